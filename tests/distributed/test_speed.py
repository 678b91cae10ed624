"""Three ranks measure their sums: right, and all ranks come to the same figures."""

import torch

from gigamil.parallel.speed import measure_all_reduce
from gigamil.testing.ranks import run_on_ranks


def test_ranks_agree_on_what_they_measure() -> None:
    first, *others = run_on_ranks(measure, 3)
    assert first["num_ranks"] == 3
    assert first["num_wrong"] == 0
    assert first["sizes"] == (8, 65536, 1048576)
    assert others == [first, first]


def measure(rank: int) -> dict[str, object]:
    return vars(measure_all_reduce(torch.device("cpu"), sizes=(8, 64 << 10, 1 << 20), budget_s=0.5))

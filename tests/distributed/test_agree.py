"""Ranks decide together: what one meets, all raise; what all meet alike keeps its type; rank 0's word is everybody's."""

import pytest
import torch

from gigamil.errors import ConfigError, GigamilError, TrainingError
from gigamil.parallel.topology import Topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.agree import Decision, agree, all_or_none, first_rank_says
from gigamil.train.engine import make_ranks

CPU = torch.device("cpu")


def _decide(rank: int, num_ranks: int) -> list[object]:
    ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
    seen: list[object] = [agree(ranks, CPU, error=None, stop=rank == 1, save=rank == 0)]
    seen.append(first_rank_says(ranks, f"from {rank}"))
    with all_or_none(ranks, CPU, first_rank_alone=True):
        pass
    with pytest.raises(TrainingError) as lost, all_or_none(ranks, CPU, first_rank_alone=True):
        if rank == 0:
            raise OSError("no space left")
    seen.append(str(lost.value))
    for error in (
        OSError("no space left") if rank == 1 else None,
        ConfigError("k must be 3"),
        ConfigError("k must be 3") if rank == 0 else ValueError("something else"),
    ):
        with pytest.raises(GigamilError) as caught, all_or_none(ranks, CPU):
            if error is not None:
                raise error
        seen.append((type(caught.value).__name__, str(caught.value), caught.value.exit_code))
    return seen


def test_all_ranks_see_the_same() -> None:
    first, second = run_on_ranks(_decide, 2, 2)
    assert first == second
    assert first == [
        Decision(stop=True, save=True),
        "from 0",
        "rank 0: OSError: no space left",
        ("TrainingError", "rank 1: OSError: no space left", 4),
        ("ConfigError", "k must be 3", 2),
        ("TrainingError", "rank 0: ConfigError: k must be 3", 2),
    ]

"""The speed of sums: what is measured, in how many rounds, and that a wrong sum is counted."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from gigamil.parallel import speed
from gigamil.parallel.speed import AllReduceSpeed, measure_all_reduce

CPU = torch.device("cpu")


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
class TestMeasuring:
    def test_each_size_is_measured_and_right(self) -> None:
        found = measure_all_reduce(CPU, sizes=(4096, 8), budget_s=0.01)
        assert (found.num_ranks, found.sizes, found.num_wrong) == (1, (8, 4096), 0)
        assert all(time_s > 0 for time_s in found.times_s)
        assert all(3 <= rounds <= 20 for rounds in found.num_rounds)

    def test_sizes_that_would_take_too_long_are_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(speed, "_time_round", lambda own_n, *_: own_n.numel() * 8 / 2**20)  # 1 s for 1 MiB
        found = measure_all_reduce(CPU, sizes=(8, 1 << 20, 2 << 20, 16 << 20), budget_s=28.0)
        assert found.sizes == (8, 1 << 20, 2 << 20)  # three rounds of 16 s do not go into 7 s
        assert found.num_rounds == (20, 7, 3)
        assert found.bytes_per_s == 2**20

    def test_wrong_sums_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lose_a_number(values: torch.Tensor, **_: object) -> None:
            if values.dim():
                values[-1] += 1

        monkeypatch.setattr(dist, "all_reduce", lose_a_number)
        assert measure_all_reduce(CPU, sizes=(8, 4096), budget_s=0.01).num_wrong == 2


def test_latency_is_of_the_smallest_and_bandwidth_of_the_largest() -> None:
    found = AllReduceSpeed(4, (8, 1000), (1e-5, 1e-4), (20, 20), 0)
    assert found.latency_s == 1e-5
    assert found.bytes_per_s == pytest.approx(1e7)
    assert found.traffic == 1.5

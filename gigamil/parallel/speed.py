"""How long a call takes on a device; how fast ranks sum over their network, and whether the sums are right."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SIZES = (8, 64 << 10, 1 << 20, 8 << 20, 64 << 20)  # bytes: from one number to the gradient of a ResNet
_MAX_ROUNDS, _MIN_ROUNDS = 20, 3
_PERIOD = 1000  # of the numbers that are summed: small, so that their sum is exact in float64 on any number of ranks


@dataclass(frozen=True)
class AllReduceSpeed:
    """What `measure_all_reduce` found; all but `num_wrong` is equal on all ranks.

    Attributes:
        num_ranks: that took part.
        sizes: bytes of the buffers that were summed, ascending.
        times_s: of each size, the median round of the slowest rank.
        num_rounds: of each size.
        num_wrong: numbers that were not the exact sum on this rank, over all sizes.
    """

    num_ranks: int
    sizes: tuple[int, ...]
    times_s: tuple[float, ...]
    num_rounds: tuple[int, ...]
    num_wrong: int

    @property
    def latency_s(self) -> float:
        """Time of the smallest sum."""
        return self.times_s[0]

    @property
    def bytes_per_s(self) -> float:
        """Bytes of the largest buffer by its time. What crosses a link is up to twice as much, see `traffic`."""
        return self.sizes[-1] / self.times_s[-1]

    @property
    def traffic(self) -> float:
        """Bytes that a rank sends for each byte of a large buffer in a ring: 2 (P - 1) / P."""
        return 2 * (self.num_ranks - 1) / self.num_ranks


def measure_all_reduce(
    device: torch.device,
    group: dist.ProcessGroup | None = None,
    *,
    sizes: Sequence[int] = SIZES,
    budget_s: float = 8.0,
) -> AllReduceSpeed:
    """Sum buffers of several sizes over the ranks of a group, a number of rounds each. A collective: all ranks call it.

    Each size is summed once to be checked, against integers that float64 holds exactly, and then timed. How often, and
    whether a size is left out because it would take too long, follows from times that the ranks agree on.

    Args:
        device: where the buffers are.
        group: None takes all ranks.
        sizes: in bytes, multiples of 8.
        budget_s: about how long it may take; the smallest size is measured in any case, in 3 rounds at least.
    Returns:
        Times of the sizes that were measured.
    Cost: about `budget_s`; three buffers of the largest size.
    """
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    share_s = budget_s / len(sizes)
    measured: dict[int, tuple[float, int]] = {}
    num_wrong, time_per_byte = 0, 0.0
    for size in sorted(sizes):
        if _MIN_ROUNDS * time_per_byte * size > share_s:
            break  # the next ones are larger still
        number_n = torch.arange(size // 8, device=device).remainder_(_PERIOD).add_(1).double()
        own_n = number_n * (rank + 1)
        sum_n = own_n.clone()
        dist.all_reduce(sum_n, group=group)  # also opens the connections, which the first sum pays for
        num_wrong += int((sum_n != number_n * (num_ranks * (num_ranks + 1) // 2)).sum())
        first_s = _slowest([_time_round(own_n, sum_n, group)], device, group)
        rounds = min(_MAX_ROUNDS, max(_MIN_ROUNDS, int(share_s / first_s)))
        time_s = _slowest([_time_round(own_n, sum_n, group) for _ in range(rounds)], device, group)
        measured[size] = (time_s, rounds)
        time_per_byte = time_s / size if size >= 1 << 20 else 0.0  # of small ones it is all latency
    times_s, num_rounds = zip(*measured.values(), strict=True)
    return AllReduceSpeed(num_ranks, tuple(measured), times_s, num_rounds, num_wrong)


def _time_round(own_n: Tensor, sum_n: Tensor, group: dist.ProcessGroup | None) -> float:
    sum_n.copy_(own_n)
    return seconds_of(lambda: dist.all_reduce(sum_n, group=group), sum_n.device)


def _slowest(times_s: Sequence[float], device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Median of this rank's times, of the rank where that is longest; equal on all."""
    median = torch.tensor(statistics.median(times_s), dtype=torch.float64, device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX, group=group)
    return max(float(median), 1e-9)  # a clock that did not move


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, with the GPU's work, and without what it still had to do before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start

"""Collectives inside the step, as autograd functions.

Who divides by what. Every rank of a group of R computes the same loss L from sums over the group, y = sum_r x_r. The
backward of the sum is again a *sum* over ranks of dL/dy, R equal terms, so rank r holds R times its own part of the
gradient of every parameter before the sum (encoder, attention), and the whole gradient of those after it (classifier).
DeepSpeed then takes the mean over all ranks: R parts, each R times too large, give the gradient; R equal copies of the
whole give it too. An identity backward, or a plain in-place all_reduce, leaves the encoder's gradient 1/R too small,
silently. Rows that move (`fetch_rows`, `heads_apart`) send their gradients back the way they came, where they are added
up: what depends on R replicated losses is R times its part before the move as after it.
"""

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigamil.models.bag import Ranges


class SumOverRanks(torch.autograd.Function):
    """y = sum over the ranks of a group; backward: the sum over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """All-reduce a copy of `values`."""
        ctx.group = group
        return _all_reduced(values, dist.ReduceOp.SUM, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """All-reduce a copy of the gradient."""
        return _all_reduced(grads[0], dist.ReduceOp.SUM, ctx.group), None


class _Route:
    """Which pieces of rows go from whom to whom: a pure function of who owns and who wants what.

    Args:
        counts: rows of each rank.
        wanted: for each rank, the ranges of pooled row numbers that it asks for.
        rank: this rank.
    Attributes:
        sends: for each rank, the ranges of own rows that it gets.
        receives: for each rank, (place among the pieces of the result, number of rows) of what comes from it.
    """

    def __init__(self, counts: Sequence[int], wanted: Sequence[Ranges], rank: int) -> None:
        starts = list(itertools.accumulate(counts, initial=0))
        first, last = starts[rank], starts[rank + 1]
        self.sends = [[(a - first, b - first) for a, b in _cut(ranges, first, last)] for ranges in wanted]
        self.receives: list[list[tuple[int, int]]] = [[] for _ in counts]
        place = 0
        for start, stop in wanted[rank]:
            while start < stop:
                owner = bisect.bisect_right(starts, start) - 1  # the last that starts here: others are empty
                rows = min(stop, starts[owner + 1]) - start
                self.receives[owner].append((place, rows))
                start, place = start + rows, place + 1
        self._sent = [sum(b - a for a, b in ranges) for ranges in self.sends]
        self._received = [sum(rows for _, rows in pieces) for pieces in self.receives]
        self._arrival = list(itertools.chain.from_iterable(self.receives))

    def forward(self, values_nX: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Rows go to those who want them."""
        pieces = [values_nX[a:b] for ranges in self.sends for a, b in ranges]
        found = _exchange(values_nX, pieces, self._sent, self._received, group)
        parts = found.split([rows for _, rows in self._arrival])
        placed = dict(zip((place for place, _ in self._arrival), parts, strict=True))
        return torch.cat([values_nX[:0], *(placed[place] for place in range(len(placed)))])

    def backward(self, grad_mX: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
        """Gradients go back, and are added up, lowest rank first."""
        parts = grad_mX.split([rows for _, rows in sorted(self._arrival)])
        pieces = [parts[place] for place, _ in self._arrival]
        found = _exchange(grad_mX, pieces, self._received, self._sent, group)
        result_nX = grad_mX.new_zeros((num_rows, *grad_mX.shape[1:]))
        start = 0
        for a, b in itertools.chain.from_iterable(self.sends):
            result_nX[a:b] += found[start : start + b - a]
            start += b - a
        return result_nX


class FetchRows(torch.autograd.Function):
    """Rows by number, from the ranks that own them; backward: gradients are added up at the owners."""

    @staticmethod
    def forward(ctx: Any, values_nX: Tensor, route: _Route, group: dist.ProcessGroup) -> Tensor:
        """Exchange rows."""
        ctx.route, ctx.group, ctx.num_rows = route, group, len(values_nX)
        return route.forward(values_nX, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Exchange gradients the other way."""
        return ctx.route.backward(grads[0], ctx.num_rows, ctx.group), None, None


class HeadsApart(torch.autograd.Function):
    """(n, H, X) -> (N, H / R, X): rows of all heads become all rows of a share of the heads; backward: the inverse."""

    @staticmethod
    def forward(ctx: Any, values_nHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
        """Exchange once."""
        ctx.route = counts, rank, group
        return _heads_apart(values_nHX, counts, rank, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Exchange back."""
        return _heads_together(grads[0], *ctx.route), None, None, None


class HeadsTogether(torch.autograd.Function):
    """(N, H / R, X) -> (n, H, X), the inverse of `HeadsApart`, which is its backward."""

    @staticmethod
    def forward(ctx: Any, values_NHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
        """Exchange once."""
        ctx.route = counts, rank, group
        return _heads_together(values_NHX, counts, rank, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Exchange back."""
        return _heads_apart(grads[0], *ctx.route), None, None, None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum equal-shaped tensors over a group; differentiable, the result is equal on all its ranks.

    Cost: one all-reduce of values' size, one more in backward. Test: distributed/test_collectives.py.
    """
    result: Tensor = SumOverRanks.apply(values, group)
    return result


def max_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise maximum over a group, detached. Cost: one all-reduce of values' size."""
    return _all_reduced(values.detach(), dist.ReduceOp.MAX, group)


def stack_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equal-shaped tensors of all ranks of a group, (R, ...), detached. Cost: one all-gather of values' size."""
    values = values.detach().contiguous()
    result = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(result, values, group=group)
    return torch.stack(result)


def fetch_rows(
    values_nX: Tensor, counts: Sequence[int], wanted: Sequence[Ranges], rank: int, group: dist.ProcessGroup
) -> Tensor:
    """Rows of any rank by pooled number; differentiable.

    Args:
        values_nX: this rank's rows, counts[rank] of them.
        counts: rows of each rank; row numbers run through them in the order of ranks.
        wanted: for each rank, the ranges (start, stop) that it asks for; may overlap; equal on all ranks.
        rank: this rank's place in the group.
    Returns:
        The rows of this rank's ranges, one after the other.
    Cost: one all-to-all of just these rows, one more in backward. Test: distributed/test_collectives.py.
    """
    result: Tensor = FetchRows.apply(values_nX, _Route(counts, wanted, rank), group)
    return result


def heads_apart(values_nHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """All rows of this rank's share of the heads; differentiable. The number of ranks divides that of heads.

    Cost: one all-to-all of this rank's values, one more in backward.
    Source: Jacobs et al. 2023 (DeepSpeed-Ulysses), arXiv:2309.14509.
    """
    result: Tensor = HeadsApart.apply(values_nHX, counts, rank, group)
    return result


def heads_together(values_NHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of all heads; the inverse of `heads_apart`, at the same cost."""
    result: Tensor = HeadsTogether.apply(values_NHX, counts, rank, group)
    return result


def _heads_apart(values_nHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    size = len(counts)
    shares = list(values_nHX.chunk(size, dim=1))
    return _exchange(shares[0], shares, [counts[rank]] * size, list(counts), group)


def _heads_together(values_NHX: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup) -> Tensor:
    size = len(counts)
    found = _exchange(values_NHX, [values_NHX], list(counts), [counts[rank]] * size, group)
    return found.unflatten(0, (size, counts[rank])).transpose(0, 1).flatten(1, 2)


def _exchange(
    like: Tensor, pieces: Sequence[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all of rows: `pieces` in the order of their receivers -> rows in the order of their senders."""
    send = torch.cat([like[:0], *pieces]).contiguous()
    result = like.new_empty((sum(received), *like.shape[1:]))
    dist.all_to_all_single(result, send, received, sent, group=group)
    return result


def _cut(ranges: Ranges, first: int, last: int) -> list[tuple[int, int]]:
    """The parts of the ranges that lie in first..last - 1."""
    parts = [(max(start, first), min(stop, last)) for start, stop in ranges]
    return [(start, stop) for start, stop in parts if start < stop]


def _all_reduced(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    result = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation, group=group)
    return result

"""The pool of a bag whose tiles lie on several ranks."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from gigamil.models.bag import Ranges
from gigamil.parallel.collectives import (
    fetch_rows,
    heads_apart,
    heads_together,
    max_over_ranks,
    stack_ranks,
    sum_over_ranks,
)


class GroupPool:
    """`gigamil.models.bag.Pool` over the ranks of a group: each call is one collective.

    Args:
        group: ranks that pool together.
        counts: tiles of each of them; may be 0.
        rank: this rank's place in the group.
    """

    def __init__(self, group: dist.ProcessGroup, counts: Sequence[int], rank: int) -> None:
        self.counts = tuple(counts)
        self.rank = rank
        self._group = group

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, equal on all. Cost: one all-reduce, and one in backward."""
        return sum_over_ranks(values, self._group)

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks, equal on all; detached. Cost: one all-reduce."""
        return max_over_ranks(values, self._group)

    def stack(self, values: Tensor) -> Tensor:
        """The equal-shaped tensors of all ranks, (R, ...); detached. Cost: one all-gather."""
        return stack_ranks(values, self._group)

    def fetch(self, values_nX: Tensor, wanted: Sequence[Ranges]) -> Tensor:
        """Rows of any rank by pooled number. Cost: one all-to-all of these rows, and one in backward."""
        return fetch_rows(values_nX, self.counts, wanted, self.rank, self._group)

    def heads_apart(self, values_nHX: Tensor) -> Tensor:
        """All rows of this rank's share of the heads. Cost: one all-to-all of the values, and one in backward."""
        return heads_apart(values_nHX, self.counts, self.rank, self._group)

    def heads_together(self, values_NHX: Tensor) -> Tensor:
        """The inverse of `heads_apart`, at the same cost."""
        return heads_together(values_NHX, self.counts, self.rank, self._group)

    def repartitioned(self, counts: Sequence[int]) -> "GroupPool":
        """The same ranks with other rows."""
        return GroupPool(self._group, counts, self.rank)

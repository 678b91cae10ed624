"""The pool of a bag whose tiles lie on several ranks."""

import torch.distributed as dist
from torch import Tensor

from gigamil.models.bag import LocalPool
from gigamil.parallel.collectives import max_over_ranks, sum_over_ranks


class GroupPool:
    """`LocalPool` on each rank's tiles, then one collective: the same result on every rank of the group.

    A rank without tiles takes part with the identities (-inf, 0), so the number of collectives depends on nothing
    local.

    Args:
        group: ranks that pool together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._local = LocalPool()

    def segment_max(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Maximum per slide, (B, X), detached. Cost: one all-reduce of B X numbers."""
        return max_over_ranks(self._local.segment_max(values_nX, slide_index_n, num_slides), self._group)

    def segment_sum(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Sum per slide, (B, X). Cost: one all-reduce of B X numbers, and one in backward."""
        return sum_over_ranks(self._local.segment_sum(values_nX, slide_index_n, num_slides), self._group)

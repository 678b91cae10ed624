"""The bag that an aggregator sees, and how segments of it are pooled.

Shapes: n tiles on this rank, B slides of the step, D embedding, A attention heads.
A model never knows of ranks: it asks `bag.pool`, which is `LocalPool` in one process and a collective one over ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Pool(Protocol):
    """Reductions over all tiles of each slide, whoever owns them; every rank of the group gets the same result."""

    def segment_max(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Maximum per slide, (B, X), detached; -inf where a slide has no tile."""
        ...

    def segment_sum(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Sum per slide, (B, X). Backward: each rank receives the gradient of its own n rows."""
        ...


class LocalPool:
    """One process holds every tile: the reference for every distributed test."""

    def segment_max(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Maximum per slide, (B, X), detached; -inf where a slide has no tile."""
        values_nX = values_nX.detach()
        start_BX = values_nX.new_full((num_slides, *values_nX.shape[1:]), -torch.inf)
        index_nX = slide_index_n[:, None].expand_as(values_nX)
        return start_BX.scatter_reduce(0, index_nX, values_nX, reduce="amax")

    def segment_sum(self, values_nX: Tensor, slide_index_n: Tensor, num_slides: int) -> Tensor:
        """Sum per slide, (B, X)."""
        start_BX = values_nX.new_zeros((num_slides, *values_nX.shape[1:]))
        return start_BX.index_add(0, slide_index_n, values_nX)


@dataclass
class Bag:
    """The instances of a step's slides that this rank owns.

    Attributes:
        embedding_nD: encoder output.
        slide_index_n: int64, the slide of each tile, in 0..num_slides - 1.
        position_n2: float64, (x, y) of each tile's top-left corner in micron from the slide's origin.
        num_slides: B, equal on every rank of the group.
        tile_key_n: int64 keys of (seed, step, slide, tile), for dropout on tiles; None outside training.
        slide_key_B: int64 keys of (seed, step, slide), equal on every rank, for dropout after pooling; None likewise.
        pool: how segments are reduced.
    """

    embedding_nD: Tensor
    slide_index_n: Tensor
    position_n2: Tensor
    num_slides: int
    tile_key_n: Tensor | None
    slide_key_B: Tensor | None
    pool: Pool


def softmax_pool(logit_nA: Tensor, value_nD: Tensor, bag: Bag) -> tuple[Tensor, Tensor]:
    """Pool each slide's values with a softmax over all its tiles, wherever they are.

    Args:
        logit_nA: unnormalised attention of this rank's tiles; n may be 0 and may differ between ranks.
        value_nD: what is averaged. Both are taken to float32 if they are narrower.
        bag: tells which tile belongs to which slide.
    Returns:
        Pooled values (B, A, D), equal on all ranks, and attention (n, A), which sums to 1 over a slide's tiles.
    Cost: one max all-reduce of B A numbers, one sum all-reduce of B A (D + 1); one sum of that size in backward.
    Source: Ilse et al. 2018, arXiv:1802.04712; running max, Milakov & Gimelshein 2018, arXiv:1805.02867.
        Test: distributed/test_step.py.
    """
    dtype = torch.promote_types(value_nD.dtype, torch.float32)
    logit_nA, value_nD = logit_nA.to(dtype), value_nD.to(dtype)
    index_n, num_slides = bag.slide_index_n, bag.num_slides
    # softmax(l) h = sum(e h) / sum(e) with e = exp(l - m). Any m cancels, so the maximum is detached and the gradient
    # is still exact; a slide without tiles would give 0 / 0, and is refused before a step is planned.
    shift_BA = bag.pool.segment_max(logit_nA, index_n, num_slides)
    weight_nA = torch.exp(logit_nA - shift_BA[index_n])
    weighted_nAD = weight_nA[:, :, None] * value_nD[:, None, :]
    num_heads, width = weighted_nAD.shape[1:]
    packed_nX = torch.cat([weight_nA, weighted_nAD.flatten(1)], dim=1)
    total_BX = bag.pool.segment_sum(packed_nX, index_n, num_slides)
    norm_BA = total_BX[:, :num_heads]
    pooled_BAD = total_BX[:, num_heads:].view(num_slides, num_heads, width) / norm_BA[:, :, None]
    return pooled_BAD, weight_nA / norm_BA[index_n]

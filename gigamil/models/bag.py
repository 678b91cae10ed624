"""The bag that an aggregator sees, and the reductions over a slide's tiles that it is made of.

Shapes: n tiles on this rank, N tiles of the group, B slides of the step, D embedding, A attention heads, K classes, G
segments, k best tiles. A model never knows of ranks: everything that looks at more than one tile goes through the bag,
which reduces what it holds and leaves the rest to its pool (`LocalPool` in one process, a collective one over ranks).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Ranges = Sequence[tuple[int, int]]


class Pool(Protocol):
    """What crosses ranks. All ranks of a group make the same calls in the same order, ranks without tiles too.

    Attributes:
        counts: tiles of each rank of the group; rank r owns the run of pooled tile numbers after those before it.
        rank: this rank's place in the group.
    """

    counts: tuple[int, ...]
    rank: int

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, equal on all. Backward: the same sum of the gradients."""
        ...

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks, equal on all; detached."""
        ...

    def stack(self, values: Tensor) -> Tensor:
        """The equal-shaped tensors of all ranks, (R, ...); detached."""
        ...

    def fetch(self, values_nX: Tensor, wanted: Sequence[Ranges]) -> Tensor:
        """Rows of any rank by pooled number. Backward: each row's gradient is added up where the row came from.

        Args:
            values_nX: this rank's rows.
            wanted: for each rank, the ranges (start, stop) of pooled numbers that it asks for; equal on all ranks.
        Returns:
            The rows of this rank's ranges, one after the other.
        """
        ...

    def heads_apart(self, values_nHX: Tensor) -> Tensor:
        """All rows of this rank's share of the heads, (N, H / R, X), from its rows of all heads (n, H, X).

        The number of ranks divides that of heads.
        """
        ...

    def heads_together(self, values_NHX: Tensor) -> Tensor:
        """The inverse of `heads_apart`."""
        ...

    def repartitioned(self, counts: Sequence[int]) -> "Pool":
        """The same ranks with other rows, for example the tokens that an aggregator makes of the tiles."""
        ...


class LocalPool:
    """One process holds every tile: the reference for every distributed test.

    Args:
        num_tiles: N.
    """

    def __init__(self, num_tiles: int) -> None:
        self.counts: tuple[int, ...] = (num_tiles,)
        self.rank = 0

    def sum(self, values: Tensor) -> Tensor:
        """The values."""
        return values

    def max(self, values: Tensor) -> Tensor:
        """The values, detached."""
        return values.detach()

    def stack(self, values: Tensor) -> Tensor:
        """The values in a row of one, detached."""
        return values.detach()[None]

    def fetch(self, values_nX: Tensor, wanted: Sequence[Ranges]) -> Tensor:
        """The rows of the ranges, one after the other."""
        return torch.cat([values_nX[:0], *(values_nX[start:stop] for start, stop in wanted[0])])

    def heads_apart(self, values_nHX: Tensor) -> Tensor:
        """The values."""
        return values_nHX

    def heads_together(self, values_NHX: Tensor) -> Tensor:
        """The values."""
        return values_NHX

    def repartitioned(self, counts: Sequence[int]) -> "LocalPool":
        """One process holds all these rows too."""
        return LocalPool(sum(counts))


@dataclass
class Bag:
    """The instances of a step's slides that this rank owns: a run of the group's pooled tiles, slide after slide.

    Attributes:
        embedding_nD: encoder output.
        position_n2: float64, (x, y) of each tile's top-left corner in micron from the slide's origin.
        sizes: tiles of each slide over all ranks; equal on every rank of the group.
        pool: what crosses ranks.
        tile_key_n: int64 keys of (seed, step, slide, tile), for dropout on tiles; None outside training.
        slide_key_B: int64 keys of (seed, step, slide), equal on every rank, for draws per slide; None likewise.
        label_B: labels in training, for aggregators with a loss of their own; None otherwise.
    """

    embedding_nD: Tensor
    position_n2: Tensor
    sizes: tuple[int, ...]
    pool: Pool
    tile_key_n: Tensor | None = None
    slide_key_B: Tensor | None = None
    label_B: Tensor | None = None

    def __post_init__(self) -> None:
        found = (len(self.embedding_nD), sum(self.sizes))
        if found != (self.pool.counts[self.pool.rank], sum(self.pool.counts)):
            raise ValueError(f"{found[0]} of {found[1]} tiles do not fit a pool of {self.pool.counts} tiles per rank")
        sizes = torch.tensor([stop - start for start, stop in self.runs()], dtype=torch.int64)
        # On the CPU first: repeat_interleave on a GPU would wait for it, to learn the length of the result.
        index_n = torch.repeat_interleave(torch.arange(self.num_slides), sizes, output_size=len(self.embedding_nD))
        self.slide_index_n = index_n.to(self.embedding_nD.device, non_blocking=True)

    @property
    def num_slides(self) -> int:
        """B."""
        return len(self.sizes)

    @property
    def first(self) -> int:
        """Pooled number of this rank's first tile."""
        return sum(self.pool.counts[: self.pool.rank])

    @property
    def offsets(self) -> tuple[int, ...]:
        """Pooled number of each slide's first tile."""
        return tuple(itertools.accumulate(self.sizes, initial=0))[:-1]

    def runs(self) -> list[tuple[int, int]]:
        """For each slide, this rank's rows (start, stop) of it; start = stop where it owns none."""
        last = len(self.embedding_nD)
        bounds = [
            (offset - self.first, offset - self.first + size)
            for offset, size in zip(self.offsets, self.sizes, strict=True)
        ]
        return [(min(max(start, 0), last), min(max(stop, 0), last)) for start, stop in bounds]

    def segment_max(
        self, values_nX: Tensor, segment_n: Tensor | None = None, num_segments: int | None = None
    ) -> Tensor:
        """Maximum per segment over all ranks, (G, X), detached; -inf where a segment has no tile.

        Args:
            values_nX: a row per tile of this rank.
            segment_n, num_segments: of each tile, and G; both None: its slide, and B.
        Raises:
            ValueError: only one of them is given.
        Cost: one all-reduce of G X numbers.
        """
        segment_n, num_segments = self._segments(segment_n, num_segments)
        values_nX = values_nX.detach()
        start_GX = values_nX.new_full((num_segments, *values_nX.shape[1:]), -torch.inf)
        index_nX = segment_n.view(-1, *[1] * (values_nX.dim() - 1)).expand_as(values_nX)
        return self.pool.max(start_GX.scatter_reduce(0, index_nX, values_nX, reduce="amax"))

    def segment_sum(
        self, values_nX: Tensor, segment_n: Tensor | None = None, num_segments: int | None = None
    ) -> Tensor:
        """Sum per segment over all ranks, (G, X). Backward: each rank receives the gradient of its own rows.

        Args:
            values_nX: a row per tile of this rank.
            segment_n, num_segments: of each tile, and G; both None: its slide, and B.
        Raises:
            ValueError: only one of them is given.
        Cost: one all-reduce of G X numbers, and one in backward.
        """
        index_n, num_segments = self._segments(segment_n, num_segments)
        if segment_n is None:  # rows of a slide lie together: pairwise sums lose less
            return self.pool.sum(torch.stack([values_nX[start:stop].sum(0) for start, stop in self.runs()]))
        start_GX = values_nX.new_zeros((num_segments, *values_nX.shape[1:]))
        return self.pool.sum(start_GX.index_add(0, index_n, values_nX))

    def segment_mean(self, values_nX: Tensor) -> Tensor:
        """Mean per slide, (B, X). Cost: as `segment_sum`."""
        size_B1 = torch.tensor(self.sizes, dtype=values_nX.dtype).to(values_nX.device, non_blocking=True)[:, None]
        return self.segment_sum(values_nX) / size_B1

    def segment_softmax(self, score_nX: Tensor) -> Tensor:
        """Softmax over the tiles of each slide, (n, X).

        Cost: one max and one sum all-reduce of B X numbers, and one in backward.
        """
        score_nX = _wide(score_nX)
        weight_nX = torch.exp(score_nX - self.segment_max(score_nX)[self.slide_index_n])
        return weight_nX / self.segment_sum(weight_nX)[self.slide_index_n]

    def top(self, score_nX: Tensor, k: int) -> Tensor:
        """Pooled numbers of the k highest scores of each slide, int64 (B, k, X), equal on all ranks.

        Highest first; equal scores in the order of tile numbers; -1 where a slide has fewer than k tiles. For the
        lowest scores give their negative.

        Cost: one all-gather of 2 B k X float64 numbers. Test: distributed/test_collectives.py.
        """
        score_nX = score_nX.detach().double()
        best_2BkX = score_nX.new_full((2, self.num_slides, k, score_nX.shape[1]), -torch.inf)
        best_2BkX[1] = -1
        for slide, (start, stop) in enumerate(self.runs()):
            # A stable sort, not torch.topk, which leaves the order of equals open.
            order_kX = torch.argsort(score_nX[start:stop], dim=0, descending=True, stable=True)[:k]
            best_2BkX[0, slide, : len(order_kX)] = score_nX[start:stop].gather(0, order_kX)
            best_2BkX[1, slide, : len(order_kX)] = order_kX + (self.first + start)
        found_R2BkX = self.pool.stack(best_2BkX)
        score_BMX, number_BMX = found_R2BkX.permute(1, 2, 0, 3, 4).flatten(2, 3)
        # Ranks lie in the order of their tiles, so a stable sort of all their best keeps the order of equals too.
        order_BkX = torch.argsort(score_BMX, dim=1, descending=True, stable=True)[:, :k]
        return number_BMX.gather(1, order_BkX).long()

    def pick(self, values_nX: Tensor, number_M: Tensor) -> Tensor:
        """Rows by pooled tile number, (M, X), from the rank that owns each to all; zeros for number -1.

        Args:
            values_nX: a row per tile of this rank.
            number_M: int64, equal on all ranks (as `top` gives it).
        Backward: the owner receives the gradient of its row.
        Cost: one all-reduce of M X numbers, and one in backward.
        """
        padded_nX = torch.cat([values_nX, values_nX.new_zeros((1, *values_nX.shape[1:]))])
        return self.pool.sum(padded_nX[self.own_rows(number_M)])

    def own_rows(self, number_X: Tensor) -> Tensor:
        """Rows of this rank by pooled tile number, int64 (X,); n, one behind the last, for tiles that it does not own."""
        num_own = len(self.embedding_nD)
        is_own_X = (number_X >= self.first) & (number_X < self.first + num_own)
        return torch.where(is_own_X, number_X - self.first, num_own)

    def gather(self, values_nX: Tensor) -> Tensor:
        """The rows of all tiles of the group in pooled order, (N, X), on every rank.

        Backward: each rank receives the gradient of its own rows, added up over ranks.
        Cost: n X (R - 1) numbers sent by each rank, as many received in backward.
        """
        everything = [(0, sum(self.pool.counts))]
        return self.pool.fetch(values_nX, [everything] * len(self.pool.counts))

    def _segments(self, segment_n: Tensor | None, num_segments: int | None) -> tuple[Tensor, int]:
        if segment_n is None and num_segments is None:
            return self.slide_index_n, self.num_slides
        if segment_n is None or num_segments is None:
            raise ValueError("segment_n and num_segments go together: give both, or neither for slides")
        return segment_n, num_segments


class Pooled(NamedTuple):
    """What an aggregator makes of a bag. A tuple, because DeepSpeed looks for the tensors in it.

    The loss of a slide is `weight` x loss(logits, label), plus the weighted losses of the extra logits, plus `loss_B`.

    Attributes:
        slide_BX: slide embedding, or the logits (B, K) of an aggregator with its own classifier; equal on all ranks.
        attention_nA: of this rank's tiles, not negative, sums to 1 over a slide's tiles; None if there are scores.
        score_nA: in place of attention: how much each tile speaks for a class or a head, on any scale.
        per_class: columns of attention or scores are classes, not heads.
        weight: of the loss of the slide's logits.
        extra_logits_MK: further logits that learn from the labels of slides (instances, pseudo-bags).
        extra_slide_M: int64, the slide of each.
        extra_weight_M: the weight of the loss of each.
        loss_B: further loss of each slide, weighted already; only with labels.
    """

    slide_BX: Tensor
    attention_nA: Tensor | None = None
    score_nA: Tensor | None = None
    per_class: bool = False
    weight: float = 1.0
    extra_logits_MK: Tensor | None = None
    extra_slide_M: Tensor | None = None
    extra_weight_M: Tensor | None = None
    loss_B: Tensor | None = None


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
    logit_nA, value_nD = _wide(logit_nA), _wide(value_nD)
    # softmax(l) h = sum(e h) / sum(e) with e = exp(l - m). Any m cancels, so the maximum is detached and the gradient
    # is still exact; a slide without tiles would give 0 / 0, and is refused before a step is planned.
    shift_BA = bag.segment_max(logit_nA)
    weight_nA = torch.exp(logit_nA - shift_BA[bag.slide_index_n])
    # A product of matrices per slide: no (n, A, D) intermediate.
    weighted_BAD = torch.stack([weight_nA[start:stop].T @ value_nD[start:stop] for start, stop in bag.runs()])
    norm_BA = torch.stack([weight_nA[start:stop].sum(0) for start, stop in bag.runs()])
    total_BAX = bag.pool.sum(torch.cat([weighted_BAD, norm_BA[:, :, None]], dim=2))
    norm_BA = total_BAX[:, :, -1]
    return total_BAX[:, :, :-1] / norm_BA[:, :, None], weight_nA / norm_BA[bag.slide_index_n]


def _wide(values: Tensor) -> Tensor:
    """float32 or wider: softmax statistics and sums over tiles lose too much in bfloat16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

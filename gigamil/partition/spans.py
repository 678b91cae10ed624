"""Who owns which tiles of a step: pure integers.

The tiles of a group's slides are laid end to end, and rank r of R owns the run [T r // R, T (r + 1) // R) of the T
tiles. So ranks differ by one tile at most, whatever the slide sizes; a rank may own none, or parts of several slides.

Ranks that are not equally fast may be given shares w_r: rank r then owns [T W_r // W_R, T W_(r+1) // W_R), with W_r the sum
of the shares before it. Equal shares give the runs above, to the tile.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A contiguous run of one slide's tiles, in stored (Hilbert) order: a compact region of tissue.

    Attributes:
        slide: position of the slide in the group's list.
        start, stop: first tile number and one past the last.
    """

    slide: int
    start: int
    stop: int

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return self.stop - self.start


def owned_range(num_items: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The contiguous run of `num_items` that `rank` owns: [N r // R, N (r + 1) // R)."""
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank {rank} is not in 0..{num_ranks - 1}")
    return num_items * rank // num_ranks, num_items * (rank + 1) // num_ranks


def shared_bounds(num_items: int, shares: Sequence[int]) -> tuple[int, ...]:
    """R + 1 cuts of `num_items` in proportion to the shares of R ranks: rank r owns [cuts[r], cuts[r + 1]).

    A rank's run differs from its exact share by less than one item; a share of 0 owns nothing.

    Raises:
        ValueError: a share is negative, or all are 0.
    """
    if not shares or min(shares) < 0 or not sum(shares):
        raise ValueError(f"shares {list(shares)} of the ranks must not be negative, and not all 0")
    total = sum(shares)
    return tuple(num_items * before // total for before in itertools.accumulate(shares, initial=0))


def owned_spans(
    slide_sizes: Sequence[int], rank: int, num_ranks: int, shares: Sequence[int] | None = None
) -> tuple[Span, ...]:
    """The spans of pooled tiles that a rank of a group owns, in order; empty if it owns none.

    Args:
        slide_sizes: tiles of each slide of the group.
        rank, num_ranks: position inside the group and the group's size.
        shares: of each rank of the group; None: equal ones.
    """
    if shares is None:
        begin, end = owned_range(sum(slide_sizes), rank, num_ranks)
    else:
        begin, end = shared_bounds(sum(slide_sizes), shares)[rank : rank + 2]
    spans, offset = [], 0
    for slide, size in enumerate(slide_sizes):
        start, stop = max(begin - offset, 0), min(end - offset, size)
        if start < stop:
            spans.append(Span(slide, start, stop))
        offset += size
    return tuple(spans)


def chunk_ranges(num_tiles: int, chunk: int) -> tuple[tuple[int, int], ...]:
    """Cut a rank's tiles into encoder calls of at most `chunk` tiles; no tiles give no call."""
    return tuple((start, min(start + chunk, num_tiles)) for start in range(0, num_tiles, chunk))

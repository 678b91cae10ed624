"""Parts of slides that ranks own, and rows beyond them: for aggregators whose tiles look at each other.

Shapes: n rows on this rank, X any.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from gigamil.models.bag import Bag, Pool


class Span(NamedTuple):
    """Rows of one slide, counted from its first: start .. stop - 1."""

    slide: int
    start: int
    stop: int


def spans_by_rank(pool: Pool, sizes: Sequence[int]) -> list[list[Span]]:
    """For each rank, the parts of slides that its run of the pooled rows is made of."""
    ends = list(itertools.accumulate(pool.counts))
    spans: list[list[Span]] = [[] for _ in pool.counts]
    for slide, (first, stop) in enumerate(itertools.pairwise(itertools.accumulate(sizes, initial=0))):
        start = first
        while start < stop:
            rank = bisect.bisect_right(ends, start)
            end = min(ends[rank], stop)
            spans[rank].append(Span(slide, start - first, end - first))
            start = end
    return spans


def fetch_windows(
    values_nX: Tensor, bag: Bag, window: Callable[[int, int, int], tuple[int, int]]
) -> tuple[list[Span], Tensor, Sequence[Tensor]]:
    """What this rank needs of each slide's values, its own and beyond.

    Args:
        values_nX: of this rank's tiles or tokens.
        window: (slide, start, stop) -> the first row that this span needs and one past the last.
    Returns:
        This rank's spans, no row (but in the graph of the exchange on a rank without spans too), a window per span.
    Cost: one all-to-all, and one in backward.
    """
    spans, offsets = spans_by_rank(bag.pool, bag.sizes), bag.offsets
    windows = [[(offsets[span.slide], *window(*span)) for span in one_rank] for one_rank in spans]
    wanted = [[(offset + low, offset + high) for offset, low, high in one_rank] for one_rank in windows]
    found_wX = bag.pool.fetch(values_nX, wanted)
    rank = bag.pool.rank
    return spans[rank], found_wX[:0], found_wX.split([high - low for _, low, high in windows[rank]])


def fetch_slides(values_nX: Tensor, bag: Bag) -> tuple[list[Span], Tensor, Sequence[Tensor]]:
    """As `fetch_windows`, with all rows of each span's slide."""
    return fetch_windows(values_nX, bag, lambda slide, _start, _stop: (0, bag.sizes[slide]))

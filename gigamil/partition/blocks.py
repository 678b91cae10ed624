"""Encoder calls of a dense encoder: runs of a slide's tiles that lie in one square of its grid. Pure integers.

Tiles are stored along the Hilbert curve, which fills an aligned square of 2^j x 2^j cells before it leaves it. So the
tiles of such a square are one run in stored order, and a rank's span of tiles is a list of squares, of which the first
and the last may be shared with its neighbours. Test: partition/test_blocks.py
"""

import itertools
import math

import numpy as np


def block_side(chunk: int) -> int:
    """Cells along the side of the largest square of a power of two that holds at most `chunk` cells."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: a call has at least one tile")
    return 1 << (math.isqrt(chunk).bit_length() - 1)


def block_ranges(slide_n: np.ndarray, cell_n2: np.ndarray, chunk: int) -> tuple[tuple[int, int], ...]:
    """Cut a rank's tiles into encoder calls: rows [start, stop) of one slide that lie in one square.

    Args:
        slide_n: which slide each tile belongs to.
        cell_n2: int64, (row, column) of each tile in the grid of its slide.
        chunk: largest number of tiles of a call.
    Returns:
        Ranges in row order that cover all tiles; none of no tiles.
    """
    if not len(slide_n):
        return ()
    square_n3 = np.column_stack([slide_n, cell_n2 // block_side(chunk)])
    begins = np.flatnonzero((square_n3[1:] != square_n3[:-1]).any(axis=1)) + 1
    bounds = [0, *begins.tolist(), len(slide_n)]
    return tuple(itertools.pairwise(bounds))

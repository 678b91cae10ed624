"""The Hilbert curve: neighbours along it are neighbours in the plane, so a contiguous run of tiles is a compact region.

That is the spatial decomposition of a slide (docs/decisions.md): tiles are stored along the curve once, and every
number of ranks then cuts the same order into runs.
"""

import numpy as np

_MAX_ORDER = 31  # 2 * 31 bits fit an int64


def hilbert_index(x: np.ndarray, y: np.ndarray, order: int) -> np.ndarray:
    """Position along the Hilbert curve of a 2**order x 2**order square.

    Args:
        x, y: integer columns and rows of equal shape, each in [0, 2**order).
        order: number of halvings, 0..31.
    Returns:
        int64 of the same shape, a bijection onto [0, 4**order); cells of consecutive positions share an edge.
    Raises:
        ValueError: an order or a cell outside these ranges.
    Cost: `order` passes over the arrays.
    Source: Skilling 2004, AIP Conf. Proc. 707:381, in the two-dimensional form of Warren, Hacker's Delight, ch. 16.
    """
    if not 0 <= order <= _MAX_ORDER:
        raise ValueError(f"order={order} is not in 0..{_MAX_ORDER}")
    x, y = np.asarray(x, dtype=np.int64).copy(), np.asarray(y, dtype=np.int64).copy()
    if x.shape != y.shape:
        raise ValueError(f"x has shape {x.shape} and y {y.shape}")
    if x.size and (min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= 1 << order):
        raise ValueError(f"a cell lies outside the {1 << order} x {1 << order} square of order {order}")
    index = np.zeros_like(x)
    for bit in reversed(range(order)):
        side = np.int64(1 << bit)
        right, lower = (x & side) > 0, (y & side) > 0
        index += side * side * ((3 * right) ^ lower)
        # Enter the quadrant: its own curve is the parent's, mirrored at a diagonal unless it is one of the lower two.
        flip = ~lower & right
        x[flip], y[flip] = side - 1 - (x[flip] & (side - 1)), side - 1 - (y[flip] & (side - 1))
        x[~lower], y[~lower] = y[~lower], x[~lower]
        x &= side - 1
        y &= side - 1
    return index


def hilbert_sort(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The permutation that puts grid cells along the smallest Hilbert curve that holds them.

    Args:
        column, row: integer arrays (N,), non-negative.
    Returns:
        int64 (N,): `column[result], row[result]` are in curve order; equal cells keep their order.
    """
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    largest = int(max(np.max(column), np.max(row)))
    return np.argsort(hilbert_index(column, row, largest.bit_length()), kind="stable")

"""Some tiles of a slide, drawn anew in each step: pure functions of a key, so that all ranks draw the same."""

from collections.abc import Sequence

import numpy as np

from gigamil.config.schema import Regime
from gigamil.keyed import text_key

_REACHES = (0, 1, 2, 4)  # tiles from the middle of a region to its border: 1, 3, 5 and 9 on a side


def sampled_sizes(regime: Regime, sizes: Sequence[int]) -> tuple[int, ...]:
    """Tiles of each slide in a step."""
    return tuple(min(size, regime.tiles) for size in sizes) if regime.name in ("sampled", "taught") else tuple(sizes)


def uniform_tiles(num_tiles: int, count: int, key: str) -> np.ndarray:
    """Numbers of so many tiles, ascending int64 (min(count, num_tiles),); each set of them is equally likely.

    Args:
        key: of the draw, for example seed, step and slide.
    """
    if count >= num_tiles:
        return np.arange(num_tiles, dtype=np.int64)
    return np.sort(_generator(key).choice(num_tiles, count, replace=False, shuffle=False)).astype(np.int64)


def region_tiles(x_um_N: np.ndarray, y_um_N: np.ndarray, tile_um: float, count: int, key: str) -> np.ndarray:
    """Numbers of tiles in square regions of 1, 3, 5 and 9 tiles on a side, in turn, until there are so many.

    Regions lie around tiles that are drawn; what of them is no tissue is left out. So single tiles from everywhere come with
    neighbourhoods, which tiles drawn one by one hardly ever have.

    Args:
        x_um_N, y_um_N: corners of all tiles.
        tile_um: distance of neighbours.
        count, key: as of `uniform_tiles`.
    """
    num_tiles = len(x_um_N)
    if count >= num_tiles:
        return np.arange(num_tiles, dtype=np.int64)
    generator = _generator(key)
    taken_N, left = np.zeros(num_tiles, dtype=bool), count
    for turn, centre in enumerate(generator.permutation(num_tiles)):
        if left == 0:
            break
        reach_um = (_REACHES[turn % len(_REACHES)] + 0.25) * tile_um  # corners are rounded to pixels
        away_N = np.maximum(np.abs(x_um_N - x_um_N[centre]), np.abs(y_um_N - y_um_N[centre]))
        region = np.flatnonzero((away_N < reach_um) & ~taken_N)
        region = region[np.argsort(away_N[region], kind="stable")][:left]
        taken_N[region] = True
        left -= len(region)
    return np.flatnonzero(taken_N).astype(np.int64)


def _generator(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=text_key(key) % 2**64))

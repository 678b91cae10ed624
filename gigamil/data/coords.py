"""Coordinates of tiles, to and from TRIDENT and CLAM: `gigamil export-coords`, and tiles at given positions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np

from gigamil.data.h5 import Attribute, Coords, read_coords, trident_attributes, write_coords
from gigamil.errors import CohortError, ShardError, SlideError
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.read import ShardSet
from gigamil.slides.reader import SlideInfo

Layout = Literal["trident", "clam"]

# Other tools round the side of a tile to whole level-0 pixels, and magnifications to whole numbers.
SIZE_TOLERANCE = 0.02


def export_coords(shards: ShardSet, folder: Path, layout: Layout, slide_ids: Iterable[str] | None = None) -> list[Path]:
    """Write the coordinates of tiled slides as the files that TRIDENT or CLAM extract features from.

    TRIDENT looks for `<job>/<coords>/patches/<slide>_patches.h5`, CLAM for `<dir>/patches/<slide>.h5`: `folder` is what
    holds `patches`.

    Args:
        slide_ids: default: every slide that has tiles.
    Returns:
        The files, in the order of the slides. Coordinates are in stored order, rounded to level-0 pixels.
    Raises:
        CohortError: a layout of another name.
        ShardError: a slide has no shards.
        EnvironmentFault, OSError: as `write_coords`.
    """
    if layout not in ("trident", "clam"):
        raise CohortError(f"layout '{layout}' is unknown; choose trident or clam")
    attributes = trident_attributes if layout == "trident" else clam_attributes
    name = "{}_patches.h5" if layout == "trident" else "{}.h5"
    written = []
    for slide_id in shards.slide_ids if slide_ids is None else slide_ids:
        index = shards.index(slide_id)
        path = folder / "patches" / name.format(slide_id)
        write_coords(path, np.stack([index.x_px0, index.y_px0], axis=1), attributes(shards.manifest(slide_id)))
        written.append(path)
    return written


def clam_attributes(manifest: SlideManifest) -> dict[str, Attribute]:
    """What CLAM reads beside the coordinates of a slide: patches of level 0, in whole pixels.

    CLAM resizes them to its `--target_patch_size`, which is to be `tile_px`.
    """
    size = (float(manifest.width_px0), float(manifest.height_px0))
    return {
        "name": manifest.slide_id,
        "patch_size": round(manifest.tile_px * manifest.pixel_mpp_x / manifest.mpp_x),
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "level_dim": size,
        "downsampled_level_dim": size,
    }


def read_positions(path: Path, info: SlideInfo, tile_px: int, tile_mpp: float) -> np.ndarray:
    """Read coordinates as the positions at which a slide is to be tiled.

    Args:
        path: in the layout of TRIDENT or CLAM.
        info: of the slide; the file must be about a slide of this size.
        tile_px, tile_mpp: the tiles that are configured, which must have the size that the file says, to 2 %.
    Returns:
        int64 (N, 2), top left corners (x, y) in level-0 pixels, in the order of the file; N may be 0.
    Raises:
        SlideError: the file is damaged, is of another slide or of tiles of another size or an unknown one, or has
            positions that lie outside the slide or occur twice. Names slide and file.
    """
    try:
        coords = read_coords(path)
    except ShardError as error:
        raise SlideError(f"slide '{info.path}': {error}") from error
    problem = _problem(coords, info, tile_px * tile_mpp)
    if problem:
        raise SlideError(f"slide '{info.path}': '{path}' {problem}")
    return coords.coords_N2_px0


def _problem(coords: Coords, info: SlideInfo, tile_um: float) -> str:
    """Why coordinates are not those of this slide and these tiles; empty if they are."""
    said = tuple(coords.attrs.get(name) for name in ("level0_width", "level0_height"))
    if None not in said and said != (info.width, info.height):
        return f"is of a slide of {said[0]} x {said[1]} pixels; this one has {info.width} x {info.height}"
    if coords.size_px0 is None:
        return (
            "does not say how large a tile is: 'coords' has neither patch_size_level0 (TRIDENT) nor patch_size and "
            "downsample (CLAM)"
        )
    size_um = (coords.size_px0[0] * info.mpp_x, coords.size_px0[1] * info.mpp_y)
    if max(abs(side / tile_um - 1) for side in size_um) > SIZE_TOLERANCE:
        return (
            f"has tiles of {size_um[0]:.4g} x {size_um[1]:.4g} um, configured are {tile_um:.4g} um: set "
            "slides.tile_px and slides.tile_mpp to theirs"
        )
    x, y = coords.coords_N2_px0.T
    outside = int(((x < 0) | (y < 0) | (x >= info.width) | (y >= info.height)).sum())
    if outside:
        return f"has {outside} of {len(x)} positions outside the slide of {info.width} x {info.height} pixels"
    twice = len(x) - len(np.unique(coords.coords_N2_px0, axis=0))
    return f"names {twice} positions more than once" if twice else ""

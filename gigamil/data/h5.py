"""HDF5 files of other tools: features and coordinates in the layouts of TRIDENT and CLAM, read and written.

TRIDENT's file of a slide has a dataset `coords`, int64 (N, 2): the top left corners (x, y) of the tiles in level-0
pixels, and, if it holds features, a dataset `features` (N, D). What else is known stands in attributes of the datasets.
CLAM writes the same two datasets with other attributes. Files come from elsewhere and are not trusted: nothing outside
the file is followed, and a size is believed only if the file can hold it.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gigamil.errors import EnvironmentFault, ShardError
from gigamil.shards.manifest import SlideManifest

if TYPE_CHECKING:
    import h5py

Attribute = str | int | float | tuple[float, ...]

_BLOCK_BYTES = 1 << 20  # of a chunk of features; TRIDENT's own chunks of one row make reading 7 times slower
_MAX_TILES = 10_000_000  # 50 times the largest slide at 0.25 um; more is a damaged header
_MAX_EXPANSION = 100  # of a compressed dataset; features and coordinates of slides reach 20
_ON_FEATURES = ("encoder", "encoder_sha256")  # attributes of `features`; all others are of `coords`


class Features(NamedTuple):
    """Features of one slide.

    Attributes:
        features_ND: float32 or float16, as stored.
        coords_N2_px0: int64, top left corners (x, y) of the tiles in level-0 pixels.
        attrs: attributes of both datasets, as text and numbers.
    """

    features_ND: np.ndarray
    coords_N2_px0: np.ndarray
    attrs: dict[str, Attribute]


class Coords(NamedTuple):
    """Tiles of one slide, as another tool chose them.

    Attributes:
        coords_N2_px0: int64, top left corners (x, y) in level-0 pixels.
        size_px0: width and height of a tile in level-0 pixels; None if the file does not tell.
        attrs: attributes of `coords`, as text and numbers.
    """

    coords_N2_px0: np.ndarray
    size_px0: tuple[float, float] | None
    attrs: dict[str, Attribute]


class FeaturesHeader(NamedTuple):
    """Number of tiles, length of a feature, and attributes of a file, without its features."""

    num_tiles: int
    dim: int
    attrs: dict[str, Attribute]


def trident_attributes(manifest: SlideManifest) -> dict[str, Attribute]:
    """What TRIDENT writes beside the coordinates of a slide, and after it what is exact.

    Magnifications are nominal, 10 / mpp: tools that know no mpp compute with them.
    """
    mpp_x, mpp_y, tile_px = manifest.mpp_x, manifest.mpp_y, manifest.tile_px
    return {
        "name": manifest.slide_id,
        "patch_size": tile_px,
        "patch_size_level0": round(tile_px * manifest.pixel_mpp_x / mpp_x),
        "overlap": tile_px - manifest.stride_px,
        "level0_magnification": _magnification(mpp_x),
        "target_magnification": _magnification(manifest.tile_mpp),
        "level0_width": manifest.width_px0,
        "level0_height": manifest.height_px0,
        "mpp_x": mpp_x,
        "mpp_y": mpp_y,
        "tile_px": tile_px,
        "target_mpp": manifest.tile_mpp,
        "reader": "gigamil",
        "params_hash": manifest.settings_hash,
    }


def write_features(
    path: Path, features_ND: np.ndarray, coords_N2_px0: np.ndarray, attrs: Mapping[str, Attribute]
) -> None:
    """Write the features of a slide in TRIDENT's layout; the file appears when it is whole.

    Args:
        features_ND: float32 or float16.
        coords_N2_px0: integers, top left corners (x, y) of the tiles in level-0 pixels.
        attrs: those of `trident_attributes` and more; `encoder` and `encoder_sha256` are put on `features`, the rest on
            `coords`.
    Raises:
        ValueError: shapes or kinds that do not fit, or numbers that are not finite.
        EnvironmentFault: h5py is not installed.
        OSError: the file cannot be written.
    Equal arguments give equal bytes. Chunks are blocks of rows of about 1 MiB.
    """
    features, coords = np.asarray(features_ND), np.asarray(coords_N2_px0)
    if features.ndim != 2 or features.dtype not in (np.float32, np.float16):
        raise ValueError(f"features are {features.dtype}{features.shape}; expected float32 or float16 (N, D)")
    if coords.shape != (len(features), 2) or coords.dtype.kind not in "iu":
        raise ValueError(f"coords are {coords.dtype}{coords.shape}; expected integers ({len(features)}, 2)")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity")
    with _written(path) as file:
        rows = max(1, _BLOCK_BYTES // max(1, features[:1].nbytes))
        chunks = (min(rows, len(features)), features.shape[1]) if features.size else None
        on_features = file.create_dataset("features", data=features, chunks=chunks)
        on_coords = file.create_dataset("coords", data=coords.astype(np.int64))
        for name, value in sorted(attrs.items()):
            (on_features if name in _ON_FEATURES else on_coords).attrs[name] = value


def read_features(path: Path, start: int = 0, stop: int | None = None) -> Features:
    """Read features in the layout of TRIDENT or CLAM, of all tiles or of tiles start..stop-1.

    Raises:
        ShardError: the file is missing, no HDF5, damaged, leads outside itself, claims more than it can hold, lacks a
            dataset, has a wrong shape, or holds NaN or infinity in what was asked for. Names file and dataset.
        EnvironmentFault: h5py is not installed.
        IndexError: the tiles are not all there.
    Cost: reads the chunks that hold the tiles.
    """
    with _opened(path) as file:
        features, coords = _feature_sets(path, file)
        stop = len(features) if stop is None else stop
        if not 0 <= start <= stop <= len(features):
            raise IndexError(f"'{path}' has features 0..{len(features) - 1}; asked for {start}..{stop - 1}")
        found = Features(features[start:stop], coords[start:stop].astype(np.int64), _attrs(coords) | _attrs(features))
    if not np.isfinite(found.features_ND).all():
        raise _refused(path, f"'features' holds NaN or infinity within tiles {start}..{stop - 1}")
    return found


def write_coords(path: Path, coords_N2_px0: np.ndarray, attrs: Mapping[str, Attribute]) -> None:
    """Write coordinates of a slide's tiles: `attrs` of `trident_attributes` or `clam_attributes` make the layout.

    Raises:
        ValueError: not integers (N, 2).
        EnvironmentFault, OSError: as `write_features`.
    """
    coords = np.asarray(coords_N2_px0)
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
        raise ValueError(f"coords are {coords.dtype}{coords.shape}; expected integers (N, 2)")
    with _written(path) as file:
        on_coords = file.create_dataset("coords", data=coords.astype(np.int64))
        for name, value in sorted(attrs.items()):
            on_coords.attrs[name] = value


def read_coords(path: Path) -> Coords:
    """Read the coordinates in a file of coordinates or features, in the layout of TRIDENT or CLAM.

    TRIDENT states the side of a tile in level-0 pixels; in CLAM's files it is the patch size times the level's downsample.

    Raises:
        ShardError: as `read_features`; or the side of a tile is no positive number.
        EnvironmentFault: h5py is not installed.
    """
    with _opened(path) as file:
        coords = _coords(path, file)
        attrs = _attrs(coords)
        found = coords[:]
    try:
        return Coords(found.astype(np.int64), _size_px0(attrs), attrs)
    except (TypeError, ValueError) as error:
        raise _refused(path, f"'coords' has attributes that say no size of a tile: {error}") from error


def read_features_header(path: Path) -> FeaturesHeader:
    """Read what a features file is, without its features.

    Raises:
        ShardError, EnvironmentFault: as `read_features`.
    """
    with _opened(path) as file:
        features, coords = _feature_sets(path, file)
        return FeaturesHeader(len(features), features.shape[1], _attrs(coords) | _attrs(features))


def _size_px0(attrs: Mapping[str, Attribute]) -> tuple[float, float] | None:
    if "patch_size_level0" in attrs:
        size = _pair(attrs["patch_size_level0"])
    elif "patch_size" in attrs and "downsample" in attrs:
        side, down, more = (_pair(attrs.get(name, 1)) for name in ("patch_size", "downsample", "custom_downsample"))
        size = (side[0] * down[0] * more[0], side[1] * down[1] * more[1])
    else:
        return None
    if not all(np.isfinite(size)) or min(size) <= 0:
        raise ValueError(f"{size} pixels")
    return size


def _pair(value: Attribute) -> tuple[float, float]:
    """A number for both axes, or one for each."""
    x, *rest = value if isinstance(value, tuple) else (value,)
    return float(x), float(rest[0] if rest else x)


def _feature_sets(path: Path, file: "h5py.File") -> "tuple[h5py.Dataset, h5py.Dataset]":
    features, coords = _dataset(path, file, "features"), _coords(path, file)
    if features.ndim != 2 or features.dtype not in (np.float32, np.float16):
        raise _refused(path, f"'features' is {features.dtype}{features.shape}; expected float32 or float16 (N, D)")
    if len(features) != len(coords):
        raise _refused(path, f"'features' has {len(features)} rows and 'coords' {len(coords)}")
    return features, coords


def _coords(path: Path, file: "h5py.File") -> "h5py.Dataset":
    coords = _dataset(path, file, "coords")
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
        raise _refused(path, f"'coords' is {coords.dtype}{coords.shape}; expected integers (N, 2)")
    return coords


def _dataset(path: Path, file: "h5py.File", name: str) -> "h5py.Dataset":
    """A dataset that lies in this file, is of a believable size, and is no object of another kind."""
    h5py = _import()
    link = file.get(name, getlink=True)
    if link is None:
        raise _refused(path, f"has no dataset '{name}'; it has: {', '.join(sorted(file)[:20]) or 'nothing'}")
    if not isinstance(link, h5py.HardLink):
        raise _refused(path, f"'{name}' is a link to somewhere else")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or found.dtype.kind not in "iuf":
        raise _refused(path, f"'{name}' is no array of numbers")
    if found.is_virtual or found.external:
        raise _refused(path, f"'{name}' lies in other files")
    if len(found.shape) and found.shape[0] > _MAX_TILES:
        raise _refused(path, f"'{name}' claims {found.shape[0]} tiles; no slide has more than {_MAX_TILES}")
    if found.nbytes > _MAX_EXPANSION * found.id.get_storage_size():
        raise _refused(path, f"'{name}' claims {found.nbytes} bytes and holds {found.id.get_storage_size()}")
    return found


def _attrs(found: "h5py.Dataset") -> dict[str, Attribute]:
    """Attributes as text and numbers; what is neither is left out."""
    attrs: dict[str, Attribute] = {}
    for name in found.attrs:
        value = found.attrs[name]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.size <= 16:
            value = tuple(float(item) for item in value.ravel())
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, str | int | float | tuple):
            attrs[name] = value
    return attrs


@contextmanager
def _opened(path: Path) -> "Iterator[h5py.File]":
    """An HDF5 file; whatever the library finds wrong with it becomes a ShardError."""
    h5py = _import()
    if not path.is_file():
        raise ShardError(f"no file '{path}'. Correct the folder, or write it again.")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (IndexError, ShardError):
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, UnicodeError) as error:
        raise _refused(path, f"cannot be read as HDF5: {error}") from error


@contextmanager
def _written(path: Path) -> "Iterator[h5py.File]":
    """A new HDF5 file, which takes its name when it is whole and on disk."""
    h5py = _import()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(staged, "w") as file:
            yield file
        with staged.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _magnification(mpp: float) -> int | float:
    return round(10 / mpp) or round(10 / mpp, 3)


def _refused(path: Path, what: str) -> ShardError:
    return ShardError(f"'{path}': {what}. Write the file again with the tool that it came from, or remove it.")


def _import() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise EnvironmentFault(
            f"HDF5 files need h5py, which cannot be imported ({error}). Type: pip install 'gigamil[h5]'"
        ) from error
    return h5py

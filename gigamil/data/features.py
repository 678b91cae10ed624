"""Features of slides that a frozen encoder has made, one HDF5 file each: what stands in for shards on such data.

The layout is TRIDENT's (h5.py): files of `gigamil features` are read as TRIDENT's own are. A file says how many tiles
there are, how wide a feature is and where the tiles lie; that is all that an aggregator needs of a slide.
Shapes: N tiles of a slide, D embedding.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from gigamil.config.schema import RunConfig
from gigamil.data.cohort import CohortTable
from gigamil.data.h5 import Attribute, read_coords, read_features, read_features_header
from gigamil.errors import BagError, GigamilError, ShardError
from gigamil.shards.job import fingerprint

SUFFIX = ".h5"
_MAX_LISTED = 20
# Magnifications of TRIDENT are nominal, in steps by 2: tiles may be so many times larger or smaller than they say.
_NOMINAL = math.sqrt(2)


@dataclass(frozen=True)
class SlideFeatures:
    """What the file of a slide says, without its features.

    Attributes:
        num_tiles, dim: N and D.
        encoder: name of what made them; empty if the file does not tell.
        encoder_sha256: digest of its weights and settings, of files by gigamil; else empty.
        tile_px: side of the tiles that were encoded; None if the file does not tell.
        said_um: that side in micron, as far as the file or the slide table tells; None where they do not.
        is_exact: `said_um` is the configured one of files by gigamil; else it may be nominal.
        tile_um, stride_um: their width and height, and the distance of neighbours along x and y, in micron.
        mpp_x, mpp_y: micron per level-0 pixel.
        bounds_x_px0, bounds_y_px0: what QuPath takes for the slide's origin.
    """

    slide_id: str
    num_tiles: int
    dim: int
    encoder: str
    encoder_sha256: str
    tile_px: int | None
    said_um: float | None
    is_exact: bool
    tile_um: tuple[float, float]
    stride_um: tuple[float, float]
    mpp_x: float
    mpp_y: float
    bounds_x_px0: int
    bounds_y_px0: int


@dataclass(frozen=True, eq=False)
class FeaturePlaces:
    """Top left corners of a slide's tiles in micron from the corner of level 0, float64 (N,)."""

    x_um: np.ndarray
    y_um: np.ndarray

    def __len__(self) -> int:
        return len(self.x_um)


class FeatureSet:
    """The features of a folder, `<slide_id>.h5` each: what `ShardSet` is for tiles.

    Micron per pixel comes from the file if it has `mpp_x` and `mpp_y` (gigamil's own), else from the slide table, else
    from `patch_size_level0`, the side of a tile in level-0 pixels, which is taken to be `tile_um`.

    Args:
        folder: of the files.
        tile_um: side of a tile as configured, in micron.
        mpp: of slides, by id, from the slide table; None where it has none.
    Raises:
        ShardError: there is no such folder, or no file in it.
    """

    def __init__(self, folder: Path, tile_um: float, mpp: Mapping[str, float | None] | None = None) -> None:
        self.root = folder
        self._tile_um = tile_um
        self._mpp = mpp or {}
        self._manifests: dict[str, SlideFeatures] = {}
        if not self.slide_ids:
            raise ShardError(
                f"no features in '{folder}': no file SLIDE_ID{SUFFIX}. Run `gigamil features` first, or set data.features."
            )

    @cached_property
    def slide_ids(self) -> tuple[str, ...]:
        """Slides that have a file, sorted."""
        found = (path.name.removesuffix(SUFFIX) for path in self.root.glob(f"*{SUFFIX}"))
        return tuple(sorted(slide_id for slide_id in found if not slide_id.startswith(".")))

    def path(self, slide_id: str) -> Path:
        """File of a slide."""
        return features_path(self.root, slide_id)

    def manifest(self, slide_id: str) -> SlideFeatures:
        """What the slide's file says, read once.

        Raises:
            ShardError: it is missing, damaged, or says nothing of scale.
        """
        if slide_id not in self._manifests:
            path = self.path(slide_id)
            if not path.is_file():
                raise ShardError(f"slide '{slide_id}' has no features: '{path}' is missing")
            num_tiles, dim, attrs = read_features_header(path)
            self._manifests[slide_id] = self._described(slide_id, num_tiles, dim, attrs)
        return self._manifests[slide_id]

    def dim(self, slide_ids: Iterable[str]) -> int:
        """D, which is equal for all of these slides if `check_tiles` has passed them."""
        return self.manifest(next(iter(slide_ids))).dim

    def index(self, slide_id: str) -> FeaturePlaces:
        """Where the slide's tiles lie. The last 32 are kept in memory."""
        manifest = self.manifest(slide_id)
        path = self.path(slide_id)
        return _places(path, _file_state(path), manifest.mpp_x, manifest.mpp_y)

    def digest(self, slide_id: str) -> str:
        """Digest of the file's size and its ends, which tells files of other tiles or another encoder apart."""
        return fingerprint(self.path(slide_id))

    def check_tiles(self, slide_ids: Iterable[str], tile_px: int, encoder: str | None = None) -> None:
        """Refuse slides without features, and features that were made otherwise than configured or than each other.

        Tiles of gigamil's files must have the configured size exactly; those of others to a factor of sqrt(2).

        Args:
            slide_ids: slides that are to be used.
            tile_px: side of the tiles as configured.
            encoder: `science.encoder.name`; compared with files by gigamil only.
        Raises:
            ShardError: lists all that is wrong.
            BagError: slides have no tile to pool.
        """
        slide_ids = list(slide_ids)
        problems = [text for slide_id in slide_ids if (text := self._problem(slide_id, tile_px, encoder))]
        if problems:
            more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            lines = "".join(f"\n  {text}" for text in problems[:_MAX_LISTED])
            raise ShardError(
                f"{len(problems)} of {len(slide_ids)} slides have no fitting features in '{self.root}':{lines}{more}\n"
                "Run `gigamil features`, set data.features to the right folder, or leave these slides out of the table."
            )
        kinds: dict[tuple[int, str, str], str] = {}
        for slide_id in slide_ids:
            manifest = self.manifest(slide_id)
            kinds.setdefault((manifest.dim, manifest.encoder, manifest.encoder_sha256), slide_id)
        if len(kinds) > 1:
            lines = "".join(
                f"\n  '{slide_id}': {dim} numbers a tile, encoder '{name}' {sha256[:12]}".rstrip()
                for (dim, name, sha256), slide_id in list(kinds.items())[:_MAX_LISTED]
            )
            raise ShardError(
                f"the features in '{self.root}' were made by {len(kinds)} encoders, for example:{lines}\n"
                "One model cannot be trained on them. Run `gigamil features` again, or choose another folder."
            )
        empty = [slide_id for slide_id in slide_ids if not self.manifest(slide_id).num_tiles]
        if empty:
            raise BagError(
                f"{len(empty)} slides have no tile in '{self.root}', for example '{empty[0]}'. Leave them out of the "
                "table and run `gigamil split` again."
            )

    def _problem(self, slide_id: str, tile_px: int, encoder: str | None) -> str:
        """What is wrong with a slide's file, in a line; empty if nothing is."""
        try:
            manifest = self.manifest(slide_id)
        except GigamilError as error:
            return str(error)
        if manifest.tile_px not in (None, tile_px):
            return (
                f"slide '{slide_id}': features of tiles of {manifest.tile_px} px; configured slides.tile_px {tile_px}"
            )
        if manifest.said_um is not None:
            other = max(manifest.said_um / self._tile_um, self._tile_um / manifest.said_um)
            if other > (1 if manifest.is_exact else _NOMINAL):
                return (
                    f"slide '{slide_id}': features of tiles of {manifest.said_um:.6g} um; configured slides.tile_px * "
                    f"slides.tile_mpp is {self._tile_um:.6g} um"
                )
        if encoder is not None and manifest.encoder_sha256 and manifest.encoder != encoder:
            return f"slide '{slide_id}': features of encoder '{manifest.encoder}'; configured science.encoder.name {encoder}"
        return ""

    def _described(self, slide_id: str, num_tiles: int, dim: int, attrs: Mapping[str, Attribute]) -> SlideFeatures:
        side_px0 = _number(attrs, "patch_size_level0")
        mpp_x, mpp_y = _number(attrs, "mpp_x"), _number(attrs, "mpp_y")
        if mpp_x is None or mpp_y is None:
            mpp_x = mpp_y = self._mpp.get(slide_id)
        said_um = _said_um(attrs, mpp_x)
        if side_px0 and mpp_x is None:
            mpp_x = mpp_y = self._tile_um / side_px0
        if mpp_x is None or mpp_y is None:
            raise ShardError(
                f"slide '{slide_id}': '{self.path(slide_id)}' does not say how large a tile is (attribute "
                "patch_size_level0 of 'coords'), and the slide table has no mpp for it. Give the table a column mpp."
            )
        tile_px = _number(attrs, "patch_size")
        tile_um = (side_px0 * mpp_x, side_px0 * mpp_y) if side_px0 else (self._tile_um, self._tile_um)
        # Below 0 where tiles lie apart.
        share = 1 - (_finite(attrs, "overlap") or 0) / tile_px if tile_px else 1.0
        return SlideFeatures(
            slide_id=slide_id,
            num_tiles=num_tiles,
            dim=dim,
            encoder=str(attrs.get("encoder", "")),
            encoder_sha256=str(attrs.get("encoder_sha256", "")),
            tile_px=None if tile_px is None else round(tile_px),
            said_um=said_um,
            is_exact=bool(tile_px and _number(attrs, "target_mpp")),
            tile_um=tile_um,
            stride_um=(tile_um[0] * share, tile_um[1] * share) if share > 0 else tile_um,
            mpp_x=mpp_x,
            mpp_y=mpp_y,
            bounds_x_px0=round(_number(attrs, "bounds_x_px0") or 0),
            bounds_y_px0=round(_number(attrs, "bounds_y_px0") or 0),
        )


class FeatureSource:
    """A loader's rows out of cached features, float32.

    Args:
        features: where they lie; `check_tiles` has passed the slides.
        slide_ids: some of those slides.
    Attributes:
        dim: D.
    """

    block = 4096  # a read of some 10 MB

    def __init__(self, features: FeatureSet, slide_ids: Iterable[str]) -> None:
        self.dim = features.dim(slide_ids)
        self._features = features

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Features of tiles start..stop - 1, float32 (n, D), in `out` if that is given.

        Raises:
            ShardError: the file is missing or damaged, or a feature is not finite; names the file.
        Cost: reads the chunks of the file that hold the tiles.
        """
        features_nD = read_features(self._features.path(slide_id), start, stop).features_ND
        if out is None:
            out = np.empty(features_nD.shape, dtype=np.float32)
        torch.from_numpy(out).copy_(torch.from_numpy(features_nD))  # of float16 much faster than numpy
        return out

    def index(self, slide_id: str) -> FeaturePlaces:
        """Where the slide's tiles lie."""
        return self._features.index(slide_id)


def features_folder(config: RunConfig) -> Path:
    """Folder of a run's features: `data.features`, or `<out>/features`."""
    return config.data.features or config.bookkeeping.out / "features"


def features_path(folder: Path, slide_id: str) -> Path:
    """File of a slide."""
    return folder / f"{slide_id}{SUFFIX}"


def open_features(config: RunConfig, table: CohortTable) -> FeatureSet:
    """The features that a run is trained on.

    Raises:
        ShardError: there are none.
    """
    mpp = {row.slide_id: row.mpp for row in table.rows}
    return FeatureSet(features_folder(config), config.slides.tile_px * config.slides.tile_mpp, mpp)


@lru_cache(maxsize=32)
def _places(path: Path, state: tuple[int, ...], mpp_x: float, mpp_y: float) -> FeaturePlaces:
    # The file's state is part of the key: a file that was written anew is read anew.
    x_px0, y_px0 = read_coords(path)[0].T.astype(np.float64)
    return FeaturePlaces(x_px0 * mpp_x, y_px0 * mpp_y)


def _file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written anew; empty if it is gone, which reading it says."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _said_um(attrs: Mapping[str, Attribute], mpp: float | None) -> float | None:
    """Side of a tile in micron by the attributes of a file, and by mpp of level 0 if they are known."""
    tile_px, side_px0 = _number(attrs, "patch_size"), _number(attrs, "patch_size_level0")
    target_mpp, magnification = _number(attrs, "target_mpp"), _number(attrs, "target_magnification")
    if tile_px and target_mpp:
        return tile_px * target_mpp
    if side_px0 and mpp:
        return side_px0 * mpp
    return tile_px * 10 / magnification if tile_px and magnification else None


def _number(attrs: Mapping[str, Attribute], name: str) -> float | None:
    """An attribute that is a finite number above 0; else None."""
    value = _finite(attrs, name)
    return value if value is not None and value > 0 else None


def _finite(attrs: Mapping[str, Attribute], name: str) -> float | None:
    """An attribute that is a finite number; else None."""
    value = attrs.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


__all__ = [
    "FeaturePlaces",
    "FeatureSet",
    "FeatureSource",
    "SlideFeatures",
    "features_folder",
    "features_path",
    "open_features",
]

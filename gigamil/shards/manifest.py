"""The manifest of a slide: the last file written, so a slide that has one is complete.

It holds no patient, no label and no path: shards can be shared without them.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gigamil.errors import ShardError
from gigamil.files import file_sha256
from gigamil.shards.format import FORMAT_VERSION, MANIFEST

Setting = str | int | float | None

# These keys of `slides` name folders with a file per slide: a manifest's settings hold the digest of the slide's own.
FILE_SETTINGS = {"masks": "mask_file_sha256", "coords": "coords_file_sha256"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileDigest(_Record):
    """A file beside the manifest; its name leads nowhere else, whoever wrote the manifest."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SlideManifest(_Record):
    """What a slide is and how it was tiled.

    Lengths end in their unit: `_px0` level-0 pixels, `_um` micron, `mpp` micron per pixel.
    `tile_mpp` is the mpp that was asked for and `pixel_mpp_x`, `pixel_mpp_y` those of the stored pixels: they are equal
    unless `way` is "raw", where tiles are the slide file's own at its own mpp; then `num_raw` of them are its very
    bytes. `way_reason` says why a slide was resampled.
    `num_dropped` tiles with enough tissue failed a quality filter. `stored` is False where only positions are kept.
    `settings` are the values that decide the tiles and `settings_hash` their digest; `source_fingerprint` tells
    another slide file, or a copy that was cut short, from the one that was tiled.
    """

    format_version: Literal[2]
    slide_id: str
    vendor: str
    objective: str | None
    width_px0: int
    height_px0: int
    bounds_x_px0: int
    bounds_y_px0: int
    mpp_x: float
    mpp_y: float
    mpp_source: str
    icc_sha256: str | None
    tile_px: int
    tile_mpp: float
    stride_px: int
    pixel_mpp_x: float
    pixel_mpp_y: float
    num_x: int
    num_y: int
    num_tiles: int
    num_raw: int
    num_dropped: int
    way: Literal["raw", "resampled"]
    way_reason: str
    stored: bool
    tissue_area_mm2: float
    thumbnail_mpp: float
    mask_sha256: str
    settings: dict[str, Setting]
    settings_hash: str
    source_fingerprint: str
    tars: tuple[FileDigest, ...]
    index: FileDigest
    thumbnail: FileDigest
    mask: FileDigest
    tissue: FileDigest
    overview: FileDigest

    @property
    def tile_um(self) -> float:
        """Side of a tile in micron, as configured; raw tiles differ by up to `slides.raw_tolerance`."""
        return self.tile_px * self.tile_mpp

    @property
    def tile_width_um(self) -> float:
        """Width of a tile in micron."""
        return self.tile_px * self.pixel_mpp_x

    @property
    def tile_height_um(self) -> float:
        """Height of a tile in micron."""
        return self.tile_px * self.pixel_mpp_y

    @property
    def files(self) -> tuple[FileDigest, ...]:
        """Every file beside the manifest."""
        return (*self.tars, self.index, self.thumbnail, self.mask, self.tissue, self.overview)

    @property
    def why_empty(self) -> str:
        """Why there is no tile; empty if there are tiles."""
        if self.num_tiles:
            return ""
        given_mask, given_coords = (self.settings.get(name) for name in FILE_SETTINGS.values())
        if self.num_dropped:
            which = "given" if given_coords else "with tissue"
            return f"all {self.num_dropped} tiles {which} were dropped by slides.max_pen or slides.min_sharpness"
        if given_coords:
            return "its file in slides.coords names no position; make it anew, or remove the slide's row"
        if not self.tissue_area_mm2:
            if given_mask:
                return "its mask in slides.masks shows no tissue; correct it, or remove the slide's row"
            return "no tissue found: the slide is empty, or all of it lies in specks below slides.min_tissue_area_um2"
        return (
            f"{self.tissue_area_mm2:.3f} mm2 of tissue, but no tile of {self.tile_um:g} um holds enough of it; "
            f"lower slides.min_tissue ({self.settings['min_tissue']}) or slides.tile_px"
        )


def settings_digest(settings: dict[str, Setting]) -> str:
    """Digest of the values that decide the tiles."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest_file(path: Path) -> FileDigest:
    """Size and sha256 of a file, read once in blocks."""
    return FileDigest(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))


def read_manifest(folder: Path) -> SlideManifest:
    """Read the manifest of a slide's folder.

    Raises:
        ShardError: it is missing, is not a manifest of this format version, or belongs to another slide.
    """
    path = folder / MANIFEST
    cure = f"Delete the folder '{folder}' and run `gigamil tile` again."
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise no_manifest(folder.name, path) from None
    except OSError as error:
        raise ShardError(f"slide '{folder.name}': '{path}' cannot be read: {error}. {cure}") from error
    return parse_manifest(text, folder.name, str(path), cure)


def parse_manifest(text: bytes, slide_id: str, where: str, cure: str) -> SlideManifest:
    """Check the text of a slide's manifest; `where` and `cure` are for the message.

    Raises:
        ShardError: it is not a manifest of this format version, or belongs to another slide.
    """
    try:
        manifest = SlideManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise ShardError(
            f"slide '{slide_id}': '{where}' is not a manifest of format version {FORMAT_VERSION}: {key}: "
            f"{first['msg']}. {cure}"
        ) from error
    if manifest.slide_id != slide_id:
        raise ShardError(f"'{where}' is the manifest of slide '{manifest.slide_id}', not of '{slide_id}'. {cure}")
    return manifest


def no_manifest(slide_id: str, where: Path | str) -> ShardError:
    """The error for a slide that has not been tiled."""
    return ShardError(f"slide '{slide_id}' has no shards: '{where}' is missing. Run `gigamil tile` first.")

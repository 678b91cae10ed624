"""A slide to be tiled: the values that decide its tiles, and whether they are there already."""

import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gigamil.config.schema import Slides
from gigamil.errors import ShardError, SlideError
from gigamil.shards.format import FORMAT_VERSION, MANIFEST, TILES_PER_TAR, slide_folder
from gigamil.shards.manifest import (
    FILE_SETTINGS,
    Setting,
    SlideManifest,
    digest_file,
    read_manifest,
    settings_digest,
)
from gigamil.slides.masks import mask_file
from gigamil.slides.points import coords_file
from gigamil.slides.reader import SlideInfo

# (columns, rows) of grid cells -> the permutation in which their tiles are stored.
CellOrder = Callable[[np.ndarray, np.ndarray], np.ndarray]
# (file, slide, tile_px, tile_mpp) -> positions that another tool has chosen, int64 (N, 2), in level-0 pixels.
PositionReader = Callable[[Path, SlideInfo, int, float], np.ndarray]

# Keys of `slides` that decide the tiles of one spacing as they stand; of `masks` and `coords`, the slide's own file does.
_TILING_KEYS = tuple(key for key in Slides.model_fields if key not in ("max_failed", "extra_mpp", *FILE_SETTINGS))
_FINGERPRINT_BYTES = 1 << 16


@dataclass(frozen=True)
class SlideJob:
    """A slide to be tiled.

    Attributes:
        mpp: that of the slide table; wins over the file's.
        root: the shard folder.
        order, read_positions: importable by name, as jobs go to other processes; the second is for `slides.coords`.
        stored: False keeps positions only, and pixels are read from the slide in training.
        tiles_per_tar: tiles after which the next tar begins.
    """

    slide_id: str
    path: Path
    mpp: float | None
    slides: Slides
    root: Path
    order: CellOrder
    stored: bool = True
    tiles_per_tar: int = TILES_PER_TAR
    read_positions: PositionReader | None = None

    @property
    def folder(self) -> Path:
        """Folder of the finished slide."""
        return slide_folder(self.root, self.slide_id)

    @cached_property
    def mask(self) -> Path | None:
        """The slide's mask in `slides.masks`.

        Raises:
            SlideError: there is none, or there are several.
        """
        return None if self.slides.masks is None else mask_file(self.slides.masks, self.slide_id)

    @cached_property
    def coords(self) -> Path | None:
        """The file of the slide's positions in `slides.coords`.

        Raises:
            SlideError: there is none, or there are several.
        """
        return None if self.slides.coords is None else coords_file(self.slides.coords, self.slide_id)

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Every value that decides the tiles.

        Raises:
            OSError: the slide's mask or its file of positions is missing, or cannot be read.
        """
        chosen: dict[str, Setting] = {key: getattr(self.slides, key) for key in _TILING_KEYS}
        given = {FILE_SETTINGS["masks"]: _sha256(self.mask), FILE_SETTINGS["coords"]: _sha256(self.coords)}
        return {"format_version": FORMAT_VERSION, "table_mpp": self.mpp} | given | chosen


def finished_slide(job: SlideJob) -> SlideManifest | None:
    """The manifest of a slide that needs no tiling: same settings, same slide file, all files there in full size.

    A slide file that is gone or cannot be read (moved to an archive, on a server that is away) does not make its shards
    stale.
    """
    try:
        manifest = read_manifest(job.folder)
        same_settings = manifest.settings_hash == settings_digest(job.settings)
    except OSError:
        return None  # missing, damaged or of another version, or a mask is missing: tile it anew
    if job.folder.is_symlink() or _size(job.folder / MANIFEST) is None:
        return None
    complete = all(_size(job.folder / file.name) == file.bytes for file in manifest.files)
    has_pixels = manifest.stored or not job.stored
    return manifest if complete and has_pixels and same_settings and _same_source(job.path, manifest) else None


def fingerprint(path: Path) -> str:
    """Digest of the size, the first and the last 64 KiB of a slide's files: one, or those of DICOM and MIRAX.

    Tells a re-exported or a truncated copy from the original without reading gigabytes; headers and directories of
    all common formats lie at one of the ends.

    Raises:
        SlideError: the file cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    try:
        for file in _files(path):
            # Without O_NONBLOCK, a pipe that nobody writes to would be waited for.
            handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
            try:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    raise SlideError(f"slide '{path}' is not a regular file.")
                digest.update(found.st_size.to_bytes(8, "little") + os.pread(handle, _FINGERPRINT_BYTES, 0))
                digest.update(os.pread(handle, _FINGERPRINT_BYTES, max(0, found.st_size - _FINGERPRINT_BYTES)))
            finally:
                os.close(handle)
    except SlideError:
        raise
    except OSError as error:
        raise SlideError(f"slide '{path}' cannot be read: {error}") from error
    return digest.hexdigest()


def slide_bytes(path: Path) -> int | None:
    """Size of a slide file, or of the files in a slide folder; None if it cannot be looked at."""
    try:
        return sum(file.stat().st_size for file in _files(path))
    except OSError:
        return None


def refuse_link(job: SlideJob) -> None:
    """Refuse a slide whose folder of shards is a symbolic link, which would lead out of the shard folder.

    Raises:
        ShardError: names it.
    """
    if job.folder.is_symlink():
        raise ShardError(f"'{job.folder}' is a symbolic link to '{os.readlink(job.folder)}'. Remove it.")


def _sha256(path: Path | None) -> str | None:
    return None if path is None else digest_file(path).sha256


def _files(path: Path) -> list[Path]:
    """The files of a slide: those in a folder of DICOM; the file; and of MIRAX also the folder where its pixels are."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    companion = path.with_suffix("")
    return [path, *(_files(companion) if path.suffix.lower() == ".mrxs" and companion.is_dir() else ())]


def _same_source(path: Path, manifest: SlideManifest) -> bool:
    try:
        return fingerprint(path) == manifest.source_fingerprint
    except SlideError:
        return True  # as far as anyone can see now


def _size(path: Path) -> int | None:
    try:
        found = path.lstat()  # a link is not a file that was written here
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None

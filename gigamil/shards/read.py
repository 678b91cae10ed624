"""Shards -> tiles: reading a span touches the bytes of that span only. Imports webdataset, as write.py does.

webdataset's own splitting is not used: it reads RANK and WORLD_SIZE from the environment, splits by whole tars and
raises on ranks without one. Here the caller names the tiles, and gets exactly those or an error.
"""

import itertools
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.tariterators import tar_file_iterator

from gigamil.errors import BagError, ShardError
from gigamil.shards.format import INDEX, MASK, SLIDES, STATUS, TAR_BLOCK, THUMBNAIL, member_name, padded, slide_folder
from gigamil.shards.index import SlideIndex, read_index
from gigamil.shards.manifest import FileDigest, SlideManifest, digest_file, read_manifest


class ShardSet:
    """The finished slides of a shard folder. Cheap to make, safe to pickle and to share between threads.

    Raises:
        ShardError: the folder holds no shards.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if not (self.root / SLIDES).is_dir():
            raise ShardError(f"no shards in '{self.root}'. Run `gigamil tile` first, or set bookkeeping.shards.")
        self._manifests: dict[str, SlideManifest] = {}

    @cached_property
    def slide_ids(self) -> tuple[str, ...]:
        """Slides that have at least one tile, sorted."""
        found = sorted(folder.name for folder in (self.root / SLIDES).iterdir() if folder.is_dir())
        return tuple(slide_id for slide_id in found if self.manifest(slide_id).num_tiles)

    def folder(self, slide_id: str) -> Path:
        """Folder of a slide."""
        return slide_folder(self.root, slide_id)

    def manifest(self, slide_id: str) -> SlideManifest:
        """The slide's manifest, read once.

        Raises:
            ShardError: the slide has no shards, or the manifest is damaged or of another version.
        """
        if slide_id not in self._manifests:
            self._manifests[slide_id] = read_manifest(self.folder(slide_id))
        return self._manifests[slide_id]

    def index(self, slide_id: str) -> SlideIndex:
        """The slide's index; its digest is checked when it is read. The last 32 are kept in memory.

        Raises:
            ShardError: missing or damaged.
        """
        return _checked_index(self.folder(slide_id), self.manifest(slide_id).index)

    def positions_um(self, slide_id: str) -> np.ndarray:
        """Top left corners (x, y) of the slide's tiles in micron, float64 (N, 2), in stored order."""
        index = self.index(slide_id)
        return np.stack([index.x_um, index.y_um], axis=1)

    def read_span(self, slide_id: str, start: int, stop: int, verify: bool = True) -> list[bytes]:
        """Read the JPEG bytes of tiles start..stop-1 in stored order.

        Args:
            verify: compare each tile's crc32 with the index.
        Raises:
            IndexError: the span is not inside 0..num_tiles.
            ShardError: a tar is missing, cut short, or holds other bytes than were written; names slide, tile and tar.
        Cost: one read per tar, from the header of the span's first tile to the end of its last.
        """
        num_tiles = self.manifest(slide_id).num_tiles
        if not 0 <= start <= stop <= num_tiles:
            raise IndexError(f"slide '{slide_id}' has tiles 0..{num_tiles - 1}; asked for {start}..{stop - 1}")
        index = self.index(slide_id)
        jpegs: list[bytes] = []
        for first, last in _runs_per_tar(index.tar, start, stop):
            jpegs += self._read_run(slide_id, index, first, last, verify)
        return jpegs

    def verify(self, slide_id: str) -> None:
        """Compare every file of a slide with the digests in its manifest.

        Raises:
            ShardError: names the file that differs.
        Cost: reads all tiles of the slide once.
        """
        folder = self.folder(slide_id)
        for file in self.manifest(slide_id).files:
            _check_digest(folder, file)

    def check_tiles(self, slide_ids: Iterable[str], tile_px: int, tile_mpp: float) -> None:
        """Refuse slides that were tiled at another size or scale, or that have no tile to pool.

        Raises:
            ShardError: lists those tiled otherwise; or one has no shards.
            BagError: lists those without a tile.
        """
        slide_ids = list(slide_ids)
        empty = [slide_id for slide_id in slide_ids if not self.manifest(slide_id).num_tiles]
        if empty:
            raise BagError(
                f"{len(empty)} slides have no tile in '{self.root}', for example '{empty[0]}': no tissue was found when "
                "they were tiled last. Run `gigamil split` again to leave them out, or lower slides.min_tissue."
            )
        other = [s for s in slide_ids if (self.manifest(s).tile_px, self.manifest(s).tile_mpp) != (tile_px, tile_mpp)]
        if other:
            first = self.manifest(other[0])
            raise ShardError(
                f"{len(other)} slides in '{self.root}' were tiled otherwise than configured, for example '{other[0]}': "
                f"{first.tile_px} px at {first.tile_mpp:g} um per pixel, configured {tile_px} at {tile_mpp:g}. "
                f"Run `gigamil tile` again ('{self.root / STATUS}' says why a slide failed), or set slides.tile_px and "
                "slides.tile_mpp to these values."
            )

    def made_with(self, slide_id: str, settings: Mapping[str, object]) -> bool:
        """Whether a slide's tiles were made with these settings, of those that both know.

        When tiling a slide anew fails, its old shards stay.
        """
        recorded = self.manifest(slide_id).settings
        return all(recorded[name] == value for name, value in settings.items() if name in recorded)

    def thumbnail(self, slide_id: str) -> tuple[np.ndarray, float]:
        """Thumbnail uint8 (H, W, 3) and its micron per pixel; pixel (0, 0) starts at the corner of level 0."""
        return self._image(slide_id, THUMBNAIL, "RGB"), self.manifest(slide_id).thumbnail_mpp

    def mask(self, slide_id: str) -> np.ndarray:
        """Tissue mask, bool (H, W), on the pixels of the thumbnail."""
        return self._image(slide_id, MASK, "L") > 0

    def _image(self, slide_id: str, name: str, mode: str) -> np.ndarray:
        path = self.folder(slide_id) / name
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert(mode))
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error}") from error

    def _read_run(self, slide_id: str, index: SlideIndex, first: int, last: int, verify: bool) -> list[bytes]:
        """Tiles first..last-1, which all lie in one tar."""
        path = self.folder(slide_id) / self.manifest(slide_id).tars[index.tar[first]].name
        begin = int(index.offset[first]) - TAR_BLOCK
        end = int(index.offset[last - 1]) + padded(int(index.length[last - 1]))
        jpegs: list[bytes] = []
        for row, (name, data) in enumerate(_members(path, _pread(path, begin, end)), start=first):
            wanted = member_name(slide_id, int(index.number[row])) if row < last else "nothing more"
            if name != wanted:
                raise _damaged(path, f"holds '{name}' where the index has '{wanted}'")
            if len(data) != index.length[row] or (verify and zlib.crc32(data) != index.crc32[row]):
                raise _damaged(path, f"tile {index.number[row]} is not what was written: its crc32 differs")
            jpegs.append(data)
        # tarfile takes a damaged header for the end of the archive, so the members have to be counted.
        if len(jpegs) != last - first:
            raise _damaged(path, f"the header of tile {index.number[first + len(jpegs)]} is damaged")
        return jpegs


@lru_cache(maxsize=32)
def _checked_index(folder: Path, expected: FileDigest) -> SlideIndex:
    # The digest is part of the key: an index that was written anew is read anew.
    _check_digest(folder, expected)
    return read_index(folder / INDEX)


def _check_digest(folder: Path, expected: FileDigest) -> None:
    path = folder / expected.name
    try:
        found = digest_file(path)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    if found != expected:
        raise _damaged(
            path,
            f"is not what was written: {found.bytes} bytes with sha256 {found.sha256[:12]}..., "
            f"expected {expected.bytes} with {expected.sha256[:12]}...",
        )


def _runs_per_tar(tar: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows start..stop-1 where the tar changes."""
    cuts = start + 1 + np.flatnonzero(np.diff(tar[start:stop]))
    return ((a, b) for a, b in itertools.pairwise([start, *cuts.tolist(), stop]) if a < b)


def _pread(path: Path, begin: int, end: int) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(handle, end - begin, begin)
        finally:
            os.close(handle)
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error}") from error
    if len(data) != end - begin:
        raise _damaged(path, f"is cut short: no byte beyond {begin + len(data)}")
    return data


def _members(path: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    try:
        # skip_meta=None: by default a slide id such as `__x__` would be skipped without a word.
        for member in tar_file_iterator(BytesIO(data), skip_meta=None):
            yield member["fname"], member["data"]
    except tarfile.TarError as error:
        raise _damaged(path, f"is not a readable tar: {error}") from error


def _damaged(path: Path, what: str) -> ShardError:
    folder = path.parent
    return ShardError(
        f"slide '{folder.name}', '{path.name}': {what}. Delete the folder '{folder}' and run `gigamil tile` again."
    )

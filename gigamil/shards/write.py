"""Tiles -> tars in a staging folder, and the one rename that makes a slide appear. Imports webdataset, as read.py does.

Nothing half-finished ever has a final name: a slide is written in a staging folder, every file is flushed to disk,
the manifest is written last, and then the folder is renamed.
"""

import itertools
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from gigamil.files import fsync
from gigamil.shards.format import (
    EXTENSION,
    MANIFEST,
    REMOVED,
    STAGING,
    TAR_BLOCK,
    TILES_PER_TAR,
    padded,
    slide_folder,
    tar_name,
    tile_key,
)
from gigamil.shards.manifest import FileDigest, SlideManifest, digest_file


@dataclass(frozen=True, eq=False)
class StoredTiles:
    """Where tiles lie: the tars, and arrays as the columns of the same name in `SlideIndex`."""

    tars: tuple[FileDigest, ...]
    tar: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray


def write_tars(folder: Path, slide_id: str, jpegs: Iterable[bytes], tiles_per_tar: int = TILES_PER_TAR) -> StoredTiles:
    """Write tiles, in the order given, to as many tars as needed.

    Args:
        folder: an existing folder, in staging.
        jpegs: encoded tiles; consumed one by one, so memory holds one tile.
        tiles_per_tar: tiles after which the next tar begins.
    Returns:
        Their places. Equal tiles give equal bytes: time, owner and mode in the tar are constants.
    """
    tars: list[FileDigest] = []
    places: list[tuple[int, int, int, int]] = []
    for tar, tiles in itertools.groupby(enumerate(jpegs), key=lambda tile: tile[0] // tiles_per_tar):
        path = folder / tar_name(tar)
        places += [(tar, *place) for place in _write_tar(path, slide_id, tiles)]
        tars.append(digest_file(path))
    columns = np.array(places, dtype=np.int64).reshape(-1, 4)
    return StoredTiles(
        tuple(tars), columns[:, 0].astype(np.int32), columns[:, 1], columns[:, 2], columns[:, 3].astype(np.uint32)
    )


@contextmanager
def staged_slide(root: Path, slide_id: str) -> Iterator[Path]:
    """Give an empty staging folder for a slide; what is not committed when the block ends is deleted."""
    folder = root / STAGING / slide_id
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(root: Path, staged: Path, manifest: SlideManifest) -> None:
    """Make a staged slide final: flush its files, write the manifest last, rename the folder.

    Shards of the slide that are there already go when the new ones are complete and not before.

    Raises:
        OSError: the disk is full.
    """
    final, old = slide_folder(root, manifest.slide_id), root / REMOVED / manifest.slide_id
    final.parent.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        fsync(staged / file.name)
    (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    fsync(staged / MANIFEST)
    fsync(staged)
    if final.exists():
        # It disappears with one rename, so no reader sees half of it.
        old.parent.mkdir(parents=True, exist_ok=True)
        final.rename(old)
    staged.rename(final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)  # what a reader still holds open is for `clear_leftovers`


def clear_leftovers(root: Path) -> None:
    """Delete what a run that was stopped left. Call it only while holding the folder's lock."""
    for name in (STAGING, REMOVED):
        shutil.rmtree(root / name, ignore_errors=True)


def _write_tar(path: Path, slide_id: str, tiles: Iterable[tuple[int, bytes]]) -> list[tuple[int, int, int]]:
    """Write one tar; returns offset, length and crc32 of each tile."""
    places = []
    # TarWriter on our own handle: webdataset's ShardWriter writes in place and never closes a handle it was given.
    # mtime=0 and the writer's constant owner make the bytes a function of the tiles.
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
        # webdataset 1.0.2 takes a format but does not pass it on; in PAX, ids over 89 characters get longer headers.
        writer.tarstream.format = tarfile.USTAR_FORMAT
        for number, jpeg in tiles:
            offset = writer.tarstream.offset + TAR_BLOCK
            writer.write({"__key__": tile_key(slide_id, number), EXTENSION: jpeg})
            # What the reader counts on; USTAR holds names of ids up to 128 characters in one block.
            assert writer.tarstream.offset == offset + padded(len(jpeg)), f"unexpected header of {slide_id}/{number}"
            places.append((offset, len(jpeg), zlib.crc32(jpeg)))
    return places

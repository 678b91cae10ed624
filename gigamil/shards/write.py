"""Tiles -> tars in a staging folder, and the one rename that makes a slide appear.

Nothing half-finished ever has a final name: a slide is written in a staging folder, every file is flushed to disk,
the manifest is written last, and then the folder is renamed.

The tars are plain USTAR, which webdataset reads (tests/unit/shards/test_read_write.py). Its writer is not used: it
imports torch, 400 MB and two seconds in each process of `gigamil tile`.
"""

import hashlib
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigamil.errors import ShardError
from gigamil.files import fsync
from gigamil.shards.format import (
    CONTACT_SHEET,
    JOBS,
    MANIFEST,
    REMOVED,
    SLIDES,
    STAGING,
    TAR_BLOCK,
    member_name,
    padded,
    slide_folder,
)
from gigamil.shards.manifest import FileDigest, SlideManifest


@dataclass(frozen=True, eq=False)
class StoredTar:
    """One tar and where its tiles lie in it: arrays as the columns of the same name in `SlideIndex`."""

    file: FileDigest
    number: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray


def write_tar(path: Path, slide_id: str, tiles: Iterable[tuple[int, bytes]]) -> StoredTar:
    """Write a tar of tiles.

    Args:
        path: a file that does not exist, in a staging folder.
        tiles: numbers and encoded tiles; consumed one by one, so memory holds one tile.
    Returns:
        Their places. Equal tiles give equal bytes: time, owner and mode in the tar are constants.
    Cost: the file is hashed while it is written, so it is not read again.
    """
    places: list[tuple[int, int, int, int]] = []
    digest, end = hashlib.sha256(), 0
    with path.open("xb") as file:
        for number, jpeg in tiles:
            block = _member(member_name(slide_id, number), jpeg)
            file.write(block)
            digest.update(block)
            places.append((number, end + TAR_BLOCK, len(jpeg), zlib.crc32(jpeg)))
            end += len(block)
        # An archive ends with two empty blocks, and is filled up to whole records.
        rest = bytes(2 * TAR_BLOCK + -(end + 2 * TAR_BLOCK) % tarfile.RECORDSIZE)
        file.write(rest)
        digest.update(rest)
    columns = np.array(places, dtype=np.int64).reshape(-1, 4)
    return StoredTar(
        file=FileDigest(name=path.name, bytes=end + len(rest), sha256=digest.hexdigest()),
        number=columns[:, 0],
        offset=columns[:, 1],
        length=columns[:, 2],
        crc32=columns[:, 3].astype(np.uint32),
    )


def place_tiles(tars: Sequence[StoredTar]) -> dict[str, np.ndarray]:
    """The columns of `SlideIndex` that say where tiles lie."""

    def joined(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(tar, name) for tar in tars)])

    return {
        "tar": np.repeat(np.arange(len(tars), dtype=np.int32), [len(tar.number) for tar in tars]),
        "number": joined("number", np.int64),
        "offset": joined("offset", np.int64),
        "length": joined("length", np.int64),
        "crc32": joined("crc32", np.uint32),
    }


def staging_folder(root: Path, slide_id: str) -> Path:
    """Where a slide is written."""
    return root / STAGING / slide_id


def stage(root: Path, slide_id: str) -> Path:
    """Make the empty staging folder of a slide."""
    folder = staging_folder(root, slide_id)
    discard(root, slide_id)
    folder.mkdir(parents=True)
    return folder


def discard(root: Path, slide_id: str) -> None:
    """Delete the staging folder of a slide, if there is one."""
    shutil.rmtree(staging_folder(root, slide_id), ignore_errors=True)


def commit(root: Path, staged: Path, manifest: SlideManifest) -> None:
    """Make a staged slide final: flush its files, write the manifest last, rename the folder.

    Shards of the slide that are there already go when the new ones are in their place and not before.

    Raises:
        OSError: the disk is full, or a folder cannot be renamed.
    """
    final, old = slide_folder(root, manifest.slide_id), root / REMOVED / manifest.slide_id
    final.parent.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        fsync(staged / file.name)
    (staged / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    fsync(staged / MANIFEST)
    fsync(staged)
    is_there = final.exists()
    if is_there:
        # It disappears with one rename, so no reader sees half of it.
        old.parent.mkdir(parents=True, exist_ok=True)
        final.rename(old)
    try:
        staged.rename(final)
    except BaseException:
        if is_there:
            old.rename(final)
        raise
    fsync(final.parent)
    (old / MANIFEST).unlink(missing_ok=True)  # first: what has its manifest is whole, for `clear_leftovers`
    shutil.rmtree(old, ignore_errors=True)  # what a reader still holds open is for `clear_leftovers`


def refuse_links(root: Path) -> None:
    """Refuse symbolic links where folders are written and deleted: they would lead out of the shard folder.

    The shard folder itself may be a link.

    Raises:
        ShardError: names the link.
    """
    for path in (root / name for name in (SLIDES, STAGING, REMOVED, JOBS, CONTACT_SHEET)):
        if path.is_symlink():
            raise ShardError(
                f"'{path}' is a symbolic link to '{os.readlink(path)}', outside of what `gigamil tile` may write. "
                "Remove it, or point bookkeeping.shards at the folder itself."
            )


def clear_leftovers(root: Path, slide_ids: Sequence[str] | None = None) -> None:
    """Delete what a run that was stopped left. Call it only while holding the folder's lock, after `refuse_links`.

    Shards that were to be replaced are put back if the new ones did not get as far as their place.

    Args:
        slide_ids: only what belongs to these slides, where others work in the folder too. Default: all.
    Raises:
        OSError: shards cannot be put back; they stay where they are.
    """
    removed = root / REMOVED
    if removed.is_dir():
        for slide_id in os.listdir(removed) if slide_ids is None else slide_ids:
            final = slide_folder(root, slide_id)
            if (removed / slide_id / MANIFEST).is_file() and not os.path.lexists(final):
                final.parent.mkdir(exist_ok=True)
                (removed / slide_id).rename(final)
    for name in (STAGING, REMOVED):
        for path in [root / name] if slide_ids is None else [root / name / slide_id for slide_id in slide_ids]:
            shutil.rmtree(path, ignore_errors=True)


def _member(name: str, data: bytes) -> bytes:
    """A file in a tar: header, data, filling up to whole blocks."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o444, 0
    block = header.tobuf(tarfile.USTAR_FORMAT)
    # What the reader counts on; USTAR holds names of ids up to 128 characters in one block.
    assert len(block) == TAR_BLOCK, f"unexpected header of {name}"
    return block + data + bytes(padded(len(data)) - len(data))

"""Copies of tars on a node's own disk, so that from the second epoch on no span crosses the network.

A copy is named by the digest of the tar, so it is right for whichever slide asks for it, and a tar that was written anew
is copied anew. Processes of a node share the folder.
"""

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gigamil.config.schema import Execution
from gigamil.shards.manifest import FileDigest
from gigamil.shards.storage import Storage, read_at

_log = logging.getLogger("gigamil")
_BLOCK = 1 << 24  # bytes copied at a time
_COPY, _PART = ".tar", ".part"
_STALE_S = 3600.0  # a copy that was begun so long ago was left by a process that was killed


class ShardCache:
    """A folder of copies with a limit; what was used longest ago goes first.

    It never changes what is read: where a copy cannot be made (the disk is full, the tar is larger than the limit, its
    digest is not that of the manifest), the caller reads from the root, with a warning in the log.

    Args:
        folder: on a disk of this node; made when it is needed. Safe for several processes and threads at once.
        limit_bytes: size of all copies together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._refused: set[str] = set()
        self._unusable = False

    @classmethod
    def of(cls, execution: Execution) -> "ShardCache | None":
        """The cache that a configuration asks for: `execution.shard_cache` and `shard_cache_gb`."""
        folder = execution.shard_cache
        return None if folder is None else cls(folder, int(execution.shard_cache_gb * 1e9))

    def read_range(self, storage: Storage, name: str, tar: FileDigest, begin: int, end: int) -> bytes | None:
        """Bytes begin..end - 1 of a tar out of its copy, which is made if it is missing; None if there can be none.

        Args:
            name: of the tar in the storage.
            tar: its size and digest.
        Cost: the first read of a tar copies all of it, once per node.
        """
        if self._unusable or tar.sha256 in self._refused or not re.fullmatch("[0-9a-f]{64}", tar.sha256):
            return None
        path = self._folder / (tar.sha256 + _COPY)
        try:
            data = _read(path, begin, end)
            if data is None and self._fill(storage, name, tar, path):
                data = _read(path, begin, end)
        except OSError as error:
            _log.warning("shard cache '%s' cannot be used (%s): spans are read from the shards", self._folder, error)
            self._unusable = True
            return None
        return data

    def forget(self, tar: FileDigest) -> None:
        """Delete a copy that turned out to be damaged."""
        _log.warning("shard cache '%s': the copy of '%s' was damaged and is made anew", self._folder, tar.name)
        (self._folder / (tar.sha256 + _COPY)).unlink(missing_ok=True)

    def _fill(self, storage: Storage, name: str, tar: FileDigest, path: Path) -> bool:
        """Copy a tar under another name, compare its digest, and rename it. One process of a node does it."""
        if tar.bytes > self._limit:
            return self._refuse(storage, name, tar, f"it is larger than the cache ({self._limit} bytes)")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_suffix(_PART)
        with self._locked(tar.sha256[:2]):
            if path.exists():
                return True
            try:
                with part.open("wb") as file:
                    if not self._reserve(file.fileno(), tar.bytes):
                        return False  # others copy just now, and all room is theirs
                    wrong = _copy(storage, name, tar, file)
                if not wrong:
                    part.rename(path)
            finally:
                part.unlink(missing_ok=True)
        return self._refuse(storage, name, tar, wrong) if wrong else True

    def _reserve(self, handle: int, num_bytes: int) -> bool:
        """Delete what was used longest ago until so many bytes are within the limit, and take them.

        Returns:
            False, with nothing deleted, if no deleting makes room for them.
        """
        with self._locked("room"):
            kept, copies = num_bytes, []
            for path in self._folder.iterdir():
                if path.suffix not in (_COPY, _PART):
                    continue
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue  # a copy that was renamed, or was found damaged
                if path.suffix == _COPY or time.time() - found.st_mtime > _STALE_S:
                    copies.append((found.st_mtime_ns, found.st_size, path))
                kept += found.st_size
            if kept - sum(size for _, size, _ in copies) > self._limit:
                return False  # others copy just now, and without these copies it would still not fit
            for _, size, path in sorted(copies):
                if kept <= self._limit:
                    break
                path.unlink(missing_ok=True)  # who has it open reads on
                kept -= size
            if num_bytes:
                os.posix_fallocate(handle, 0, num_bytes)  # a full disk shows now, and other processes count these bytes
            return True

    @contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        """Hold a lock of this node; it ends with its process, whatever ends that."""
        with (self._folder / f".lock-{what}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _refuse(self, storage: Storage, name: str, tar: FileDigest, why: str) -> bool:
        _log.warning("shard cache '%s': no copy of '%s': %s", self._folder, storage.where(name), why)
        self._refused.add(tar.sha256)
        return False


def _copy(storage: Storage, name: str, tar: FileDigest, file: BinaryIO) -> str:
    """Write a copy; returns what is wrong with the original."""
    digest = hashlib.sha256()
    for begin in range(0, tar.bytes, _BLOCK):
        try:
            block = storage.read_range(name, begin, min(begin + _BLOCK, tar.bytes))
        except OSError as error:
            return f"it cannot be read: {error}"
        digest.update(block)
        file.write(block)
    return "" if digest.hexdigest() == tar.sha256 else "its digest is not that of the manifest"


def _read(path: Path, begin: int, end: int) -> bytes | None:
    """Bytes of a copy, which counts as used; None if there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        os.utime(handle)
        return read_at(handle, begin, end)
    finally:
        os.close(handle)

"""The cache never changes what is read; it copies a tar once per node, stays within its limit, and may fail at any time."""

import logging
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import pytest

from gigamil.config.schema import Execution
from gigamil.shards.cache import ShardCache
from gigamil.shards.read import ShardSet
from gigamil.shards.storage import LocalStorage
from gigamil.testing.shards import make_shards, noise_jpegs

JPEGS = noise_jpegs(12, 16)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_shards(tmp_path / "shards", "s", JPEGS, tile_px=16, tiles_per_tar=4)  # three tars
    return tmp_path / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Reads:
    """Watches what is read of the original's tars."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        real = LocalStorage.read_range

        def watched(storage: LocalStorage, name: str, begin: int, end: int) -> bytes:
            self.names.append(name.rpartition("/")[2])
            return real(storage, name, begin, end)

        monkeypatch.setattr(LocalStorage, "read_range", watched)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def copies(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if not path.name.startswith(".lock")}


def tar_bytes(root: Path) -> list[int]:
    return [file.bytes for file in ShardSet(root).manifest("s").tars]


def test_each_tar_is_copied_once_and_all_spans_are_the_same(root: Path, folder: Path, reads: Reads) -> None:
    for _ in range(2):
        shards = ShardSet(root, ShardCache(folder, 10**9))
        for start in range(13):
            for stop in range(start, 13):
                assert shards.read_span("s", start, stop) == JPEGS[start:stop]
    assert sorted(reads.names) == [f"tiles-0000{n}.tar" for n in range(3)]
    assert copies(folder) == {file.sha256 + ".tar": file.bytes for file in shards.manifest("s").tars}


def test_what_was_used_longest_ago_goes_first(root: Path, folder: Path, reads: Reads) -> None:
    sizes = tar_bytes(root)
    limit = max(sizes[0] + sizes[1], sizes[0] + sizes[2], sizes[1] + sizes[2])
    shards = ShardSet(root, ShardCache(folder, limit))
    names = [file.sha256 + ".tar" for file in shards.manifest("s").tars]
    for time_ns, (start, stop) in enumerate([(0, 4), (4, 8), (0, 1)], start=1):
        assert shards.read_span("s", start, stop) == JPEGS[start:stop]
        os.utime(folder / names[start // 4], ns=(time_ns, time_ns))  # clocks of file systems tick slowly
    assert shards.read_span("s", 8, 12) == JPEGS[8:]
    assert set(copies(folder)) == {names[0], names[2]}
    assert sum(copies(folder).values()) <= limit
    reads.names.clear()
    for start, stop in [(0, 4), (8, 12), (4, 8)]:
        assert shards.read_span("s", start, stop) == JPEGS[start:stop]
    assert reads.names == ["tiles-00001.tar"]


def test_reading_counts_as_use(root: Path, folder: Path) -> None:
    shards = ShardSet(root, ShardCache(folder, 10**9))
    shards.read_span("s", 0, 1)
    copy = folder / (shards.manifest("s").tars[0].sha256 + ".tar")
    os.utime(copy, ns=(1, 1))
    shards.read_span("s", 1, 2)
    assert copy.stat().st_mtime_ns > 1


def test_a_tar_above_the_limit_is_read_directly(root: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = ShardSet(root, ShardCache(folder, 1000))
    for _ in range(2):
        assert shards.read_span("s", 0, 12) == JPEGS
    assert [record.getMessage().count("larger than the cache") for record in caplog.records] == [1, 1, 1]
    assert not folder.exists()


def test_a_damaged_original_is_not_kept_and_its_good_tiles_are_read(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "slides" / "s" / "tiles-00000.tar"
    data = bytearray(path.read_bytes())
    data[-700] ^= 1  # in padding or the end mark: no tile is damaged
    path.write_bytes(data)
    shards = ShardSet(root, ShardCache(folder, 10**9))
    assert shards.read_span("s", 0, 4) == JPEGS[:4]
    assert shards.read_span("s", 0, 4) == JPEGS[:4]
    assert copies(folder) == {}
    assert ["its digest is not that of the manifest" in record.getMessage() for record in caplog.records] == [True]


def test_a_copy_that_rots_is_replaced(root: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = ShardSet(root, ShardCache(folder, 10**9))
    shards.read_span("s", 0, 4)
    (copy,) = (path for path in folder.iterdir() if path.suffix == ".tar")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert shards.read_span("s", 0, 4) == JPEGS[:4]
    assert "was damaged" in caplog.text
    assert shards.read_span("s", 0, 4) == JPEGS[:4]
    assert copy.read_bytes() == (root / "slides" / "s" / "tiles-00000.tar").read_bytes()


def test_a_full_disk_is_said_once_and_changes_nothing(
    root: Path, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    shards = ShardSet(root, ShardCache(folder, 10**9))
    for _ in range(2):
        assert shards.read_span("s", 0, 12) == JPEGS
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert copies(folder) == {}


def test_a_folder_that_cannot_be_made(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    shards = ShardSet(root, ShardCache(tmp_path / "file" / "cache", 10**9))
    assert shards.read_span("s", 0, 12) == JPEGS
    assert len(caplog.records) == 1


def test_a_digest_of_a_hostile_manifest_names_no_file(root: Path, folder: Path, tmp_path: Path) -> None:
    tar = ShardSet(root).manifest("s").tars[0]
    cache, storage = ShardCache(folder, 10**9), LocalStorage(root)
    for digest in ("../../stolen", "/stolen", "", "A" * 64):
        odd = tar.model_copy(update={"sha256": digest})
        assert cache.read_range(storage, "slides/s/tiles-00000.tar", odd, 0, 10) is None
    assert not folder.exists()


def test_what_a_killed_process_left_is_deleted_when_room_is_needed(root: Path, folder: Path) -> None:
    folder.mkdir()
    left = folder / ("0" * 64 + ".part")
    left.write_bytes(bytes(10_000))
    os.utime(left, (1, 1))
    shards = ShardSet(root, ShardCache(folder, max(tar_bytes(root))))
    assert shards.read_span("s", 0, 4) == JPEGS[:4]
    assert not left.exists()


def test_nothing_is_deleted_where_that_makes_too_little_room(root: Path, folder: Path) -> None:
    shards = ShardSet(root, ShardCache(folder, sum(tar_bytes(root)[:2])))
    shards.read_span("s", 0, 4)
    before = copies(folder)
    (folder / ("0" * 64 + ".part")).write_bytes(bytes(tar_bytes(root)[0] + 1))  # another process copies just now
    assert shards.read_span("s", 4, 8) == JPEGS[4:8]
    assert before.items() <= copies(folder).items()


def read_all(root: Path, folder: Path, limit: int) -> None:
    shards = ShardSet(root, ShardCache(folder, limit))
    for _ in range(5):
        for start in range(0, 12, 2):
            assert shards.read_span("s", start, start + 2) == JPEGS[start : start + 2]


@pytest.mark.parametrize("num_tars", [1, 3])
def test_processes_and_threads_share_it(root: Path, folder: Path, num_tars: int) -> None:
    """With room for one tar they delete each other's copies all the time."""
    limit = max(tar_bytes(root)) * num_tars
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=read_all, args=(root, folder, limit)) for _ in range(3)]
    threads = [threading.Thread(target=read_all, args=(root, folder, limit)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    for thread in threads:
        thread.start()
    for worker in (*ranks, *threads):
        worker.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert sum(copies(folder).values()) <= limit
    assert not [name for name in copies(folder) if name.endswith(".part")]


def test_the_configuration_asks_for_it(tmp_path: Path) -> None:
    assert ShardCache.of(Execution()) is None
    cache = ShardCache.of(Execution(shard_cache=tmp_path, shard_cache_gb=2.5))
    assert cache is not None
    assert (cache._folder, cache._limit) == (tmp_path, 2_500_000_000)


def test_shards_that_are_gone_are_read_from_their_copies(root: Path, folder: Path) -> None:
    shards = ShardSet(root, ShardCache(folder, 10**9))
    shards.read_span("s", 0, 12)
    shutil.rmtree(root)
    assert shards.read_span("s", 0, 12) == JPEGS

"""Tiles by row, held or stored, are the same pixels; the feed reads each chunk once more at most, and ahead of time."""

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from gigamil.data.images import ChunkFeed, HeldImages, RowMemory, StoredImages, _copy_stream
from gigamil.errors import ShardError

SIDE = 4
CPU = torch.device("cpu")
SPANS = (("a", 2, 5), ("b", 0, 1), ("c", 7, 7), ("a", 6, 10))  # 3 + 1 + 0 + 4 rows
CHUNK_BYTES = 2 * SIDE * SIDE * 3


def pixels(slide_id: str, start: int, stop: int) -> Tensor:
    """Tile t of a slide is filled with a number of its own."""
    value = torch.arange(start, stop, dtype=torch.uint8) + 100 * (slide_id == "b")
    return value[:, None, None, None].expand(-1, SIDE, SIDE, 3)


class Source:
    """Decodes, and remembers what was asked for and by which thread."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.threads: set[str] = set()

    def __call__(self, slide_id: str, start: int, stop: int) -> Tensor:
        self.asked.append((slide_id, start, stop))
        self.threads.add(threading.current_thread().name.split("_")[0])
        return pixels(slide_id, start, stop)


def stored(source: Source) -> StoredImages:
    return StoredImages(SPANS, SIDE, source)


def test_stored_images_are_the_held_ones_for_every_range() -> None:
    whole = torch.cat([pixels(*span) for span in SPANS])
    held, source = HeldImages(whole), Source()
    images = stored(source)
    assert (held.shape, images.shape, held.held, images.held) == ((SIDE, SIDE, 3), (SIDE, SIDE, 3), True, False)
    for start in range(9):
        for stop in range(start, 9):
            assert torch.equal(images.read(start, stop), held.read(start, stop))
    assert images.read(3, 3).shape == (0, SIDE, SIDE, 3)


def test_only_the_asked_rows_are_decoded() -> None:
    source = Source()
    stored(source).read(2, 6)
    assert source.asked == [("a", 4, 5), ("b", 0, 1), ("a", 6, 8)]


def test_held_images_are_given_as_views_without_a_thread() -> None:
    whole = torch.cat([pixels(*span) for span in SPANS])
    with ChunkFeed(HeldImages(whole), CPU, cache_bytes=10**9) as feed:
        assert feed.get(2, 4, (4, 6)).data_ptr() == whole[2:].data_ptr()
    assert [t for t in threading.enumerate() if t.name.startswith("gigamil-chunks")] == []


def test_the_next_chunk_is_read_once_and_in_another_thread() -> None:
    source = Source()
    whole = torch.cat([pixels(*span) for span in SPANS])
    with ChunkFeed(stored(source), CPU, cache_bytes=0) as feed:
        rows = [(0, 2), (2, 4), (4, 8)]
        for number, (start, stop) in enumerate(rows):
            upcoming = rows[number + 1] if number + 1 < len(rows) else None
            assert torch.equal(feed.get(start, stop, upcoming), whole[start:stop])
    assert sum(stop - start for _, start, stop in source.asked) == 8
    assert source.threads == {"MainThread", "gigamil-chunks"}
    assert [t for t in threading.enumerate() if t.name.startswith("gigamil-chunks")] == []


@pytest.mark.parametrize(("chunks_that_fit", "decoded"), [(0, 8), (1, 6), (2, 4)])
def test_what_fits_the_cache_is_read_once_for_both_passes(chunks_that_fit: int, decoded: int) -> None:
    source = Source()
    with ChunkFeed(stored(source), CPU, chunks_that_fit * CHUNK_BYTES) as feed:
        for _ in range(2):
            assert torch.equal(feed.get(0, 2), pixels("a", 2, 4))
            feed.get(2, 4)
    assert sum(stop - start for _, start, stop in source.asked) == decoded


def test_another_chunk_than_announced_is_right_too() -> None:
    whole = torch.cat([pixels(*span) for span in SPANS])
    with ChunkFeed(stored(Source()), CPU, cache_bytes=0) as feed:
        feed.get(0, 2, (2, 8))
        assert torch.equal(feed.get(2, 4, (4, 8)), whole[2:4])  # halved in the meantime
        assert torch.equal(feed.get(4, 8, None), whole[4:8])


def test_an_error_comes_with_the_chunk_that_it_is_of() -> None:
    def damaged(slide_id: str, start: int, stop: int) -> Tensor:
        if slide_id == "b":
            raise ShardError("slide 'b' is damaged")
        return pixels(slide_id, start, stop)

    with ChunkFeed(StoredImages(SPANS, SIDE, damaged), CPU, cache_bytes=0) as feed:
        feed.get(0, 2, (2, 4))
        with pytest.raises(ShardError, match="'b' is damaged"):
            feed.get(2, 4, (4, 8))
        assert torch.equal(feed.get(4, 8), pixels("a", 6, 10))


def test_a_feed_that_is_left_with_a_chunk_ahead_ends_its_thread() -> None:
    with ChunkFeed(stored(Source()), CPU, cache_bytes=0) as feed:
        feed.get(0, 2, (2, 4))
    assert [t for t in threading.enumerate() if t.name.startswith("gigamil-chunks")] == []


def test_all_feeds_of_a_device_copy_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    # The allocator gives memory back to the stream that it was taken on, so another stream would need memory of its own.
    class Stream:  # in place of one of a GPU: a test has none
        def __init__(self, device: torch.device) -> None:
            self.device = device

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    _copy_stream.cache_clear()
    try:
        with ChunkFeed(stored(Source()), first, 0) as a, ChunkFeed(stored(Source()), first, 0) as b:
            assert a._stream is b._stream
            assert a._stream.device == first
        with ChunkFeed(stored(Source()), second, 0) as c:
            assert c._stream.device == second
    finally:
        _copy_stream.cache_clear()


def test_memory_is_used_again_once_no_tensor_holds_it() -> None:
    memory, shape, kind = RowMemory(), (6, SIDE, SIDE, 3), np.dtype(np.uint8)
    tensor = torch.from_numpy(memory.take(shape, kind))
    place, part = tensor.data_ptr(), tensor[2:4]
    others = [torch.from_numpy(memory.take(shape, kind)) for _ in range(3)]
    del tensor
    assert part.data_ptr() > place  # a part holds all of it
    others.append(torch.from_numpy(memory.take(shape, kind)))
    assert place not in [other.data_ptr() for other in others]
    array = part.numpy()
    del part
    assert torch.from_numpy(memory.take(shape, kind)).data_ptr() != place  # and so does an array of a part
    del array
    smaller = torch.from_numpy(memory.take((4, SIDE, SIDE, 3), kind))
    assert smaller.data_ptr() == place
    assert smaller.shape == (4, SIDE, SIDE, 3)


def test_memory_that_is_too_small_or_far_too_large_is_let_go() -> None:
    memory = RowMemory()
    for rows in (10, 11, 5, 4):
        taken = memory.take((rows, 8), np.dtype(np.float32))
        assert (taken.shape, taken.dtype) == ((rows, 8), np.float32)
        size = taken.base.nbytes
        assert rows * 32 <= size <= 2 * rows * 32
        del taken
    assert len(memory._free) == 1
    assert memory.take((0, 8), np.dtype(np.float32)).shape == (0, 8)

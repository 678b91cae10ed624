"""The pixels of this rank's tiles of a step: held as uint8, or read and decoded again whenever they are asked for.

Where tiles were encoded before (`data.source: features`), rows of features take the place of images.
Shapes: n tiles on this rank, c tiles of a chunk, H W image, D embedding.
"""

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor


class Stopwatch:
    """Seconds that a step has waited for data, wherever it waited."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class RowMemory:
    """Memory for the rows of a step, used again when no tensor holds them any more.

    New memory is given as pages of zeros, and to make those takes a tenth of the time of decoding (17 us a tile of 224
    pixels; 100 where the pages are small, as torch's own are). One buffer is kept; it may be up to twice as large as
    what is asked for.
    """

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=1)

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content. Its memory comes back when it and each tensor made of it are gone."""
        wanted = math.prod(shape) * dtype.itemsize
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if not wanted <= memory.size <= 2 * wanted:
            memory = np.empty(wanted, np.uint8)
        # A tensor of `rows` holds this very array, and parts of the tensor hold the tensor's memory. Parts of the array
        # do not: who writes to them has to be done before it goes.
        rows = memory[:wanted].view(dtype).reshape(shape)
        weakref.finalize(rows, self._free.append, memory).atexit = False
        return rows


class TileImages(Protocol):
    """Tiles by row.

    Attributes:
        shape: of a row: (H, W, 3), or (D,) of features.
        held: they lie in memory, and reading them costs nothing.
        ahead: a chunk may be read by a thread while the one before it is computed.
        waited: who waits for rows to be read adds the time here.
    """

    shape: tuple[int, ...]
    held: bool
    ahead: bool
    waited: Stopwatch

    def read(self, start: int, stop: int) -> Tensor:
        """uint8 RGB (c, H, W, 3) of rows start..stop - 1, or float32 (c, D)."""
        ...


class HeldImages:
    """All tiles in one tensor.

    Args:
        image_nHWC: uint8 RGB, or float32 features (n, D).
    """

    held = ahead = True

    def __init__(self, image_nHWC: Tensor) -> None:
        self.image_nHWC = image_nHWC
        self.waited = Stopwatch()
        self.shape = tuple(image_nHWC.shape[1:])

    def read(self, start: int, stop: int) -> Tensor:
        """A view."""
        return self.image_nHWC[start:stop]


class StoredImages:
    """Tiles that are read and decoded each time, because all of them together would take too much memory.

    Args:
        spans: (slide id, first tile, one past the last) of this rank's runs, in row order.
        side: H = W.
        decode: (slide id, first tile, one past the last) -> uint8 (c, H, W, 3), or float32 (c, D).
        dim: D, if rows are features; None if they are images.
        waited: stopwatch of the loader.
        ahead: as of `TileImages`.
    """

    held = False

    def __init__(
        self,
        spans: Sequence[tuple[str, int, int]],
        side: int,
        decode: Callable[[str, int, int], Tensor],
        dim: int | None = None,
        waited: Stopwatch | None = None,
        ahead: bool = True,
    ) -> None:
        self.waited = Stopwatch() if waited is None else waited
        self.ahead = ahead
        self._empty = torch.empty((0, side, side, 3), dtype=torch.uint8) if dim is None else torch.empty((0, dim))
        self.shape = tuple(self._empty.shape[1:])
        self.row_bytes = math.prod(self.shape) * self._empty.element_size()
        self._spans = spans
        self._decode = decode

    def read(self, start: int, stop: int) -> Tensor:
        """Read and decode."""
        parts, row = [self._empty], 0
        for slide_id, first, last in self._spans:
            a, b = max(start - row, 0), min(stop - row, last - first)
            if a < b:
                parts.append(self._decode(slide_id, first + a, first + b))
            row += last - first
        return parts[1] if len(parts) == 2 else torch.cat(parts)


class ChunkFeed:
    """Chunks of a step's tiles on the device; the next one is read and copied while this one computes, if it may be.

    Args:
        images: tiles of the step.
        device: where they are wanted.
        cache_bytes: memory of the device for chunks that are asked for twice.
    """

    def __init__(self, images: TileImages, device: torch.device, cache_bytes: int) -> None:
        self._images = images
        self._device = device
        self._left = cache_bytes
        self._cached: dict[tuple[int, int], Tensor] = {}
        self._ahead: tuple[tuple[int, int], Future[Tensor]] | None = None
        # Views of main memory need no thread.
        self._is_free = images.held and device.type == "cpu"
        self._thread = ThreadPoolExecutor(1, "gigamil-chunks") if images.ahead and not self._is_free else None
        self._stream = _copy_stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def get(self, start: int, stop: int, upcoming: tuple[int, int] | None = None) -> Tensor:
        """Rows start..stop - 1 on the device: uint8 (c, H, W, 3), or float32 (c, D).

        Args:
            upcoming: rows that will be asked for next; they are prepared meanwhile.
        """
        if self._is_free:
            return self._images.read(start, stop)
        rows, ahead = (start, stop), self._ahead
        self._ahead = None
        if rows in self._cached:
            image = self._cached[rows]
        else:
            with self._images.waited.running():
                image = ahead[1].result() if ahead is not None and ahead[0] == rows else self._load(start, stop)
            if image.nbytes <= self._left:
                self._left -= image.nbytes
                self._cached[rows] = image
        if self._stream is not None:
            # The copy runs beside the computation, which has to wait for its end. The next chunk is asked for after
            # that, below, or the computation could wait for its copy too.
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            image.record_stream(current)
        if ahead is not None and ahead[0] == upcoming:
            self._ahead = ahead
        elif self._thread is not None and upcoming is not None and upcoming not in self._cached:
            self._ahead = upcoming, self._thread.submit(self._load, *upcoming)
        return image

    def _load(self, start: int, stop: int) -> Tensor:
        image = self._images.read(start, stop)
        if self._stream is None:
            return image.to(self._device)
        with torch.cuda.stream(self._stream):
            return image.pin_memory().to(self._device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to a device. Memory goes back to the stream that it was taken on: with a stream for
    each feed, the chunks of one step would lie unused beside those of the next."""
    return torch.cuda.Stream(device)

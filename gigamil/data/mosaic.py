"""Blocks of slides, put together of tiles. So a pixel is the same in every block that shows it.

Shapes: h w cells of a slide's grid, n tiles, H W image.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import numpy as np

from gigamil.data.threads import ReadThreads

WHITE = 255
ReadTiles = Callable[[str, int, int], np.ndarray]  # slide id, first number, one past the last -> (n, side, side, 3)


class Mosaic:
    """Tiles that are read on some threads, and kept for the next blocks, as neighbours share them.

    Args:
        tile_px: side of a tile.
        workers: threads that read; fewer than two: who asks reads.
        piece: tiles that one thread reads at a time, at most.
        kept_bytes: memory for the tiles that were used last, one at least.
    """

    def __init__(self, tile_px: int, workers: int, piece: int, kept_bytes: int) -> None:
        self._tile_px, self._piece = tile_px, piece
        self._threads = ReadThreads(workers)
        self._most_kept = max(1, kept_bytes // (3 * tile_px**2))
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def block(
        self, slide_id: str, number_hw: np.ndarray, read: ReadTiles, box: tuple[int, int, int, int]
    ) -> np.ndarray:
        """A part of a slide.

        Args:
            number_hw: int, the tile of each cell of the slide's grid; -1: none, white.
            read: tiles by their numbers.
            box: top, left, height and width in pixels of the tiles.
        Returns:
            uint8 (height, width, 3), RGB.
        Raises:
            What `read` raises; of several errors that of the lowest number, whatever the number of threads.
        Cost: a read of the tiles that are not kept. Memory for those that the threads have in hand, beside the result.
        """
        top, left, height, width = box
        side, image_HW3 = self._tile_px, np.full((height, width, 3), WHITE, np.uint8)
        row, col = max(0, top // side), max(0, left // side)
        inside_hw = number_hw[row : -(-(top + height) // side), col : -(-(left + width) // side)]
        corners = {
            int(number): ((row + i) * side - top, (col + j) * side - left)
            for (i, j), number in np.ndenumerate(inside_hw)
            if number >= 0
        }

        def read_piece(numbers: range) -> None:
            tiles = read(slide_id, numbers.start, numbers.stop)
            for number, tile_HW3 in zip(numbers, tiles, strict=True):
                _paste(image_HW3, tile_HW3, *corners[number])
                self._keep((slide_id, number), tile_HW3)

        missing = []
        for number in sorted(corners):
            tile_HW3 = self._find((slide_id, number))
            if tile_HW3 is None:
                missing.append(number)
            else:
                _paste(image_HW3, tile_HW3, *corners[number])
        self._threads.run([partial(read_piece, numbers) for numbers in self._pieces(missing)])
        return image_HW3

    def _pieces(self, numbers: list[int]) -> list[range]:
        """Runs of ascending numbers, as long as they may be where all threads are to have work."""
        most = max(1, min(self._piece, -(-len(numbers) // max(1, self._threads.number))))
        found: list[range] = []
        for number in numbers:
            if found and found[-1].stop == number and len(found[-1]) < most:
                found[-1] = range(found[-1].start, number + 1)
            else:
                found.append(range(number, number + 1))
        return found

    def _find(self, key: tuple[str, int]) -> np.ndarray | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, int], tile_HW3: np.ndarray) -> None:
        tile_HW3 = tile_HW3.copy()  # a part of an array would keep all of it
        with self._lock:
            self._kept[key] = tile_HW3
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)


def _paste(image_HW3: np.ndarray, tile_HW3: np.ndarray, y: int, x: int) -> None:
    """Put a tile with its corner at (y, x), of which a part may lie outside the image."""
    height, width = image_HW3.shape[:2]
    side = len(tile_HW3)
    y0, x0, y1, x1 = max(0, y), max(0, x), min(height, y + side), min(width, x + side)
    image_HW3[y0:y1, x0:x1] = tile_HW3[y0 - y : y1 - y, x0 - x : x1 - x]

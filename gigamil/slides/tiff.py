"""The JPEG tiles of a TIFF, as bytes and as pixels: what OpenSlide decodes, without OpenSlide.

OpenSlide 4 composes each region with cairo: 1.2 ms for a tile of 256 pixels whose decoding takes 0.2. Files of the two
plainest layouts (Aperio SVS and generic tiled TIFF, 8-bit JPEG) can be read tile by tile instead. What is not of
exactly that kind is left to OpenSlide, and so is every single tile that is missing, damaged or of an odd kind.

Source: TIFF 6.0, Adobe 1992; TIFF Technical Note 2 (JPEG tables); ITU-T T.81 (JPEG markers). Test: test_native.py
"""

import logging
import math
import os
import re
import struct
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import simplejpeg
import tifffile

from gigamil.slides.backend import shown

# It logs what it finds odd in a file, with text from the file, and would do so on a user's terminal.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)

MAX_DIRECTORIES = 256
MAX_TILE_PX = 4096
MAX_FRONT = 4096  # bytes before the scan that are remembered; tables take 600
MAX_SCANS = 32  # of a progressive JPEG: each costs a pass over the tile
CACHE_BYTES = 32 << 20  # of decoded tiles of one open slide, at least one tile
JPEG, RGB, YCBCR, CONTIGUOUS = 7, 2, 6, 1

_SOI, _SOS, _EOI = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_PROGRESSIVE = b"\xff\xc2"
_EMPTY_SCAN = _SOS + b"\0\2" + _EOI
# Decoders take colours from these two alone: JFIF is YCbCr, Adobe with transform 0 is RGB.
_JFIF = b"\xff\xe0" + struct.pack(">H5sHBHHBB", 16, b"JFIF\0", 0x0102, 0, 1, 1, 0, 0)
_ADOBE_RGB = b"\xff\xee" + struct.pack(">H5sHHHB", 14, b"Adobe", 100, 0, 0, 0)
_TABLES = (0xC4, 0xDB, 0xDD)  # Huffman, quantisation, restart interval
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman
_SCAN, _END = 0xDA, 0xD9
_DROPPED = (*range(0xE0, 0xF0), 0xFE)  # applications' segments (EXIF, XMP, ICC) and comments
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # a marker, not a stuffed byte or a restart
_SAMPLING = ((1, 1), (2, 1), (1, 2), (2, 2))


class NotTiled(ValueError):
    """A file, or a level of it, is not of the kind that is read tile by tile; the text says why."""


@dataclass(frozen=True)
class TileLevel:
    """Where the JPEG tiles of one level lie in the file."""

    width: int
    height: int
    tile_w: int
    tile_h: int
    rgb: bool  # the JPEG holds red, green, blue as they are, else YCbCr
    tables: bytes  # segments that all tiles share
    offsets: np.ndarray
    lengths: np.ndarray

    @property
    def num_x(self) -> int:
        """Columns of tiles; the last may hang over the edge."""
        return -(-self.width // self.tile_w)


class JpegTiles:
    """The tiles of an open TIFF, level by level, for one thread. It keeps 32 MiB of decoded tiles, at least one tile.

    Args:
        path: the file.
        level_dimensions: (width, height) of the levels wanted, as OpenSlide has them.
    Raises:
        NotTiled: the structure of the file cannot be read.
    Cost: the headers of all levels; 16 bytes of memory per tile of the file.
    """

    def __init__(self, path: Path, level_dimensions: tuple[tuple[int, int], ...]) -> None:
        self.levels, self.refusals = _read_levels(path, level_dimensions)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Decoded tiles lie in slots that are used again: fresh memory costs as much as half of the decoding.
        self._slots = np.empty((0, 0, 0, 3), np.uint8)
        self._free_slots: list[int] = []
        self._slot_of: OrderedDict[tuple[int, int], int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file handle back."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._slots = np.empty((0, 0, 0, 3), np.uint8)
        self._slot_of.clear()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()

    def level(self, number: int) -> TileLevel:
        """A level; NotTiled says why it is not read tile by tile."""
        level = self.levels[number]
        if level is None:
            raise NotTiled(self.refusals[number])
        return level

    def jpeg(self, number: int, col: int, row: int) -> bytes | None:
        """One tile as a JPEG of its own, with all tables and without any text; None if there is no such tile.

        The header is checked (8 bit, three components, the size of the grid), the pixels are not.
        """
        level = self.level(number)
        data = self._bytes(level, row * level.num_x + col)
        return None if data is None else clean_jpeg(data, level.tables, level.tile_w, level.tile_h, rgb=level.rgb)

    def _bytes(self, level: TileLevel, index: int) -> bytes | None:
        length = int(level.lengths[index])
        # No JPEG is larger than its pixels; a file that says so would only fill the memory.
        if not 0 < length <= 4 * level.tile_w * level.tile_h:
            return None
        try:
            data = os.pread(self._fd, length, int(level.offsets[index]))
        except OSError:
            return None
        return data if len(data) == length else None

    def pixels(self, number: int, col: int, row: int) -> np.ndarray | None:
        """One tile, uint8 [tile_h, tile_w, 3], RGB; None if it is missing or cannot be decoded.

        The array is this object's own, and good until the next call.
        """
        level = self.level(number)
        key = (number, row * level.num_x + col)
        known = self._slot_of.get(key)
        if known is not None:
            self._slot_of.move_to_end(key)
            return self._slots[known]
        data = self._bytes(level, key[1])
        jpeg = None if data is None else decodable_jpeg(data, level)
        if jpeg is None:
            return None
        shape = (level.tile_h, level.tile_w, 3)
        if self._slots.shape[1:] != shape:
            self._slots = np.empty((max(1, CACHE_BYTES // math.prod(shape)), *shape), np.uint8)
            self._free_slots = list(range(len(self._slots)))
            self._slot_of.clear()
        slot = self._free_slots.pop() if self._free_slots else self._slot_of.popitem(last=False)[1]
        out_HW3 = self._slots[slot]
        try:
            simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, strict=True, buffer=out_HW3)
        except ValueError:  # libjpeg has so much as a warning
            self._free_slots.append(slot)
            return None
        self._slot_of[key] = slot
        return out_HW3

    def read(self, number: int, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """Pixels of a level, uint8 [height, width, 3], all inside it; None if a tile is missing or damaged."""
        level = self.level(number)
        w, h = level.tile_w, level.tile_h
        out_HW3 = np.empty((height, width, 3), np.uint8)
        for row in range(y // h, (y + height - 1) // h + 1):
            top, bottom = max(y, row * h), min(y + height, (row + 1) * h)
            for col in range(x // w, (x + width - 1) // w + 1):
                tile_HW3 = self.pixels(number, col, row)
                if tile_HW3 is None:
                    return None
                left, right = max(x, col * w), min(x + width, (col + 1) * w)
                part = tile_HW3[top - row * h : bottom - row * h, left - col * w : right - col * w]
                out_HW3[top - y : bottom - y, left - x : right - x] = part
        return out_HW3


def is_sound(jpeg: bytes) -> bool:
    """Whether a JPEG decodes to its end without a warning. Cost: two thirds of decoding it."""
    try:
        simplejpeg.decode_jpeg(jpeg, "GRAY", min_factor=8, strict=True)
    except ValueError:
        return False
    return True


def clean_jpeg(tile: bytes, tables: bytes, width: int, height: int, *, rgb: bool) -> bytes | None:
    """A tile of a TIFF as a JPEG file: with the shared tables, its colour space stated, and without any text.

    Only tables, frame and scans are taken; comments, EXIF, and what lies behind the end are left out.

    Args:
        tile: the bytes in the file; tables: segments to put in front, without start and end.
        width, height: that the frame must have.
        rgb: its components are red, green and blue, whatever the tile itself says.
    Returns:
        The JPEG; None if it is not 8 bit, three components (the second and third at full or half resolution),
        baseline or progressive with Huffman codes, or has no end.
    Cost: one search over the bytes.
    """
    scan_at, front = _shared_front(tile, tables, width, height, rgb)
    # Nearly every tile has one scan, to its end.
    end = None if front is None else _end_of_scan(tile, scan_at + len(_SOS))
    if front is not None and end is not None and tile.startswith(_EOI, end):
        return front + tile[scan_at:end] + _EOI
    return _walk(tile, tables, width, height, rgb)


def decodable_jpeg(tile: bytes, level: TileLevel) -> bytes | None:
    """What `clean_jpeg` gives, except that text may be left behind the first scan. For decoding, not for keeping."""
    scan_at, front = _shared_front(tile, level.tables, level.tile_w, level.tile_h, level.rgb)
    if front is None or _PROGRESSIVE in front:
        return clean_jpeg(tile, level.tables, level.tile_w, level.tile_h, rgb=level.rgb)
    return front + tile[scan_at:]


def _shared_front(tile: bytes, tables: bytes, width: int, height: int, rgb: bool) -> tuple[int, bytes | None]:
    """Where the scan starts, and what is put before it. Nearly every tile has the front of its neighbours."""
    scan_at = tile.find(_SOS, 0, MAX_FRONT)
    return scan_at, _front(tile[:scan_at], tables, width, height, rgb) if scan_at > 0 else None


@lru_cache(maxsize=32)
def _front(front: bytes, tables: bytes, width: int, height: int, rgb: bool) -> bytes | None:
    """What is taken of the segments before the scan; None if they are not whole, or odd."""
    whole = _walk(front + _EMPTY_SCAN, tables, width, height, rgb)
    return None if whole is None else whole.removesuffix(_EMPTY_SCAN)


def _walk(tile: bytes, tables: bytes, width: int, height: int, rgb: bool) -> bytes | None:
    """`clean_jpeg`, segment by segment."""
    if not tile.startswith(_SOI):
        return None
    parts, at, num_frames, num_scans = [_SOI, _ADOBE_RGB if rgb else _JFIF, tables], 2, 0, 0
    while True:
        found = _segment(tile, at)
        if found is None:
            return None
        marker, segment, at = found
        if marker == _END:
            break
        if marker in _FRAMES:
            num_frames += 1
            if not _fits(segment, width, height):
                return None
        elif marker == _SCAN:
            num_scans += 1
            end = _end_of_scan(tile, at)
            if end is None:
                return None
            segment, at = tile[at - len(segment) : end], end
        elif marker not in _TABLES and marker not in _DROPPED:
            return None
        if marker not in _DROPPED:
            parts.append(segment)
    return b"".join([*parts, _EOI]) if num_frames == 1 and 1 <= num_scans <= MAX_SCANS else None


def num_directories(path: Path) -> int:
    """Pages of a TIFF: 0, 1, or 2 for more. 0: its first directory cannot be read."""
    try:
        with tifffile.TiffFile(path) as file:
            tiff, first = file.tiff, file.pages.first
            handle = file.filehandle
            handle.seek(first.offset)
            (num_tags,) = struct.unpack(tiff.tagnoformat, handle.read(tiff.tagnosize))
            handle.seek(first.offset + tiff.tagnosize + num_tags * tiff.tagsize)
            (following,) = struct.unpack(tiff.offsetformat, handle.read(tiff.offsetsize))
    except Exception:  # noqa: BLE001 of a dozen kinds, on damaged files
        return 0
    return 2 if following else 1


def _segment(data: bytes, at: int) -> tuple[int, bytes, int] | None:
    """(marker, the segment with its marker, where the next one starts); None at the end of the data."""
    while data[at : at + 2] == b"\xff\xff":  # fill bytes
        at += 1
    if len(data) < at + 2 or data[at] != 0xFF:
        return None
    marker = data[at + 1]
    if marker == _END:
        return marker, _EOI, at + 2
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return (marker, data[at:end], end) if at + 4 <= end <= len(data) else None


def _end_of_scan(data: bytes, start: int) -> int | None:
    """Where the next marker after the compressed data from `start` stands; None if there is none."""
    end = data.find(_EOI, start)
    # Nearly always it is the last scan, without restarts: then every 0xFF in it is followed by 0.
    if end >= 0:
        bytes_N = np.frombuffer(data, np.uint8, end - start, start)
        if not bytes_N[np.flatnonzero(bytes_N[:-1] == 0xFF) + 1].any():
            return end
    found = _AFTER_SCAN.search(data, start)
    return None if found is None else found.start()


def _fits(frame: bytes, width: int, height: int) -> bool:
    if len(frame) != 19:  # three components
        return False
    precision, rows, cols, num_components = struct.unpack_from(">BHHB", frame, 4)
    sampling = [(frame[at] >> 4, frame[at] & 15) for at in (11, 14, 17)]
    half = sampling[0] in _SAMPLING and sampling[1] == sampling[2] == (1, 1)
    return (precision, rows, cols, num_components) == (8, height, width, 3) and half


def _read_levels(
    path: Path, level_dimensions: tuple[tuple[int, int], ...]
) -> tuple[list[TileLevel | None], dict[int, str]]:
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in islice(file.pages, MAX_DIRECTORIES) if isinstance(page, tifffile.TiffPage)]
            levels: list[TileLevel | None] = []
            refusals = {}
            for number, size in enumerate(level_dimensions):
                fitting = [page for page in pages if page.is_tiled and (page.imagewidth, page.imagelength) == size]
                try:
                    levels.append(_read_level(fitting))
                except NotTiled as reason:
                    levels.append(None)
                    refusals[number] = str(reason)
    except Exception as error:  # of a dozen kinds, on damaged files
        raise NotTiled(f"the structure of the TIFF cannot be read: {shown(error)}") from error
    return levels, refusals


def _read_level(pages: list[tifffile.TiffPage]) -> TileLevel:
    if len(pages) != 1:
        raise NotTiled(f"{len(pages)} tiled images of the level's size in the file")
    (page,) = pages
    if page.compression != JPEG:
        raise NotTiled("its tiles are not JPEG")
    if (page.bitspersample, page.samplesperpixel, page.planarconfig) != (8, 3, CONTIGUOUS):
        raise NotTiled("its tiles are not three interleaved samples of 8 bit")
    if page.photometric not in (RGB, YCBCR):
        raise NotTiled("its colours are neither RGB nor YCbCr")
    if page.imagedepth != 1 or max(page.tilewidth, page.tilelength) > MAX_TILE_PX or page.fillorder != 1:
        raise NotTiled("its tiles are of an unusual layout")
    tables = page.jpegtables or _SOI + _EOI
    segments, at = [], 2
    while (found := _segment(tables, at)) is not None and found[0] != _END:
        marker, segment, at = found
        if marker in _TABLES:
            segments.append(segment)
    offsets, lengths = (np.array(values, np.int64) for values in (page.dataoffsets, page.databytecounts))
    level = TileLevel(
        width=page.imagewidth,
        height=page.imagelength,
        tile_w=page.tilewidth,
        tile_h=page.tilelength,
        rgb=page.photometric == RGB,
        tables=b"".join(segments),
        offsets=offsets,
        lengths=lengths,
    )
    if not len(offsets) == len(lengths) == level.num_x * -(-level.height // level.tile_h):
        raise NotTiled("its list of tiles is incomplete")
    return level

"""Writing a pyramidal, JPEG-tiled TIFF that OpenSlide opens, from an RGB array.

Written by hand (a dozen tags) because tifffile needs the imagecodecs package for JPEG, also for tiles that are
encoded already. Source: TIFF 6.0 specification, Adobe 1992, and TIFF Technical Note 2 for JPEG.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

SHORT, LONG, RATIONAL = 3, 4, 5
TYPE_FORMAT = {SHORT: "H", LONG: "I", RATIONAL: "I"}
NO_UNIT, CENTIMETER = 1, 3
OFFSET_BYTES = 4
FIRST_DIRECTORY_AT = 4
# Resolutions are kept as 10 000 um per cm over mpp, both times this: an mpp of up to 5 decimals comes back exact.
MPP_STEPS = 100_000

Tag = tuple[int, int, list[int]]  # number, type, values (a rational is two)


def write_pyramid_tiff(
    path: Path | str,
    image_HW3: np.ndarray,
    mpp: float | tuple[float, float] | None,
    *,
    tile: int = 256,
    quality: int = 85,
    levels: int = 3,
) -> None:
    """Write an RGB image as a pyramid of JPEG tiles, which OpenSlide opens as generic-tiff.

    Args:
        image_HW3: uint8 RGB.
        mpp: micron per pixel of level 0, or (x, y), kept as resolution tags; None keeps none.
        tile: side of the JPEG tiles in pixels, a multiple of 16.
        quality: of JPEG, 1 to 100, colour at half resolution.
        levels: number of pyramid levels; each halves the one before.
    Raises:
        struct.error: the file would exceed 4 GiB, which this flavour of TIFF cannot address.
    Cost: one JPEG encoding of 4/3 of the image. The same input gives the same bytes.
    """
    with Path(path).open("wb") as file:
        file.write(struct.pack("<2sHI", b"II", 42, 0))
        pointer_at = FIRST_DIRECTORY_AT
        level_HW3 = image_HW3
        for level in range(levels):
            if level:
                level_HW3 = halved(level_HW3)
            tags = _level_tags(file, level_HW3, tile, quality, level) + _resolution_tags(mpp, 2**level)
            pointer_at = _write_directory(file, sorted(tags), pointer_at)


def halved(image_HW3: np.ndarray) -> np.ndarray:
    """Half the size on each axis, rounded down, by averaging 2 x 2 pixels."""
    image = Image.fromarray(image_HW3)
    return np.asarray(image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX))


def _level_tags(file: BinaryIO, image_HW3: np.ndarray, tile: int, quality: int, level: int) -> list[Tag]:
    """Write the tiles of a level; returns the tags that describe it."""
    offsets, lengths = [], []
    for jpeg in _jpeg_tiles(image_HW3, tile, quality):
        offsets.append(file.tell())
        lengths.append(file.write(jpeg))
    height, width = image_HW3.shape[:2]
    return [
        (254, LONG, [1 if level else 0]),  # a reduced copy?
        (256, LONG, [width]),
        (257, LONG, [height]),
        (258, SHORT, [8, 8, 8]),  # bits per sample
        (259, SHORT, [7]),  # compression: JPEG
        (262, SHORT, [6]),  # colour: YCbCr
        (277, SHORT, [3]),  # samples per pixel
        (284, SHORT, [1]),  # interleaved
        (322, LONG, [tile]),
        (323, LONG, [tile]),
        (324, LONG, offsets),
        (325, LONG, lengths),
        (530, SHORT, [2, 2]),  # colour at half resolution
    ]


def _resolution_tags(mpp: float | tuple[float, float] | None, scale: int) -> list[Tag]:
    if mpp is None:
        return [(296, SHORT, [NO_UNIT])]
    mpp_x, mpp_y = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    return [
        (282, RATIONAL, [10_000 * MPP_STEPS, round(mpp_x * scale * MPP_STEPS)]),
        (283, RATIONAL, [10_000 * MPP_STEPS, round(mpp_y * scale * MPP_STEPS)]),
        (296, SHORT, [CENTIMETER]),
    ]


def _write_directory(file: BinaryIO, tags: list[Tag], pointer_at: int) -> int:
    """Append a directory of tags and point to it from `pointer_at`; returns where the pointer to the next one is.

    Values of up to four bytes stand in the entry itself, longer ones before the directory.
    """
    entries = b""
    for number, kind, values in tags:
        data = struct.pack(f"<{len(values)}{TYPE_FORMAT[kind]}", *values)
        if len(data) > OFFSET_BYTES:
            _align(file)
            data_at = file.tell()
            file.write(data)
            data = struct.pack("<I", data_at)
        count = len(values) // 2 if kind == RATIONAL else len(values)
        entries += struct.pack("<HHI", number, kind, count) + data.ljust(OFFSET_BYTES, b"\0")
    _align(file)
    directory_at = file.tell()
    file.write(struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))
    end = file.tell()
    file.seek(pointer_at)
    file.write(struct.pack("<I", directory_at))
    file.seek(end)
    return end - OFFSET_BYTES


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (file.tell() % 2))  # offsets are even in TIFF


def _jpeg_tiles(image_HW3: np.ndarray, tile: int, quality: int) -> Iterator[bytes]:
    height, width = image_HW3.shape[:2]
    padded = np.pad(image_HW3, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            block = np.ascontiguousarray(padded[top : top + tile, left : left + tile])
            yield simplejpeg.encode_jpeg(block, quality=quality, colorspace="RGB", colorsubsampling="420")

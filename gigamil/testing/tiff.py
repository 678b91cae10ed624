"""Writing a pyramidal, JPEG-tiled TIFF that OpenSlide opens, from an RGB array.

Written by hand (a dozen tags) because tifffile needs the imagecodecs package for JPEG, also for tiles that are
encoded already. Source: TIFF 6.0 specification, Adobe 1992, and TIFF Technical Note 2 for JPEG.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

ASCII, SHORT, LONG, RATIONAL, BYTES, LONG8 = 2, 3, 4, 5, 7, 16
TYPE_FORMAT = {ASCII: "B", SHORT: "H", LONG: "I", RATIONAL: "I", BYTES: "B", LONG8: "Q"}
NO_UNIT, CENTIMETER = 1, 3
YCBCR, RGB = 6, 2
SAMPLING = {"444": (1, 1), "422": (2, 1), "420": (2, 2)}
# Resolutions are kept as 10 000 um per cm over mpp, both times this: an mpp of up to 5 decimals comes back exact.
MPP_STEPS = 100_000

Tag = tuple[int, int, list[int]]  # number, type, values (a rational is two)


@dataclass(frozen=True)
class _Flavour:
    """Classic TIFF has offsets of 4 bytes, BigTIFF of 8; so have the values that stand in an entry itself."""

    header: bytes
    offset: str
    num_tags: str
    count: str
    offset_kind: int
    first_directory_at: int


CLASSIC = _Flavour(struct.pack("<2sHI", b"II", 42, 0), "<I", "<H", "I", LONG, 4)
BIG = _Flavour(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0), "<Q", "<Q", "Q", LONG8, 8)


@dataclass(frozen=True)
class _Coding:
    """How tiles are encoded."""

    tile: int
    quality: int
    subsampling: str
    rgb: bool
    shared_tables: bool


def write_pyramid_tiff(
    path: Path | str,
    image_HW3: np.ndarray,
    mpp: float | tuple[float, float] | None,
    *,
    tile: int = 256,
    quality: int = 85,
    levels: int = 3,
    subsampling: str = "420",
    rgb: bool = False,
    shared_tables: bool = False,
    big: bool = False,
    description: str | None = None,
    repeat: tuple[int, int] = (1, 1),
) -> None:
    """Write an RGB image as a pyramid of JPEG tiles, which OpenSlide opens as generic-tiff.

    Args:
        image_HW3: uint8 RGB.
        mpp: micron per pixel of level 0, or (x, y), kept as resolution tags; None keeps none.
        tile: side of the JPEG tiles in pixels, a multiple of 16.
        quality: of JPEG, 1 to 100.
        levels: number of pyramid levels; each halves the one before.
        subsampling: "444", "422" or "420": colour at full, half (along x) or quarter resolution.
        rgb: components are red, green and blue as they are, not YCbCr, at full resolution; as many SVS files have it.
        shared_tables: quantisation and Huffman tables once per level, not in each tile.
        big: BigTIFF, with offsets of 8 bytes.
        description: ImageDescription of level 0; "Aperio ...|MPP = 0.5" makes an SVS for OpenSlide.
        repeat: the image (columns, rows) times side by side, encoded once: large slides without the memory. Each
            level of the image must then be whole tiles.
    Raises:
        struct.error: a classic file would exceed 4 GiB.
        ValueError: `repeat` of an image that is not whole tiles.
    Cost: one JPEG encoding of 4/3 of the image. The same input gives the same bytes.
    """
    coding = _Coding(tile, quality, "444" if rgb else subsampling, rgb, shared_tables)
    flavour = BIG if big else CLASSIC
    if repeat != (1, 1) and any(side % (tile * 2 ** (levels - 1)) for side in image_HW3.shape[:2]):
        raise ValueError(f"an image of {image_HW3.shape[:2]} is not whole tiles of {tile} px on {levels} levels")
    with Path(path).open("wb") as file:
        file.write(flavour.header)
        pointer_at = flavour.first_directory_at
        level_HW3 = image_HW3
        for level in range(levels):
            if level:
                level_HW3 = halved(level_HW3)
            tags = _level_tags(file, level_HW3, coding, level, flavour, repeat) + _resolution_tags(mpp, 2**level)
            if description is not None and not level:
                tags.append((270, ASCII, [*description.encode(), 0]))
            pointer_at = _write_directory(file, sorted(tags), pointer_at, flavour)


def halved(image_HW3: np.ndarray) -> np.ndarray:
    """Half the size on each axis, rounded down, by averaging 2 x 2 pixels."""
    image = Image.fromarray(image_HW3)
    return np.asarray(image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX))


def _level_tags(
    file: BinaryIO, image_HW3: np.ndarray, coding: _Coding, level: int, flavour: _Flavour, repeat: tuple[int, int]
) -> list[Tag]:
    """Write the tiles of a level; returns the tags that describe it."""
    height, width = image_HW3.shape[:2]
    jpegs = list(_jpeg_tiles(image_HW3, coding))
    num_x = -(-width // coding.tile)
    offsets, lengths = [], []
    for _ in range(repeat[1]):
        for start in range(0, len(jpegs), num_x):
            for jpeg in jpegs[start : start + num_x] * repeat[0]:
                offsets.append(file.tell())
                lengths.append(file.write(jpeg))
    tables: list[Tag] = []
    if coding.shared_tables:
        tables = [(347, BYTES, list(_encoded(np.zeros((16, 16, 3), np.uint8), coding, streamtype=1)))]
    return [
        (254, LONG, [1 if level else 0]),  # a reduced copy?
        (256, LONG, [width * repeat[0]]),
        (257, LONG, [height * repeat[1]]),
        (258, SHORT, [8, 8, 8]),  # bits per sample
        (259, SHORT, [7]),  # compression: JPEG
        (262, SHORT, [RGB if coding.rgb else YCBCR]),
        (277, SHORT, [3]),  # samples per pixel
        (284, SHORT, [1]),  # interleaved
        (322, LONG, [coding.tile]),
        (323, LONG, [coding.tile]),
        (324, flavour.offset_kind, offsets),
        (325, LONG, lengths),
        (530, SHORT, list(SAMPLING[coding.subsampling])),  # resolution of colour
        *tables,
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


def _write_directory(file: BinaryIO, tags: list[Tag], pointer_at: int, flavour: _Flavour) -> int:
    """Append a directory of tags and point to it from `pointer_at`; returns where the pointer to the next one is.

    Values no longer than an offset stand in the entry itself, longer ones before the directory.
    """
    offset_bytes = struct.calcsize(flavour.offset)
    entries = b""
    for number, kind, values in tags:
        data = struct.pack(f"<{len(values)}{TYPE_FORMAT[kind]}", *values)
        if len(data) > offset_bytes:
            _align(file)
            data_at = file.tell()
            file.write(data)
            data = struct.pack(flavour.offset, data_at)
        count = len(values) // 2 if kind == RATIONAL else len(values)
        entries += struct.pack(f"<HH{flavour.count}", number, kind, count) + data.ljust(offset_bytes, b"\0")
    _align(file)
    directory_at = file.tell()
    file.write(struct.pack(flavour.num_tags, len(tags)) + entries + struct.pack(flavour.offset, 0))
    end = file.tell()
    file.seek(pointer_at)
    file.write(struct.pack(flavour.offset, directory_at))
    file.seek(end)
    return end - offset_bytes


def _align(file: BinaryIO) -> None:
    file.write(b"\0" * (file.tell() % 2))  # offsets are even in TIFF


def _jpeg_tiles(image_HW3: np.ndarray, coding: _Coding) -> Iterator[bytes]:
    height, width = image_HW3.shape[:2]
    tile = coding.tile
    padded = np.pad(image_HW3, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            block = np.ascontiguousarray(padded[top : top + tile, left : left + tile])
            if coding.rgb or coding.shared_tables:
                yield _encoded(block, coding, streamtype=2 if coding.shared_tables else 0)
            else:
                yield simplejpeg.encode_jpeg(
                    block, quality=coding.quality, colorspace="RGB", colorsubsampling=coding.subsampling
                )


def _encoded(block_HW3: np.ndarray, coding: _Coding, streamtype: int) -> bytes:
    """By Pillow, which can keep RGB, and write the tables (1) and the rest (2) apart."""
    buffer = BytesIO()
    Image.fromarray(block_HW3).save(
        buffer,
        "JPEG",
        quality=coding.quality,
        subsampling={"444": 0, "422": 1, "420": 2}[coding.subsampling],
        keep_rgb=coding.rgb,
        streamtype=streamtype,
    )
    return buffer.getvalue()

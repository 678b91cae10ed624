"""Slide files: the only import of OpenSlide. Regions are asked for in micron, so a slide needs a known mpp."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import openslide
from PIL import Image

from gigamil.errors import SlideError

# Scanners lie between 0.1 (100x) and 30 (overview images) micron per pixel; what is outside is a wrong unit or a stub.
MIN_MPP, MAX_MPP = 0.05, 60.0
# A level that is this little too coarse is still taken: pyramids round their sizes (a "4x" level may be 4.002x).
LEVEL_TOLERANCE = 1.02
# A finer level than needed is read and reduced where it is at most this much finer: some writers make levels without
# antialiasing, and the tiles of one slide in two formats then differ by 11 grey levels at 1 um instead of 4.
MAX_DETAIL = 2.1
# Largest source region in one read (64 MiB as RGBA); larger ones, as thumbnails of a flat slide, are read in parts.
MAX_READ_PX = 4096 * 4096
# Bicubic keeps a near-identity (0.499 to 0.5 um) equally sharp everywhere, and rings less than Lanczos.
KERNEL = Image.Resampling.BICUBIC
# Its half width in output pixels: so many neighbours are read too, which leaves tiles seamless.
KERNEL_SUPPORT = 2
WHITE = (255, 255, 255)


class MppError(SlideError):
    """The micron per pixel of a slide are unknown or cannot be true."""


@dataclass(frozen=True)
class SlideInfo:
    """What is known of a slide before a pixel is read; sizes in level-0 pixels unless the name says micron."""

    path: Path
    vendor: str
    width: int
    height: int
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...]
    mpp_x: float
    mpp_y: float
    mpp_source: str  # "table", "file" or "default"
    objective: str | None  # only displayed, never computed with
    bounds_x: int  # QuPath counts its coordinates from these
    bounds_y: int

    @property
    def width_um(self) -> float:
        """Width in micron."""
        return self.width * self.mpp_x

    @property
    def height_um(self) -> float:
        """Height in micron."""
        return self.height * self.mpp_y


class Slide:
    """An open slide. Use it as a context manager, one per process: a handle does not survive a fork."""

    def __init__(self, handle: openslide.OpenSlide, file: Path, info: SlideInfo) -> None:
        """Use `open_slide` instead."""
        self.info = info
        self._handle = handle
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the file handle back."""
        self._handle.close()

    def read_um(
        self, x_um: float, y_um: float, width_um: float, height_um: float, out_w: int, out_h: int
    ) -> np.ndarray:
        """Read a region given in micron, resampled to a given size.

        A level at least as fine is read and reduced with an antialiasing kernel that also sees the neighbours of the
        region: adjacent regions meet without a seam, and mpp_x may differ from mpp_y.

        Args:
            x_um, y_um: top left corner, from the corner of level 0; may lie outside the slide.
            width_um, height_um: extent, > 0.
            out_w, out_h: size of the result in pixels, >= 1.
        Returns:
            uint8 [out_h, out_w, 3], RGB. What is outside the slide or transparent is white.
        Raises:
            SlideError: the region cannot be decoded, also not after the file was opened again.
        Cost: decodes up to 4 times the pixels of the result where levels are halved, up to 16 times where they are
            quartered, and the region at level 0 where there is no other level.
        """
        info = self.info
        box = (x_um / info.mpp_x, y_um / info.mpp_y, width_um / info.mpp_x, height_um / info.mpp_y)
        level = self._level_for(box[2] / out_w, box[3] / out_h)
        return self._read_box(level, box, out_w, out_h)

    def thumbnail(self, mpp: float) -> np.ndarray:
        """Read the whole slide at `mpp` micron per pixel.

        Returns:
            uint8 [H, W, 3]. Pixel (row, col) covers exactly the square of side mpp at (col * mpp, row * mpp) micron;
            the last row and column may hang over the edge of the slide, and are white there.
        Raises:
            SlideError: as `read_um`.
        """
        # The tolerance keeps 1000.0000001 micron at 10 micron per pixel from becoming 101 pixels.
        out_w = max(1, math.ceil(self.info.width_um / mpp - 1e-6))
        out_h = max(1, math.ceil(self.info.height_um / mpp - 1e-6))
        return self.read_um(0.0, 0.0, out_w * mpp, out_h * mpp, out_w, out_h)

    def _level_for(self, scale_x: float, scale_y: float) -> int:
        """Finest level of those up to `MAX_DETAIL` finer than wanted, else the next finer one, else level 0.

        Scales are level-0 pixels per output pixel.
        """
        detail = [
            min(scale_x / down_x, scale_y / down_y)
            for down_x, down_y in map(self._axis_downsamples, range(len(self.info.level_dimensions)))
        ]
        fine_enough = [level for level, ratio in enumerate(detail) if ratio * LEVEL_TOLERANCE >= 1]
        affordable = [level for level in fine_enough if detail[level] <= MAX_DETAIL]
        return affordable[0] if affordable else max(fine_enough, default=0)

    def _axis_downsamples(self, level: int) -> tuple[float, float]:
        width, height = self.info.level_dimensions[level]
        return self.info.width / width, self.info.height / height

    def _read_box(self, level: int, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
        """Resample a box (x, y, width, height in level-0 pixels, fractions allowed) of one level to out_w x out_h."""
        down_x, down_y = self._axis_downsamples(level)
        x, y, w, h = box
        if w * h > MAX_READ_PX * down_x * down_y and max(out_w, out_h) > 1:
            return self._read_halves(level, box, out_w, out_h)
        span_x = _source_span(x / down_x, w / down_x, out_w)
        span_y = _source_span(y / down_y, h / down_y, out_h)
        region, shift_x, shift_y = self._read_padded(level, span_x.first, span_y.first, span_x.num, span_y.num)
        inner = (span_x.start - shift_x, span_y.start - shift_y, span_x.stop - shift_x, span_y.stop - shift_y)
        return np.asarray(region.resize((out_w, out_h), KERNEL, box=inner))

    def _read_padded(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """Pixels (x, y, width, height) of a level on white, and how far right and down of them OpenSlide reads.

        Only what lies inside the level is asked for: OpenSlide truncates negative origins to whole pixels of the level.
        """
        level_w, level_h = self.info.level_dimensions[level]
        left, top = max(0, x), max(0, y)
        inside_w, inside_h = min(level_w, x + width) - left, min(level_h, y + height) - top
        canvas = Image.new("RGB", (width, height), WHITE)
        if inside_w <= 0 or inside_h <= 0:
            return canvas, 0.0, 0.0
        # OpenSlide takes the origin in whole level-0 pixels and divides it by its own downsample, a mean of both axes.
        down = self.info.level_downsamples[level]
        x0, y0 = round(left * down), round(top * down)
        region = self._read_region(x0, y0, level, inside_w, inside_h)
        canvas.paste(region, (left - x, top - y), mask=region.getchannel("A"))
        return canvas, x0 / down - left, y0 / down - top

    def _read_halves(self, level: int, box: tuple[float, float, float, float], out_w: int, out_h: int) -> np.ndarray:
        x, y, w, h = box
        if out_h >= out_w:
            first = out_h // 2
            cut = h * first / out_h
            above = self._read_box(level, (x, y, w, cut), out_w, first)
            return np.concatenate(
                [above, self._read_box(level, (x, y + cut, w, h - cut), out_w, out_h - first)], axis=0
            )
        first = out_w // 2
        cut = w * first / out_w
        before = self._read_box(level, (x, y, cut, h), first, out_h)
        return np.concatenate([before, self._read_box(level, (x + cut, y, w - cut, h), out_w - first, out_h)], axis=1)

    def _read_region(self, x0: int, y0: int, level: int, width: int, height: int) -> Image.Image:
        """One OpenSlide read. A failed handle fails for ever: the file is opened again and the read tried once more."""
        try:
            return self._handle.read_region((x0, y0), level, (width, height))
        except openslide.OpenSlideError:
            self._handle.close()
            self._handle = _open_handle(self._file)
        try:
            return self._handle.read_region((x0, y0), level, (width, height))
        except openslide.OpenSlideError as err:
            raise SlideError(
                f"slide '{self.info.path}': level {level}, {width} x {height} pixels at ({x0}, {y0}) cannot be read: "
                f"{err}. The file is damaged or truncated: copy it again from its source, or remove its row."
            ) from err


def open_slide(path: Path | str, *, mpp: float | None = None, default_mpp: float | None = None) -> Slide:
    """Open a slide and settle its micron per pixel.

    Args:
        path: any file that OpenSlide reads; for DICOM the folder, or any file of the pyramid.
        mpp: micron per pixel of level 0 from the slide table; wins over the file.
        default_mpp: used where neither the table nor the file has one.
    Raises:
        SlideError: the path is missing, unreadable, truncated, of an unknown format, or a folder of several slides.
        MppError: no mpp, or one outside 0.05 to 60.
    Cost: headers only.
    """
    path = Path(path)
    file, handle = _open_path(path)
    try:
        mpp_x, mpp_y, source = _settle_mpp(path, handle.properties, mpp, default_mpp)
    except MppError:
        handle.close()
        raise
    return Slide(handle, file, _describe(path, handle, mpp_x, mpp_y, source))


def is_slide(path: Path | str) -> bool:
    """Whether OpenSlide knows the format of a file; False for folders. Cost: the first bytes of the file."""
    path = Path(path)
    return path.is_file() and openslide.OpenSlide.detect_format(path) is not None


def _open_path(path: Path) -> tuple[Path, openslide.OpenSlide]:
    if not path.exists():
        raise SlideError(f"slide '{path}': no such file or folder. Correct the path in the slide table.")
    if not os.access(path, os.R_OK):
        raise SlideError(f"slide '{path}': no permission to read it.")
    return _open_folder(path) if path.is_dir() else (path, _open_handle(path))


def _open_handle(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as err:
        raise SlideError(
            f"slide '{path}': not a slide that OpenSlide can open: an unknown format, or the file is truncated "
            f"({path.stat().st_size} bytes). Copy it again from its source, or remove its row."
        ) from err
    except openslide.OpenSlideError as err:
        raise SlideError(
            f"slide '{path}': cannot be opened: {err}. The file is damaged or truncated: copy it again from its "
            "source, or remove its row."
        ) from err


def _open_folder(folder: Path) -> tuple[Path, openslide.OpenSlide]:
    """Open the one slide in a folder: a DICOM pyramid, whose files each stand for the whole, or a single file."""
    files = [file for file in sorted(folder.iterdir()) if is_slide(file)]
    if not files:
        raise SlideError(f"slide '{folder}': a folder without a file that OpenSlide can open. Name a slide file.")
    handle = _open_handle(files[0])
    for other in files[1:]:
        with _open_handle(other) as second:
            same = _series(second) is not None and _series(second) == _series(handle)
        if not same:
            handle.close()
            raise SlideError(
                f"slide '{folder}': the folder holds several slides ('{files[0].name}' and '{other.name}' differ). "
                "Name one file of the slide in the slide table."
            )
    return files[0], handle


def _series(handle: openslide.OpenSlide) -> str | None:
    return handle.properties.get("dicom.SeriesInstanceUID")


def _settle_mpp(
    path: Path, properties: Mapping[str, str], table: float | None, default: float | None
) -> tuple[float, float, str]:
    """Table, then file, then default. A wrong value is refused, never passed over for the next source."""
    if table is not None:
        _check_mpp(path, table, "in the slide table", "Correct the mpp column.")
        return table, table, "table"
    text_x, text_y = properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)
    if text_x is not None and text_y is not None:
        mpp_x, mpp_y = _number(path, text_x), _number(path, text_y)
        for value in (mpp_x, mpp_y):
            _check_mpp(path, value, "in the file", "Write the true value into the mpp column of the slide table.")
        return mpp_x, mpp_y, "file"
    if default is not None:
        _check_mpp(path, default, "from slides.default_mpp", "Correct slides.default_mpp.")
        return default, default, "default"
    raise MppError(
        f"slide '{path}': no mpp in the file, so micron cannot be turned into pixels. Write it into the mpp column of "
        "the slide table, or set slides.default_mpp."
    )


def _number(path: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MppError(
            f"slide '{path}': mpp {text[:40]!r} in the file is no number. Write the true value into the mpp column of the "
            "slide table."
        ) from None


def _check_mpp(path: Path, value: float, where: str, cure: str) -> None:
    if not MIN_MPP <= value <= MAX_MPP:  # also refuses NaN
        raise MppError(
            f"slide '{path}': mpp {value:g} {where} cannot be true (plausible: {MIN_MPP:g} to {MAX_MPP:g} micron per "
            f"pixel). {cure}"
        )


def _describe(path: Path, handle: openslide.OpenSlide, mpp_x: float, mpp_y: float, source: str) -> SlideInfo:
    properties = handle.properties
    width, height = handle.dimensions
    return SlideInfo(
        path=path,
        vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        width=width,
        height=height,
        level_dimensions=handle.level_dimensions,
        level_downsamples=handle.level_downsamples,
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        mpp_source=source,
        objective=properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER),
        bounds_x=int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0)),
        bounds_y=int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0)),
    )


class _Span(NamedTuple):
    """Pixels of a level that an output axis needs, and where in them the output starts and stops."""

    first: int
    num: int
    start: float
    stop: float


def _source_span(start: float, length: float, out: int) -> _Span:
    """One more pixel than the kernel reaches is taken at each end, for the shift of the origin."""
    margin = KERNEL_SUPPORT * max(1.0, length / out) + 1
    first = math.floor(start - margin)
    num = math.ceil(start + length + margin) - first
    return _Span(first, num, start - first, start + length - first)

"""Slide files: the only import of OpenSlide. Regions are asked for in micron, so a slide needs a known mpp."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import openslide
from PIL import Image, ImageCms

from gigamil.errors import SlideError
from gigamil.slides.backend import Backend, Header, ReadError, shown
from gigamil.slides.plain import PlainImage, is_plain
from gigamil.slides.tiff import JpegTiles, NotTiled

# Scanners lie between 0.1 (100x) and 30 (overview images) micron per pixel; what is outside is a wrong unit or a stub.
MIN_MPP, MAX_MPP = 0.05, 60.0
# A level that is this little too coarse is still taken: pyramids round their sizes (a "4x" level may be 4.002x).
LEVEL_TOLERANCE = 1.02
# A finer level than needed is read and reduced where it is at most this much finer: some writers make levels without
# antialiasing, and the tiles of one slide in two formats then differ by 11 grey levels at 1 um instead of 4.
MAX_DETAIL = 2.1
# 0.25 m at 0.25 micron; no glass is that long. A header that claims more is damaged, and would only fill the memory.
MAX_SIDE_PX = 1_000_000
# Largest source region in one read (64 MiB as RGBA); larger ones, as thumbnails of a flat slide, are read in parts.
MAX_READ_PX = 4096 * 4096
# Bicubic keeps a near-identity (0.499 to 0.5 um) equally sharp everywhere, and rings less than Lanczos.
KERNEL = Image.Resampling.BICUBIC
# Its half width in output pixels: so many neighbours are read too, which leaves tiles seamless.
KERNEL_SUPPORT = 2
WHITE = (255, 255, 255)
# The layouts whose tiles are where OpenSlide looks for them; others overlap, are shifted, or have a special colour.
TILED_VENDORS = ("aperio", "generic-tiff")
# Tiles of a level that are compared with OpenSlide before the level is read without it.
NUM_CHECKED = 3
MAX_GREY_DIFFERENCE = 2
# Off by more than this in OpenSlide's own level coordinates, on both axes, a sharp edge alone would differ by more grey.
MAX_CHECK_SHIFT = MAX_GREY_DIFFERENCE / (2 * 255)
# Rounding of micron to pixels; a thousandth of a grey level at the steepest edge.
EXACT_PX = 1e-6
OPENSLIDE_CACHE_BYTES = 64 << 20

Icc = Literal["ignore", "apply"]
_Mpp = tuple[float | None, float | None]  # of the table, and the default


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
    icc_sha256: str | None = None  # of the colour profile in the file, whether applied or not

    @property
    def width_um(self) -> float:
        """Width in micron."""
        return self.width * self.mpp_x

    @property
    def height_um(self) -> float:
        """Height in micron."""
        return self.height * self.mpp_y

    @property
    def mpp_L2(self) -> np.ndarray:
        """Micron per pixel (x, y) of each level, float64."""
        size_2 = np.array([self.width, self.height])
        return np.array([self.mpp_x, self.mpp_y]) * (size_2 / np.array(self.level_dimensions))

    def nearest_level(self, mpp_x: float, mpp_y: float) -> int:
        """The level whose micron per pixel differ least, on the axis where they differ more."""
        return int(np.abs(self.mpp_L2 / (mpp_x, mpp_y) - 1).max(axis=1).argmin())

    def shape_at(self, mpp: float) -> tuple[int, int]:
        """Rows and columns of the whole slide at `mpp` micron per pixel; the last of them may hang over its edge."""
        # The tolerance keeps 1000.0000001 micron at 10 micron per pixel from becoming 101 pixels.
        rows, cols = (max(1, math.ceil(length / mpp - 1e-6)) for length in (self.height_um, self.width_um))
        return rows, cols


class Slide:
    """An open slide. Use it as a context manager, one per process and thread: a handle does not survive a fork."""

    def __init__(self, path: Path, file: Path, reopen: Callable[[], Backend], mpp: _Mpp, icc: Icc) -> None:
        """Use `open_slide` instead."""
        self._file, self._reopen, self._closed = file, reopen, False
        self._backend = reopen()
        self._tiles: JpegTiles | None = None
        self._tile_levels: dict[int, str] = {}  # checked levels, and why OpenSlide is needed for them ("": it is not)
        try:
            header = self._backend.header
            self.info = _describe(path, header, *_settle_mpp(path, header, mpp))
            self._to_srgb = _srgb_transform(path, header.icc) if icc == "apply" and header.icc else None
        except SlideError:
            self._backend.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the file handles back; the slide cannot be read any more."""
        self._closed = True
        self._backend.close()
        if self._tiles is not None:
            self._tiles.close()

    @property
    def icc_applied(self) -> bool:
        """Whether colours were turned into sRGB: icc="apply", and the file has a profile."""
        return self._to_srgb is not None

    @property
    def held_bytes(self) -> int:
        """Bytes of pixels that stay decoded until `close`: those of a plain image. Caches are not counted."""
        return self._backend.held_bytes

    def read_um(
        self,
        x_um: float,
        y_um: float,
        width_um: float,
        height_um: float,
        out_w: int,
        out_h: int,
        *,
        level: int | None = None,
    ) -> np.ndarray:
        """Read a region given in micron, resampled to a given size.

        A level at least as fine is read and reduced with an antialiasing kernel that also sees the neighbours of the
        region: adjacent regions meet without a seam, and mpp_x may differ from mpp_y. The result depends on the
        region alone, not on what was read before.

        Args:
            x_um, y_um: top left corner, from the corner of level 0; may lie outside the slide.
            width_um, height_um: extent, > 0.
            out_w, out_h: size of the result in pixels, >= 1.
            level: of the pyramid; default: the one that suits the scale.
        Returns:
            uint8 [out_h, out_w, 3], RGB. What is outside the slide or transparent is white.
        Raises:
            SlideError: the region cannot be decoded, also not after the file was opened again.
            ValueError: the slide is closed.
        Cost: decodes up to 4 times the pixels of the result where levels are halved, up to 16 times where they are
            quartered, and the region at level 0 where there is no other level. Tiles of SVS and generic TIFF are
            decoded once for neighbouring regions, without OpenSlide (a quarter of its time).
        """
        info = self.info
        box = (x_um / info.mpp_x, y_um / info.mpp_y, width_um / info.mpp_x, height_um / info.mpp_y)
        chosen = self._level_for(box[2] / out_w, box[3] / out_h) if level is None else level
        return self._read_box(chosen, box, out_w, out_h)

    def thumbnail(self, mpp: float) -> np.ndarray:
        """Read the whole slide at `mpp` micron per pixel.

        Returns:
            uint8 [H, W, 3]. Pixel (row, col) covers exactly the square of side mpp at (col * mpp, row * mpp) micron;
            the last row and column may hang over the edge of the slide, and are white there.
        Raises:
            SlideError: as `read_um`.
        """
        out_h, out_w = self.info.shape_at(mpp)
        return self.read_um(0.0, 0.0, out_w * mpp, out_h * mpp, out_w, out_h)

    def _level_for(self, scale_x: float, scale_y: float) -> int:
        """Finest level of those up to `MAX_DETAIL` finer than wanted, else the next finer one, else level 0.

        Scales are level-0 pixels per output pixel.
        """
        size, levels = (self.info.width, self.info.height), self.info.level_dimensions
        detail = [min(scale_x * width / size[0], scale_y * height / size[1]) for width, height in levels]
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
        first_x, first_y = _first_pixel(x / down_x, w / down_x, out_w), _first_pixel(y / down_y, h / down_y, out_h)
        if first_x is not None and first_y is not None:  # pixel by pixel: the kernel would change nothing
            pixels_HW3 = self._read_tiles(level, first_x, first_y, out_w, out_h)
            if pixels_HW3 is not None:
                return pixels_HW3
        span_x = _source_span(x / down_x, w / down_x, out_w)
        span_y = _source_span(y / down_y, h / down_y, out_h)
        region, shift_x, shift_y = self._read_padded(level, span_x.first, span_y.first, span_x.num, span_y.num)
        inner = (span_x.start - shift_x, span_y.start - shift_y, span_x.stop - shift_x, span_y.stop - shift_y)
        return np.asarray(region.resize((out_w, out_h), KERNEL, box=inner))

    def _read_padded(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """Pixels (x, y, width, height) of a level on white, and how far right and down of them they really lie.

        Only what lies inside the level is asked for: OpenSlide truncates negative origins to whole pixels of the level.
        """
        level_w, level_h = self.info.level_dimensions[level]
        left, top = max(0, x), max(0, y)
        inside_w, inside_h = min(level_w, x + width) - left, min(level_h, y + height) - top
        if inside_w <= 0 or inside_h <= 0:
            return Image.new("RGB", (width, height), WHITE), 0.0, 0.0
        pixels_HW3 = self._read_tiles(level, left, top, inside_w, inside_h)
        if pixels_HW3 is not None:
            region, shift_x, shift_y, alpha = Image.fromarray(pixels_HW3), 0.0, 0.0, None
        else:
            region, shift_x, shift_y = self._read_backend(level, left, top, inside_w, inside_h)
            alpha = region.getchannel("A") if region.mode == "RGBA" else None
            region = self._srgb(region.convert("RGB"))
        if alpha is None and region.size == (width, height):
            return region, shift_x, shift_y
        canvas = Image.new("RGB", (width, height), WHITE)
        canvas.paste(region, (left - x, top - y), mask=alpha)
        return canvas, shift_x, shift_y

    def _read_tiles(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray | None:
        """Pixels of a level from the file's own tiles; None where OpenSlide is needed, or for what lies outside."""
        level_w, level_h = self.info.level_dimensions[level]
        if x < 0 or y < 0 or x + width > level_w or y + height > level_h:
            return None
        try:
            pixels_HW3 = self.tiles(level).read(level, x, y, width, height)
        except NotTiled:
            return None
        if pixels_HW3 is None or not self.icc_applied:
            return pixels_HW3
        return np.asarray(self._srgb(Image.fromarray(pixels_HW3)))

    def _srgb(self, image: Image.Image) -> Image.Image:
        if self._to_srgb is not None:
            ImageCms.applyTransform(image, self._to_srgb, inPlace=True)
        return image

    def tiles(self, level: int) -> JpegTiles:
        """The file's own JPEG tiles, if those of this level hold the pixels that OpenSlide shows.

        Three tiles, those with most bytes, are compared at the first call for a level. (Where its downsample is no
        whole number, OpenSlide shows most tiles a fraction of a pixel off; then three of those that lie right.)

        Raises:
            NotTiled: the format is another one, or the pixels differ.
        Cost: the first call reads the structure of the file; the first one for a level decodes its three tiles twice.
        """
        self._check_open()
        if level not in self._tile_levels:
            try:
                self._check_tiles(level)
                self._tile_levels[level] = ""
            except NotTiled as reason:
                self._tile_levels[level] = str(reason)
        if self._tile_levels[level] or self._tiles is None:
            raise NotTiled(self._tile_levels[level])
        return self._tiles

    def _check_tiles(self, number: int) -> None:
        if self.info.vendor not in TILED_VENDORS:
            raise NotTiled(f"format {self.info.vendor}: tiles are copied from SVS and generic tiled TIFF only")
        if self._tiles is None:
            self._tiles = JpegTiles(self._file, self.info.level_dimensions)
        level, down = self._tiles.level(number), self.info.level_downsamples[number]
        col_N, row_N = np.arange(len(level.offsets)) % level.num_x, np.arange(len(level.offsets)) // level.num_x
        x_N, y_N = col_N * level.tile_w, row_N * level.tile_h
        shift_N = np.maximum(np.abs(np.rint(x_N * down) / down - x_N), np.abs(np.rint(y_N * down) / down - y_N))
        comparable = np.flatnonzero(shift_N <= MAX_CHECK_SHIFT)
        num_equal = 0
        for index in comparable[np.argsort(-level.lengths[comparable], kind="stable")[:NUM_CHECKED]]:
            x, y = int(x_N[index]), int(y_N[index])
            width, height = min(level.tile_w, level.width - x), min(level.tile_h, level.height - y)
            ours_HW3 = self._tiles.read(number, x, y, width, height)
            if ours_HW3 is None:
                continue  # OpenSlide says what is wrong with it, when it is wanted
            try:
                theirs_HW3 = np.asarray(self._read_backend(number, x, y, width, height)[0].convert("RGB"))
            except SlideError:
                continue
            if np.abs(ours_HW3.astype(np.int16) - theirs_HW3).max() > MAX_GREY_DIFFERENCE:
                raise NotTiled("the file's tiles are not the pixels that OpenSlide shows")
            num_equal += 1
        if not num_equal:
            raise NotTiled("none of the tiles that were tried can be decoded")

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

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"slide '{shown(self.info.path)}' is closed")

    def _read_backend(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """A read. A failed OpenSlide handle fails for ever: the file is opened again and the read tried once more."""
        self._check_open()
        try:
            return self._backend.read(x, y, level, width, height)
        except ReadError:
            self._backend.close()
            self._backend = self._reopen()
        try:
            return self._backend.read(x, y, level, width, height)
        except ReadError as err:
            raise SlideError(
                f"slide '{shown(self.info.path)}': level {level}, {width} x {height} pixels at ({x}, {y}) cannot be "
                f"read: {err}. The file is damaged or truncated: copy it again from its source, or remove its row."
            ) from err


class _OpenSlideFile:
    """A file that OpenSlide reads, as a `Backend`. Of its properties only the few that are needed are looked at."""

    def __init__(self, path: Path) -> None:
        try:
            self._handle = openslide.OpenSlide(path)
        except openslide.OpenSlideUnsupportedFormatError as err:
            raise SlideError(
                f"slide '{shown(path)}': not a slide that OpenSlide can open: an unknown format, or the file is "
                f"truncated ({path.stat().st_size} bytes). Copy it again from its source, or remove its row."
            ) from err
        except openslide.OpenSlideError as err:
            raise SlideError(
                f"slide '{shown(path)}': cannot be opened: {shown(err)}. The file is damaged or truncated: copy it "
                "again from its source, or remove its row."
            ) from err
        self._closed = False
        self._handle.set_cache(_tile_cache(os.getpid()))
        properties = self._handle.properties
        mpp_x, mpp_y = (properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
        self.header = Header(
            vendor=properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
            level_dimensions=self._handle.level_dimensions,
            level_downsamples=self._handle.level_downsamples,
            mpp=(mpp_x, mpp_y) if mpp_x is not None and mpp_y is not None else None,
            objective=_objective(properties),
            bounds=(
                _whole(path, properties, openslide.PROPERTY_NAME_BOUNDS_X),
                _whole(path, properties, openslide.PROPERTY_NAME_BOUNDS_Y),
            ),
            # The binding hands the profile out with a region, and this one is empty.
            icc=self._handle.read_region((0, 0), 0, (0, 0)).info.get("icc_profile"),
        )

    @property
    def held_bytes(self) -> int:
        """0: what OpenSlide keeps is bounded by the cache of the process."""
        return 0

    @property
    def series(self) -> str | None:
        """What the files of one DICOM pyramid have in common."""
        return self._handle.properties.get("dicom.SeriesInstanceUID")

    def read(self, x: float, y: float, level: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """As `Backend.read`."""
        if self._closed:  # after an error, where the file could not be opened again
            raise ReadError("the file is closed")
        # OpenSlide takes the origin in whole level-0 pixels and divides it by its own downsample, a mean of both axes.
        down = self.header.level_downsamples[level]
        x0, y0 = round(x * down), round(y * down)
        try:
            return self._handle.read_region((x0, y0), level, (width, height)), x0 / down - x, y0 / down - y
        except openslide.OpenSlideError as err:
            raise ReadError(shown(err)) from err

    def close(self) -> None:
        """Give the file handle back, if that was not done yet."""
        if not self._closed:
            self._closed = True
            self._handle.close()


@cache
def _tile_cache(pid: int) -> openslide.OpenSlideCache:
    """One for all slides of a process. It has a lock, which a fork could copy in the locked state: hence by pid."""
    return openslide.OpenSlideCache(OPENSLIDE_CACHE_BYTES)


def _objective(properties: Mapping[str, str]) -> str | None:
    """The objective power if it is a number, which is all that may be shown."""
    text = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "")
    try:
        return f"{float(text):g}"
    except ValueError:
        return None


def _whole(path: Path, properties: Mapping[str, str], name: str) -> int:
    text = properties.get(name, "0")
    try:
        return int(text)
    except ValueError:
        raise SlideError(f"slide '{shown(path)}': {name} is {shown(text)!r}, which is no whole number.") from None


def open_slide(
    path: Path | str, *, mpp: float | None = None, default_mpp: float | None = None, icc: Icc = "ignore"
) -> Slide:
    """Open a slide and settle its micron per pixel.

    Args:
        path: any file that OpenSlide reads; for DICOM the folder, or any file of the pyramid; or a plain image (PNG,
            JPEG, TIFF without tiles), which becomes a slide of one level.
        mpp: micron per pixel of level 0 from the slide table; wins over the file.
        default_mpp: used where neither the table nor the file has one.
        icc: "apply" turns colours into sRGB where the file has an ICC profile; "ignore" leaves them.
    Raises:
        SlideError: the path is missing, unreadable, truncated, of an unknown format, or a folder of several slides; or
            a plain image that is too large, or an ICC profile that cannot be applied.
        MppError: no mpp, or one outside 0.05 to 60.
    Cost: headers only. A plain image is decoded as a whole at the first read.
    """
    path = Path(path)
    if not path.exists():
        raise SlideError(f"slide '{shown(path)}': no such file or folder. Correct the path in the slide table.")
    if not os.access(path, os.R_OK):
        raise SlideError(f"slide '{shown(path)}': no permission to read it.")
    file = _file_of(path) if path.is_dir() else path
    return Slide(path, file, partial(_open_file, file), (mpp, default_mpp), icc)


def _openslide_knows(path: Path) -> bool:
    return openslide.OpenSlide.detect_format(path) is not None


def _open_file(path: Path) -> Backend:
    if not _openslide_knows(path) and is_plain(path):
        return PlainImage(path)
    return _OpenSlideFile(path)


def _file_of(folder: Path) -> Path:
    """The one slide in a folder: a DICOM pyramid, whose files each stand for the whole, or a single file."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _openslide_knows(file)]
    if not files:
        raise SlideError(
            f"slide '{shown(folder)}': a folder without a file that OpenSlide can open. Name a slide file."
        )
    series = _series(files[0])
    for other in files[1:]:
        if series is None or _series(other) != series:
            raise SlideError(
                f"slide '{shown(folder)}': the folder holds several slides ('{shown(files[0].name)}' and "
                f"'{shown(other.name)}' differ). Name one file of the slide in the slide table."
            )
    return files[0]


def _series(file: Path) -> str | None:
    with closing(_OpenSlideFile(file)) as handle:
        return handle.series


def _settle_mpp(path: Path, header: Header, given: _Mpp) -> tuple[float, float, str]:
    """Table, then file, then default. A wrong value is refused, never passed over for the next source."""
    table, default = given
    if table is not None:
        _check_mpp(path, table, "in the slide table", "Correct the mpp column.")
        return table, table, "table"
    if header.mpp is not None:
        mpp_x, mpp_y = (_number(path, text) for text in header.mpp)
        for value in (mpp_x, mpp_y):
            _check_mpp(path, value, "in the file", "Write the true value into the mpp column of the slide table.")
        return mpp_x, mpp_y, "file"
    if default is not None:
        _check_mpp(path, default, "from slides.default_mpp", "Correct slides.default_mpp.")
        return default, default, "default"
    raise MppError(
        f"slide '{shown(path)}': no mpp in the file{header.mpp_note}, so micron cannot be turned into pixels. Write it "
        "into the mpp column of the slide table, or set slides.default_mpp."
    )


def _number(path: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise MppError(
            f"slide '{shown(path)}': mpp '{shown(text[:40])}' in the file is no number. Write the true value into the "
            "mpp column of the slide table."
        ) from None


def _check_mpp(path: Path, value: float, where: str, cure: str) -> None:
    if not MIN_MPP <= value <= MAX_MPP:  # also refuses NaN
        raise MppError(
            f"slide '{shown(path)}': mpp {value:g} {where} cannot be true (plausible: {MIN_MPP:g} to {MAX_MPP:g} "
            f"micron per pixel). {cure}"
        )


def _describe(path: Path, header: Header, mpp_x: float, mpp_y: float, source: str) -> SlideInfo:
    width, height = header.level_dimensions[0]
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX):
        raise SlideError(
            f"slide '{shown(path)}': it claims {width} x {height} pixels, which no slide has. Its header is damaged: "
            "copy it again from its source, or remove its row."
        )
    return SlideInfo(
        path=path,
        vendor=header.vendor,
        width=width,
        height=height,
        level_dimensions=header.level_dimensions,
        level_downsamples=header.level_downsamples,
        mpp_x=mpp_x,
        mpp_y=mpp_y,
        mpp_source=source,
        objective=header.objective,
        bounds_x=header.bounds[0],
        bounds_y=header.bounds[1],
        icc_sha256=None if header.icc is None else hashlib.sha256(header.icc).hexdigest(),
    )


def _srgb_transform(path: Path, profile: bytes) -> ImageCms.ImageCmsTransform:
    """From the colours of a file to sRGB, by the profile's own rendering intent."""
    try:
        source = ImageCms.getOpenProfile(BytesIO(profile))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError, ValueError) as err:
        raise SlideError(
            f"slide '{shown(path)}': its ICC profile ({len(profile)} bytes) cannot be applied: {shown(err)}. Set "
            "slides.icc=ignore, or remove its row."
        ) from err


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


def _first_pixel(start: float, length: float, out: int) -> int | None:
    """The pixel of the level that an output axis starts with, if it has just the level's pixels; else None."""
    first = round(start)
    return first if abs(length - out) < EXACT_PX and abs(start - first) < EXACT_PX else None

"""How fast are tiles made, beside a plain OpenSlide loop and beside the least that decoding and encoding can cost?

Expected: copying the file's own JPEG tiles needs no encoding and makes no pixels, so many times the OpenSlide loop
(5 to 8 times by what others measured). Where tiles are resampled, the file's tiles that cover the output have to be
decoded once, resized and encoded; what is spent beyond that is the reader's own. OpenSlide composes each region with
cairo, which takes several times the decoding.

Slides: one real SVS, where it is there (GIGAMIL_TEST_DATA, or ../shared/data), read again and again; and a pyramid of
0.5 gigapixel in JPEG tiles of 256, which the script makes from drawn tissue.

Arms, all on the same part of the slide, one thread, JPEG quality 90:

    raw         `native_tiles`: the file's tile, cleaned and decoded to its end without making pixels
    OpenSlide   read_region of that tile, convert("RGB"), encode
    gigamil     `Slide.read_um` of 224 px tiles at 0.5 (or 1.0) micron, encode
    limit       the file's tiles that cover those outputs decoded once, resized, encoded; nothing else: no reading, no
                checks, no memory for more than one tile, and putting outputs together from tiles is free
    loop        read_region of each of those outputs, resized, encoded: the plain OpenSlide loop at another scale. Its
                tiles have seams: it reads no neighbours, so the kernel lacks them at the border

Pixels are compared before anything is timed: raw and gigamil with OpenSlide, limit with gigamil, loop with gigamil
but for the outermost two pixels of a resized tile (three if it is enlarged), which the border reaches. Arms take
turns, each round on a part of its own with a slide opened anew, so that nothing is in a cache; a ratio is that of
medians. Times are CPU times. Memory and scaling come from whole runs over the pyramid in 1 and 2 processes, by wall
time, which needs a core for each: the share of the machine that others had is printed beside them.

    python benchmarks/tiling.py [--quick] [--out FILE]

The last line is JSON: raw_over_openslide and reencode_over_limit (worst over slides and scales), peak_rss_mb (largest
of the processes that tile the pyramid), scaling_2_over_1 (tiles/s of two processes over one, resampled tiles).
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openslide
import psutil
import simplejpeg
from options import add_sizes, real_data
from origin import origin
from PIL import Image

from gigamil.slides import Slide, native_tiles, open_slide
from gigamil.slides.reader import KERNEL, KERNEL_SUPPORT
from gigamil.testing.paint import synthetic_slide
from gigamil.testing.tiff import write_pyramid_tiff

REAL_SLIDE = "wsi/CMU-1-Small-Region.svs"
OUTPUT_PX = 224
QUALITY = 90
MAX_GREY_DIFFERENCE = 2


@dataclass(frozen=True)
class Sizes:
    """How large the comparison is."""

    base_px: int = 2048  # of the drawn tissue; a multiple of 1024
    repeat: int = 11  # so many times on each axis: 22,528 pixels, 0.5 gigapixel
    part_px: int = 7168  # side of the part that a round reads
    rounds: int = 5
    whole_rounds: int = 3  # of the runs over the whole pyramid


QUICK = Sizes(base_px=1024, repeat=4, part_px=1792, rounds=3, whole_rounds=1)
TINY = Sizes(base_px=1024, repeat=2, part_px=896, rounds=2, whole_rounds=1)


@dataclass(frozen=True)
class Part:
    """A square of level 0 of a slide, its corner on a corner of the file's tiles."""

    path: Path
    left: int
    top: int
    side: int


@dataclass
class Figure:
    """An arm: tiles and CPU seconds of each round."""

    num_tiles: int = 0
    cpu_s: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Tiles per second and core, by the median round."""
        return self.num_tiles / statistics.median(self.cpu_s)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.cpu_s, n=4)
        return (high - low) / statistics.median(self.cpu_s)


def encode(tile_HW3: np.ndarray) -> bytes:
    """As `gigamil tile` does."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(tile_HW3), quality=QUALITY, colorsubsampling="420")


# ---- arms: each returns its tiles, and the CPU seconds that count ----


def raw(part: Part, file_px: int) -> tuple[list[bytes], float]:
    """The file's own tiles."""
    with open_slide(part.path) as slide:
        tiles = native_tiles(slide, file_px, slide.info.mpp_x, 0.02)
        start = time.process_time()
        found = [tiles.jpeg(col, row) for col, row in file_cells(part, file_px)]
        spent = time.process_time() - start
    if any(jpeg is None for jpeg in found):
        raise SystemExit("raw: a whole tile was not copied, so its time means nothing")
    return [jpeg for jpeg in found if jpeg is not None], spent


def openslide_loop(part: Part, file_px: int) -> tuple[list[bytes], float]:
    """What a user writes, on the file's own grid."""
    with openslide.OpenSlide(part.path) as handle:
        start = time.process_time()
        found = []
        for col, row in file_cells(part, file_px):
            region = handle.read_region((col * file_px, row * file_px), 0, (file_px, file_px))
            found.append(encode(np.asarray(region.convert("RGB"))))
        return found, time.process_time() - start


def gigamil(part: Part, tile_mpp: float) -> tuple[list[bytes], float]:
    """Resampled tiles."""
    with open_slide(part.path) as slide:
        slide.tiles(0)  # the structure of the file, which is read once per slide
        start = time.process_time()
        found = [encode(tile) for tile in read_tiles(slide, part, tile_mpp)]
        return found, time.process_time() - start


def loop(part: Part, tile_mpp: float) -> tuple[list[bytes], float]:
    """What a user writes, at another scale."""
    with open_slide(part.path) as slide:
        mpp = slide.info.mpp_x
    with openslide.OpenSlide(part.path) as handle:
        start = time.process_time()
        found = [encode(tile) for tile in loop_tiles(handle, part, mpp, tile_mpp)]
        return found, time.process_time() - start


def limit(part: Part, tile_mpp: float) -> tuple[list[np.ndarray], float]:
    """Decoding, resizing (Pillow, from array to array) and encoding alone; putting tiles together is not counted.

    The part lies inside the slide: what the kernel needs around it is there.
    """
    with open_slide(part.path) as slide:
        mpp, tiles = slide.info.mpp_x, slide.tiles(0)
        level = tiles.level(0)
        side_um = OUTPUT_PX * tile_mpp
        exact = same_scale(mpp, tile_mpp)
        margin = 0 if exact else 2 * max(1.0, tile_mpp / mpp) + 1  # what the kernel reaches
        corners = [(x_um / mpp, y_um / mpp) for x_um, y_um in positions(part, mpp, tile_mpp)]
        low = [int(max(0, min(corner[axis] for corner in corners) - margin)) for axis in (0, 1)]
        high = [
            int(min(edge, np.ceil(max(corner[axis] for corner in corners) + side_um / mpp + margin)))
            for axis, edge in ((0, slide.info.width), (1, slide.info.height))
        ]
        cols = range(low[0] // level.tile_w, -(-high[0] // level.tile_w))
        rows = range(low[1] // level.tile_h, -(-high[1] // level.tile_h))
        jpegs = [tiles.jpeg(0, col, row) for row in rows for col in cols]
        decoded = [simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False) for jpeg in jpegs]
        same_place = np.empty_like(decoded[0])  # fresh memory would cost as much as half of the decoding
        start = time.process_time()
        for jpeg in jpegs:
            simplejpeg.decode_jpeg(jpeg, "RGB", fastdct=False, fastupsample=False, buffer=same_place)
        spent = time.process_time() - start
    strips = [decoded[first : first + len(cols)] for first in range(0, len(decoded), len(cols))]
    canvas_HW3 = np.concatenate([np.concatenate(strip, axis=1) for strip in strips], axis=0)
    x0, y0 = cols[0] * level.tile_w, rows[0] * level.tile_h
    found = []
    for x, y in corners:
        left, top = max(0, int(x - x0 - margin)), max(0, int(y - y0 - margin))
        region_HW3 = canvas_HW3[
            top : int(np.ceil(y - y0 + side_um / mpp + margin)), left : int(np.ceil(x - x0 + side_um / mpp + margin))
        ]
        box = (x - x0 - left, y - y0 - top, x - x0 - left + side_um / mpp, y - y0 - top + side_um / mpp)
        if not exact:
            region_HW3 = np.ascontiguousarray(region_HW3)
            start = time.process_time()
            region_HW3 = np.asarray(Image.fromarray(region_HW3).resize((OUTPUT_PX, OUTPUT_PX), KERNEL, box=box))
            spent += time.process_time() - start
        found.append(np.ascontiguousarray(region_HW3))
    start = time.process_time()
    for tile_HW3 in found:
        encode(tile_HW3)
    return found, spent + time.process_time() - start


def file_cells(part: Part, file_px: int) -> list[tuple[int, int]]:
    """(column, row) of the file's tiles inside a part, row by row."""
    first_col, first_row, num = part.left // file_px, part.top // file_px, part.side // file_px
    return [(first_col + index % num, first_row + index // num) for index in range(num * num)]


def positions(part: Part, mpp: float, tile_mpp: float) -> list[tuple[float, float]]:
    """Corners, in micron, of the output tiles inside a part, row by row."""
    side_um = OUTPUT_PX * tile_mpp
    num = int(part.side * mpp / side_um + 1e-9)
    return [
        (part.left * mpp + index % num * side_um, part.top * mpp + index // num * side_um) for index in range(num * num)
    ]


def read_tiles(slide: Slide, part: Part, tile_mpp: float) -> Iterator[np.ndarray]:
    """Resampled tiles of a part, one after the other as `gigamil tile` takes them: a thousand kept would be timed too,
    for fresh memory costs 50 us a tile."""
    side_um = OUTPUT_PX * tile_mpp
    for x_um, y_um in positions(part, slide.info.mpp_x, tile_mpp):
        yield slide.read_um(x_um, y_um, side_um, side_um, OUTPUT_PX, OUTPUT_PX)


def loop_tiles(handle: openslide.OpenSlide, part: Part, mpp: float, tile_mpp: float) -> Iterator[np.ndarray]:
    """The same extents as `read_tiles`, each read by itself: the pixels that it touches, and no neighbours."""
    exact, side = same_scale(mpp, tile_mpp), OUTPUT_PX * tile_mpp / mpp
    for x_um, y_um in positions(part, mpp, tile_mpp):
        x, y = x_um / mpp, y_um / mpp
        if exact:
            region = handle.read_region((round(x), round(y)), 0, (OUTPUT_PX, OUTPUT_PX)).convert("RGB")
        else:
            left, top = math.floor(x), math.floor(y)
            size = (math.ceil(x + side) - left, math.ceil(y + side) - top)
            box = (x - left, y - top, x - left + side, y - top + side)
            region = handle.read_region((left, top), 0, size).convert("RGB")
            region = region.resize((OUTPUT_PX, OUTPUT_PX), KERNEL, box=box)
        yield np.asarray(region)


def same_scale(mpp: float, tile_mpp: float) -> bool:
    """Whether output pixels are the slide's; 0.5 micron of a slide of 0.499 are not, though a tile has 224 of both."""
    return abs(tile_mpp - mpp) < 1e-9


# ---- one slide ----


def check_pixels(part: Part, file_px: int, scales: Sequence[float]) -> int:
    """Largest difference, in grey levels, of what the arms make.

    Raises:
        SystemExit: it is over two: then they do not do the same work.
    """
    worst = 0
    with openslide.OpenSlide(part.path) as handle:
        for jpeg, (col, row) in zip(raw(part, file_px)[0], file_cells(part, file_px), strict=True):
            region = handle.read_region((col * file_px, row * file_px), 0, (file_px, file_px)).convert("RGB")
            worst = max(worst, difference(simplejpeg.decode_jpeg(jpeg, "RGB"), np.asarray(region)))
    for tile_mpp in scales:
        with open_slide(part.path) as slide:
            ours = list(read_tiles(slide, part, tile_mpp))
            plain = [
                slide_by_openslide(slide, place, tile_mpp) for place in positions(part, slide.info.mpp_x, tile_mpp)
            ]
            mpp = slide.info.mpp_x
        for other in (limit(part, tile_mpp)[0], plain):
            worst = max([worst, *(difference(one, two) for one, two in zip(ours, other, strict=True))])
        # `loop` has no neighbours of a tile for the kernel, so the border that it reaches is left out.
        border = 0 if same_scale(mpp, tile_mpp) else math.ceil(KERNEL_SUPPORT * max(1.0, mpp / tile_mpp))
        inner = (slice(border, OUTPUT_PX - border),) * 2
        with openslide.OpenSlide(part.path) as handle:
            pairs = zip(ours, loop_tiles(handle, part, mpp, tile_mpp), strict=True)
            worst = max([worst, *(difference(one[inner], two[inner]) for one, two in pairs)])
    if worst > MAX_GREY_DIFFERENCE:
        raise SystemExit(f"the arms' pixels differ by up to {worst} grey levels, so their times mean nothing")
    return worst


def slide_by_openslide(slide: Slide, place: tuple[float, float], tile_mpp: float) -> np.ndarray:
    """One output tile of `Slide.read_um`, with OpenSlide under it."""
    known, slide._tile_levels = slide._tile_levels, {0: "not used here"}
    try:
        return slide.read_um(*place, OUTPUT_PX * tile_mpp, OUTPUT_PX * tile_mpp, OUTPUT_PX, OUTPUT_PX, level=0)
    finally:
        slide._tile_levels = known


def difference(one_HW3: np.ndarray, two_HW3: np.ndarray) -> int:
    """Largest difference of a grey level."""
    return int(np.abs(one_HW3.astype(np.int16) - two_HW3).max())


def compare(name: str, parts: Sequence[Part], file_px: int, scales: Sequence[float]) -> dict[str, Figure]:
    """All arms, in turns over the parts; the first part only warms up."""
    arms: dict[str, Callable[[Part], tuple[Sequence[object], float]]] = {
        "raw": lambda part: raw(part, file_px),
        "OpenSlide": lambda part: openslide_loop(part, file_px),
    }
    for scale in scales:
        arms[f"gigamil {scale:g} um"] = lambda part, scale=scale: gigamil(part, scale)  # type: ignore[misc]
        arms[f"limit {scale:g} um"] = lambda part, scale=scale: limit(part, scale)  # type: ignore[misc]
        arms[f"loop {scale:g} um"] = lambda part, scale=scale: loop(part, scale)  # type: ignore[misc]
    figures = {arm: Figure() for arm in arms}
    for number, part in enumerate(parts):
        for arm, make in arms.items():
            tiles, spent = make(part)
            if number:
                figures[arm].num_tiles = len(tiles)
                figures[arm].cpu_s.append(spent)
    print(f"\n{name}      tiles   tiles/s and core   spread")
    for arm, figure in figures.items():
        print(f"    {arm:18} {figure.num_tiles:6} {figure.per_second:14.0f} {figure.spread:12.0%}")
    return figures


def ratios(figures: dict[str, Figure], scales: Sequence[float]) -> dict[str, float]:
    """What the docstring promises, of one slide."""
    found = {"raw_over_openslide": figures["raw"].per_second / figures["OpenSlide"].per_second}
    for scale in scales:
        ours = figures[f"gigamil {scale:g} um"].per_second
        found[f"reencode_over_limit_{scale:g}um"] = ours / figures[f"limit {scale:g} um"].per_second
        found[f"reencode_over_openslide_{scale:g}um"] = ours / figures[f"loop {scale:g} um"].per_second
    return {name: round(value, 3) for name, value in found.items()}


# ---- whole pyramid, in processes ----


def tile_rows(path: Path, way: str, part: int, num_parts: int) -> tuple[int, int]:
    """One of `num_parts` bands of a slide; returns the number of its tiles, and this process's peak in bytes."""
    num = 0
    with open_slide(path) as slide:
        if way == "raw":
            tiles = native_tiles(slide, 256, slide.info.mpp_x, 0.02)
            for row in band(tiles.num_y, part, num_parts):
                for col in range(tiles.num_x):
                    num += tiles.jpeg(col, row) is not None
        else:
            side_um = OUTPUT_PX * 0.5
            for row in band(int(slide.info.height_um / side_um), part, num_parts):
                for col in range(int(slide.info.width_um / side_um)):
                    encode(slide.read_um(col * side_um, row * side_um, side_um, side_um, OUTPUT_PX, OUTPUT_PX))
                    num += 1
    return num, peak_bytes()


def peak_bytes() -> int:
    """Most memory of this process so far. (What getrusage says, a new process inherits from its parent.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def band(num_rows: int, part: int, num_parts: int) -> range:
    """Rows of a part."""
    return range(num_rows * part // num_parts, num_rows * (part + 1) // num_parts)


def ready() -> None:
    """Something to do for a fresh process: it is there, with all its imports, when this returns."""
    time.sleep(0.5)


def whole_pyramid(path: Path, rounds: int) -> tuple[dict[str, float], int]:
    """Tiles/s of each way in 1 and 2 processes by wall time, median; and the largest peak of a process, in bytes."""
    speeds: dict[str, list[float]] = {}
    peak = 0
    print("\nwhole pyramid  processes  tiles  tiles/s  share of the machine left idle")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(ready) for _ in range(2)]:
            job.result()
        for _ in range(rounds):
            for way in ("raw", "resampled"):
                for num in (1, 2):
                    start, idle = time.perf_counter(), psutil.cpu_times().idle
                    jobs = [pool.submit(tile_rows, path, way, part, num) for part in range(num)]
                    done = [job.result() for job in jobs]
                    wall = time.perf_counter() - start
                    tiles = sum(count for count, _ in done)
                    peak = max([peak, *(used for _, used in done)])
                    speeds.setdefault(f"{way}_{num}", []).append(tiles / wall)
                    free = (psutil.cpu_times().idle - idle) / wall / (os.cpu_count() or 1)
                    print(f"    {way:14} {num:5} {tiles:7} {tiles / wall:8.0f} {free:10.0%}")
    return {name: round(statistics.median(values), 1) for name, values in speeds.items()}, peak


# ---- slides ----


def make_pyramid(path: Path, sizes: Sizes) -> None:
    """Drawn tissue, side by side, in JPEG tiles of 256."""
    side_um = sizes.base_px * 0.5
    image_HW3 = synthetic_slide(1, tumour=True, size_um=(side_um, side_um), mpp=0.5).image_HW3
    write_pyramid_tiff(path, image_HW3, 0.5, repeat=(sizes.repeat, sizes.repeat))


def pyramid_parts(path: Path, sizes: Sizes) -> list[Part]:
    """Parts of the pyramid for each round, and one to warm up; they come again when the pyramid is small."""
    side = sizes.part_px // 256 * 256
    num = max(1, (sizes.base_px * sizes.repeat - 2 * 256) // side)  # the outermost tiles are left out: see `limit`
    corners = [(256 + number % num * side, 256 + number // num % num * side) for number in range(sizes.rounds + 1)]
    return [Part(path, left, top, side) for left, top in corners]


def real_slide() -> Path | None:
    """The real SVS, where it is."""
    path = real_data(REAL_SLIDE)
    return path if path.is_file() else None


def main(words: Sequence[str] | None = None) -> int:
    """Compare, print, return 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_sizes(parser, Sizes(), QUICK, TINY, "smaller, fewer rounds")
    parser.add_argument("--out", type=Path, help="write the raw figures, as JSON")
    arguments = parser.parse_args(words)
    sizes: Sizes = arguments.sizes
    scales = (0.5, 1.0)
    found: dict[str, dict[str, float]] = {}
    raw_figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        pyramid = Path(folder) / "pyramid.tiff"
        make_pyramid(pyramid, sizes)
        slides = {"pyramid": (pyramid_parts(pyramid, sizes), 256)}
        real = real_slide()
        if real is not None:
            slides["real SVS"] = ([Part(real, 240, 240, 7 * 240)] * (sizes.rounds + 1), 240)
        worst = 0
        for name, (parts, file_px) in slides.items():
            worst = max(worst, check_pixels(parts[0], file_px, scales))
            figures = compare(name, parts, file_px, scales)
            found[name] = ratios(figures, scales)
            raw_figures[name] = {arm: [figure.num_tiles, *figure.cpu_s] for arm, figure in figures.items()}
            print("    " + ", ".join(f"{key} {value}" for key, value in found[name].items()))
        speeds, peak = whole_pyramid(pyramid, sizes.whole_rounds)
    over_limit = [value for each in found.values() for key, value in each.items() if "over_limit" in key]
    result = {
        "raw_over_openslide": min(each["raw_over_openslide"] for each in found.values()),
        "reencode_over_limit": min(over_limit),
        "peak_rss_mb": round(peak / 1e6),
        "scaling_2_over_1": round(speeds["resampled_2"] / speeds["resampled_1"], 3),
        "largest_grey_difference": worst,
        "tiles_per_second": speeds,
        "by_slide": found,
    }
    if arguments.out is not None:
        versions = {
            "openslide": openslide.__library_version__,
            "simplejpeg": simplejpeg.__version__,
            "pillow": Image.__version__,
        }
        about = origin(__file__, words, **versions)
        raw_out = about | {"sizes": vars(sizes), "result": result, "arms": raw_figures}
        arguments.out.write_text(json.dumps(raw_out, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `gigamil tile` would do to a cohort, without doing it: a row per slide, and what tiles and time it will cost."""

import math
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from gigamil.config.schema import Execution, Slides
from gigamil.cores import num_cores
from gigamil.data.cohort import SlideRow
from gigamil.data.coords import read_positions
from gigamil.data.scan import find_slides
from gigamil.data.workers import Died, Limits, run_isolated
from gigamil.errors import CohortError
from gigamil.partition.curve import hilbert_sort
from gigamil.shards.build import Part, PreparedSlide, finish_slide, open_job, prepare_slide, store_part
from gigamil.shards.cohort_table import plain
from gigamil.shards.format import TAR_BLOCK, padded
from gigamil.shards.job import SlideJob
from gigamil.shards.write import discard
from gigamil.slides.backend import shown
from gigamil.slides.reader import SlideInfo
from gigamil.units import format_bytes

Made = TypeVar("Made")

SAMPLED_TILES = 8
MOST_BARS, BAR_LETTERS = 8, 40


@dataclass(frozen=True)
class InspectedSlide:
    """One slide: what it is, and what tiling it would give and cost.

    Attributes:
        problem: why it gives no tiles; empty if it does. What is not known then is NaN, 0 or empty.
        way: raw (the file's own JPEG tiles are copied) or resampled.
        bytes, seconds: expected size of its tars, and time of one core, from `sampled` tiles that were made and thrown
            away.
    """

    slide_id: str
    problem: str = ""
    vendor: str = ""
    width: int = 0
    height: int = 0
    mpp_x: float = math.nan
    mpp_y: float = math.nan
    mpp_source: str = ""
    tissue_area_mm2: float = math.nan
    tiles: int = 0
    way: str = ""
    bytes: float = 0.0
    seconds: float = 0.0
    sampled: int = 0

    @property
    def mpp_text(self) -> str:
        """Micron per pixel, both where they differ, and where they come from."""
        if math.isnan(self.mpp_x):
            return "unknown"
        both = dict.fromkeys(f"{mpp:.4g}" for mpp in (self.mpp_x, self.mpp_y))
        return f"{' x '.join(both)} ({self.mpp_source})"

    @property
    def size_text(self) -> str:
        """Width and height in pixels."""
        return f"{self.width} x {self.height}" if self.width else ""

    @property
    def tissue_text(self) -> str:
        """Square millimetres."""
        return "" if math.isnan(self.tissue_area_mm2) else f"{self.tissue_area_mm2:.2f}"

    def cells(self) -> list[str]:
        """The row of a table, under `HEAD`."""
        made = [f"{self.tiles:,}", format_bytes(self.bytes), self.way] if self.tiles else ["0", "", ""]
        return [self.slide_id, self.vendor, self.size_text, self.mpp_text, self.tissue_text, *made, self.problem]


HEAD = ["slide", "vendor", "pixels", "um/px (from)", "tissue mm2", "tiles", "storage", "way", "problem"]


@dataclass(frozen=True)
class CohortInspection:
    """All slides of a cohort, in order, and the settings they were looked at with."""

    rows: tuple[InspectedSlide, ...]
    slides: Slides
    num_workers: int

    @property
    def good(self) -> tuple[InspectedSlide, ...]:
        """Slides that give tiles."""
        return tuple(row for row in self.rows if not row.problem)

    @property
    def exit_code(self) -> int:
        """0, or 3 if a slide gives no tiles."""
        return 3 if len(self.good) < len(self.rows) else 0

    @property
    def num_tiles(self) -> int:
        """Expected tiles of all slides."""
        return sum(row.tiles for row in self.rows)

    @property
    def bytes(self) -> float:
        """Expected size of all tars."""
        return sum(row.bytes for row in self.rows)

    @property
    def seconds(self) -> float:
        """Expected wall time on as many cores as workers looked at the cohort, if all are busy to the end."""
        return sum(row.seconds for row in self.rows) / self.num_workers

    @property
    def values(self) -> dict[str, list[float]]:
        """What is shown as histograms, of slides of which it is known."""
        return {
            "um/px": [row.mpp_x for row in self.rows if not math.isnan(row.mpp_x)],
            "tiles": [row.tiles for row in self.good],
            "tissue mm2": [row.tissue_area_mm2 for row in self.rows if not math.isnan(row.tissue_area_mm2)],
        }

    def summary(self) -> list[str]:
        """Sentences: how many slides give tiles, and what is expected."""
        good, total = len(self.good), len(self.rows)
        lines = [f"{good} of {total} slides give tiles of {self.slides.tile_px} px at {self.slides.tile_mpp:g} um/px"]
        if good:
            raw = sum(row.way == "raw" for row in self.good)
            cores = f"{self.num_workers} core" + ("s" if self.num_workers > 1 else "")
            expected = f"{self.num_tiles:,} tiles, {format_bytes(self.bytes)}, {time_text(self.seconds)} on {cores}"
            lines.append(f"expected: {expected}; {raw} slides are copied, {good - raw} resampled")
            lines.append(f"measured on {sum(row.sampled for row in self.rows)} tiles of them, made and thrown away")
        if self.slides.extra_mpp:
            lines.append("not counted: the tiles of slides.extra_mpp")
        return lines

    def text(self) -> str:
        """For people: the table, histograms, and the summary."""
        table = [HEAD, *(row.cells() for row in self.rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(HEAD) - 1)]
        lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in table]
        for name, values in self.values.items():
            if values:
                lines += ["", name, *_bars(values)]
        return "\n".join([*lines, "", *self.summary()])


def inspect_cohort(
    rows: Sequence[SlideRow],
    slides: Slides,
    execution: Execution | None = None,
    *,
    num_sampled: int = SAMPLED_TILES,
    progress: bool = True,
) -> CohortInspection:
    """Look at every slide as `gigamil tile` would: find its tissue, count its tiles, and make a few of them.

    Each slide is looked at in a child process with the limits of `gigamil tile`: one that is broken, or breaks the
    reader, is a row with a problem. Nothing is kept but the report. A script calls this below
    `if __name__ == "__main__":`, since children import the script.

    Args:
        rows: the slides; of the other columns `mpp` is used.
        slides: how they would be tiled.
        execution: number of workers and their limits.
        num_sampled: one less than the tiles that are made of each slide, evenly spaced, to tell storage and time
            (>= 1). The first is made twice, and a slide with fewer tiles gives all.
        progress: show a bar, on a terminal.
    Cost: reading the tissue of every slide once at `tissue_mpp`, and making at most `num_sampled` + 2 tiles of each.
    """
    execution = execution or Execution()
    cores = num_cores()
    num_workers = execution.tile_workers or cores
    limits = Limits(int(execution.tile_memory_gb * 1e9), execution.tile_timeout_s)
    found: dict[int, InspectedSlide] = {}
    with TemporaryDirectory(prefix="gigamil-inspect-") as root:
        jobs = [
            _Look(
                SlideJob(
                    row.slide_id, row.path, row.mpp, slides, Path(root), hilbert_sort, read_positions=read_positions
                ),
                num_sampled,
            )
            for row in rows
        ]
        hidden = not (progress and sys.stderr.isatty())
        with (
            tqdm(total=len(jobs), desc="inspect", unit="slide", disable=hidden) as bar,
            closing(run_isolated(_look, jobs, num_workers, limits=limits)) as results,
        ):
            for position, result in results:
                found[position] = (
                    InspectedSlide(rows[position].slide_id, str(result)) if isinstance(result, Died) else result
                )
                bar.update()
    return CohortInspection(tuple(found[position] for position in range(len(rows))), slides, num_workers)


def slides_in(paths: Iterable[Path]) -> tuple[SlideRow, ...]:
    """Rows for slide files, and for the slides in folders and below; their ids are the paths, in plain characters.

    Raises:
        CohortError: a folder holds no slide, or as `find_slides`.
    """
    rows: list[SlideRow] = []
    times: Counter[str] = Counter()
    for path in paths:
        files = list(find_slides(path)) if path.is_dir() else [path]
        if not files:
            raise CohortError(f"no slide in '{path}' or below")
        for file in files:
            shown = path.resolve().name if file == path else str(file.relative_to(path))
            name = re.sub(r"[^A-Za-z0-9._-]", "_", shown)[-100:]
            times[name] += 1
            slide_id = name if times[name] == 1 else f"{name}~{times[name]}"
            rows.append(SlideRow(slide_id, file, slide_id, None, None, None, None))
    return tuple(rows)


@dataclass(frozen=True)
class _Look:
    job: SlideJob
    num_sampled: int


def _look(look: _Look) -> InspectedSlide:
    """Look at one slide, in a child process."""
    job = look.job
    warnings.filterwarnings("ignore", module="PIL")  # of damaged headers, without saying of which slide
    try:
        prepared, seconds = _timed(prepare_slide, job)
        row = replace(_known(job, prepared.info), tissue_area_mm2=prepared.tissue_area_um2 / 1e6, seconds=seconds)
        return _with_sample(row, prepared, look.num_sampled)
    except OSError as error:  # a SlideError, or the disk
        return replace(_described(job), problem=_without_path(job, str(error)))
    finally:
        discard(job.root, job.slide_id)
        shutil.rmtree(job.folder, ignore_errors=True)


def _with_sample(row: InspectedSlide, prepared: PreparedSlide, num_sampled: int) -> InspectedSlide:
    """Make a few tiles for size and time. The time to open the slide, once per tar, is told from that of a tile."""
    num = len(prepared.cells_N)
    if not num:
        where = "no tissue found" if not prepared.tissue_area_um2 else "no tile holds enough tissue, or is free of pen"
        return replace(row, problem=where)
    chosen = np.unique(np.linspace(0, num - 1, min(num, num_sampled + 1)).astype(np.int64))
    job, grid, cells_N = prepared.job, prepared.grid, prepared.cells_N
    _, one_s = _timed(store_part, Part(job, grid, prepared.way, 0, 0, cells_N[chosen[:1]]))
    stored, all_s = _timed(store_part, Part(job, grid, prepared.way, 1, 0, cells_N[chosen]))
    columns = {name: getattr(prepared, name)[chosen] for name in ("cells_N", "tissue_N", "pen_N")}
    _, finish_s = _timed(finish_slide, replace(prepared, **columns), [stored])
    lengths = [] if stored.tar is None else stored.tar.length.tolist()
    if not lengths:
        return replace(row, problem=f"none of {len(chosen)} sampled tiles is sharp enough (slides.min_sharpness)")
    kept = len(lengths) / len(chosen)
    tile_s = max(all_s - one_s, 0.0) / max(len(chosen) - 1, 1)
    open_s = max(one_s - tile_s, 0.0)
    return replace(
        row,
        tiles=round(num * kept),
        way=prepared.way,
        bytes=num * kept * float(np.mean([TAR_BLOCK + padded(length) for length in lengths])),
        seconds=row.seconds + len(prepared.parts()) * open_s + num * tile_s + finish_s,
        sampled=len(chosen),
    )


def _timed(function: Callable[..., Made], *arguments: object) -> tuple[Made, float]:
    start = time.perf_counter()
    made = function(*arguments)
    return made, time.perf_counter() - start


def _described(job: SlideJob) -> InspectedSlide:
    """What the headers of a slide say that cannot be tiled."""
    try:
        with open_job(job) as slide:
            return _known(job, slide.info)
    except OSError:
        return InspectedSlide(job.slide_id)


def _known(job: SlideJob, info: SlideInfo) -> InspectedSlide:
    return InspectedSlide(
        job.slide_id,
        vendor=plain(info.vendor),
        width=info.width,
        height=info.height,
        mpp_x=info.mpp_x,
        mpp_y=info.mpp_y,
        mpp_source=info.mpp_source,
    )


def _without_path(job: SlideJob, reason: str) -> str:
    """A reason without the folders of slide, masks and coordinates, which may name a patient; its row says which."""
    paths = filter(None, (job.path, job.slides.masks, job.slides.coords))
    for path in sorted(paths, key=lambda path: -len(str(path))):  # one may lie in another
        for text in (str(path), shown(path)):
            reason = reason.removeprefix(f"slide '{text}': ")
            if path.name:  # "." and "/" have none, and stand in every sentence
                reason = reason.replace(text, shown(path.name))
    return plain(reason)


def histogram(values: Sequence[float]) -> list[tuple[str, int]]:
    """Names and counts of the bars of a histogram, at most 8.

    A bar for each value, to three digits, where there are few; else for equal ranges between round numbers (steps of 1,
    2 or 5 times a power of ten).
    """
    few = Counter(float(f"{value:.3g}") for value in values)
    if len(few) <= MOST_BARS:
        return [(f"{value:,g}", few[value]) for value in sorted(few)]
    raw = (max(values) - min(values)) / (MOST_BARS - 1)
    decade = 10.0 ** math.floor(math.log10(raw))
    step = next(step * decade for step in (1, 2, 5, 10) if step * decade >= raw * (1 - 1e-9))
    number_of = Counter(math.floor(value / step + 1e-9) for value in values)
    numbers = range(min(number_of), max(number_of) + 1)
    return [(f"{number * step:,g} to {(number + 1) * step:,g}", number_of[number]) for number in numbers]


def _bars(values: Sequence[float]) -> list[str]:
    bars = histogram(values)
    width = max(len(name) for name, _ in bars)
    scale = min(1.0, BAR_LETTERS / max(count for _, count in bars))
    return [f"  {name:>{width}}  {count:>6}  {'#' * math.ceil(count * scale)}".rstrip() for name, count in bars]


def time_text(seconds: float) -> str:
    """Seconds in the unit that suits them: 12 min."""
    for limit, unit in ((60, "s"), (60, "min"), (48, "h")):
        if seconds < limit:
            return f"{seconds:.2g} {unit}" if seconds < 10 else f"{seconds:.0f} {unit}"
        seconds /= 60
    return f"{seconds * 60 / 24:,.0f} days"

"""All slides of a cohort -> shards: in parallel, one bad slide never stops the others, finished slides are skipped."""

import csv
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from gigamil.config.schema import RunConfig
from gigamil.data.cohort import CohortTable, SlideRow, load_cohort
from gigamil.data.split import smoke_slides
from gigamil.data.workers import Died, run_isolated
from gigamil.errors import CohortError
from gigamil.lock import folder_lock
from gigamil.partition.curve import hilbert_sort
from gigamil.shards.build import SlideJob, build_slide, finished_slide
from gigamil.shards.format import STATUS, slide_folder
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.write import clear_leftovers

Status = Literal["ok", "cached", "no_tissue", "failed"]


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide: a row of status.csv.

    `status` is ok (tiled now), cached (finished before), no_tissue (no tile; `reason` says why) or failed.
    """

    slide_id: str
    status: Status
    tiles: int
    seconds: float
    reason: str

    @property
    def is_bad(self) -> bool:
        """It gives nothing to train on."""
        return self.status in ("failed", "no_tissue")

    def line(self) -> str:
        """One line for people."""
        text = f"{self.slide_id:<40} {self.status:<9} {self.tiles:>8} tiles {self.seconds:>7.1f} s"
        return f"{text}  {self.reason}".rstrip()


@dataclass(frozen=True)
class TileReport:
    """Outcome of every slide, in the order of the slide table."""

    rows: tuple[SlideOutcome, ...]
    shards: Path

    @property
    def bad(self) -> tuple[SlideOutcome, ...]:
        """Slides without a tile: failed, or without tissue."""
        return tuple(row for row in self.rows if row.is_bad)

    @property
    def num_tiles(self) -> int:
        """Tiles of all slides."""
        return sum(row.tiles for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0, or 3 if a slide is bad."""
        return 3 if self.bad else 0

    def text(self) -> str:
        """For people: the bad slides with their reasons, and a line of counts. All slides are in status.csv."""
        count = Counter(row.status for row in self.rows)
        counts = ", ".join(f"{count[status]} {status}" for status in ("ok", "cached", "no_tissue", "failed"))
        total = f"{len(self.rows)} slides: {counts}; {self.num_tiles} tiles in '{self.shards}'"
        return "\n".join([*(row.line() for row in self.bad), total])


def tile_cohort(cfg: RunConfig, *, progress: bool = True) -> TileReport:
    """Tile every slide of the table.

    Each slide is tiled in a child process; an unreadable slide, or a crash, costs that slide only and is reported with
    its reason. A slide that was finished with the same settings from the same file is skipped. What a stopped run left
    half done is deleted. With `bookkeeping.limit` only the slides of the smoke run are tiled. A script calls this below
    `if __name__ == "__main__":`, since children import the script.

    Args:
        cfg: the run; shards go to `cfg.bookkeeping.shard_root`.
        progress: print a line per slide, on a terminal above a bar, and the bad slides again at the end.
    Returns:
        The report, also written to status.csv beside the shards. Its `exit_code` is 3 if a slide is bad.
    Raises:
        CohortError: the table is wrong, or none of its slides exists.
        EnvironmentFault: another run holds the folder, or it cannot be written.
    Cost: reading the tissue of every slide once; memory per worker is a thumbnail and a tile.
    """
    rows = _wanted_rows(cfg)
    root = cfg.bookkeeping.shard_root
    jobs = [SlideJob(row.slide_id, row.path, row.mpp, cfg.slides, root) for row in rows]
    with folder_lock(root, "gigamil tile"), _no_leftovers(root):
        outcomes = {job.slide_id: _outcome(job, done, "cached", 0.0) for job in jobs if (done := finished_slide(job))}
        todo = [job for job in jobs if job.slide_id not in outcomes]
        # os.path.exists: what may not be looked at counts as absent, where Path.exists raises.
        if todo and not any(os.path.exists(job.path) for job in todo) and not outcomes:
            raise CohortError(
                f"none of the {len(todo)} slide paths exists, for example '{todo[0].path}'; set cohort.root"
            )
        num_workers = cfg.execution.tile_workers or _num_cores()
        # Closed here, and not when its garbage is collected: no child may outlive the lock.
        with _progress(len(jobs), progress) as show, closing(run_isolated(tile_slide, todo, num_workers)) as results:
            for outcome in outcomes.values():
                show(outcome)
            for position, result in results:
                job = todo[position]
                outcome = _failed(job, str(result), 0.0) if isinstance(result, Died) else result
                outcomes[job.slide_id] = outcome
                show(outcome)
        report = TileReport(tuple(outcomes[row.slide_id] for row in rows), root)
        _write_status(report)
    if progress:
        print(report.text(), flush=True)
    return report


def tile_slide(job: SlideJob) -> SlideOutcome:
    """Tile one slide, along the Hilbert curve; a slide that cannot be read gives an outcome, not an error."""
    start = time.perf_counter()
    try:
        manifest = build_slide(job, hilbert_sort)
    except OSError as error:  # a SlideError, or the disk
        return _failed(job, str(error), time.perf_counter() - start)
    return _outcome(job, manifest, "ok", time.perf_counter() - start)


def _outcome(job: SlideJob, manifest: SlideManifest, status: Status, seconds: float) -> SlideOutcome:
    status = status if manifest.num_tiles else "no_tissue"
    return SlideOutcome(job.slide_id, status, manifest.num_tiles, round(seconds, 2), manifest.why_empty)


def _failed(job: SlideJob, reason: str, seconds: float) -> SlideOutcome:
    kept = " (Its shards of other settings, or of another version of its file, are kept.)"
    had_shards = os.path.exists(slide_folder(job.root, job.slide_id))
    reason = " ".join(reason.split()) + (kept if had_shards else "")
    return SlideOutcome(job.slide_id, "failed", 0, round(seconds, 2), reason)


@contextmanager
def _no_leftovers(root: Path) -> Iterator[None]:
    """Delete what a killed run left, and at the end what children left that were ended by Ctrl-C."""
    clear_leftovers(root)
    try:
        yield
    finally:
        clear_leftovers(root)


def _wanted_rows(cfg: RunConfig) -> tuple[SlideRow, ...]:
    limit = cfg.bookkeeping.limit
    # A path that does not exist is that slide's failure, so that the others go on.
    table: CohortTable = load_cohort(cfg.cohort, need_labels=limit is not None, need_files=False)
    if limit is None:
        return table.rows
    return tuple(table.row(slide_id) for slide_id in smoke_slides(table, cfg.cohort, limit))


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[SlideOutcome], None]]:
    if not wanted:
        yield lambda outcome: None
    elif sys.stderr.isatty():
        with tqdm(total=total, desc="tile", unit="slide") as bar:

            def advance(outcome: SlideOutcome) -> None:
                bar.write(outcome.line())
                bar.update()

            yield advance
    else:
        num_done = 0

        def say(outcome: SlideOutcome) -> None:
            nonlocal num_done
            num_done += 1
            print(f"[{num_done}/{total}] {outcome.line()}", flush=True)

        yield say


def _write_status(report: TileReport) -> None:
    path = report.shards / STATUS
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(SlideOutcome))
        writer.writerows(astuple(row) for row in report.rows)
    os.replace(temporary, path)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""All slides of a cohort -> shards: on all cores, one bad slide never stops the others, finished slides are skipped."""

import filecmp
import hashlib
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from gigamil.config.schema import RunConfig, Slides
from gigamil.cores import num_cores
from gigamil.data.cohort import SlideRow, load_cohort
from gigamil.data.coords import read_positions
from gigamil.data.split import smoke_slides
from gigamil.data.targets import load_target_table
from gigamil.data.workers import Died, Limits, run_isolated
from gigamil.errors import CohortError, ConfigError, ShardError, SlideError
from gigamil.files import replace_file
from gigamil.lock import folder_lock
from gigamil.partition.curve import hilbert_sort
from gigamil.shards.build import PreparedSlide, StoredPart
from gigamil.shards.cohort_table import SlideOutcome, plain, read_cohort, write_cohort
from gigamil.shards.format import CONTACT_SHEET, OVERVIEW, TILES_PER_TAR, slide_folder
from gigamil.shards.job import SlideJob, fingerprint, finished_slide, slide_bytes
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.pieces import Failed, Finish, Made, Piece, make_piece
from gigamil.shards.write import clear_leftovers, discard, refuse_links
from gigamil.slides.overview import INDEX_NAME, write_contact_sheet

SAY_EVERY_S = 60.0  # in a log, where there is no bar
_LOOKERS = 8  # threads that look for finished slides: they wait for the disk
_SHOWN = ".shown"  # in a contact sheet: a digest of what it shows


@dataclass(frozen=True)
class ArrayJob:
    """The i-th of n jobs that tile a cohort together; i counts from 1, as Slurm's arrays may.

    Raises:
        ValueError: i is not in 1..n.
    """

    i: int
    n: int

    def __post_init__(self) -> None:
        if not 1 <= self.i <= self.n:
            raise ValueError(f"{self.i}/{self.n} is not one of 1/{self.n} to {self.n}/{self.n}")

    def owns(self, slide_id: str) -> bool:
        """Whether a slide is this job's: by a digest of its id, so that it does not depend on other rows."""
        return int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8], "big") % self.n == self.i - 1


@dataclass(frozen=True)
class TileReport:
    """Outcome of every slide, in the order of the slide table; `extra` are those of `slides.extra_mpp`."""

    rows: tuple[SlideOutcome, ...]
    shards: Path
    extra: tuple["TileReport", ...] = ()

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
        return 3 if self.bad or any(report.bad for report in self.extra) else 0

    def text(self) -> str:
        """For people: the bad slides with their reasons, and a line of counts. All slides are in cohort.csv."""
        count = Counter(row.status for row in self.rows)
        counts = ", ".join(f"{count[status]} {status}" for status in ("ok", "cached", "no_tissue", "failed"))
        total = f"{len(self.rows)} slides: {counts}; {self.num_tiles} tiles in '{self.shards}'"
        return "\n".join([*(row.line() for row in self.bad), total])


def tile_cohort(cfg: RunConfig, *, progress: bool = True, job: ArrayJob | None = None) -> TileReport:
    """Tile every slide of the table.

    Slides are tiled in child processes, piece by piece: one process makes a slide with one tar, several share a larger
    one, and the bytes do not depend on how many there are. An unreadable slide, a crash, or a piece that takes over
    `execution.tile_memory_gb` or `execution.tile_timeout_s` costs that slide only and is reported with its reason. A
    slide that was finished with the same settings from the same file is skipped. What a stopped run left half done is
    deleted. With `bookkeeping.limit` only the slides of the smoke run are tiled. A script calls this below
    `if __name__ == "__main__":`, since children import the script.

    Args:
        cfg: the run; shards go to `cfg.bookkeeping.shard_root`, those of each `slides.extra_mpp` into a folder in it.
            With `data.source: slides` only positions are stored.
        progress: print a line per slide, on a terminal above a bar, and the bad slides again at the end.
        job: tile only the slides of this job; the other jobs of its array may work at the same time.
    Returns:
        The report, also written to cohort.parquet and cohort.csv beside the shards. Its `exit_code` is 3 if a slide is
        bad.
    Raises:
        CohortError: the table is wrong, or none of its slides exists.
        EnvironmentFault: another run holds the folder, or it cannot be written.
    Cost: reading the tissue of every slide once; memory per worker is a thumbnail and a tile.
    """
    rows = _wanted_rows(cfg)
    copies = _copies(rows)
    mine = tuple(row for row in rows if job is None or job.owns(row.slide_id))
    root = cfg.bookkeeping.shard_root
    if not isinstance(root, Path):
        raise ConfigError(f"bookkeeping.shards={root} is a URL: shards are made in a folder and then copied there.")
    report = _tile(cfg, cfg.slides, root, mine, copies, progress, job)
    extra = tuple(
        _tile(cfg, slides, root / f"mpp-{slides.tile_mpp:g}", mine, copies, progress, job)
        for slides in (cfg.slides.model_copy(update={"tile_mpp": mpp}) for mpp in cfg.slides.extra_mpp)
    )
    return replace(report, extra=extra)


def _tile(
    cfg: RunConfig,
    slides: Slides,
    root: Path,
    rows: Sequence[SlideRow],
    copies: Mapping[str, str],
    progress: bool,
    array_job: ArrayJob | None,
) -> TileReport:
    """Tile slides at one spacing."""
    place = None if array_job is None else (array_job.i, array_job.n)
    what = "gigamil tile" if place is None else "gigamil tile --shard {}/{}".format(*place)
    stored = cfg.data.source != "slides"
    jobs = [
        SlideJob(row.slide_id, row.path, row.mpp, slides, root, hilbert_sort, stored, TILES_PER_TAR, read_positions)
        for row in rows
    ]
    if progress and root != cfg.bookkeeping.shard_root:
        print(f"again, at {slides.tile_mpp:g} um per pixel:", flush=True)
    patients = {row.slide_id: row.patient_id for row in rows}
    with folder_lock(root, what, place), _no_leftovers(root, None if place is None else [*patients]):
        outcomes = {
            job.slide_id: _failed(
                job, f"its file is that of slide '{copies[job.slide_id]}'; remove one of the two rows"
            )
            for job in jobs
            if job.slide_id in copies
        }
        took = _seconds_before(root)
        with ThreadPoolExecutor(_LOOKERS) as lookers:
            for job, done in zip(jobs, lookers.map(finished_slide, jobs), strict=True):
                if done and job.slide_id not in outcomes:
                    outcomes[job.slide_id] = _tiled(job, done, "cached", took.get(job.slide_id, 0.0))
        todo = [job for job in jobs if job.slide_id not in outcomes]
        # os.path.exists: what may not be looked at counts as absent, where Path.exists raises.
        if array_job is None and todo and not outcomes and not any(os.path.exists(job.path) for job in todo):
            raise CohortError(
                f"none of the {len(todo)} slide paths exists, for example '{todo[0].path}'; set cohort.root"
            )
        if progress and (num_cached := sum(row.status != "failed" for row in outcomes.values())):
            print(f"{num_cached} of {len(jobs)} slides were finished before", flush=True)
        num_ready, has_new = len(outcomes), False
        crew = _Crew(cfg, [_Underway(job) for job in todo])
        with _shown(crew, len(jobs), num_ready, progress) as show, closing(crew.run()) as results:
            for outcome in results:
                show(outcome)
                if outcome:
                    outcomes[outcome.slide_id] = outcome
                    has_new |= outcome.status != "failed"
        found = [replace(outcomes[job.slide_id], patient_id=patients[job.slide_id]) for job in jobs]
        write_cohort(root, found, place)
        sheet = root / CONTACT_SHEET if place is None else root / CONTACT_SHEET / "{}-of-{}".format(*place)
        _drop_other_sheets(root / CONTACT_SHEET, place)
        _draw_sheet(sheet, root, [row for row in found if row.status != "failed"], has_new)
    report = TileReport(tuple(found), root)
    if progress:
        print(report.text(), flush=True)
    return report


@dataclass
class _Underway:
    """How far a slide is: pieces that are not back yet, and what came back. What was found goes when it has ended."""

    job: SlideJob
    outstanding: int = 1
    seconds: float = 0.0
    prepared: PreparedSlide | None = None
    parts: list[StoredPart] = field(default_factory=list)
    outcome: SlideOutcome | None = None


@dataclass
class _Crew:
    """The processes that tile slides; it knows what follows from each piece.

    Attributes:
        num_tiles: stored so far.
        known: (slides, their tiles) whose number of tiles is known.
    """

    cfg: RunConfig
    slides: list[_Underway]
    num_tiles: int = 0
    known: tuple[int, int] = 0, 0

    @property
    def expected_tiles(self) -> float:
        """Tiles of all slides, if the others have as many as those that are known."""
        return self.known[1] * len(self.slides) / self.known[0] if self.known[0] else 0.0

    def run(self) -> Generator[SlideOutcome | None, None, None]:
        """Tile the slides; yields after each piece, and the outcome of a slide that has ended by it."""
        execution = self.cfg.execution
        limits = Limits(int(execution.tile_memory_gb * 1e9), execution.tile_timeout_s)
        first: list[Piece] = [slide.job for slide in self.slides]
        num_workers = execution.tile_workers or num_cores()
        with closing(run_isolated(make_piece, first, num_workers, limits=limits, more=self._follow)) as results:
            for position, _ in results:
                slide = self.slides[position]
                ended = None if slide.outstanding else slide.outcome
                slide.outcome = slide.outcome if ended is None else None  # said once
                yield ended

    def _follow(self, position: int, answer: tuple[Made, float] | Died) -> Sequence[Piece]:
        """Note what a piece gave; returns the pieces that follow from it."""
        slide = self.slides[position]
        made, seconds = (Failed(self._why(answer)), 0.0) if isinstance(answer, Died) else answer
        slide.outstanding -= 1
        slide.seconds += seconds
        pieces = [] if slide.outcome else self._next(slide, made)
        slide.outstanding += len(pieces)
        if slide.outcome and slide.outcome.status == "failed":
            # Now, so that its other pieces find no folder and end at once; and when the last of them is back.
            discard(slide.job.root, slide.job.slide_id)
        return pieces

    def _next(self, slide: _Underway, made: Made) -> Sequence[Piece]:
        match made:
            case PreparedSlide():
                slide.prepared = made
                self._count(len(made.cells_N))
                return made.parts()
            case StoredPart():
                slide.parts.append(made)
                self.num_tiles += len(made.number_n)
                if slide.outstanding or slide.prepared is None:
                    return []
                return [Finish(slide.prepared, tuple(sorted(slide.parts, key=lambda part: part.number)))]
            case SlideManifest():
                slide.outcome = _tiled(slide.job, made, "ok", slide.seconds)
                if slide.prepared is None:  # made in one piece
                    self._count(made.num_tiles)
                    self.num_tiles += made.num_tiles
            case Failed():
                slide.outcome = _failed(slide.job, made.reason, slide.seconds)
                if slide.prepared is None:
                    self._count(0)
        slide.prepared, slide.parts = None, []
        return []

    def _count(self, num_tiles: int) -> None:
        num_slides, total = self.known
        self.known = num_slides + 1, total + num_tiles

    def _why(self, died: Died) -> str:
        memory, seconds = self.cfg.execution.tile_memory_gb, self.cfg.execution.tile_timeout_s
        if died.limit == "time":
            return f"a piece of it took over execution.tile_timeout_s={seconds:g} seconds; raise it, or remove its row"
        limit = f"execution.tile_memory_gb={memory:g}"
        if died.limit == "memory":
            return f"it needs more memory than {limit}; raise it, or remove its row"
        # C libraries end the process when they get no memory.
        return f"{died}: a broken file, or more memory than {limit}. Copy it again from its source, or remove its row"


def _drop_other_sheets(folder: Path, place: tuple[int, int] | None) -> None:
    """Remove contact sheets of another array, or of a run of its own: nobody draws them anew. The lock keeps those away."""
    for path in folder.glob("*"):
        if path.is_dir() and (place is None or not path.name.endswith(f"-of-{place[1]}")):
            shutil.rmtree(path, ignore_errors=True)
        elif place is not None and path.is_file():
            path.unlink(missing_ok=True)


def _seconds_before(root: Path) -> dict[str, float]:
    """What each slide took when it was tiled, by the table of the run before."""
    try:
        return {row.slide_id: row.seconds for row in read_cohort(root)}
    except ShardError:
        return {}


def _copies(rows: Sequence[SlideRow]) -> dict[str, str]:
    """Slides whose file is that of an earlier row, with that row's id: they would count twice, or leak into the test.

    Only files of equal size are read, at both ends, so this takes no time in a cohort without copies. Files that are
    equal there are compared up to the first difference: uncompressed slides with white margins have equal ends.
    """
    with ThreadPoolExecutor(_LOOKERS) as lookers:
        sizes = lookers.map(slide_bytes, [row.path for row in rows])
        by_size: dict[int, list[SlideRow]] = defaultdict(list)
        for row, size in zip(rows, sizes, strict=True):
            if size:
                by_size[size].append(row)
        alike = [row for same in by_size.values() if len(same) > 1 for row in same]
        digests = list(lookers.map(_fingerprint_or_none, [row.path for row in alike]))
    originals: dict[str, list[SlideRow]] = defaultdict(list)
    copies = {}
    for row, digest in zip(alike, digests, strict=True):
        if digest:
            original = next((other for other in originals[digest] if _is_copy(row.path, other.path)), None)
            if original:
                copies[row.slide_id] = original.slide_id
            else:
                originals[digest].append(row)
    return copies


def _is_copy(path: Path, other: Path) -> bool:
    """Whether two slides of one fingerprint are one: files by their content, DICOM and MIRAX by the fingerprint."""
    try:
        has_folder = any(slide.is_dir() or slide.suffix.lower() == ".mrxs" for slide in (path, other))
        return has_folder or path.samefile(other) or filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False  # said when it is tiled


def _fingerprint_or_none(path: Path) -> str | None:
    try:
        return fingerprint(path)
    except SlideError:
        return None  # said when it is tiled


def _tiled(job: SlideJob, manifest: SlideManifest, status: str, seconds: float) -> SlideOutcome:
    if manifest.way == "raw" and not manifest.stored:
        words = "only positions are kept (data.source: slides)"
    elif manifest.way == "raw":
        words = f"{manifest.num_raw} of {manifest.num_tiles} tiles copied"
    else:
        words = manifest.way_reason
    if manifest.num_dropped:
        words += f"; {manifest.num_dropped} tiles dropped by slides.max_pen or slides.min_sharpness"
    return SlideOutcome(
        slide_id=job.slide_id,
        patient_id="",
        status=("cached" if status == "cached" else "ok") if manifest.num_tiles else "no_tissue",
        reason=plain(words if manifest.num_tiles else manifest.why_empty),
        tiles=manifest.num_tiles,
        bytes=sum(tar.bytes for tar in manifest.tars),
        seconds=round(seconds, 2),
        way=manifest.way,
        tissue_area_mm2=manifest.tissue_area_mm2,
        vendor=plain(manifest.vendor),
        mpp_x=manifest.mpp_x,
        mpp_y=manifest.mpp_y,
        mpp_source=manifest.mpp_source,
        source_fingerprint=manifest.source_fingerprint,
    )


def _failed(job: SlideJob, reason: str, seconds: float = 0.0) -> SlideOutcome:
    kept = " (Its shards of other settings, or of another version of its file, are kept.)"
    reason = plain(reason) + (kept if os.path.exists(slide_folder(job.root, job.slide_id)) else "")
    return SlideOutcome(job.slide_id, "", "failed", reason, seconds=round(seconds, 2))


def _draw_sheet(sheet: Path, root: Path, rows: Sequence[SlideOutcome], has_new: bool) -> None:
    """Write the contact sheet of these slides, unless one is there that was finished: the mark in it is written last."""
    shown = [(row.slide_id, row.tiles, row.tissue_area_mm2, row.way, row.source_fingerprint) for row in rows]
    wanted, mark = hashlib.sha256(repr(shown).encode()).hexdigest(), sheet / _SHOWN
    if not has_new and (sheet / INDEX_NAME).is_file() and mark.is_file() and mark.read_bytes() == wanted.encode():
        return
    mark.unlink(missing_ok=True)
    write_contact_sheet(sheet, [_picture(root, row) for row in rows])
    replace_file(mark, wanted)


def _picture(root: Path, row: SlideOutcome) -> tuple[str, str, Path]:
    caption = f"{row.tiles} tiles, {row.tissue_area_mm2:.1f} mm2"
    return row.slide_id, caption, slide_folder(root, row.slide_id) / OVERVIEW


@contextmanager
def _no_leftovers(root: Path, slide_ids: Sequence[str] | None) -> Iterator[None]:
    """Refuse links; delete what a killed run left, and at the end what children left that were ended by Ctrl-C."""
    refuse_links(root)  # first: what lies behind a link is not ours to delete
    clear_leftovers(root, slide_ids)
    try:
        yield
    finally:
        clear_leftovers(root, slide_ids)


def _wanted_rows(cfg: RunConfig) -> tuple[SlideRow, ...]:
    limit = cfg.bookkeeping.limit
    # A path that does not exist is that slide's failure, so that the others go on.
    if limit is None:
        return load_cohort(cfg.cohort, need_labels=False, need_files=False).rows
    table = load_target_table(cfg.cohort, cfg.science)
    return tuple(table.row(slide_id) for slide_id in smoke_slides(table, cfg.cohort, limit))


@contextmanager
def _shown(crew: _Crew, total: int, num_done: int, wanted: bool) -> Iterator[Callable[[SlideOutcome | None], None]]:
    """A function that shows how far the crew is, and a slide that has ended."""
    if not wanted:
        yield lambda outcome: None
        return
    if sys.stderr.isatty():
        # smoothing=0: the rate since the start, as tiles come in lumps of a tar.
        with tqdm(desc="tile", unit="tile", smoothing=0, unit_scale=True) as bar:

            def advance(outcome: SlideOutcome | None) -> None:
                nonlocal num_done
                if outcome:
                    num_done += 1
                    bar.write(outcome.line())
                bar.total = round(crew.expected_tiles)
                bar.set_postfix_str(f"{num_done}/{total} slides", refresh=False)
                bar.update(crew.num_tiles - bar.n)

            yield advance
    else:
        start = last = time.monotonic()

        def say(outcome: SlideOutcome | None) -> None:
            nonlocal num_done, last
            if outcome:
                num_done += 1
                print(f"[{num_done}/{total}] {outcome.line()}", flush=True)
            now = time.monotonic()
            if now - last >= SAY_EVERY_S:
                last, rate = now, crew.num_tiles / (now - start)
                left = f"{(crew.expected_tiles - crew.num_tiles) / rate / 60:.0f} min left" if rate else "time unknown"
                print(f"[{num_done}/{total}] {crew.num_tiles} tiles, {rate:.0f} tiles/s, {left}", flush=True)

        yield say


def refuse_failures(report: TileReport, max_failed: int | None) -> None:
    """Refuse to go on when more slides are bad than allowed.

    Args:
        max_failed: so many may be; None: none may, and nobody can set it.
    Raises:
        SlideError: lists them.
    """
    if len(report.bad) > (max_failed or 0):
        lines = "\n".join("  " + row.line() for row in report.bad)
        more, cure = "", "Leave them out."
        if max_failed is not None:
            more = f", more than slides.max_failed={max_failed}"
            cure = "Mend or remove them, or set slides.max_failed."
        raise SlideError(f"{len(report.bad)} slides have no tiles{more}:\n{lines}\n{cure}")

"""The table of the cohort: what each slide is, and what `gigamil tile` did to it.

    <root>/cohort.parquet                exact values, for programs
    <root>/cohort.csv                    the same for people; what a spreadsheet would execute is defused
    <root>/.gigamil-jobs/<i>-of-<n>.json what each job of an array found, from which every one of them writes the table

Unlike the manifests it names patients: leave it out where shards are shared without them.
"""

import csv
import io
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gigamil.errors import ShardError
from gigamil.files import replace_file
from gigamil.shards.format import COHORT, COHORT_CSV, JOBS

Status = Literal["ok", "cached", "no_tissue", "failed"]

# A spreadsheet takes a cell that begins so for a formula: CWE-1236.
_FORMULA = ("=", "+", "-", "@")


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide: a row of the table.

    Attributes:
        status: ok (tiled now), cached (finished before), no_tissue (no tile) or failed.
        reason: why it has no tiles or they were resampled, else how many were copied; and how many were dropped. In plain
            characters.
        tiles, bytes: stored, and the size of its tars.
        seconds: of all processes, in the run that tiled it; a cached slide keeps those of then, or 0 where the last
            table does not have it.
        way: raw (the file's own tiles) or resampled; empty if it failed.
        tissue_area_mm2, mpp_x, mpp_y: NaN if it failed.
        source_fingerprint: as in the manifest.
    """

    slide_id: str
    patient_id: str
    status: Status
    reason: str
    tiles: int = 0
    bytes: int = 0
    seconds: float = 0.0
    way: str = ""
    tissue_area_mm2: float = float("nan")
    vendor: str = ""
    mpp_x: float = float("nan")
    mpp_y: float = float("nan")
    mpp_source: str = ""
    source_fingerprint: str = ""

    @property
    def is_bad(self) -> bool:
        """It gives nothing to train on."""
        return self.status in ("failed", "no_tissue")

    def line(self) -> str:
        """One line for people."""
        text = f"{self.slide_id:<40} {self.status:<9} {self.tiles:>8} tiles {self.seconds:>7.1f} s"
        way = f"  {self.way:<9}" if self.tiles else ""
        return f"{text}{way}  {self.reason}".rstrip()


def write_cohort(root: Path, rows: Sequence[SlideOutcome], job: tuple[int, int] | None = None) -> None:
    """Write the table, each file by a rename.

    Args:
        rows: of all slides, or of the i-th of n jobs of an array. The jobs may end in any order and at once: each writes
            what it found, and then the table of all that was found.
        job: (i, n).
    Raises:
        OSError: the disk is full.
    """
    if job is None:
        shutil.rmtree(root / JOBS, ignore_errors=True)
        _write_table(root, rows)
        return
    mine = root / JOBS / "{}-of-{}.json".format(*job)
    replace_file(mine, json.dumps([asdict(row) for row in rows], indent=1))
    seen = None
    # Who writes the table last has looked at all parts after writing it, and would have written it again.
    while seen != (found := _parts(root, job[1])):
        seen = found
        _write_table(root, _joined(root, found, job[1]))


def read_cohort(root: Path) -> tuple[SlideOutcome, ...]:
    """Read the table.

    Raises:
        ShardError: it is missing, or is no such table.
    """
    path = root / COHORT
    try:
        with pq.ParquetFile(path) as file:
            columns = file.read(use_threads=False).to_pydict()
        return tuple(
            SlideOutcome(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        )
    except (OSError, pa.ArrowException, TypeError) as error:
        raise ShardError(f"'{path}' is not the table of a cohort: {error}. Run `gigamil tile` to write it.") from error


def plain(text: str) -> str:
    """Text on one line, with everything that is no plain character (control, ANSI, direction marks) written out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in " ".join(text.split())
    )


def _parts(root: Path, num_jobs: int) -> tuple[tuple[Path, int, int], ...]:
    """The files of this array's jobs, and what tells one version of a file from the next."""
    found = []
    for path in sorted((root / JOBS).glob(f"*-of-{num_jobs}.json")):
        state = path.stat()
        found.append((path, state.st_ino, state.st_mtime_ns))
    return tuple(found)


def _joined(root: Path, parts: Iterable[tuple[Path, int, int]], num_jobs: int) -> list[SlideOutcome]:
    for path in (root / JOBS).glob("*.json"):
        if not path.name.endswith(f"-of-{num_jobs}.json"):
            path.unlink(missing_ok=True)  # of an array of another size; none of its jobs can be running
    rows = {
        row["slide_id"]: SlideOutcome(**row)
        for path, _, _ in parts
        for row in json.loads(path.read_text(encoding="utf-8"))
    }
    return [rows[slide_id] for slide_id in sorted(rows)]


def _write_table(root: Path, rows: Sequence[SlideOutcome]) -> None:
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(SlideOutcome)}
    buffer = io.BytesIO()
    table = pa.Table.from_arrays([_to_arrow(column) for column in columns.values()], names=list(columns))
    pq.write_table(table, buffer, compression="zstd")
    replace_file(root / COHORT, buffer.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in asdict(row).values()] for row in rows)
    replace_file(root / COHORT_CSV, text.getvalue())


def _cell(value: str | float) -> str | float:
    if isinstance(value, float):
        return "" if np.isnan(value) else value
    if isinstance(value, str):
        text = plain(value)
        return "'" + text if text.startswith(_FORMULA) else text
    return value


def _to_arrow(values: list[str] | list[int] | list[float]) -> pa.Array:
    # By buffers: pa.array() would import pandas (see index.py), up to two seconds at the end of each `gigamil tile`.
    texts = [value.encode(errors="backslashreplace") for value in values if isinstance(value, str)]
    if len(texts) == len(values):
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.Array.from_buffers(pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])
    column = np.array(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(column)])

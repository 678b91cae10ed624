"""The table of the cohort says exactly what became of each slide, whoever ends last, and a spreadsheet runs none of it."""

import csv
import math
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest

from gigamil.errors import ShardError
from gigamil.shards.cohort_table import SlideOutcome, plain, read_cohort, write_cohort

GOOD = SlideOutcome("a", "p1", "ok", "", 120, 10**12, 1.5, "raw", 2.25, "aperio", 0.499, 0.501, "file", "ab" * 32)
BAD = SlideOutcome("b", "p2", "failed", "no such file, it says")


def read_csv(root: Path) -> list[dict[str, str]]:
    with (root / "cohort.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_both_files_hold_every_column(tmp_path: Path) -> None:
    write_cohort(tmp_path, [GOOD, BAD])
    found = read_cohort(tmp_path)
    assert found[0] == GOOD
    assert math.isnan(found[1].mpp_x)
    assert replace(found[1], mpp_x=0, mpp_y=0, tissue_area_mm2=0) == replace(BAD, mpp_x=0, mpp_y=0, tissue_area_mm2=0)
    rows = read_csv(tmp_path)
    assert list(rows[0]) == [field.name for field in fields(SlideOutcome)]
    assert rows[0]["bytes"] == "1000000000000"
    assert (rows[0]["mpp_x"], rows[1]["mpp_x"]) == ("0.499", "")
    assert rows[1]["reason"] == "no such file, it says"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort.csv", "cohort.parquet"]


def test_an_empty_table(tmp_path: Path) -> None:
    write_cohort(tmp_path, [])
    assert read_cohort(tmp_path) == ()
    assert read_csv(tmp_path) == []


@pytest.mark.parametrize("text", ["=cmd|' /C calc'!A0", "+1", "-2", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n=1"])
def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path: Path, text: str) -> None:
    write_cohort(tmp_path, [replace(BAD, reason=text, patient_id=text, vendor=text)])
    row = read_csv(tmp_path)[0]
    assert row["reason"] == row["patient_id"] == row["vendor"] == "'" + text.strip()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("two\nlines\r\n of\ttext", "two lines of text"),
        ("red \x1b[31m", "red \\x1b[31m"),
        ("nul \x00 bell \x07", "nul \\x00 bell \\x07"),
        ("turned \u202e round", "turned \\u202e round"),
        ("lone \udcff byte", "lone \\udcff byte"),
        ("Hämatoxylin µm", "Hämatoxylin µm"),
    ],
)
def test_control_characters_are_written_out(tmp_path: Path, text: str, wanted: str) -> None:
    assert plain(text) == wanted
    write_cohort(tmp_path, [replace(BAD, reason=text)])
    assert read_csv(tmp_path)[0]["reason"] == wanted


def test_a_table_that_is_missing_or_no_table(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cohort.parquet' is not the table of a cohort.*Run `gigamil tile`"):
        read_cohort(tmp_path)
    (tmp_path / "cohort.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ShardError, match="is not the table of a cohort"):
        read_cohort(tmp_path)


def test_the_jobs_of_an_array_write_one_table_in_any_order(tmp_path: Path) -> None:
    parts = [[replace(GOOD, slide_id=f"s{job}-{n}") for n in range(3)] for job in range(6)]
    threads = [
        threading.Thread(target=write_cohort, args=(tmp_path, rows, (job + 1, 6))) for job, rows in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(read_cohort(tmp_path)) == [row for rows in parts for row in rows]
    assert len(read_csv(tmp_path)) == 18
    write_cohort(tmp_path, [replace(GOOD, slide_id="s2-0", tiles=7)], (3, 6))  # a job that ran again, with fewer rows
    assert [row.tiles for row in read_cohort(tmp_path) if row.slide_id.startswith("s2")] == [7]
    write_cohort(tmp_path, [GOOD], (1, 2))  # another array: what the first one found is no longer known to be true
    assert read_cohort(tmp_path) == (GOOD,)
    write_cohort(tmp_path, [replace(GOOD, slide_id="alone")])
    assert [row.slide_id for row in read_cohort(tmp_path)] == ["alone"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort.csv", "cohort.parquet"]


def test_writing_it_does_not_import_pandas(tmp_path: Path) -> None:
    code = f"""
import sys, gigamil.shards.cohort_table as t
from pathlib import Path
t.write_cohort(Path({str(tmp_path)!r}), [t.SlideOutcome("a", "p", "ok", "")])
t.read_cohort(Path({str(tmp_path)!r}))
print("pandas" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

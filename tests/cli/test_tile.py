"""A folder of good and bad slides through `tile_cohort`: each bad one is named, the others are tiled, nothing is half done."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from gigamil.cli import main
from gigamil.config.load import to_yaml
from gigamil.config.schema import Bookkeeping, Cohort, Data, Execution, RunConfig, Slides
from gigamil.data.decode import decode_tiles
from gigamil.data.tile import ArrayJob, TileReport, tile_cohort
from gigamil.data.workers import Limits
from gigamil.errors import CohortError, EnvironmentFault, ShardError
from gigamil.lock import folder_lock
from gigamil.shards.cohort_table import read_cohort
from gigamil.shards.read import ShardSet
from gigamil.testing.slides import write_pyramid_tiff

DOTTED = "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0-4e9d-982d-1ad0af7bead9"
TILING = Slides(tile_px=32, tile_mpp=1.0, min_tissue_area_um2=1000.0)


def draw(path: Path, *, tissue: bool = True, mpp: float | None = 1.0, size: int = 256, tile: int = 256) -> Path:
    image = np.full((size, size, 3), 245, np.uint8)
    if tissue:
        seed = int.from_bytes(path.stem.encode()[-4:], "little")
        inner = np.random.default_rng(seed).integers(0, 40, (size - 64, size - 64, 3))
        image[32:-32, 32:-32] = np.array([190, 90, 150]) + inner
    write_pyramid_tiff(path, image, mpp, levels=2, tile=tile)
    return path


def cohort(folder: Path, slides: dict[str, tuple[Path, str]], **bookkeeping: object) -> RunConfig:
    """Slides as {slide_id: (path, mpp)}; labels alternate."""
    lines = [f"{name},{path},p-{name},{'ab'[n % 2]},{mpp}" for n, (name, (path, mpp)) in enumerate(slides.items())]
    (folder / "slides.csv").write_text("\n".join(["slide_id,path,patient_id,label,mpp", *lines]) + "\n")
    return RunConfig(
        cohort=Cohort(table=folder / "slides.csv"),
        slides=TILING,
        execution=Execution(tile_workers=2),
        bookkeeping=Bookkeeping(out=folder / "run", **bookkeeping),
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "slides").rglob("*") if path.is_file()}


def outcomes(report: TileReport) -> dict[str, tuple[str, int]]:
    return {row.slide_id: (row.status, row.tiles) for row in report.rows}


def test_bad_slides_are_listed_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.svs").write_text("no slide")
    truncated = draw(tmp_path / "truncated.tiff")
    os.truncate(truncated, truncated.stat().st_size // 2)
    slides = {
        DOTTED: (draw(tmp_path / "good.tiff"), ""),
        "no-mpp": (draw(tmp_path / "unknown.tiff", mpp=None), ""),
        "table-mpp": (draw(tmp_path / "table_mpp.tiff", mpp=None), "1.0"),
        "no-tissue": (draw(tmp_path / "empty.tiff", tissue=False), ""),
        "text": (tmp_path / "text.svs", ""),
        "truncated": (truncated, ""),
        "nowhere": (tmp_path / "nowhere.svs", ""),
    }
    cfg = cohort(tmp_path, slides)
    report = tile_cohort(cfg)
    assert outcomes(report) == {
        DOTTED: ("ok", 52),
        "no-mpp": ("failed", 0),
        "table-mpp": ("ok", 52),
        "no-tissue": ("no_tissue", 0),
        "text": ("failed", 0),
        "truncated": ("failed", 0),
        "nowhere": ("failed", 0),
    }
    assert list(outcomes(report)) == list(slides)
    assert report.exit_code == 3
    reasons = {row.slide_id: row.reason for row in report.bad}
    for slide_id, words in {
        "no-mpp": "set slides.default_mpp",
        "no-tissue": "no tissue found",
        "text": "not a slide that OpenSlide can open",
        "truncated": "truncated",
        "nowhere": "no such file",
    }.items():
        assert words in reasons[slide_id]
    printed = capsys.readouterr().out
    assert "7 slides: 2 ok, 0 cached, 1 no_tissue, 4 failed; 104 tiles" in printed
    assert printed.count("nowhere.svs") == 2  # while it ran, and at the end
    root = cfg.bookkeeping.shard_root
    assert repr(read_cohort(root)) == repr(report.rows)  # NaN is not equal to itself
    with (root / "cohort.csv").open(newline="") as file:
        assert [(row["slide_id"], row["patient_id"], row["status"], row["tiles"]) for row in csv.DictReader(file)] == [
            (row.slide_id, f"p-{row.slide_id}", row.status, str(row.tiles)) for row in report.rows
        ]
    assert ShardSet(root).slide_ids == (DOTTED, "table-mpp")
    assert sorted(path.name for path in root.iterdir() if path.is_dir() and any(path.iterdir())) == [
        "contact-sheet",
        "slides",
    ]

    before = contents(root)
    again = tile_cohort(cfg, progress=False)
    assert outcomes(again)[DOTTED] == ("cached", 52)
    assert {row.slide_id: row.seconds for row in again.rows}[DOTTED] == report.rows[0].seconds > 0
    assert outcomes(again)["no-tissue"] == ("no_tissue", 0)
    assert again.exit_code == 3
    assert contents(root) == before
    assert capsys.readouterr().out == ""


TILE = """
import sys
import gigamil.data.tile
from gigamil.config.load import load_config
if __name__ == "__main__":
    gigamil.data.tile.TILES_PER_TAR = 150
    gigamil.data.tile.tile_cohort(load_config(sys.argv[1]))
"""


def test_killed_in_the_middle_then_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9: finished slides stay, nothing half-finished has a final name, and the same command ends the work."""
    monkeypatch.setattr("gigamil.data.tile.TILES_PER_TAR", 150)  # several pieces for each slide
    slides = {f"s{n}": (draw(tmp_path / f"s{n}.tiff", size=768), "") for n in range(6)}
    cfg = cohort(tmp_path, slides)
    root = cfg.bookkeeping.shard_root
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    (tmp_path / "tile.py").write_text(TILE)
    command = [sys.executable, str(tmp_path / "tile.py"), str(tmp_path / "run.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(root.glob("slides/*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []
    done = ShardSet(root).slide_ids
    assert 1 <= len(done) < 6
    for slide_id in done:
        ShardSet(root).verify(slide_id)
    assert len(list(root.rglob("slides/*/manifest.json"))) == len(list(root.glob("slides/*"))) == len(done)

    report = tile_cohort(cfg, progress=False)
    assert [row.status for row in report.rows] == ["cached" if f"s{n}" in done else "ok" for n in range(6)]
    assert report.exit_code == 0
    assert sorted(path.name for path in root.iterdir()) == ["cohort.csv", "cohort.parquet", "contact-sheet", "slides"]
    elsewhere = cfg.model_copy(update={"bookkeeping": Bookkeeping(out=tmp_path / "uninterrupted")})
    tile_cohort(elsewhere, progress=False)
    assert contents(root) == contents(elsewhere.bookkeeping.shard_root)
    assert all(len(list(folder.glob("*.tar"))) > 3 for folder in root.glob("slides/*"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without child processes: what they add has its own tests."""

    def run_here(
        function: Callable[[object], object],
        jobs: Sequence[object],
        num_workers: int,
        limits: Limits,
        more: Callable[[int, object], Sequence[object]],
    ) -> Iterator[object]:
        for position, job in enumerate(jobs):
            waiting = [job]
            while waiting:
                result = function(waiting.pop(0))
                waiting += more(position, result)
                yield position, result

    monkeypatch.setattr("gigamil.data.tile.run_isolated", run_here)


@pytest.mark.parametrize("moment", ["children start", "children import", "slides are done"])
def test_ctrl_c_says_one_line_and_leaves_nothing_half_done(
    tmp_path: Path, gigamil: Callable[..., Any], moment: str
) -> None:
    """SIGINT to the whole process group, as a terminal sends it."""
    cfg = cohort(tmp_path, {f"s{n}": (draw(tmp_path / f"s{n}.tiff", size=1024), "") for n in range(6)})
    root = cfg.bookkeeping.shard_root
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))

    def num_children() -> int:
        return len([child for child in psutil.Process(command.process.pid).children() if is_worker(child)])

    command = gigamil("tile", "run.yaml")
    if moment == "slides are done":
        command.wait_for(lambda: any(root.glob("slides/*")), "a finished slide")
    else:
        command.wait_for(lambda: num_children() >= (1 if moment == "children start" else 2), "children")
    os.killpg(command.process.pid, signal.SIGINT)
    assert command.wait() == 5, command.output()
    lines = command.output().splitlines()
    assert lines[-1] == "gigamil: interrupted; the same command continues"
    assert [line for line in lines[:-1] if not line.startswith("[")] == []  # nothing else but finished slides
    assert {path.name for path in root.iterdir()} <= {"slides"}
    assert len(list(root.glob("slides/*"))) == len(list(root.glob("slides/*/manifest.json"))) < 6
    again = tile_cohort(cfg, progress=False)
    assert again.exit_code == 0
    assert again.num_tiles > 0


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


@pytest.mark.usefixtures("in_process")
def test_a_failed_rebuild_says_that_the_old_shards_are_kept(tmp_path: Path) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (draw(tmp_path / "b.tiff"), "")})
    root = tile_cohort(cfg, progress=False).shards
    before = contents(root)
    typo = cfg.model_copy(update={"slides": TILING.model_copy(update={"tile_mpp": 0.1})})
    report = tile_cohort(typo, progress=False)
    assert [row.status for row in report.rows] == ["failed", "failed"]
    assert all("over 4 times slides.tile_mpp=0.1" in row.reason for row in report.rows)
    assert all(
        row.reason.endswith("(Its shards of other settings, or of another version of its file, are kept.)")
        for row in report.rows
    )
    assert contents(root) == before
    assert [row.status for row in tile_cohort(cfg, progress=False).rows] == ["cached", "cached"]


@pytest.mark.usefixtures("in_process")
def test_slides_of_a_server_that_is_away_stay_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (draw(tmp_path / "b.tiff"), "")})
    tile_cohort(cfg, progress=False)
    real = Path.stat

    def away(path: Path, *args: Any, **options: Any) -> os.stat_result:
        if path.suffix == ".tiff":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "stat", away)
    assert [row.status for row in tile_cohort(cfg, progress=False).rows] == ["cached", "cached"]


def test_a_folder_in_use_by_another_run(tmp_path: Path) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (draw(tmp_path / "b.tiff"), "")})
    with (
        folder_lock(cfg.bookkeeping.shard_root, "gigamil tile"),
        pytest.raises(EnvironmentFault, match="in use by `gigamil tile`, process"),
    ):
        tile_cohort(cfg)


@pytest.mark.usefixtures("in_process")
def test_no_slide_exists(tmp_path: Path) -> None:
    cfg = cohort(tmp_path, {"a": (tmp_path / "a.svs", ""), "b": (tmp_path / "b.svs", "")})
    with pytest.raises(CohortError, match=r"none of the 2 slide paths exists, for example '.*a.svs'; set cohort.root"):
        tile_cohort(cfg)
    # The part of a job may well hold no other slides than those that are missing.
    assert [row.status for n in (1, 2) for row in tile_cohort(cfg, job=ArrayJob(n, 2)).rows] == ["failed"] * 2


@pytest.mark.usefixtures("in_process")
def test_a_smoke_run_tiles_the_first_of_each_split_and_class(tmp_path: Path) -> None:
    slides = {f"s{n:02}": (draw(tmp_path / f"s{n:02}.tiff"), "") for n in range(12)}
    report = tile_cohort(cohort(tmp_path, slides, limit=1), progress=False)
    assert len(report.rows) == 6
    assert report.exit_code == 0
    assert len(ShardSet(report.shards).slide_ids) == 6


@pytest.mark.usefixtures("in_process")
def test_in_a_log_the_rate_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gigamil.data.tile.SAY_EVERY_S", 0.0)
    cfg = cohort(tmp_path, {"gone": (tmp_path / "gone.svs", ""), "good": (draw(tmp_path / "good.tiff"), "")})
    tile_cohort(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "[1/2] 0 tiles, 0 tiles/s, time unknown"
    assert re.fullmatch(r"\[2/2\] 52 tiles, [1-9]\d* tiles/s, 0 min left", lines[3])


@pytest.mark.usefixtures("in_process")
def test_on_a_terminal_a_bar_below_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cfg = cohort(tmp_path, {"good": (draw(tmp_path / "good.tiff"), ""), "gone": (tmp_path / "gone.svs", "")})
    tile_cohort(cfg)
    out, err = capsys.readouterr()
    assert "52.0/52.0" in err
    assert "2/2 slides" in err
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["good", "ok"],
        ["gone", "failed"],
        ["gone", "failed"],  # again, where it is seen
        ["2", "slides:"],
    ]


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slides in several pieces and in one, raw and resampled, on one process and on three."""
    monkeypatch.setattr("gigamil.data.tile.TILES_PER_TAR", 30)
    slides = {f"s{n}": (draw(tmp_path / f"s{n}.tiff", size=320 + 96 * n, tile=32 * (1 + n % 2)), "") for n in range(3)}
    slides["small"] = (draw(tmp_path / "small.tiff", size=160), "")
    found = {}
    for num_workers in (1, 3):
        cfg = cohort(tmp_path, slides).model_copy(
            update={
                "execution": Execution(tile_workers=num_workers),
                "bookkeeping": Bookkeeping(out=tmp_path / f"run{num_workers}"),
            }
        )
        report = tile_cohort(cfg, progress=False)
        assert report.exit_code == 0
        assert [row.way for row in report.rows] == ["raw", "resampled", "raw", "resampled"]
        found[num_workers] = contents(report.shards)
        assert not (report.shards / ".gigamil-staging").exists()
    assert found[1] == found[3]
    tars = [name for name in found[1] if name.endswith(".tar")]
    assert len(tars) > 10


MISBEHAVE = """
import os, signal, time
from gigamil.partition.curve import hilbert_sort

def order(column, row):
    kind = int(column.max()) - int(column.min())
    if kind == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == 9:
        raise KeyError("an error in the code")
    if kind == 11:
        bytes(1 << 40)
    if kind == 13:
        time.sleep(600)
    return hilbert_sort(column, row)
"""


def test_a_crash_an_error_and_each_limit_cost_one_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the child, told apart by the width of the tissue in tiles."""
    (tmp_path / "misbehave_in_child.py").write_text(MISBEHAVE)
    monkeypatch.syspath_prepend(tmp_path)
    import misbehave_in_child  # type: ignore[import-not-found]

    monkeypatch.setattr("gigamil.data.tile.hilbert_sort", misbehave_in_child.order)
    sizes = {"crash": 256, "error": 320, "memory": 384, "slow": 448, "good": 640}
    cfg = cohort(tmp_path, {name: (draw(tmp_path / f"{name}.tiff", size=size), "") for name, size in sizes.items()})
    cfg = cfg.model_copy(update={"execution": Execution(tile_workers=2, tile_timeout_s=4)})
    report = tile_cohort(cfg, progress=False)
    assert {row.slide_id: row.status for row in report.rows} == dict.fromkeys(sizes, "failed") | {"good": "ok"}
    reasons = {row.slide_id: row.reason for row in report.rows}
    assert reasons["crash"].startswith("its process was killed by SIGSEGV: a broken file, or more memory than")
    assert reasons["error"].startswith("unexpected KeyError: 'an error in the code' (misbehave_in_child.py:10)")
    assert reasons["memory"] == "it needs more memory than execution.tile_memory_gb=1.5; raise it, or remove its row"
    assert reasons["slow"].startswith("a piece of it took over execution.tile_timeout_s=4 seconds")
    assert "KeyError" in capfd.readouterr().err  # with its traceback, once
    assert sorted(path.name for path in (report.shards / "slides").iterdir()) == ["good"]
    assert not (report.shards / ".gigamil-staging").exists()
    assert report.exit_code == 3


def test_damage_found_in_a_late_piece_costs_the_whole_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other pieces are done or under way: nothing of it stays, and its neighbours are whole."""
    monkeypatch.setattr("gigamil.data.tile.clear_leftovers", lambda root, slide_ids: None)  # at once, not at the end
    monkeypatch.setattr("gigamil.data.tile.TILES_PER_TAR", 100)
    slides = {name: (draw(tmp_path / f"{name}.tiff", size=768, tile=64), "") for name in ("a", "b", "c")}
    data = bytearray(slides["b"][0].read_bytes())
    at = data.rindex(b"\xff\xd8\xff", 0, len(data) // 2)  # a tile in the middle of level 0
    data[at : at + 300] = bytes(300)
    slides["b"][0].write_bytes(data)
    report = tile_cohort(cohort(tmp_path, slides), progress=False)
    assert {row.slide_id: row.status for row in report.rows} == {"a": "ok", "b": "failed", "c": "ok"}
    assert "damaged" in report.rows[1].reason
    assert sorted(path.name for path in (report.shards / "slides").iterdir()) == ["a", "c"]
    assert list((report.shards / ".gigamil-staging").iterdir()) == []
    for slide_id in ("a", "c"):
        ShardSet(report.shards).verify(slide_id)


@pytest.mark.usefixtures("in_process")
def test_only_what_changed_is_tiled_again_and_deleted_files_heal(tmp_path: Path) -> None:
    slides = {name: (draw(tmp_path / f"{name}.tiff"), "1.0") for name in ("same", "mpp", "file", "gone", "cut", "link")}
    cfg = cohort(tmp_path, slides)
    root = tile_cohort(cfg, progress=False).shards
    before = contents(root)
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("same/*")}
    slides["mpp"] = (slides["mpp"][0], "1.1")
    draw(slides["file"][0], size=288)
    (root / "slides" / "gone" / "overview.jpg").unlink()
    os.truncate(root / "slides" / "cut" / "tiles-00000.tar", 1000)
    tar = root / "slides" / "link" / "tiles-00000.tar"
    tar.rename(tmp_path / "elsewhere.tar")
    tar.symlink_to(tmp_path / "elsewhere.tar")
    report = tile_cohort(cohort(tmp_path, slides), progress=False)
    assert {row.slide_id: row.status for row in report.rows} == dict.fromkeys(slides, "ok") | {"same": "cached"}
    after = contents(root)
    changed = {name.split("/")[1] for name in before if before[name] != after.get(name)}
    assert changed == {"mpp", "file"}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("same/*")} == stamps
    assert {row.status for row in tile_cohort(cohort(tmp_path, slides), progress=False).rows} == {"cached"}


@pytest.mark.usefixtures("in_process")
def test_a_file_under_two_ids_counts_once(tmp_path: Path) -> None:
    """Also as a copy, and whatever the order in which slides are done; equal sizes alone are no copies."""
    first = draw(tmp_path / "first.tiff")
    (tmp_path / "copy.tiff").write_bytes(first.read_bytes())
    other = bytearray(first.read_bytes())
    other[other.index(b"JFIF") + 9] ^= 1  # the resolution in a tile's header, which nothing uses
    (tmp_path / "other.tiff").write_bytes(other)
    slides = {name: (tmp_path / f"{name}.tiff", "1.0") for name in ("first", "copy", "other")}
    report = tile_cohort(cohort(tmp_path, slides), progress=False)
    assert outcomes(report) == {"first": ("ok", 52), "copy": ("failed", 0), "other": ("ok", 52)}
    assert report.rows[1].reason == "its file is that of slide 'first'; remove one of the two rows"


@pytest.mark.usefixtures("in_process")
def test_more_spacings_go_into_shards_of_their_own(tmp_path: Path) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff", size=512), ""), "b": (tmp_path / "gone.tiff", "")})
    cfg = cfg.model_copy(update={"slides": TILING.model_copy(update={"extra_mpp": (2.0, 0.5)})})
    report = tile_cohort(cfg, progress=False)
    assert [extra.shards.name for extra in report.extra] == ["mpp-2", "mpp-0.5"]
    assert report.exit_code == 3
    counts = [found.rows[0].tiles for found in (report, *report.extra)]
    assert counts[1] < counts[0] < counts[2]
    shards = ShardSet(report.shards / "mpp-2")
    assert (shards.slide_ids, shards.manifest("a").tile_mpp) == (("a",), 2.0)
    assert ShardSet(report.shards).slide_ids == ("a",)
    alone = cfg.model_copy(
        update={"slides": TILING.model_copy(update={"tile_mpp": 2.0}), "bookkeeping": Bookkeeping(out=tmp_path / "two")}
    )
    assert contents(tile_cohort(alone, progress=False).shards) == contents(report.shards / "mpp-2")
    again = tile_cohort(cfg, progress=False)
    assert [found.rows[0].status for found in (again, *again.extra)] == ["cached"] * 3


@pytest.mark.usefixtures("in_process")
def test_training_from_slides_needs_positions_only(tmp_path: Path) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (draw(tmp_path / "b.tiff"), "")})
    report = tile_cohort(cfg.model_copy(update={"data": Data(source="slides")}), progress=False)
    assert [(row.status, row.tiles, row.bytes) for row in report.rows] == [("ok", 52, 0)] * 2
    assert list(report.shards.rglob("*.tar")) == []
    assert [row.status for row in tile_cohort(cfg, progress=False).rows] == ["ok", "ok"]  # with pixels now


@pytest.mark.usefixtures("in_process")
def test_without_progress_tile_says_the_result_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (tmp_path / "gone.tiff", "")}, progress=False)
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    assert main(["tile", str(tmp_path / "run.yaml")]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["b", "failed"], ["2", "slides:"]]


def test_jobs_of_an_array_tile_one_cohort_at_once(tmp_path: Path, gigamil: Callable[..., Any]) -> None:
    """Real processes that start together; the table and the shards are those of one run."""
    slides = {f"s{n:02}": (draw(tmp_path / f"s{n:02}.tiff"), "") for n in range(9)}
    slides["bad"] = (tmp_path / "gone.tiff", "")
    cfg = cohort(tmp_path, slides)
    (tmp_path / "run.yaml").write_text(to_yaml(cfg))
    jobs = [gigamil("tile", "run.yaml", "--shard", f"{i}/3", "--execution.tile_workers", "1") for i in (1, 2, 3)]
    assert sorted(job.wait() for job in jobs) == [0, 0, 3], [job.output() for job in jobs]
    root = cfg.bookkeeping.shard_root
    table = {row.slide_id: row.status for row in read_cohort(root)}
    assert table == dict.fromkeys(sorted(slides), "ok") | {"bad": "failed"}
    alone = cfg.model_copy(update={"bookkeeping": Bookkeeping(out=tmp_path / "alone")})
    whole = tile_cohort(alone, progress=False)
    assert contents(root) == contents(whole.shards)
    shares = [[name for name in slides if ArrayJob(i, 3).owns(name)] for i in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == sorted(slides)
    assert all(shares)
    sheets = sorted(path.name for path in (root / "contact-sheet").iterdir())
    assert sheets == ["1-of-3", "2-of-3", "3-of-3"]
    assert [row.status for row in tile_cohort(cfg, progress=False).rows].count("cached") == 9
    sheets = {path.name for path in (root / "contact-sheet").iterdir()}
    assert sheets == {".shown", "index.html", "page-001.jpg"}  # those of the jobs have gone: nobody draws them anew
    assert main(["tile", str(tmp_path / "run.yaml"), "--shard", "1/2"]) in (0, 3)
    assert {path.name for path in (root / "contact-sheet").iterdir()} == {"1-of-2"}


@pytest.mark.usefixtures("in_process")
def test_a_job_touches_nothing_of_the_others(tmp_path: Path) -> None:
    """It runs beside its siblings, not beside itself, another array, or a run of its own; and leaves their staging."""
    slides = {f"s{n}": (draw(tmp_path / f"s{n}.tiff"), "") for n in range(4)}
    cfg = cohort(tmp_path, slides)
    root = cfg.bookkeeping.shard_root
    theirs, own = ([name for name in slides if ArrayJob(i, 2).owns(name)] for i in (1, 2))
    for name in slides:
        (root / ".gigamil-staging" / name).mkdir(parents=True)
    with folder_lock(root, "gigamil tile --shard 1/2", (1, 2)):
        for job in (None, ArrayJob(1, 2), ArrayJob(1, 3)):
            with pytest.raises(EnvironmentFault, match="in use by `gigamil tile --shard 1/2`"):
                tile_cohort(cfg, progress=False, job=job)
        report = tile_cohort(cfg, progress=False, job=ArrayJob(2, 2))
    assert [row.slide_id for row in report.rows] == own
    assert sorted(path.name for path in (root / ".gigamil-staging").iterdir()) == theirs
    assert theirs


def test_links_where_tile_writes_are_refused(tmp_path: Path) -> None:
    """The shard folder itself may be a link; what is in it may not lead elsewhere."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere" / "precious").mkdir(parents=True)
    cfg = cohort(tmp_path, {"a": (draw(tmp_path / "a.tiff"), ""), "b": (draw(tmp_path / "b.tiff"), "")})
    (tmp_path / "run").mkdir()
    cfg.bookkeeping.shard_root.symlink_to(tmp_path / "disk")
    (tmp_path / "elsewhere" / "a").mkdir()  # would be deleted as what is left of slide a
    for name in (".gigamil-staging", ".gigamil-removed", ".gigamil-jobs", "slides", "contact-sheet"):
        (tmp_path / "disk" / name).symlink_to(tmp_path / "elsewhere")
        for job in (None, ArrayJob(1, 1)):
            with pytest.raises(ShardError, match=rf"{name}' is a symbolic link to '.*elsewhere'"):
                tile_cohort(cfg, progress=False, job=job)
        (tmp_path / "disk" / name).unlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["a", "precious"]


@pytest.mark.usefixtures("in_process")
def test_the_contact_sheet_is_mended_and_else_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C within it or a kill before it, and when a slide left the table, though no slide is tiled."""
    slides = {name: (draw(tmp_path / f"{name}.tiff"), "") for name in ("a", "b", "c")}
    first_two = {name: slides[name] for name in "ab"}
    page = tile_cohort(cohort(tmp_path, first_two), progress=False).shards / "contact-sheet" / "page-001.jpg"
    two = page.read_bytes()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for moment, size in (("write_contact_sheet", 256), ("write_cohort", 288)):
        draw(slides["c"][0], size=size)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"gigamil.data.tile.{moment}", stop)
            tile_cohort(cohort(tmp_path, slides), progress=False)
        assert page.read_bytes() == two
        assert {row.status for row in tile_cohort(cohort(tmp_path, slides), progress=False).rows} == {"cached"}
        assert page.read_bytes() != two
        tile_cohort(cohort(tmp_path, first_two), progress=False)
        assert page.read_bytes() == two
    monkeypatch.setattr("gigamil.data.tile.write_contact_sheet", stop)
    tile_cohort(cohort(tmp_path, first_two), progress=False)


def test_what_a_slide_says_of_itself_is_harmless_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.full((256, 256, 3), (200, 110, 160), np.uint8)
    hostile = "=cmd()\x1b[31m\r\n,\u202e<script>"
    text = f"Aperio {hostile}\r\n256x256|AppMag = {hostile}|Title = {hostile}|MPP = "
    for name, mpp in (("good", "1.0"), ("bad", hostile)):
        write_pyramid_tiff(tmp_path / f"{name}.svs", image, None, levels=1, description=text + mpp)
    slides = {"-a": (tmp_path / "good.svs", ""), "b": (tmp_path / "bad.svs", "")}
    report = tile_cohort(cohort(tmp_path, slides))
    assert [row.status for row in report.rows] == ["ok", "failed"]
    texts = [capsys.readouterr().out, *(path.read_text() for path in report.shards.rglob("*.csv"))]
    texts += [path.read_text() for path in report.shards.rglob("*.json")]
    assert len(texts) == 3
    assert [text for text in texts if "\x1b" in text or "\u202e" in text] == []
    rows = list(csv.reader((report.shards / "cohort.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["slide_id", "'-a", "b"]
    assert [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))] == []


@pytest.mark.real_data
@pytest.mark.usefixtures("in_process")
def test_the_same_real_slide_as_svs_and_as_dicom(tmp_path: Path, real_data: Path) -> None:
    """Same grid, and tiles that differ by what the second JPEG encoding of the DICOM copy costs."""
    wsi = real_data / "wsi"
    slides = {
        "svs": (wsi / "CMU-1-Small-Region.svs", ""),
        "folder": (wsi / "CMU-1-Small-Region.dicom", ""),
        "level": (wsi / "CMU-1-Small-Region.dicom" / "level-2-frames-0-4.dcm", ""),
    }
    cfg = cohort(tmp_path, slides).model_copy(update={"slides": Slides(tile_px=224, tile_mpp=0.5)})
    report = tile_cohort(cfg, progress=False)
    assert report.exit_code == 0
    shards = ShardSet(report.shards)
    assert {shards.manifest(name).mpp_x for name in slides} == {0.499}
    assert {(shards.manifest(name).num_x, shards.manifest(name).num_y) for name in slides} == {(10, 14)}
    places = {name: list(zip(*shards.positions_um(name).T.tolist(), strict=True)) for name in slides}
    assert places["folder"] == places["level"]
    common = [place for place in places["svs"] if place in places["folder"]]
    assert len(common) >= 0.95 * max(len(places["svs"]), len(places["folder"]))

    def tiles(name: str) -> np.ndarray:
        jpegs = shards.read_span(name, 0, len(places[name]))
        return decode_tiles([jpegs[places[name].index(place)] for place in common], 224).astype(float)

    assert np.abs(tiles("svs") - tiles("folder")).mean() < 6.0
    np.testing.assert_array_equal(tiles("folder"), tiles("level"))


# In Python, because bash may run a trap in the middle of a substitution and then does not leave.
STAND_IN = f"""#!{sys.executable}
import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(5))
print("asked for:", *sys.argv[1:], flush=True)
time.sleep(float(os.environ.get("SECONDS_TO_WORK", "0")))
"""


def array_job(tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """The batch script as Slurm would start it, with stand-ins for the interpreter and for scontrol."""
    for name, text in {"python": STAND_IN, "scontrol": '#!/usr/bin/env bash\necho "scontrol $*"\n'}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "launch" / "slurm" / "tile.sbatch"
    env = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "SLURM_ARRAY_JOB_ID": "77",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "4",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_CPUS_PER_TASK": "16",
    }
    command = ["bash", str(script), "my config.yaml", "--slides.tile_px", "256"]
    return subprocess.Popen(command, env=env | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_batch_script_tiles_its_part(tmp_path: Path) -> None:
    out, _ = array_job(tmp_path).communicate(timeout=30)
    words = "tile my config.yaml --shard 2/4 --execution.tile_workers 16 --slides.tile_px 256"
    assert f"asked for: -m gigamil {words}\n" in out
    assert f"+ {tmp_path}/python -m gigamil tile my\\ config.yaml --shard 2/4" in out


@pytest.mark.parametrize("change", [{"SLURM_ARRAY_TASK_MIN": "0"}, {"SLURM_ARRAY_TASK_COUNT": "2"}])
def test_the_batch_script_leaves_out_no_part(tmp_path: Path, change: dict[str, str]) -> None:
    job = array_job(tmp_path, **change)
    out, _ = job.communicate(timeout=30)
    assert (job.returncode, "asked for" in out) == (2, False)
    assert "the array must be 1-N without gaps" in out


def test_the_batch_script_goes_back_into_the_queue(tmp_path: Path) -> None:
    # Longer than the test waits: it has to end by the signal.
    with array_job(tmp_path, SECONDS_TO_WORK="120") as job:
        assert job.stdout is not None
        while "asked for" not in job.stdout.readline():
            assert job.poll() is None
        job.send_signal(signal.SIGUSR1)
        out, _ = job.communicate(timeout=60)
    assert job.returncode == 5
    assert out.splitlines()[-1] == "scontrol requeue 77_2"

"""A folder of good and bad slides through `tile_cohort`: each bad one is named, the others are tiled, nothing is half done."""

import csv
import os
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

from gigamil.config.schema import Bookkeeping, Cohort, Execution, RunConfig, Slides
from gigamil.data.decode import decode_tiles
from gigamil.data.tile import TileReport, tile_cohort
from gigamil.errors import CohortError, EnvironmentFault
from gigamil.lock import folder_lock
from gigamil.shards.read import ShardSet
from gigamil.testing.slides import write_pyramid_tiff

DOTTED = "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0-4e9d-982d-1ad0af7bead9"
TILING = Slides(tile_px=32, tile_mpp=1.0, min_tissue_area_um2=1000.0)


def draw(path: Path, *, tissue: bool = True, mpp: float | None = 1.0, size: int = 256) -> Path:
    image = np.full((size, size, 3), 245, np.uint8)
    if tissue:
        seed = int.from_bytes(path.stem.encode()[-4:], "little")
        inner = np.random.default_rng(seed).integers(0, 40, (size - 64, size - 64, 3))
        image[32:-32, 32:-32] = np.array([190, 90, 150]) + inner
    write_pyramid_tiff(path, image, mpp, levels=2)
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
        "no-mpp": (draw(tmp_path / "no_mpp.tiff", mpp=None), ""),
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
    with (root / "status.csv").open(newline="") as file:
        assert [(row["slide_id"], row["status"]) for row in csv.DictReader(file)] == [
            (row.slide_id, row.status) for row in report.rows
        ]
    assert ShardSet(root).slide_ids == (DOTTED, "table-mpp")
    assert sorted(path.name for path in root.iterdir() if path.is_dir() and any(path.iterdir())) == ["slides"]

    before = contents(root)
    again = tile_cohort(cfg, progress=False)
    assert outcomes(again)[DOTTED] == ("cached", 52)
    assert outcomes(again)["no-tissue"] == ("no_tissue", 0)
    assert again.exit_code == 3
    assert contents(root) == before
    assert capsys.readouterr().out == ""


TILE = """
import sys
from gigamil.config.load import load_config
from gigamil.data.tile import tile_cohort
if __name__ == "__main__":
    tile_cohort(load_config(sys.argv[1]))
"""


def test_killed_in_the_middle_then_run_again(tmp_path: Path) -> None:
    """kill -9: finished slides stay, nothing half-finished has a final name, and the same command ends the work."""
    from gigamil.config.load import to_yaml

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
    assert sorted(path.name for path in root.iterdir()) == ["slides", "status.csv"]
    elsewhere = cfg.model_copy(update={"bookkeeping": Bookkeeping(out=tmp_path / "uninterrupted")})
    tile_cohort(elsewhere, progress=False)
    assert contents(root) == contents(elsewhere.bookkeeping.shard_root)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without child processes: what they add has its own tests."""

    def run_here(function: Callable[[object], object], jobs: Sequence[object], num_workers: int) -> Iterator[object]:
        yield from enumerate(map(function, jobs))

    monkeypatch.setattr("gigamil.data.tile.run_isolated", run_here)


@pytest.mark.parametrize("moment", ["children start", "children import", "slides are done"])
def test_ctrl_c_says_one_line_and_leaves_nothing_half_done(
    tmp_path: Path, gigamil: Callable[..., Any], moment: str
) -> None:
    """SIGINT to the whole process group, as a terminal sends it."""
    from gigamil.config.load import to_yaml

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


@pytest.mark.usefixtures("in_process")
def test_a_smoke_run_tiles_the_first_of_each_split_and_class(tmp_path: Path) -> None:
    slides = {f"s{n:02}": (draw(tmp_path / f"s{n:02}.tiff"), "") for n in range(12)}
    report = tile_cohort(cohort(tmp_path, slides, limit=1), progress=False)
    assert len(report.rows) == 6
    assert report.exit_code == 0
    assert len(ShardSet(report.shards).slide_ids) == 6


@pytest.mark.usefixtures("in_process")
def test_on_a_terminal_a_bar_below_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cfg = cohort(tmp_path, {"good": (draw(tmp_path / "good.tiff"), ""), "gone": (tmp_path / "gone.svs", "")})
    tile_cohort(cfg)
    out, err = capsys.readouterr()
    assert "2/2" in err
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["good", "ok"],
        ["gone", "failed"],
        ["gone", "failed"],  # again, where it is seen
        ["2", "slides:"],
    ]


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

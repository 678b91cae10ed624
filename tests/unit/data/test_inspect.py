"""`inspect` of a cohort: what it predicts is what `tile` makes, a broken slide is a row, and the page holds no harm."""

import math
import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gigamil.cli import main
from gigamil.config.schema import Execution, Slides
from gigamil.data.cohort import SlideRow
from gigamil.data.h5 import write_coords
from gigamil.data.inspect import (
    InspectedSlide,
    _Look,
    _look,
    _without_path,
    histogram,
    inspect_cohort,
    slides_in,
    time_text,
)
from gigamil.data.workers import Limits
from gigamil.errors import CohortError
from gigamil.evaluate.cohort_page import write_cohort_page
from gigamil.partition.curve import hilbert_sort
from gigamil.shards.build import Part, StoredPart, build_slide, store_part
from gigamil.shards.job import SlideJob
from gigamil.testing.slides import synthetic_slide, write_pyramid_tiff

TWO = Execution(tile_workers=2)
SETTINGS = Slides(tile_px=128, tile_mpp=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good slides, one of them with tiles that can be copied, and four that give none."""
    folder = tmp_path_factory.mktemp("Müller, Eva")
    (folder / "sub").mkdir()
    image = synthetic_slide(1, tumour=True, size_um=(700.0, 600.0)).image_HW3
    write_pyramid_tiff(folder / "a.tiff", image, 0.5, tile=128)
    write_pyramid_tiff(folder / "sub" / "b.tiff", image, 0.47, tile=256)
    write_pyramid_tiff(folder / "glass.tiff", np.full((600, 600, 3), 245, np.uint8), 0.5)
    dark = np.full((600, 600, 3), 10, np.uint8)
    dark[100:400, 100:400, 2] = 200
    write_pyramid_tiff(folder / "sub" / "dark.tiff", dark, 0.5)
    write_pyramid_tiff(folder / "no-mpp.tiff", image, None)
    (folder / "cut.svs").write_bytes((folder / "a.tiff").read_bytes()[:5000])
    return folder


def row(folder: Path, name: str) -> SlideRow:
    return SlideRow(name, folder / name, name, None, None, None, None)


def test_tiles_and_bytes_are_those_that_tile_makes(folder: Path, tmp_path: Path) -> None:
    rows = [row(folder, "a.tiff"), row(folder, "sub/b.tiff")]
    rows[1] = SlideRow("b", rows[1].path, "b", None, None, None, None)
    found = inspect_cohort(rows, SETTINGS, TWO, num_sampled=12)
    assert found.exit_code == 0
    assert [slide.way for slide in found.rows] == ["raw", "resampled"]
    for slide, wanted in zip(found.rows, rows, strict=True):
        manifest = build_slide(SlideJob(wanted.slide_id, wanted.path, None, SETTINGS, tmp_path, hilbert_sort))
        assert (slide.tiles, slide.way) == (manifest.num_tiles, manifest.way)
        assert slide.tissue_area_mm2 == pytest.approx(manifest.tissue_area_mm2, abs=1e-6)
        assert slide.bytes == pytest.approx(sum(tar.bytes for tar in manifest.tars), rel=0.2)
        assert 0 < slide.seconds < 60
        assert 0 < slide.sampled <= 13
    assert found.num_tiles == sum(slide.tiles for slide in found.rows)


def test_a_slide_that_gives_no_tiles_is_a_row_with_its_reason(folder: Path) -> None:
    found = inspect_cohort(slides_in([folder]), SETTINGS, TWO, num_sampled=2)
    assert found.exit_code == 3
    problem = {slide.slide_id: slide.problem for slide in found.rows}
    assert list(problem) == ["a.tiff", "cut.svs", "glass.tiff", "no-mpp.tiff", "sub_b.tiff", "sub_dark.tiff"]
    assert problem["a.tiff"] == problem["sub_b.tiff"] == ""
    assert problem["glass.tiff"] == "no tissue found"
    assert "slides.default_mpp" in problem["no-mpp.tiff"]
    assert "slides.dark_field: tissue" in problem["sub_dark.tiff"]
    assert "not a slide" in problem["cut.svs"]
    known = {slide.slide_id: slide for slide in found.rows}
    assert (known["sub_dark.tiff"].mpp_x, known["sub_dark.tiff"].width) == (0.5, 600)  # headers could be read
    text = found.text()
    assert "Müller" not in text  # of paths only names are shown
    assert "2 of 6 slides give tiles of 128 px at 0.5 um/px" in text
    assert re.search(r"um/px\n +0\.47 +1 +#\n +0\.5 +3 +###\n", text)


def test_a_mask_and_a_stride_count_as_in_tiling(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tiff.geojson").write_text(
        '{"type": "Polygon", "coordinates": [[[0, 0], [512, 0], [512, 256], [0, 256], [0, 0]]]}'
    )
    settings = SETTINGS.model_copy(update={"masks": tmp_path, "stride_px": 64, "min_tissue": 1.0})
    found = inspect_cohort([row(folder, "a.tiff"), row(folder, "glass.tiff")], settings, TWO, num_sampled=2)
    assert found.rows[0].tiles == 7 * 3
    assert "glass.tiff.geojson" in found.rows[1].problem
    assert str(tmp_path) not in found.rows[1].problem


def test_neither_page_nor_problems_name_a_folder(folder: Path, tmp_path: Path) -> None:
    masks, coords = tmp_path / "Roe, Jane" / "masks", tmp_path / "Roe, Jane" / "masks" / "coords"
    coords.mkdir(parents=True)
    write_coords(coords / "a.tiff.h5", np.array([[10_000, 0]]), {"patch_size": 128, "patch_size_level0": 128})
    settings = SETTINGS.model_copy(update={"coords": coords})
    found = inspect_cohort([row(folder, "a.tiff"), row(folder, "glass.tiff")], settings, TWO, num_sampled=2)
    outside, missing = (slide.problem for slide in found.rows)
    assert "'a.tiff.h5' has 1 of 1 positions outside" in outside.replace("coords/", "")
    assert "'coords' must hold one file of its coordinates" in missing
    found = replace(found, slides=settings.model_copy(update={"masks": masks}))
    write_cohort_page(tmp_path / "p.html", found)
    page = (tmp_path / "p.html").read_text()
    assert "slides.coords: &quot;coords&quot;" in page
    assert "slides.masks: &quot;masks&quot;" in page
    for text in (page, outside, missing):
        assert [name for name in ("Müller", "Roe", str(tmp_path)) if name in text] == []


@pytest.mark.parametrize("path", [Path(), Path("/")])
def test_a_folder_without_a_name_leaves_the_reason_whole(path: Path) -> None:
    settings = SETTINGS.model_copy(update={"masks": path})
    job = SlideJob("a", Path("Roe, Jane/a.svs"), None, settings, Path("shards"), hilbert_sort)
    reason = _without_path(job, "slide 'Roe, Jane/a.svs': no mask 'a.png'. Add it, 0.5 um/px.")
    assert reason == "no mask 'a.png'. Add it, 0.5 um/px."
    job = SlideJob("a", path, None, SETTINGS, Path("shards"), hilbert_sort)
    assert (
        _without_path(job, f"slide '{path}': no DICOM file. Add it, 0.5 um/px.") == "no DICOM file. Add it, 0.5 um/px."
    )


def test_one_tile_more_is_made_than_sampled_and_the_first_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def store(part: Part) -> StoredPart:
        made.append(part.cells_n.tolist())
        return store_part(part)

    monkeypatch.setattr("gigamil.data.inspect.store_part", store)
    slide = _look(_Look(SlideJob("a", folder / "a.tiff", None, SETTINGS, tmp_path, hilbert_sort), 2))
    first, chosen = made
    assert (len(chosen), slide.sampled) == (3, 3)
    assert first == chosen[:1]


def test_limits_are_those_of_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run_isolated(*_: object, limits: Limits) -> Generator[tuple[int, InspectedSlide]]:
        given.append(limits)
        yield from ()

    monkeypatch.setattr("gigamil.data.inspect.run_isolated", run_isolated)
    inspect_cohort([], SETTINGS, Execution(tile_memory_gb=1.5, tile_timeout_s=60))
    assert given == [Limits(1_500_000_000, 60)]


def test_a_slide_beyond_its_limits_costs_itself_only(folder: Path) -> None:
    tiny = Execution(tile_workers=1, tile_timeout_s=0.001)
    found = inspect_cohort([row(folder, "a.tiff")], SETTINGS, tiny, num_sampled=2)
    assert "limit of time" in found.rows[0].problem
    assert found.exit_code == 3


def test_ids_from_paths_are_plain_and_differ(tmp_path: Path) -> None:
    for name in ("x y.svs", "x_y.svs", "é.svs", "sub/x y.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = slides_in([tmp_path, tmp_path / "x y.svs"])
    assert [slide.slide_id for slide in rows] == ["x_y.svs", "x_y.svs~2", "_.svs", "sub_x_y.svs", "x_y.svs~3"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CohortError, match="no slide in .*empty"):
        slides_in([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([0.25, 0.2500001, 0.5], [("0.25", 2), ("0.5", 1)]),
        ([7], [("7", 1)]),
        (range(100), [("0 to 20", 20), ("20 to 40", 20), ("40 to 60", 20), ("60 to 80", 20), ("80 to 100", 20)]),
        (range(0, 9000, 1000), [("0 to 2,000", 2), ("2,000 to 4,000", 2), ("4,000 to 6,000", 2), ("6,000 to 8,000", 2),
                                ("8,000 to 10,000", 1)]),
    ],
)  # fmt: skip
def test_histograms_have_round_numbers(values: list[float], bars: list[tuple[str, int]]) -> None:
    assert histogram(list(values)) == bars


@pytest.mark.parametrize("seed", range(20))
def test_histograms_count_every_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.lognormal(0, 2, 200) * 10.0 ** rng.integers(-3, 6)).tolist()
    bars = histogram(values)
    assert sum(count for _, count in bars) == len(values)
    assert 2 <= len(bars) <= 8


def test_times_are_written_in_their_unit() -> None:
    assert [time_text(value) for value in (0.5, 61, 7200, 86400 * 3)] == ["0.5 s", "1 min", "2 h", "3 days"]


def test_the_page_escapes_every_text_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    found = inspect_cohort([row(folder, "a.tiff")], SETTINGS, TWO, num_sampled=2)
    hostile = InspectedSlide("<script>alert(1)</script>", "<img src=x onerror=y>", vendor='"><b>')
    write_cohort_page(tmp_path / "p.html", type(found)((*found.rows, hostile), SETTINGS, 2))
    page = (tmp_path / "p.html").read_text()
    assert "&lt;script&gt;alert" in page
    for tag in ("<script", "<img src=x", "<b>", "http:", "https:", "Müller"):
        assert tag not in page
    assert page.count('src="data:image/png;base64,') == 1
    nothing = type(found)((hostile,), SETTINGS, 2)
    write_cohort_page(tmp_path / "p.html", nothing)
    assert "0 of 1 slides give tiles" in (tmp_path / "p.html").read_text()
    assert math.isnan(hostile.mpp_x)


def test_the_command_takes_a_folder_a_table_or_a_configuration(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(folder / "sub"), "--tile-px", "128", "--html", "page.html"]) == 3
    assert "1 of 2 slides give tiles of 128 px" in capsys.readouterr().out
    assert (tmp_path / "page.html").is_file()
    Path("slides.csv").write_text(f'slide_id,path\none,"{folder / "a.tiff"}"\n')
    assert main(["inspect", "slides.csv", "--tile-px", "128"]) == 0
    assert "1 of 1 slides give tiles of 128 px at 0.5 um/px" in capsys.readouterr().out
    Path("my.yaml").write_text("cohort: {table: slides.csv, patient_is_slide: true}\nslides: {tile_px: 64}\n")
    assert main(["inspect", "my.yaml", "--slides.tile_mpp", "1.0"]) == 0
    assert "1 of 1 slides give tiles of 64 px at 1 um/px" in capsys.readouterr().out


def test_mpp_is_for_files_that_carry_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mpp", "0.25", "--tile-px", "128"]
    assert main(["inspect", str(folder / "a.tiff"), str(folder / "no-mpp.tiff"), *words]) == 0
    out = capsys.readouterr().out
    assert "0.5 um/px (from the file)" in out
    assert "0.25 um/px (the default, the file has none)" in out
    assert main(["inspect", str(folder / "sub"), *words]) == 3
    assert re.search(r"sub_b|b\.tiff .* 0\.47 \(file\)", capsys.readouterr().out)


def test_slide_files_are_reported_one_by_one_and_mixtures_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder / "a.tiff"), str(folder / "no-mpp.tiff"), "--tile-px", "128"]) == 3
    out, err = capsys.readouterr()
    assert "128 px at 0.5 um/px = 64 um" in out
    assert "no mpp in the file" in err
    assert main(["inspect", str(folder / "a.tiff"), "my.yaml"]) == 2
    assert "'my.yaml' is not a slide" in capsys.readouterr().err
    assert main(["inspect", str(folder / "a.tiff"), "--slides.tile_px", "3"]) == 2
    assert "unknown words: --slides.tile_px 3" in capsys.readouterr().err

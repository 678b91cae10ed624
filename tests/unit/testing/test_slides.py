"""The synthetic slides and the demo cohort."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import SlideError
from gigamil.slides import find_tissue, open_slide
from gigamil.testing.slides import make_demo_cohort, synthetic_slide, write_pyramid_tiff

SIZE_PX = (500, 700)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_cohort(tmp_path_factory.mktemp("demo"), num_slides=20, seed=3, size_px=SIZE_PX, progress=False)


def _rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def test_the_table_is_balanced_and_flawed(cohort: Path) -> None:
    rows = _rows(cohort)
    assert list(rows[0]) == ["slide_id", "path", "patient_id", "label", "site"]
    assert [row["slide_id"] for row in rows[-2:]] == ["bad-no-tissue", "bad-truncated"]
    good = rows[:-2]
    assert len({row["slide_id"] for row in rows}) == 20
    assert abs(sum(1 if row["label"] == "tumour" else -1 for row in good)) <= 3
    patients = [row["patient_id"] for row in good]
    assert len(set(patients)) < len(patients)
    assert len({(row["patient_id"], row["label"]) for row in good}) == len(set(patients))
    sites = {row["site"] for row in good}
    for label in ("normal", "tumour"):
        assert {row["site"] for row in good if row["label"] == label} == sites


def test_the_good_slides_open_with_the_mpp_of_their_site(cohort: Path) -> None:
    mpp_of_site: dict[str, set[float]] = {}
    for row in _rows(cohort)[:-2]:
        with open_slide(cohort.parent / row["path"]) as slide:
            mpp_of_site.setdefault(row["site"], set()).add(round(slide.info.mpp_x, 6))
            assert slide.info.vendor == "generic-tiff"
            assert find_tissue(slide).area_um2 > 0.2 * slide.info.width_um * slide.info.height_um
    assert sorted(mpp_of_site.values(), key=min) == [{0.48}, {0.5}, {0.55}, {1.0}]


def test_the_bad_slides_are_bad(cohort: Path) -> None:
    with open_slide(cohort.parent / "slides" / "bad-no-tissue.tiff") as slide:
        assert not find_tissue(slide).mask_HW.any()
    with pytest.raises(SlideError, match="truncated"):
        open_slide(cohort.parent / "slides" / "bad-truncated.tiff")


def test_lesions_lie_on_dark_tissue_of_positive_slides_only(cohort: Path) -> None:
    lesions = json.loads((cohort.parent / "lesions.json").read_text())
    rows = _rows(cohort)[:-2]
    assert list(lesions) == [row["slide_id"] for row in rows]
    for row in rows:
        boxes = lesions[row["slide_id"]]
        assert bool(boxes) == (row["label"] == "tumour")
        with open_slide(cohort.parent / row["path"]) as slide:
            for x0, y0, x1, y1 in boxes:
                box = slide.read_um(x0, y0, x1 - x0, y1 - y0, 32, 32)
                assert (box[..., 0] < 140).mean() > 0.25


def test_same_seed_same_bytes_whatever_the_number_of_threads(tmp_path: Path) -> None:
    digests = []
    for name, workers in (("one", 1), ("two", 2)):
        make_demo_cohort(tmp_path / name, num_slides=7, seed=1, size_px=(300, 400), progress=False, num_workers=workers)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]
    make_demo_cohort(tmp_path / "other", num_slides=7, seed=2, size_px=(300, 400), progress=False)
    assert (tmp_path / "other/slides/demo-000.tiff").read_bytes() != (
        tmp_path / "one/slides/demo-000.tiff"
    ).read_bytes()


def test_tumour_covers_a_few_percent_of_the_tissue() -> None:
    slide = synthetic_slide(5, tumour=True, size_um=(700.0, 700.0), mpp=1.0)
    assert slide.image_HW3.shape == (700, 700, 3)
    tissue_um2 = (slide.image_HW3[..., 1] < 215).sum()
    boxes_um2 = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in slide.lesions_um)
    assert 0.015 < boxes_um2 / tissue_um2 < 0.14  # boxes are larger than the round nests inside
    assert synthetic_slide(5, tumour=False, size_um=(700.0, 700.0), mpp=1.0).lesions_um == ()


def test_too_few_slides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_slides=5"):
        make_demo_cohort(tmp_path, num_slides=5)


@pytest.mark.parametrize("shape", [(1, 1, 3), (17, 300, 3), (256, 256, 3), (513, 511, 3)])
def test_tiff_of_any_size_comes_back(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    image = np.full(shape, (200, 120, 160), np.uint8)
    write_pyramid_tiff(tmp_path / "a.tiff", image, 0.333, levels=2)
    with open_slide(tmp_path / "a.tiff") as slide:
        assert (slide.info.height, slide.info.width) == shape[:2]
        assert slide.info.mpp_x == pytest.approx(0.333, abs=1e-9)
        pixel = slide.read_um(0.0, 0.0, 0.333, 0.333, 1, 1)
    assert np.abs(pixel.astype(int) - image[0, 0]).max() <= 3

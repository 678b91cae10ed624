"""The mosaics keep what their results rest on: fields apart, a little tumour, boxes where the tumour is."""

import csv
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from benchmarks import lung_mosaic
from benchmarks.lung_mosaic import (
    ADENO,
    CELL_PX,
    MOSAIC_MPP,
    NORMAL,
    SQUAMOUS,
    Tile,
    check_fields,
    draw_slide,
    plan_slides,
)
from gigamil.slides.reader import open_slide

GREY = {NORMAL: 200, ADENO: 120, SQUAMOUS: 60}


def flat_jpeg(grey: int) -> bytes:
    return simplejpeg.encode_jpeg(np.full((CELL_PX, CELL_PX, 3), grey, dtype=np.uint8), quality=95)


@pytest.fixture(scope="module")
def tiles() -> list[Tile]:
    jpegs = {label: flat_jpeg(grey) for label, grey in GREY.items()}
    return [Tile(f"{label}-{field}", label, jpegs[label]) for label in GREY for field in range(20) for _ in range(2)]


@pytest.mark.parametrize("num_slides", [16, 17, 24])
def test_no_field_is_on_two_sides(tiles: list[Tile], num_slides: int) -> None:
    plans = plan_slides(tiles, num_slides, seed=3)
    sides = defaultdict(set)
    for plan in plans:
        for tile in plan.normal + plan.tumour:
            sides[tile.field].add((plan.split, plan.patient_id))
    assert len(plans) == num_slides
    assert all(len(side) == 1 for side in sides.values())
    for split in ("train", "val", "test"):
        assert {plan.label for plan in plans if plan.split == split} == {"normal", "tumour"}
    assert sum(check_fields(plans).values()) == 60


def test_a_shared_field_is_refused(tiles: list[Tile]) -> None:
    first, second, *_ = plan_slides(tiles, 16, seed=3)[1:]
    with pytest.raises(ValueError, match=r"belongs to patient-000 and to patient-001"):
        check_fields([first, replace(second, normal=first.normal)])


def test_too_few_fields_say_so(tiles: list[Tile]) -> None:
    with pytest.raises(SystemExit, match=r"need a field of lung_n each, there are 20: fewer --slides"):
        plan_slides(tiles, 64, seed=0)


def test_the_picture_shows_what_the_boxes_say(tiles: list[Tile]) -> None:
    plans = plan_slides(tiles, 16, seed=3)
    positive = next(plan for plan in plans if plan.label == "tumour")
    image_HW3, drawn = draw_slide(positive)
    tumour_HW = image_HW3[..., 0] < 160
    box_area_px = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in drawn.boxes_um) / MOSAIC_MPP**2
    assert np.count_nonzero(tumour_HW) == box_area_px
    for box in drawn.boxes_um:
        x0, y0, x1, y1 = (round(side / MOSAIC_MPP) for side in box)
        assert tumour_HW[y0:y1, x0:x1].all()
    assert 0.01 <= len(drawn.boxes_um) / drawn.num_tiles <= 0.07
    assert min(image_HW3.shape[:2]) >= 3000
    assert max(image_HW3.shape[:2]) <= 6000

    same_HW3, _ = draw_slide(positive)
    assert np.array_equal(same_HW3, image_HW3)
    negative_HW3, negative = draw_slide(next(plan for plan in plans if plan.label == "normal"))
    assert negative.boxes_um == ()
    assert negative_HW3[..., 0].min() > 160


def test_slides_open_and_a_second_run_draws_nothing_unless_tiles_differ(
    tiles: list[Tile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lung_mosaic, "NUM_CELLS", (14, 14))
    with tarfile.open(tmp_path / "lung_tiles.tar", "w") as tar, (tmp_path / "tiles.csv").open("w") as handle:
        handle.write("path,label,group_id\n")
        for number, tile in enumerate(tiles):
            member = tarfile.TarInfo(f"{tile.label}/{number}.jpg")
            member.size = len(tile.jpeg)
            tar.addfile(member, io.BytesIO(tile.jpeg))
            handle.write(f"{member.name},{tile.label},{tile.field.rpartition('-')[2]}\n")

    words = [
        "--tiles",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--slides",
        "8",
        "--workers",
        "1",
        "--build-only",
    ]
    lung_mosaic.main(words)
    mosaic = json.loads((tmp_path / "out" / "mosaic.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out" / "slides.csv").read_text().splitlines()))
    assert [row["slide_id"] for row in rows] == list(mosaic["cells"])
    assert set(mosaic["tumour_um"]) == {row["slide_id"] for row in rows if row["label"] == "tumour"}
    with open_slide(tmp_path / "out" / rows[0]["path"]) as slide:
        assert slide.info.mpp_x == MOSAIC_MPP

    monkeypatch.setattr(lung_mosaic, "read_tiles", None)  # would fail if it were called
    lung_mosaic.main(words)
    assert "slides of an earlier run are used" in capsys.readouterr().out

    def drawn_again(folder: Path) -> list[Tile]:
        raise LookupError("drawn again")

    monkeypatch.setattr(lung_mosaic, "read_tiles", drawn_again)
    for name in ("tiles.csv", "lung_tiles.tar"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(kept + b"\n")
        with pytest.raises(LookupError, match="drawn again"):
            lung_mosaic.main(words)
        (tmp_path / name).write_bytes(kept)
    lung_mosaic.main(words)


def test_colour_alone_is_scored_on_held_out_slides_only() -> None:
    rows = [
        {"slide_id": slide_id, "label": label, "split": split}
        for slide_id, label, split in [
            ("a", "tumour", "test"),
            ("b", "normal", "test"),
            ("c", "normal", "train"),
            ("d", "tumour", "test"),
        ]
    ]
    assert lung_mosaic.colour_auc(rows, {"a": 3.0, "b": 2.0, "c": 9.0, "d": 1.0}) == 0.5

"""GeoJSON as QuPath reads it: level-0 pixels counted from the bounds of the scan."""

import json
from pathlib import Path

import numpy as np
import pytest

from gigamil.evaluate.attention import Attention
from gigamil.evaluate.geojson import write_geojson

ATTENTION = Attention(
    "s",
    number_N=np.array([0, 1, 2]),
    x_um_N=np.array([0.0, 100.0, 200.0]),
    y_um_N=np.array([50.0, 50.0, 150.0]),
    attention_N=np.array([0.25, 0.125, 0.625], dtype=np.float32),
    tile_um=(100.0, 101.0),
    stride_um=(50.0, 50.5),
)


def features(out: Path, **options: float) -> list[dict]:
    write_geojson(out, ATTENTION, **{"top": 99, "mpp_x": 0.5, "mpp_y": 0.25, **options})  # type: ignore[arg-type]
    collection = json.loads(out.read_text())
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def test_tiles_are_closed_rectangles_in_level_0_pixels(tmp_path: Path) -> None:
    first, *others = features(tmp_path / "s.geojson", bounds_x_px0=30, bounds_y_px0=-7)
    assert len(others) == 2
    assert first["type"] == "Feature"
    assert first["geometry"]["type"] == "Polygon"
    # x: 200 um / 0.5 - 30, width 100 / 0.5; y: 150 um / 0.25 + 7, height 101 / 0.25
    ring = [[370.0, 607.0], [570.0, 607.0], [570.0, 1011.0], [370.0, 1011.0], [370.0, 607.0]]
    assert first["geometry"]["coordinates"] == [ring]


def test_highest_attention_comes_first_with_its_measurements(tmp_path: Path) -> None:
    found = [feature["properties"] for feature in features(tmp_path / "s.geojson")]
    assert [item["name"] for item in found] == ["tile 2", "tile 0", "tile 1"]
    assert found[1]["measurements"] == {"Attention x N": 0.75, "Attention": 0.25, "Attention rank": 2}
    assert {item["objectType"] for item in found} == {"detection"}
    assert all(0 <= channel <= 255 for channel in found[0]["classification"]["color"])


@pytest.mark.parametrize("top", [0, 1, 3])
def test_only_the_top_tiles_are_written(tmp_path: Path, top: int) -> None:
    assert len(features(tmp_path / "s.geojson", top=top)) == top

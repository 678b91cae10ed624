"""Heatmaps: colour lies where the attention is, in micron, and the right slides are drawn."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
from matplotlib.figure import Figure
from PIL import Image

from gigamil.errors import CohortError, ShardError
from gigamil.evaluate.attention import Attention, attention_path, read_attention, write_attention
from gigamil.evaluate.heatmap import draw_heatmap, heatmap_run
from gigamil.evaluate.heatmap_figure import OPACITY, TINT, _draw_attention, concentration, scale_bar_um
from gigamil.evaluate.picture import slide_picture
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards

WHITE = np.full((40, 40, 3), 255, dtype=np.uint8)


def grid(columns: int, rows: int, weights: np.ndarray, tile_um: float = 10.0) -> Attention:
    y, x = np.divmod(np.arange(columns * rows), columns)
    attention = (weights / weights.sum()).astype(np.float32)
    size = tile_um, tile_um
    return Attention("s", np.arange(columns * rows), x * tile_um, y * tile_um, attention, size, size)


def test_colour_starts_at_an_even_share_and_lies_on_its_tile() -> None:
    weights = np.ones(6)
    weights[4] = 20  # row 1, column 1 of three columns
    attention = replace(grid(3, 2, weights), x_um_N=grid(3, 2, weights).x_um_N + 70.0)
    axes = Figure().add_subplot()
    norm, cmap = _draw_attention(axes, attention)
    (image,) = axes.images
    rgba = np.asarray(image.get_array())
    assert rgba.shape == (2, 3, 4)
    assert image.get_extent() == [70.0, 100.0, 20.0, 0.0]
    np.testing.assert_allclose(rgba[1, 1, :3], cmap(norm(20 * 6 / 25))[:3])
    assert rgba[1, 1, 3] == OPACITY
    np.testing.assert_allclose(rgba[0, 0], TINT)
    assert (norm.vmin, norm.vmax) == (1.0, 10.0)


def test_overlapping_tiles_each_show_their_middle() -> None:
    """Tiles of 20 x 24 um at strides of 10 x 8: pixels of a stride, none hidden, centred on their tiles."""
    attention = replace(grid(3, 2, np.array([1, 1, 1, 1, 9, 1])), tile_um=(20.0, 24.0), stride_um=(10.0, 8.0))
    attention = replace(attention, y_um_N=attention.y_um_N * 0.8)
    axes = Figure().add_subplot()
    _draw_attention(axes, attention)
    (image,) = axes.images
    assert image.get_extent() == [5.0, 35.0, 24.0, 8.0]
    assert (np.asarray(image.get_array())[..., 3] == OPACITY).tolist() == [[False] * 3, [False, True, False]]


def test_positions_without_a_tile_stay_empty() -> None:
    whole = grid(3, 1, np.ones(3))
    columns = {name: getattr(whole, name)[[0, 2]] for name in ("number_N", "x_um_N", "y_um_N", "attention_N")}
    gap = replace(whole, **columns)
    axes = Figure().add_subplot()
    _draw_attention(axes, gap)
    assert np.asarray(axes.images[0].get_array())[0, :, 3].tolist() == pytest.approx([TINT[3], 0, TINT[3]])


def test_the_scale_grows_with_concentration_only() -> None:
    weights = np.full(1000, 1e-3)
    weights[0] = 1000
    norm, _ = _draw_attention(Figure().add_subplot(), grid(50, 20, weights))
    assert norm.vmax == pytest.approx(1000, rel=0.01)


def test_concentration_counts_the_fewest_tiles_that_hold_half() -> None:
    assert concentration(grid(10, 1, np.ones(10))) == "Half of the attention is on 5 tiles of 10 (50.0%)"
    assert concentration(grid(5, 1, np.array([1, 1, 9, 1, 1]))) == "Half of the attention is on 1 tile of 5 (20.0%)"


@pytest.mark.parametrize(("width", "bar"), [(1000, 200), (999, 100), (26_000, 5000), (64, 10), (4, 0.5)])
def test_scale_bars_are_round_numbers(width: float, bar: float) -> None:
    assert scale_bar_um(width) == pytest.approx(bar)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4, 4), (4, 3), (60, 4), (3, 60)])
def test_slides_of_any_shape_are_drawn(tmp_path: Path, columns: int, rows: int) -> None:
    attention = grid(columns, rows, np.arange(1.0, columns * rows + 1))
    picture = np.full((rows * 5, columns * 5, 3), 200, dtype=np.uint8)
    tiles = [np.full((8, 8, 3), 90, dtype=np.uint8)] * min(8, columns * rows)
    options = {"title": "a $ in a name " * 12, "top_tiles": tiles, "boxes_um": [(2.0, 2.0, 9.0, 9.0)]}
    for name in ("a.png", "b.png"):
        draw_heatmap(picture, 2.0, attention, tmp_path / name, **options)  # type: ignore[arg-type]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert 800 <= image.width <= 2000
        assert image.height <= 3000


def test_heatmaps_of_a_run(run: Path, shards: ShardSet) -> None:
    files = heatmap_run(run, shards, n=3)
    # Test slides are s02 and s08 (normal), s05 (called normal) and s11 (tumour); the surest of each class in turn.
    assert [path.name for path in files[::3]] == ["s11.png", "s05.png", "s08.png"]
    assert all(path.parent == run / "heatmaps" and path.is_file() for path in files)
    features = json.loads(files[1].read_text())["features"]
    assert features[0]["properties"]["name"] == "tile 29"
    assert features[0]["geometry"]["coordinates"][0][0] == [80.0, 64.0]  # column 5, row 4 of 16-pixel tiles
    with openslide.OpenSlide(files[2]) as slide:  # of 6 x 6 places, and a pixel for each
        assert slide.dimensions == (6, 6)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(16.0, rel=1e-4)
        # The scale of colours starts at an even share: of weights 1 to 30 that is tile 15.
        below, top = (slide.read_region(place, 0, (1, 1)).getpixel((0, 0))[:3] for place in [(1, 2), (5, 4)])
    assert sum(top) < sum(below)


def test_named_slides_once_each_in_the_order_given(run: Path, shards: ShardSet) -> None:
    files = heatmap_run(run, shards, ["s03", "s00", "s03"], geojson_tiles=2)
    kinds = ("png", "geojson", "tiff")
    assert [path.name for path in files] == [f"{name}.{kind}" for name in ("s03", "s00") for kind in kinds]
    assert len(json.loads(files[1].read_text())["features"]) == 2


def test_unknown_slides_and_stale_attention_are_refused(run: Path, shards: ShardSet) -> None:
    with pytest.raises(CohortError, match="has no slide 's99'; it has 12 slides, for example 's00'"):
        heatmap_run(run, shards, ["s00", "s99"])
    stale = read_attention(attention_path(run, "s00"))
    write_attention(attention_path(run, "s00"), replace(stale, x_um_N=stale.x_um_N + 8))
    with pytest.raises(ShardError, match="slide 's00': its attention .30 tiles. belongs to other tiles"):
        heatmap_run(run, shards, ["s00"])
    write_attention(attention_path(run, "s01"), replace(stale, slide_id="s01", number_N=stale.number_N + 1))
    with pytest.raises(ShardError, match="slide 's01': its attention"):
        heatmap_run(run, shards, ["s01"])
    attention_path(run, "s02").unlink()
    with pytest.raises(ShardError, match="slide 's02': no attention"):
        heatmap_run(run, shards, ["s02"])


def test_a_run_without_a_test_split_shows_what_it_has(run: Path, shards: ShardSet, predictions: Predictions) -> None:
    write_predictions(run / FILE_NAME, predictions.take([0, 3]))
    assert [path.stem for path in heatmap_run(run, shards, n=9)[::3]] == ["s03", "s00"]


def test_small_slides_are_sharpened_with_their_tiles(tmp_path: Path) -> None:
    import simplejpeg

    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (120, 120, 120)]
    jpegs = [simplejpeg.encode_jpeg(np.full((32, 32, 3), colour, dtype=np.uint8)) for colour in colours]
    make_shards(tmp_path, "s", jpegs, tile_px=32, tile_mpp=0.5)
    shards = ShardSet(tmp_path)
    assert shards.thumbnail("s")[0].shape == (16, 16, 3)
    picture, mpp = slide_picture(shards, "s")
    assert (picture.shape, mpp) == ((64, 64, 3), 0.5)
    for (row, col), colour in zip([(0, 0), (0, 1), (1, 0), (1, 1)], colours, strict=True):
        part = picture[row * 32 : row * 32 + 32, col * 32 : col * 32 + 32].astype(int)
        assert np.abs(part - colour).max() <= 3


def test_a_damaged_tile_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path, "s", [b"no jpeg"], tile_px=32)
    with pytest.raises(ShardError, match="slide 's', tiles 0 to 0: "):
        slide_picture(ShardSet(tmp_path), "s")

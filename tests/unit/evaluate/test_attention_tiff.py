"""The attention picture is a slide: OpenSlide opens it, and its pixels lie where the tiles lie."""

from pathlib import Path

import numpy as np
import openslide
import pytest

from gigamil.evaluate.attention import Attention
from gigamil.evaluate.attention_tiff import write_attention_tiff


@pytest.mark.parametrize("size", [(3, 4), (700, 301)])
def test_openslide_shows_each_tile_where_it_lies(tmp_path: Path, size: tuple[int, int]) -> None:
    num_y, num_x = size
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.permutation(num_y * num_x)[: num_y * num_x // 2])
    weight_N = generator.random(len(chosen)).astype(np.float32) ** 8
    row_N, col_N = chosen // num_x, chosen % num_x
    attention = Attention(
        "s",
        np.arange(len(chosen)),
        col_N * 128.0,
        row_N * 130.0,
        weight_N / weight_N.sum(),
        (128.0, 130.0),
        (128.0, 130.0),
    )
    out = tmp_path / "s.tiff"
    write_attention_tiff(out, attention, num_x * 128.0 - 60, num_y * 130.0 - 1)
    with openslide.OpenSlide(out) as slide:
        assert slide.dimensions == (num_x, num_y)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(128.0, rel=1e-4)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(130.0, rel=1e-4)
        assert slide.level_count == (1 if num_y < 256 else 3)
        found_HW3 = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(int)
    white = (found_HW3 == 255).all(axis=2)
    assert white.sum() == num_y * num_x - len(chosen)
    assert not white[row_N, col_N].any()
    # More attention is never lighter than an even share or less.
    high, low = attention.times_even_N > 2, attention.times_even_N < 1
    light_N = found_HW3[row_N, col_N].sum(axis=1)
    assert light_N[high].max() < light_N[low].min()
    first = out.read_bytes()
    write_attention_tiff(out, attention, num_x * 128.0 - 60, num_y * 130.0 - 1)
    assert out.read_bytes() == first


def test_overlapping_tiles_have_a_pixel_each_and_of_tiles_on_one_pixel_the_most_attended_is_seen(
    tmp_path: Path,
) -> None:
    x_um_N = np.array([0.0, 64.0, 128.0, 192.0, 188.0])  # tiles of 128 um at strides of 64; the last two share a pixel
    weight_N = np.array([1, 1, 1, 95, 2], np.float32)
    number_N = np.arange(5)
    attention = Attention("s", number_N, x_um_N, np.zeros(5), weight_N / 100, (128.0, 64.0), (64.0, 64.0))
    write_attention_tiff(tmp_path / "s.tiff", attention, 0.0, 0.0)
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        assert slide.dimensions == (4, 1)
        light = np.asarray(slide.read_region((0, 0), 0, (4, 1)).convert("RGB")).astype(int)[0].sum(axis=1)
    assert light[3] < light[0] == light[1] == light[2] < 3 * 255

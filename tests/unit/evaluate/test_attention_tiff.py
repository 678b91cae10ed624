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

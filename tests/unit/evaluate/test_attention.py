"""Attention of a slide: the file, its order, and how often it hits a lesion."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gigamil.errors import ShardError
from gigamil.evaluate.attention import Attention, attention_path, lesion_hit, read_attention, write_attention


def row_of_tiles(weights: list[float], tile_um: float = 100.0) -> Attention:
    """Tiles in one row, from the origin to the right."""
    count = len(weights)
    attention = np.array(weights, dtype=np.float32) / np.float32(sum(weights))
    size = tile_um, tile_um
    return Attention("s", np.arange(count), np.arange(count) * tile_um, np.zeros(count), attention, size, size)


def test_round_trip_of_a_dotted_id(tmp_path: Path) -> None:
    slide_id = "TCGA-83-5908-01Z-00-DX1.381c8f82"
    written = replace(row_of_tiles([1, 2, 5]), slide_id=slide_id, tile_um=(112.4, 113.1), stride_um=(56.2, 56.55))
    write_attention(attention_path(tmp_path, slide_id), written)
    found = read_attention(attention_path(tmp_path, slide_id))
    assert (found.slide_id, found.tile_um, found.stride_um) == (slide_id, (112.4, 113.1), (56.2, 56.55))
    for name in ("number_N", "x_um_N", "y_um_N", "attention_N"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert found.attention_N.dtype == np.float32
    again = tmp_path / "again.parquet"
    write_attention(again, found)
    assert again.read_bytes() == attention_path(tmp_path, slide_id).read_bytes()


def test_top_is_by_attention_then_by_number() -> None:
    attention = row_of_tiles([1, 3, 2, 3])
    assert attention.top(3).tolist() == [1, 3, 2]
    assert attention.top(99).tolist() == [1, 3, 2, 0]
    np.testing.assert_allclose(attention.times_even_N, np.array([1, 3, 2, 3]) * 4 / 9, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": pa.array([0.5, 0.4], pa.float32())}, "2 tiles .* sums to 0.9"),
        ({"attention": pa.array([1.5, -0.5], pa.float32())}, "non-negative"),
        ({"attention": pa.array([float("nan"), 1.0], pa.float32())}, "sums to nan"),
        ({"x_um": None}, "lacks x_um"),
        ({"metadata": {}}, "lacks tile_um, stride_um"),
        ({"metadata": {b"tile_um": b"100.0", b"stride_um": b"50.0 50.0"}}, "lacks tile_um. Run"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    columns = {"number": pa.array([0, 1]), "x_um": pa.array([0.0, 1.0]), "y_um": pa.array([0.0, 0.0])}
    columns["attention"] = pa.array([0.5, 0.5], pa.float32())
    metadata = change.pop("metadata", {b"tile_um": b"100.0 100.0", b"stride_um": b"100.0 100.0"})
    columns = {name: value for name, value in {**columns, **change}.items() if value is not None}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), tmp_path / "s.parquet")
    with pytest.raises(ShardError, match=f"slide 's'.*{message}"):
        read_attention(tmp_path / "s.parquet")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="slide 's': no attention in .*Run `gigamil evaluate`"):
        read_attention(tmp_path / "s.parquet")
    (tmp_path / "s.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ShardError, match="slide 's': .* cannot be read"):
        read_attention(tmp_path / "s.parquet")


def test_lesion_hit_is_the_share_of_the_top_tiles_that_touch_a_box() -> None:
    attention = row_of_tiles([8, 7, 6, 5, 4, 3, 2, 1])
    box = (120.0, 10.0, 180.0, 20.0)  # inside tile 1
    assert lesion_hit(attention, [box], fraction=0.125) == 0.0  # tile 0 only
    assert lesion_hit(attention, [box], fraction=0.13) == 0.5  # ceil: tiles 0 and 1
    assert lesion_hit(attention, [box, (250.0, 0.0, 350.0, 5.0)], fraction=0.5) == 0.75  # tiles 1, 2, 3 of 0 to 3
    assert lesion_hit(attention, [box], fraction=1.0) == 0.125


def test_a_shared_edge_is_not_a_touch() -> None:
    attention = row_of_tiles([2, 1])
    assert lesion_hit(attention, [(100.0, 0.0, 200.0, 100.0)], fraction=0.5) == 0.0
    assert lesion_hit(attention, [(99.9, 0.0, 200.0, 100.0)], fraction=0.5) == 1.0
    assert lesion_hit(attention, [(0.0, 100.0, 200.0, 300.0)], fraction=1.0) == 0.0
    taller = replace(attention, tile_um=(100.0, 101.0))
    assert lesion_hit(taller, [(0.0, 100.0, 200.0, 300.0)], fraction=1.0) == 1.0


def test_lesion_hit_without_a_lesion_is_an_error() -> None:
    with pytest.raises(ValueError, match="slide 's' has no lesion box"):
        lesion_hit(row_of_tiles([1]), [])
    with pytest.raises(ValueError, match="fraction=0"):
        lesion_hit(row_of_tiles([1]), [(0, 0, 1, 1)], fraction=0)

"""attention/<slide_id>.parquet of a run: the attention of every tile. The only file that knows its columns."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gigamil.errors import ShardError
from gigamil.files import replace_file

FOLDER = "attention"
COLUMNS = ("number", "x_um", "y_um", "attention")
SIZES = ("tile_um", "stride_um")  # in the metadata of the schema, as "X Y"
# Sum of a slide's float32 attention against 1: a million tiles round to about 1e-4 in a sum of float32 weights.
SUM_TOLERANCE = 1e-3

Size = tuple[float, float]  # along x and y, micron
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in micron from the level-0 origin


@dataclass(frozen=True)
class Attention:
    """One slide's tiles: top-left corners in micron from the level-0 origin, and their attention, which sums to 1.

    `tile_um` is the width and height of a tile (tiles copied from a file may be a little off square), `stride_um` the
    distance of neighbouring columns and rows: less than a tile where tiles overlap.
    """

    slide_id: str
    number_N: NDArray[np.int64]
    x_um_N: NDArray[np.float64]
    y_um_N: NDArray[np.float64]
    attention_N: NDArray[np.float32]
    tile_um: Size
    stride_um: Size

    def __len__(self) -> int:
        return len(self.number_N)

    @property
    def times_even_N(self) -> NDArray[np.float64]:
        """Attention in units of an even share (attention x N): 1 is what each tile gets without a preference."""
        return self.attention_N.astype(np.float64) * len(self)

    def top(self, count: int) -> NDArray[np.int64]:
        """Rows of the `count` tiles with the most attention, highest first; equals by tile number."""
        return np.lexsort((self.number_N, -self.attention_N))[:count]


def attention_path(run: Path, slide_id: str) -> Path:
    """Where a run keeps the attention of a slide."""
    return run / FOLDER / f"{slide_id}.parquet"


def write_attention(path: Path, attention: Attention) -> None:
    """Write one slide's attention as parquet; `tile_um` and `stride_um` go into the metadata of the schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = (attention.number_N, attention.x_um_N, attention.y_um_N, attention.attention_N)
    table = pa.table(dict(zip(COLUMNS, map(pa.array, values), strict=True)))
    sizes = {name: " ".join(repr(float(value)) for value in getattr(attention, name)) for name in SIZES}
    table = table.replace_schema_metadata(sizes)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    replace_file(path, buffer.getvalue())


def read_attention(path: Path) -> Attention:
    """Read and check one slide's attention; the file name is the slide id.

    Raises:
        ShardError: no such file, a column or a size missing, no tile, or weights that are negative, not finite, or do
            not sum to 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    slide_id = path.name.removesuffix(".parquet")
    again = "Run `gigamil evaluate` again to write it anew."
    if not path.is_file():
        raise ShardError(f"slide '{slide_id}': no attention in '{path}'. Run `gigamil evaluate`, which writes it.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as fault:
        raise ShardError(f"slide '{slide_id}': '{path}' cannot be read ({fault}). {again}") from fault
    sizes = [_size((table.schema.metadata or {}).get(name.encode(), b"")) for name in SIZES]
    missing = [name for name in COLUMNS if name not in table.column_names]
    missing += [name for name, size in zip(SIZES, sizes, strict=True) if size is None]
    if missing:
        raise ShardError(f"slide '{slide_id}': '{path}' lacks {', '.join(missing)}. {again}")
    number_N, x_um_N, y_um_N, attention_N = (table[name].to_numpy() for name in COLUMNS)
    total = float(attention_N.sum(dtype=np.float64))
    if not len(attention_N) or not np.all(attention_N >= 0) or not abs(total - 1) <= SUM_TOLERANCE:
        raise ShardError(
            f"slide '{slide_id}': the attention of {len(attention_N)} tiles in '{path}' sums to {total:g}; it must be "
            f"non-negative and sum to 1. {again}"
        )
    tile_um, stride_um = (size for size in sizes if size is not None)
    return Attention(slide_id, number_N, x_um_N, y_um_N, attention_N, tile_um, stride_um)


def _size(text: bytes) -> Size | None:
    try:
        x, y = map(float, text.split())
    except ValueError:
        return None
    return x, y


def lesion_hit(attention: Attention, boxes_um: Sequence[Box], fraction: float = 0.01) -> float:
    """Share of the most attended tiles that touch a lesion: 1 is a model that looks at nothing else first.

    The ceil(fraction * N) tiles with the most attention are taken (equals by tile number); a tile touches a box when
    they share an area greater than zero.

    Args:
        attention: of one slide.
        boxes_um: lesion boxes (x0, y0, x1, y1), micron from the level-0 origin.
        fraction: of the slide's tiles, 0 < fraction <= 1.
    Raises:
        ValueError: no box (a slide without a lesion has no hit rate) or a fraction out of range.
    """
    if not len(boxes_um):
        raise ValueError(f"slide '{attention.slide_id}' has no lesion box, so no share of hits; leave it out")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} is not within 0 < fraction <= 1")
    row_n = attention.top(math.ceil(fraction * len(attention)))
    x0_n1, y0_n1 = attention.x_um_N[row_n, None], attention.y_um_N[row_n, None]
    left_B, top_B, right_B, bottom_B = np.asarray(boxes_um, dtype=np.float64).T
    overlaps_x = (x0_n1 < right_B) & (x0_n1 + attention.tile_um[0] > left_B)
    overlaps_y = (y0_n1 < bottom_B) & (y0_n1 + attention.tile_um[1] > top_B)
    return float((overlaps_x & overlaps_y).any(axis=1).mean())

"""The index of a slide: where each tile lies in the tars and on the slide. One row per tile, in stored order.

Coordinates live here and not as a second tar member per tile, which would cost 1 KB of header and padding each.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True, eq=False)
class SlideIndex:
    """Columns of equal length N (tiles of the slide).

    Attributes:
        tar: int32, position in the manifest's `tars`; the number in the file's name may be a higher one, as tars that
            lost all their tiles are not written.
        offset: int64, byte at which the tile's JPEG starts in its tar.
        length: int64, bytes of the JPEG.
        number: int64, the number in the member's name: ascending, and 0..N-1 unless tiles that were not sharp enough
            (`slides.min_sharpness`) were dropped.
        x_um, y_um: float64, top left corner in micron from the corner of level 0.
        x_px0, y_px0: int64, the same in level-0 pixels, rounded.
        tissue: float32, share of the tile that is tissue.
        pen: float32, share of the tile that is covered by pen marks.
        sharpness: float32, see slides/quality.py; NaN unless `slides.min_sharpness` asked for it.
        crc32: uint32 of the JPEG.

    Where only positions are kept (`data.source: slides`), tar, offset, length and crc32 are 0.
    """

    tar: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    number: np.ndarray
    x_um: np.ndarray
    y_um: np.ndarray
    x_px0: np.ndarray
    y_px0: np.ndarray
    tissue: np.ndarray
    pen: np.ndarray
    sharpness: np.ndarray
    crc32: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != self.number.shape:
                raise ValueError(f"index column '{name}' is {column.dtype}{column.shape}, expected {dtype}")

    def __len__(self) -> int:
        return len(self.number)


_DTYPES = {
    "tar": np.dtype(np.int32),
    "offset": np.dtype(np.int64),
    "length": np.dtype(np.int64),
    "number": np.dtype(np.int64),
    "x_um": np.dtype(np.float64),
    "y_um": np.dtype(np.float64),
    "x_px0": np.dtype(np.int64),
    "y_px0": np.dtype(np.int64),
    "tissue": np.dtype(np.float32),
    "pen": np.dtype(np.float32),
    "sharpness": np.dtype(np.float32),
    "crc32": np.dtype(np.uint32),
}


def write_index(path: Path, index: SlideIndex) -> None:
    """Write an index as parquet; equal columns give equal bytes."""
    table = pa.Table.from_arrays([_to_arrow(getattr(index, name)) for name in _DTYPES], names=list(_DTYPES))
    pq.write_table(table, path, compression="zstd")


def read_index(file: Path | BinaryIO) -> SlideIndex:
    """Read an index; its columns are read-only.

    Raises:
        OSError, KeyError, ValueError: not a file that `write_index` wrote. The caller has compared its digest before,
            so this is a bug or another version.
    """
    with pq.ParquetFile(file) as parquet:
        table = parquet.read(use_threads=False)
    return SlideIndex(**{name: np.from_dlpack(table[name].combine_chunks()) for name in _DTYPES})


def _to_arrow(column: np.ndarray) -> pa.Array:
    # pa.array(), pq.read_table() and to_numpy() would import pandas, two seconds in every process.
    buffer = pa.py_buffer(np.ascontiguousarray(column))
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, buffer])

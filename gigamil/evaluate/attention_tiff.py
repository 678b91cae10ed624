"""A slide's attention as a picture of one pixel per tile, which OpenSlide and QuPath open beside the slide."""

import io
from pathlib import Path

import numpy as np
import tifffile

from gigamil.evaluate.attention import Attention
from gigamil.evaluate.heatmap_figure import attention_colours
from gigamil.files import replace_file

TILE = 256  # side of the file's own tiles, in pixels
_CM_UM = 10_000


def write_attention_tiff(out: Path, attention: Attention, width_um: float, height_um: float) -> None:
    """Write a pyramid over the whole slide, white where there is no tile, with its micron per pixel.

    Colours are those of the heatmap. A pixel is as large as the distance of neighbouring tiles, so the picture lies on
    the slide if both are shown in micron.

    Args:
        out: file to write, name ending in .tiff.
        attention: of one slide, whose tiles lie on a grid from the corner of level 0.
        width_um, height_um: of the slide.
    Cost: memory for a few bytes per tile. Equal attention gives equal bytes. Test: unit/evaluate/test_attention_tiff.py
    """
    step_x, step_y = attention.stride_um
    num_x, num_y = max(1, round(width_um / step_x + 0.49)), max(1, round(height_um / step_y + 0.49))
    col_N = np.rint(attention.x_um_N / step_x).astype(np.int64)
    row_N = np.rint(attention.y_um_N / step_y).astype(np.int64)
    num_x, num_y = max(num_x, int(col_N.max()) + 1), max(num_y, int(row_N.max()) + 1)
    level_HW3 = np.full((num_y, num_x, 3), 255, np.uint8)
    rgba_N4 = attention_colours(attention)
    level_HW3[row_N, col_N] = np.rint(255 * (rgba_N4[:, :3] * rgba_N4[:, 3:] + 1 - rgba_N4[:, 3:]))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level in range(16):
            scale = 2**level
            file.write(
                level_HW3,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="zlib",
                resolution=(_CM_UM / (step_x * scale), _CM_UM / (step_y * scale)),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
                software=False,
            )
            if max(level_HW3.shape[:2]) <= TILE:
                break
            level_HW3 = _halved(level_HW3)
    replace_file(out, buffer.getvalue())


def _halved(image_HW3: np.ndarray) -> np.ndarray:
    """Half the size on each axis, rounded up, by the mean of 2 x 2 pixels; the last ones are repeated."""
    rows, cols = (np.minimum(np.arange(2 * (-(-n // 2))), n - 1) for n in image_HW3.shape[:2])
    even_HW3 = image_HW3[rows][:, cols].astype(np.uint16)
    return ((even_HW3[::2, ::2] + even_HW3[1::2, ::2] + even_HW3[::2, 1::2] + even_HW3[1::2, 1::2] + 2) // 4).astype(
        np.uint8
    )

"""A slide's attention as a picture of one pixel per tile, which OpenSlide and QuPath open beside the slide."""

import math
from pathlib import Path

import numpy as np

from gigamil.evaluate.attention import Attention
from gigamil.evaluate.heatmap_figure import attention_colours, on_white
from gigamil.evaluate.pyramid import write_pyramid

_EXACT = 1e-3  # of a pixel: rounding of micron


def write_attention_tiff(out: Path, attention: Attention, width_um: float, height_um: float) -> None:
    """Write a pyramid over the whole slide, white where there is no tile, with its micron per pixel.

    Colours are those of the heatmap. A pixel is as large as the distance of neighbouring tiles, so the picture lies on
    the slide if both are shown in micron. Tiles that lie between pixels (they overlap, or were placed by others) go to
    the nearest one, and of several the most attended is seen.

    Args:
        out: file to write, name ending in .tiff.
        attention: of one slide, micron from the corner of level 0.
        width_um, height_um: of the slide; 0 where they are not known: the picture then ends with the tiles.
    Cost: memory for a few bytes per tile. Equal attention gives equal bytes. Test: unit/evaluate/test_attention_tiff.py
    """
    # A pixel lies on the middle of its tile. Of two as near (a tile of two strides) the first: rounding to even would
    # put two columns into one.
    col_N, row_N = (
        np.ceil((corner_N + (tile - stride) / 2) / stride - 0.5 - _EXACT).astype(np.int64)
        for corner_N, tile, stride in zip(
            (attention.x_um_N, attention.y_um_N), attention.tile_um, attention.stride_um, strict=True
        )
    )
    num_x, num_y = (
        max(math.ceil(size / stride - _EXACT), int(number_N.max()) + 1)
        for size, stride, number_N in zip((width_um, height_um), attention.stride_um, (col_N, row_N), strict=True)
    )
    image_HW3 = np.full((num_y, num_x, 3), 255, np.uint8)
    order = np.argsort(attention.attention_N, kind="stable")
    image_HW3[row_N[order], col_N[order]] = on_white(attention_colours(attention))[order]
    write_pyramid(out, image_HW3, *attention.stride_um)

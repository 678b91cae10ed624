"""Pictures of a slide as pyramidal tiled TIFF, which OpenSlide and QuPath open beside the slide."""

import io
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from gigamil.files import replace_file

TILE = 256  # side of the file's own tiles, in pixels
_CM_UM = 10_000


def write_pyramid(out: Path, image_HW3: NDArray[np.uint8], mpp_x: float, mpp_y: float) -> None:
    """Write a picture with its micron per pixel; each level has half the size of the one before, by the mean.

    Args:
        out: file to write, a whole file or none, name ending in .tiff.
        image_HW3: RGB; pixel (0, 0) starts at the corner of the slide's level 0.
        mpp_x, mpp_y: micron per pixel.
    Cost: memory of about twice the picture. Equal pictures give equal bytes.
    """
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        for level in range(32):
            scale = 2**level
            file.write(
                image_HW3,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="zlib",
                resolution=(_CM_UM / (mpp_x * scale), _CM_UM / (mpp_y * scale)),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
                software=False,
            )
            if max(image_HW3.shape[:2]) <= TILE:
                break
            image_HW3 = _halved(image_HW3)
    replace_file(out, buffer.getvalue())


def _halved(image_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Half the size on each axis, rounded up, by the mean of 2 x 2 pixels; the last ones are repeated."""
    rows, cols = (n % 2 for n in image_HW3.shape[:2])
    even_HW3 = np.pad(image_HW3, ((0, rows), (0, cols), (0, 0)), mode="edge")
    sum_HW3 = np.full((even_HW3.shape[0] // 2, even_HW3.shape[1] // 2, 3), 2, np.uint16)  # rounds
    for part_HW3 in (even_HW3[y::2, x::2] for y in (0, 1) for x in (0, 1)):
        sum_HW3 += part_HW3
    return (sum_HW3 // 4).astype(np.uint8)

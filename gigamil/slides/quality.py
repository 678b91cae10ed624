"""Signs that a tile is no good: out of focus, or drawn over with a pen. Optional filters of `gigamil tile`."""

import numpy as np
from scipy import ndimage

from gigamil.slides.tissue import DENSITY, smooth_strips, without_small

# Luminance from which a pixel is glass: it has no detail in focus either.
GLASS_LUMINANCE = 225
# Share of a tile that has to be something else than glass before its focus can be judged.
MIN_CONTENT = 0.02
LUMINANCE = (0.299, 0.587, 0.114)

# Rules in optical density (log10). Hematoxylin and eosin both absorb green most (Ruifrok and Johnston 2001); blue and
# green ink let it pass, black ink lets nothing pass, red ink absorbs blue like green, and unlike DAB, nearly no red.
# On 2,618 H&E tiles of lung and two whole slides the rules find one spot, of blue ink.
BLUE_RED_OVER_GREEN, GREEN_OTHERS_OVER_GREEN = 0.12, 0.10
BLACK_DENSITY, BLACK_CHROMA = 0.75, 30
RED_BLUE_OVER_GREEN, RED_RED_OVER_BLUE, RED_DENSITY = 0.75, 0.2, 0.6
# Strokes are wide: pieces of fewer pixels of a thumbnail are chromatic noise, dust and folds.
MIN_STROKE_PX = 24
RIM_PX = 2  # ink fades out at the edge of a stroke, as tissue does beside glass


def sharpness(tile_HW3: np.ndarray) -> float:
    """Focus of a tile: mean square of the Laplacian of its luminance, over pixels that are not glass or beside it.

    Over glass it would be near zero whatever the focus: leaving it out makes the value that of the tissue, and since it
    is a mean over pixels, one threshold serves tiles of any size and any share of tissue. It depends on mpp, stain and
    scanner: look at the column `sharpness` of an index before choosing slides.min_sharpness.

    Args:
        tile_HW3: uint8 RGB, at least 3 x 3 pixels.
    Returns:
        Grey levels squared; 0 for a tile that is all glass.
    Source: Pech-Pacheco et al. 2000, ICPR, "Diatom autofocusing in brightfield microscopy".
    """
    luminance_HW = tile_HW3.astype(np.float32) @ np.array(LUMINANCE, dtype=np.float32)
    centre = luminance_HW[1:-1, 1:-1]
    around = luminance_HW[:-2, 1:-1] + luminance_HW[2:, 1:-1] + luminance_HW[1:-1, :-2] + luminance_HW[1:-1, 2:]
    # Without the rim of glass either: its step would outweigh all nuclei.
    content = ndimage.maximum_filter(luminance_HW, 2 * RIM_PX + 1)[1:-1, 1:-1] < GLASS_LUMINANCE
    if content.mean() < MIN_CONTENT:
        return 0.0
    return float(np.square(around - 4 * centre)[content].mean())


def find_pen(thumbnail_HW3: np.ndarray) -> np.ndarray:
    """Pen marks on a thumbnail of an H&E or IHC slide: blue, green, black and red ink.

    Ink on the margins of a specimen counts as well, and so do black frames. Not seen are yellow ink, pale red ink
    (congested vessels look alike), and blue ink over nuclei as dark as itself.

    Args:
        thumbnail_HW3: uint8 RGB of some 4 to 16 micron per pixel.
    Returns:
        bool [H, W].
    """
    ink_HW = np.empty(thumbnail_HW3.shape[:2], bool)
    for rows, smooth_hW3 in smooth_strips(thumbnail_HW3):
        red, green, blue = (DENSITY[smooth_hW3[..., channel]] for channel in range(3))
        chroma = smooth_hW3.max(axis=2) - smooth_hW3.min(axis=2)
        ink = red - green > BLUE_RED_OVER_GREEN
        ink |= np.minimum(red, blue) - green > GREEN_OTHERS_OVER_GREEN
        ink |= (np.minimum(np.minimum(red, green), blue) > BLACK_DENSITY) & (chroma < BLACK_CHROMA)
        ink |= (blue > RED_BLUE_OVER_GREEN * green) & (red < RED_RED_OVER_BLUE * blue) & (blue > RED_DENSITY)
        ink_HW[rows] = ink
    strokes: np.ndarray = ndimage.binary_dilation(without_small(ink_HW, MIN_STROKE_PX), iterations=RIM_PX)
    return strokes

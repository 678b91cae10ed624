"""Thumbnail -> tissue mask: Otsu's threshold on saturation, without specks, with small holes filled."""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from gigamil.slides.reader import Slide

# Bounds of the threshold. Otsu splits any picture in two: without the lower one it would find tissue in the noise of an
# empty slide, without the upper one it would drop pale tissue of a slide that is full of it. Glass stays below 0.03
# and pale eosin lies above 0.10 on the slides looked at.
MIN_SATURATION, MAX_SATURATION = 0.05, 0.12
# Mean optical density below which a pixel is glass, whatever its tint: scanners tint the background a little.
MIN_DENSITY = 0.03


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue is. Pixel (row, col) is the square of side `mpp` at (col * mpp, row * mpp) micron of level 0."""

    mask_HW: np.ndarray
    mpp: float

    @property
    def area_um2(self) -> float:
        """Area of the tissue in square micron."""
        return float(np.count_nonzero(self.mask_HW)) * self.mpp**2

    def fraction(self, x_um: np.ndarray | float, y_um: np.ndarray | float, side_um: np.ndarray | float) -> np.ndarray:
        """Share of tissue in squares, exact also where they cut through mask pixels.

        Args:
            x_um, y_um: top left corners; side_um: sides. Arrays that broadcast, or numbers.
        Returns:
            float64 array in 0..1 of the broadcast shape. Area outside the mask counts as no tissue.
        Cost: one pass over the mask, then constant per square.
        """
        x, y, side = (np.asarray(value, dtype=np.float64) / self.mpp for value in (x_um, y_um, side_um))
        height, width = self.mask_HW.shape
        sums = np.zeros((height + 1, width + 1))
        sums[1:, 1:] = self.mask_HW.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)

        def area_before(right: np.ndarray, bottom: np.ndarray) -> np.ndarray:
            return _bilinear(sums, np.clip(right, 0, width), np.clip(bottom, 0, height))

        area = area_before(x + side, y + side) - area_before(x, y + side) - area_before(x + side, y) + area_before(x, y)
        return np.clip(area / side**2, 0.0, 1.0)

    def sha256(self) -> str:
        """Digest of the geometry and every pixel: equal masks, equal digests."""
        height, width = self.mask_HW.shape
        header = f"{height} {width} {self.mpp!r}\n".encode()
        return hashlib.sha256(header + np.packbits(self.mask_HW).tobytes()).hexdigest()


def find_tissue(
    slide: Slide, *, tissue_mpp: float = 8.0, min_area_um2: float = 20_000.0, max_hole_area_um2: float = 20_000.0
) -> TissueMask:
    """Find the tissue of a slide on its thumbnail.

    Args:
        slide: an open slide.
        tissue_mpp: micron per pixel of the mask; a slide that is coarser is taken at its own mpp.
        min_area_um2: smaller pieces are specks, not tissue.
        max_hole_area_um2: smaller holes are filled; larger ones (fat, lumens, tears) stay out.
    Returns:
        The mask; it is all False for a slide without tissue.
    Raises:
        SlideError: the thumbnail cannot be read.
    Cost: reads the slide once at about `tissue_mpp`.
    Source: Otsu 1979, IEEE Trans. Syst. Man Cybern. 9(1).
    """
    mpp = max(tissue_mpp, slide.info.mpp_x, slide.info.mpp_y)
    mask_HW = tissue_pixels(slide.thumbnail(mpp))
    # Holes first: a thin ring of tissue is then weighed together with what it encloses.
    mask_HW = ~_without_small(~mask_HW, max_hole_area_um2 / mpp**2)
    return TissueMask(_without_small(mask_HW, min_area_um2 / mpp**2), mpp)


def tissue_pixels(image_HW3: np.ndarray) -> np.ndarray:
    """Tissue of a thumbnail, pixel by pixel: coloured beyond Otsu's threshold, and denser than glass.

    Grey and black (frames, shadows, the marker's edge) carry no saturation and are left out.

    Args:
        image_HW3: uint8 RGB.
    Returns:
        bool [H, W].
    """
    # The mean of 3 x 3 pixels quiets the blocks of JPEG, whose colour noise else lies at the threshold.
    smooth = Image.fromarray(image_HW3).filter(ImageFilter.BoxBlur(1))
    smooth_HW3 = np.asarray(smooth, dtype=np.float32)
    # Chroma, not HSV saturation: dividing by the brightest channel would blow up the noise of black pixels.
    saturation_HW = (smooth_HW3.max(axis=2) - smooth_HW3.min(axis=2)) / 255.0
    density_HW = -np.log10((smooth_HW3 + 1.0) / 256.0).mean(axis=2)
    threshold = float(np.clip(otsu_threshold(saturation_HW), MIN_SATURATION, MAX_SATURATION))
    return (saturation_HW > threshold) & (density_HW > MIN_DENSITY)


def otsu_threshold(value_HW: np.ndarray, num_bins: int = 256) -> float:
    """Value in 0..1 that splits a histogram into the two classes furthest apart; 0 if all values are equal."""
    count, edges = np.histogram(value_HW, bins=num_bins, range=(0.0, 1.0))
    centre = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(count)[:-1].astype(np.float64)
    above = count.sum() - below
    sum_below = np.cumsum(count * centre)[:-1]
    sum_above = (count * centre).sum() - sum_below
    both = (below > 0) & (above > 0)
    if not both.any():
        return 0.0
    difference = sum_below[both] / below[both] - sum_above[both] / above[both]
    variance = below[both] * above[both] * difference**2
    return float(edges[1:-1][both][np.argmax(variance)])


def _without_small(mask_HW: np.ndarray, min_px: float) -> np.ndarray:
    """Drop 4-connected pieces of fewer than `min_px` pixels."""
    piece_HW, _ = ndimage.label(mask_HW)
    keep = np.bincount(piece_HW.ravel()) >= min_px
    keep[0] = False
    return keep[piece_HW]


def _bilinear(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate a table of sums; between the corners of one pixel the area grows linearly on each axis."""
    col = np.minimum(x.astype(np.int64), table.shape[1] - 2)
    row = np.minimum(y.astype(np.int64), table.shape[0] - 2)
    fx, fy = x - col, y - row
    upper = table[row, col] * (1 - fx) + table[row, col + 1] * fx
    lower = table[row + 1, col] * (1 - fx) + table[row + 1, col + 1] * fx
    return upper * (1 - fy) + lower * fy

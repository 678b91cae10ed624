"""Thumbnail -> tissue mask: Otsu's threshold on saturation, without specks, with small holes filled.

Slides with a dark background (fluorescence, dark field) are another matter: there tissue is what is bright.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage

from gigamil.errors import SlideError
from gigamil.slides.backend import shown
from gigamil.slides.reader import Slide, SlideInfo

DarkField = Literal["refuse", "tissue"]

# Optical density of a grey level, -log10 of the light that passes; black counts as 1 / 256.
DENSITY = -np.log10((np.arange(256, dtype=np.float32) + 1.0) / 256.0)
# Pixels that are worked on at once. A slide of 76 x 26 mm has 31 million at 8 um, and its colours as floats 370 MB.
STRIP_PX = 1 << 20

# Bounds of the threshold. Otsu splits any picture in two: without the lower one it would find tissue in the noise of an
# empty slide, without the upper one it would drop pale tissue of a slide that is full of it. Glass stays below 0.03
# and pale eosin lies above 0.10 on the slides looked at.
MIN_SATURATION, MAX_SATURATION = 0.05, 0.12
# Mean optical density below which a pixel is glass, whatever its tint: scanners tint the background a little.
MIN_DENSITY = 0.03
# Brightest channel, of 255, below which a pixel of a dark background lies. Bright-field tissue is this dark only where
# it is burnt or folded, fluorescence backgrounds lie at 0 to 40.
DARK_LEVEL = 64
# A dark background is at least this share of what was scanned, and of the whole picture (a large blot of ink is not).
MIN_DARK_SHARE, MIN_DARK_OF_ALL = 0.5, 0.1
# Beside it no glass: bright-field slides whose unscanned areas are filled with black hold more of it, in what is not dark.
GLASS_LEVEL, MAX_GLASS_SHARE = 200, 0.2
# Bounds of Otsu's threshold above the background, as for saturation: weak signals count too, noise does not.
MIN_SIGNAL, MAX_SIGNAL = 0.05, 0.15


@dataclass(frozen=True)
class TissueMask:
    """Where the tissue is. Pixel (row, col) is the square of side `mpp` at (col * mpp, row * mpp) micron of level 0.

    The last row and column may hang over the edge of the slide, at `width_um` and `height_um`: what lies beyond it is
    no tissue, whatever its pixel says.
    """

    mask_HW: np.ndarray
    mpp: float
    width_um: float = math.inf
    height_um: float = math.inf

    @classmethod
    def of(cls, info: SlideInfo, mask_HW: np.ndarray, mpp: float) -> Self:
        """Mask of a slide, on the pixels of `Slide.thumbnail(mpp)`."""
        return cls(mask_HW, mpp, info.width_um, info.height_um)

    @property
    def area_um2(self) -> float:
        """Area of the tissue in square micron. Cost: that of `fraction`."""
        rows, cols = self.mask_HW.shape
        width_um, height_um = min(self.width_um, cols * self.mpp), min(self.height_um, rows * self.mpp)
        return float(self.fraction(0.0, 0.0, width_um, height_um)) * width_um * height_um

    def fraction(
        self,
        x_um: np.ndarray | float,
        y_um: np.ndarray | float,
        width_um: np.ndarray | float,
        height_um: np.ndarray | float | None = None,
    ) -> np.ndarray:
        """Share of tissue in rectangles, exact also where they cut through mask pixels.

        Args:
            x_um, y_um: top left corners; width_um, height_um: extents, squares without a height. Arrays that broadcast,
                or numbers.
        Returns:
            float64 array in 0..1 of the broadcast shape. Area outside the mask or the slide counts as no tissue.
        Cost: one pass over the mask and 4 bytes of memory for each of its pixels, then constant per rectangle.
        """
        sides = (x_um, y_um, width_um, width_um if height_um is None else height_um)
        x, y, width, height = (np.asarray(value, dtype=np.float64) / self.mpp for value in sides)
        rows, cols = self.mask_HW.shape
        right_edge, bottom_edge = min(cols, self.width_um / self.mpp), min(rows, self.height_um / self.mpp)
        sums = _summed_area(self.mask_HW)

        def area_before(right: np.ndarray, bottom: np.ndarray) -> np.ndarray:
            return _bilinear(sums, np.clip(right, 0, right_edge), np.clip(bottom, 0, bottom_edge))

        upper = area_before(x + width, y) - area_before(x, y)
        lower = area_before(x + width, y + height) - area_before(x, y + height)
        return np.clip((lower - upper) / (width * height), 0.0, 1.0)

    def sha256(self) -> str:
        """Digest of the geometry and every pixel: equal masks, equal digests."""
        height, width = self.mask_HW.shape
        header = f"{height} {width} {self.mpp!r}\n".encode()
        return hashlib.sha256(header + np.packbits(self.mask_HW).tobytes()).hexdigest()


def mask_mpp(info: SlideInfo, tissue_mpp: float) -> float:
    """Micron per pixel of a slide's mask: `tissue_mpp`, or the slide's own where that is coarser."""
    return max(tissue_mpp, info.mpp_x, info.mpp_y)


def find_tissue(
    slide: Slide,
    *,
    tissue_mpp: float = 8.0,
    min_area_um2: float = 20_000.0,
    max_hole_area_um2: float = 20_000.0,
    dark_field: DarkField = "refuse",
    thumbnail_HW3: np.ndarray | None = None,
) -> TissueMask:
    """Find the tissue of a slide on its thumbnail.

    Args:
        slide: an open slide.
        tissue_mpp: micron per pixel of the mask; a slide that is coarser is taken at its own mpp.
        min_area_um2: smaller pieces are specks, not tissue.
        max_hole_area_um2: smaller holes are filled; larger ones (fat, lumens, tears) stay out, and so does whatever
            reaches the edge of the slide.
        dark_field: what to do with a slide whose background is dark and that holds something bright: refuse it, or take
            what is bright for tissue. Other slides are not affected.
        thumbnail_HW3: the slide at `mask_mpp` micron per pixel, if it was read before.
    Returns:
        The mask; it is all False for a slide without tissue, be it white, grey or black.
    Raises:
        SlideError: the thumbnail cannot be read, or the background is dark and `dark_field` is "refuse".
    Cost: reads the slide once at about `tissue_mpp`, unless the thumbnail is given.
    Source: Otsu 1979, IEEE Trans. Syst. Man Cybern. 9(1).
    """
    mpp = mask_mpp(slide.info, tissue_mpp)
    image_HW3 = slide.thumbnail(mpp) if thumbnail_HW3 is None else thumbnail_HW3
    min_px, max_hole_px = min_area_um2 / mpp**2, max_hole_area_um2 / mpp**2
    bright_HW = bright_pixels(image_HW3)
    if bright_HW is not None:
        bright_HW = _cleaned(bright_HW, min_px, max_hole_px)
        if bright_HW.any() and dark_field == "refuse":
            raise SlideError(
                f"slide '{shown(slide.info.path)}': its background is dark and {bright_HW.mean():.1%} of it are bright, as in "
                "fluorescence; the tissue of such slides is not found by colour. Set slides.dark_field: tissue to take "
                "what is bright for tissue, give masks in slides.masks, or remove its row."
            )
        return TissueMask.of(slide.info, bright_HW, mpp)
    return TissueMask.of(slide.info, _cleaned(tissue_pixels(image_HW3), min_px, max_hole_px), mpp)


def bright_pixels(image_HW3: np.ndarray) -> np.ndarray | None:
    """What is bright on a dark background, pixel by pixel; None if the background is not dark.

    The background is dark where over half of what was scanned is, and little of the rest is glass. Pure white was not
    scanned: the reader gives it for areas that the file leaves out. Brightness is that of the brightest channel, so a
    single blue stain counts in full.

    Args:
        image_HW3: uint8 RGB.
    Returns:
        bool [H, W], all False for a picture that is black all over; or None.
    """
    lightest_HW, level_HW = (np.empty(image_HW3.shape[:2], np.uint8) for _ in range(2))
    white_HW = np.empty(image_HW3.shape[:2], bool)
    for rows, smooth_hW3 in smooth_strips(image_HW3):
        level_HW[rows], lightest_HW[rows] = _highest(smooth_hW3), _lowest(smooth_hW3)
        white_HW[rows] = _lowest(image_HW3[rows]) == 255
    # White is kept apart with the rim of one pixel into which smoothing spreads it.
    scanned_HW = ~ndimage.binary_dilation(white_HW, np.ones((3, 3)))
    dark_HW = scanned_HW & (level_HW < DARK_LEVEL)
    rest_HW = scanned_HW & ~dark_HW
    glass_HW = rest_HW & (lightest_HW > GLASS_LEVEL)
    if (
        dark_HW.sum() < max(MIN_DARK_SHARE * scanned_HW.sum(), MIN_DARK_OF_ALL * dark_HW.size)
        or glass_HW.sum() > MAX_GLASS_SHARE * rest_HW.sum()
    ):
        return None
    count = counts(level_HW[scanned_HW], 256)
    below = np.cumsum(count[:DARK_LEVEL])
    background = float(np.searchsorted(below, below[-1] / 2)) / 255.0  # the median of what is dark
    signal = float(np.clip(otsu_threshold(count) - background, MIN_SIGNAL, MAX_SIGNAL))
    return scanned_HW & (level_HW > 255.0 * (background + signal))


def tissue_pixels(image_HW3: np.ndarray) -> np.ndarray:
    """Tissue of a thumbnail, pixel by pixel: coloured beyond Otsu's threshold, and denser than glass.

    Grey and black (frames, shadows, the marker's edge) carry no saturation and are left out.

    Args:
        image_HW3: uint8 RGB.
    Returns:
        bool [H, W].
    """
    # Chroma, not HSV saturation: dividing by the brightest channel would blow up the noise of black pixels.
    chroma_HW = np.empty(image_HW3.shape[:2], np.uint8)
    is_dense_HW = np.empty(image_HW3.shape[:2], bool)
    for rows, smooth_hW3 in smooth_strips(image_HW3):
        chroma_HW[rows] = _highest(smooth_hW3) - _lowest(smooth_hW3)
        is_dense_HW[rows] = DENSITY[smooth_hW3].mean(axis=2) > MIN_DENSITY
    threshold = float(np.clip(otsu_threshold(counts(chroma_HW, 256)), MIN_SATURATION, MAX_SATURATION))
    return (chroma_HW > 255.0 * threshold) & is_dense_HW


def smooth_strips(image_HW3: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Each pixel's mean with its neighbours, 3 x 3, in strips of rows: memory does not grow with the slide.

    It quiets the blocks of JPEG, whose colour noise else lies at the thresholds.

    Yields:
        the rows of the image, and their pixels, uint8 [h, W, 3].
    """
    height, width = image_HW3.shape[:2]
    step = max(1, STRIP_PX // width)
    for top in range(0, height, step):
        bottom, before, after = min(top + step, height), max(top - 1, 0), min(top + step + 1, height)
        smooth = Image.fromarray(image_HW3[before:after]).filter(ImageFilter.BoxBlur(1))
        yield slice(top, bottom), np.asarray(smooth)[top - before : bottom - before]


def otsu_threshold(count: np.ndarray) -> float:
    """Value in 0..1 that splits a histogram over 0..1 into the two classes furthest apart; 0 if all values are equal.

    Args:
        count: of values in equal bins.
    """
    edges = np.linspace(0.0, 1.0, len(count) + 1)
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


def counts(values: np.ndarray, num: int) -> np.ndarray:
    """How often each of 0..num-1 occurs, int64 [num]."""
    flat = values.reshape(-1)
    # bincount makes an int64 of every value first.
    parts = (np.bincount(flat[at : at + STRIP_PX], minlength=num) for at in range(0, len(flat), STRIP_PX))
    return sum(parts, start=np.zeros(num, np.int64))


def without_small(mask_HW: np.ndarray, min_px: float, *, keep_at_border: bool = False) -> np.ndarray:
    """Drop 4-connected pieces of fewer than `min_px` pixels; on request not those that touch the border."""
    piece_HW, num = ndimage.label(mask_HW)
    keep = counts(piece_HW, num + 1) >= min_px
    if keep_at_border:
        for border in (piece_HW[0], piece_HW[-1], piece_HW[:, 0], piece_HW[:, -1]):
            keep[border] = True
    keep[0] = False
    step = max(1, STRIP_PX // mask_HW.shape[1])
    return np.concatenate([keep[piece_HW[top : top + step]] for top in range(0, len(piece_HW), step)])


def _cleaned(mask_HW: np.ndarray, min_px: float, max_hole_px: float) -> np.ndarray:
    """Fill small holes, then drop specks: a thin ring of tissue is then weighed together with what it encloses.

    Background at the border is not enclosed, so it is no hole, however small.
    """
    return without_small(~without_small(~mask_HW, max_hole_px, keep_at_border=True), min_px)


def _highest(image_HW3: np.ndarray) -> np.ndarray:
    return np.maximum(np.maximum(image_HW3[..., 0], image_HW3[..., 1]), image_HW3[..., 2])


def _lowest(image_HW3: np.ndarray) -> np.ndarray:
    return np.minimum(np.minimum(image_HW3[..., 0], image_HW3[..., 1]), image_HW3[..., 2])


def _summed_area(mask_HW: np.ndarray) -> np.ndarray:
    """True pixels above and to the left of each corner of a pixel, int32 [H + 1, W + 1]."""
    rows, cols = mask_HW.shape
    sums = np.zeros((rows + 1, cols + 1), np.int32)
    step = max(1, STRIP_PX // cols)
    for top in range(0, rows, step):  # at once, cumsum would take as much again
        strip = np.cumsum(mask_HW[top : top + step], axis=1, dtype=np.int32)
        np.cumsum(strip, axis=0, out=sums[top + 1 : top + 1 + len(strip), 1:])
        sums[top + 1 : top + 1 + len(strip), 1:] += sums[top, 1:]
    return sums


def _bilinear(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate a table of sums; between the corners of one pixel the area grows linearly on each axis."""
    col = np.minimum(x.astype(np.int64), table.shape[1] - 2)
    row = np.minimum(y.astype(np.int64), table.shape[0] - 2)
    fx, fy = x - col, y - row
    upper = table[row, col] * (1 - fx) + table[row, col + 1] * fx
    lower = table[row + 1, col] * (1 - fx) + table[row + 1, col + 1] * fx
    return upper * (1 - fy) + lower * fy

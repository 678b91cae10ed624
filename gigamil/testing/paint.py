"""Drawing H&E-like tissue: nuclei, fibres, fat and glands as stain density, then density as colour.

A positive slide differs from a negative one only in a few nests of large, crowded, irregular nuclei, which take the
place of lymphocyte aggregates: those are dark and crowded too, but small. Stain, its strength, fat and glands vary
alike in both. Colour statistics of whole slides still hint at the class (cross-validated AUC 0.74 on the demo cohort).
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from gigamil.testing.tiff import halved

Box = tuple[float, float, float, float]

# Optical density (base 10) of unit stain in R, G, B: hematoxylin of Ruifrok & Johnston 2001 (Anal. Quant. Cytol.
# Histol. 23(4)); eosin warmer than theirs, which draws magenta instead of pink.
HEMATOXYLIN = (0.65, 0.70, 0.29)
EOSIN = (0.10, 0.85, 0.42)
# Nuclei are drawn into an 8-bit image: this many grey levels per unit of density.
DENSITY_STEPS = 150.0
POLYGON_CORNERS = 16
FIBRE_TEXTURE_PX = 512
FIBRE_WAVE_UM = 45.0
GLAND_RADIUS_UM = (24.0, 42.0)
GLANDS_PER_MM2 = (4.0, 14.0)
AGGREGATE_RADIUS_UM = (18.0, 60.0)
LESION_SHARE = (0.025, 0.06)  # of the tissue, over all nests of a slide
CROWDED_SHARE = (0.04, 0.09)  # of the tissue, tumour and lymphocytes together
FAT_SPACING_UM = 44.0
FAT_SHARE = (0.04, 0.22)  # of the slide
COARSE_STEP = 8  # pixels between points where a coarse look is enough
# Coarser slides are drawn twice as fine and reduced, else their nuclei would have jagged edges.
FINEST_DRAWN_MPP = 0.8


@dataclass(frozen=True)
class SyntheticSlide:
    """A drawn slide: uint8 RGB image, and tight boxes (x0, y0, x1, y1 in micron of level 0) around tumour nests."""

    image_HW3: np.ndarray
    mpp: float
    lesions_um: tuple[Box, ...]


@dataclass(frozen=True)
class Nuclei:
    """How the nuclei of one kind look; lengths in micron."""

    radius: float
    spacing: float  # between neighbours, before jitter
    elongation: float  # long axis over short axis, on average
    density: float  # of hematoxylin, on average
    spread: float  # relative standard deviation of size and density
    roughness: float  # of the outline, as a share of the radius
    rim: float = 1.0  # density of the outline over that of the inside; a light rim keeps crowded nuclei apart


FIBROBLAST = Nuclei(radius=2.4, spacing=26.0, elongation=2.6, density=0.75, spread=0.2, roughness=0.05)
LYMPHOCYTE = Nuclei(radius=2.8, spacing=8.0, elongation=1.1, density=1.0, spread=0.1, roughness=0.03)
EPITHELIUM = Nuclei(radius=3.6, spacing=9.0, elongation=1.35, density=0.8, spread=0.1, roughness=0.04)
TUMOUR = Nuclei(radius=6.2, spacing=13.5, elongation=1.3, density=0.9, spread=0.22, roughness=0.1, rim=0.35)


def synthetic_slide(
    seed: int, *, tumour: bool, size_um: tuple[float, float] = (900.0, 900.0), mpp: float = 0.5
) -> SyntheticSlide:
    """Draw one slide.

    Args:
        seed: the same arguments give the same pixels.
        tumour: plant one to three nests of tumour over 2.5 to 6 % of the tissue.
        size_um: width and height in micron.
        mpp: micron per pixel of the image.
    Cost: about half a second for 4 megapixels.
    """
    if mpp > FINEST_DRAWN_MPP:
        fine = synthetic_slide(seed, tumour=tumour, size_um=size_um, mpp=mpp / 2)
        return SyntheticSlide(halved(fine.image_HW3), mpp, fine.lesions_um)
    canvas = _Canvas(np.random.default_rng(seed), size_um, mpp)
    fat_HW = _draw_fat(canvas)
    angle_HW = _draw_stroma(canvas)
    _draw_glands(canvas)
    tissue_um2 = float(np.count_nonzero(canvas.tissue_HW)) * mpp**2
    # Tumour takes the place of lymphocytes, so that how much of a slide is dark tells little of its class.
    crowded_um2 = canvas.rng.uniform(*CROWDED_SHARE) * tissue_um2
    tumour_um2 = canvas.rng.uniform(*LESION_SHARE) * tissue_um2 if tumour else 0.0
    lesions = _draw_nests(canvas, tumour_um2) if tumour else []
    _draw_aggregates(canvas, crowded_um2 - tumour_um2)
    _draw_fibroblasts(canvas, angle_HW)
    return SyntheticSlide(_colour(canvas, fat_HW), mpp, tuple(lesions))


class _Disc:
    """A roundish patch: its window of the canvas, and in it the distance to the centre over that of the rim."""

    def __init__(self, window: tuple[slice, slice], radius_um: float, uneven: float, phase: np.ndarray) -> None:
        self.window = window
        self.distance_hw = np.empty((0, 0))
        self._radius_um, self._uneven, self._phase = radius_um, uneven, phase

    def rim_um(self, turn: np.ndarray) -> np.ndarray:
        """Distance from the centre to the rim in the direction `turn`."""
        wave = np.sin(2 * turn + self._phase[0]) + 0.6 * np.sin(3 * turn + self._phase[1])
        return self._radius_um * (1 + self._uneven * wave)


class _Canvas:
    """Stain densities of a slide under construction, and what is drawn where."""

    def __init__(self, rng: np.random.Generator, size_um: tuple[float, float], mpp: float) -> None:
        self.rng = rng
        self.mpp = mpp
        self.width, self.height = (max(64, round(side / mpp)) for side in size_um)
        self.tissue_HW = self._outline()
        self.solid_HW = self.tissue_HW.copy()  # tissue that may hold cells: no fat, no lumen
        self.eosin_HW = np.zeros((self.height, self.width), np.float32)
        self.hematoxylin_HW = np.zeros((self.height, self.width), np.float32)  # cytoplasm; nuclei are apart
        self.nuclei = Image.new("L", (self.width, self.height))
        self.pen = ImageDraw.Draw(self.nuclei)

    def noise(self, cell_um: float) -> np.ndarray:
        """Smooth float32 [H, W] noise of unit scale, whose bumps are about `cell_um` wide."""
        cell_px = max(1.0, cell_um / self.mpp)
        shape = (math.ceil(self.height / cell_px) + 3, math.ceil(self.width / cell_px) + 3)
        coarse = Image.fromarray(self.rng.standard_normal(shape).astype(np.float32))
        box = (1.0, 1.0, 1.0 + self.width / cell_px, 1.0 + self.height / cell_px)
        return np.asarray(coarse.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box))

    def disc(self, x_um: float, y_um: float, radius_um: float, *, uneven: float = 0.12) -> "_Disc":
        """A roundish patch whose rim wanders by about the share `uneven` of its radius."""
        reach = (1 + 2 * uneven) * radius_um
        left, right = (int(np.clip((x_um + side * reach) / self.mpp, 0, self.width)) for side in (-1, 1))
        top, bottom = (int(np.clip((y_um + side * reach) / self.mpp, 0, self.height)) for side in (-1, 1))
        dy, dx = np.mgrid[top:bottom, left:right] * self.mpp
        dx, dy = dx - x_um, dy - y_um
        disc = _Disc((slice(top, bottom), slice(left, right)), radius_um, uneven, self.rng.uniform(0, 2 * math.pi, 2))
        disc.distance_hw = np.hypot(dx, dy) / disc.rim_um(np.arctan2(dy, dx))
        return disc

    def nucleus(self, kind: Nuclei, x_um: float, y_um: float, angle: float) -> float:
        """Draw one nucleus; returns the reach of its long axis in micron."""
        size = kind.radius * float(np.clip(1 + kind.spread * self.rng.standard_normal(), 0.6, 1.7))
        stretch = math.sqrt(kind.elongation * float(self.rng.uniform(0.8, 1.2)))
        turn = np.arange(POLYGON_CORNERS) * (2 * math.pi / POLYGON_CORNERS)
        rim = size * (1 + kind.roughness * self.rng.standard_normal(POLYGON_CORNERS).clip(-2, 2))
        along, across = rim * stretch * np.cos(turn), rim / stretch * np.sin(turn)
        x = (x_um + along * math.cos(angle) - across * math.sin(angle)) / self.mpp
        y = (y_um + along * math.sin(angle) + across * math.cos(angle)) / self.mpp
        density = kind.density * float(np.clip(1 + kind.spread * self.rng.standard_normal(), 0.6, 1.5))
        fill, outline = (min(255, round(level * DENSITY_STEPS)) for level in (density, density * kind.rim))
        self.pen.polygon(np.stack([x, y], axis=1).ravel().tolist(), fill=fill, outline=outline)
        return size * stretch

    def _outline(self) -> np.ndarray:
        size_um = self.mpp * min(self.width, self.height)  # bulges grow with the slide, else a small one may shrivel
        y, x = np.ogrid[-1 : 1 : self.height * 1j, -1 : 1 : self.width * 1j]
        radius = np.hypot(x / self.rng.uniform(0.8, 0.95), y / self.rng.uniform(0.8, 0.95)).astype(np.float32)
        inside = radius + 0.16 * self.noise(0.24 * size_um) + 0.03 * self.noise(30.0) < 0.92
        tear = np.abs(self.noise(0.45 * size_um) + 0.08 * self.noise(40.0)) < 0.02
        return inside & ~tear


def _draw_fat(canvas: _Canvas) -> np.ndarray:
    """Take fat out of the solid tissue: round holes, packed so that thin walls stay between them. Returns the holes."""
    noise_HW = canvas.noise(260.0)
    region_HW = noise_HW > np.quantile(noise_HW[::COARSE_STEP, ::COARSE_STEP], 1 - canvas.rng.uniform(*FAT_SHARE))
    holes = Image.new("L", (canvas.width, canvas.height))
    pen = ImageDraw.Draw(holes)
    for x_um, y_um in _jittered_grid(canvas, FAT_SPACING_UM, region_HW & canvas.tissue_HW, jitter=0.16):
        radius_x, radius_y = canvas.rng.uniform(0.4, 0.5, 2) * FAT_SPACING_UM / canvas.mpp
        x, y = x_um / canvas.mpp, y_um / canvas.mpp
        pen.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=255)
    holes_HW = (np.asarray(holes) > 0) & canvas.tissue_HW
    canvas.solid_HW &= ~holes_HW
    return holes_HW


def _draw_stroma(canvas: _Canvas) -> np.ndarray:
    """Lay wavy collagen fibres into the tissue. Returns their angle [H, W], which nuclei follow."""
    wave_px = FIBRE_WAVE_UM / canvas.mpp * canvas.noise(180.0)
    angle = canvas.rng.uniform(0, math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = np.ogrid[0 : canvas.height, 0 : canvas.width]
    along, across = x * cos + y * sin, y * cos - x * sin + wave_px
    fibre = _fibre_texture(canvas)[
        across.astype(np.int32) % FIBRE_TEXTURE_PX, along.astype(np.int32) % FIBRE_TEXTURE_PX
    ]
    bundle = np.clip(1 + 0.22 * canvas.noise(70.0) + 0.28 * fibre, 0.15, 2.0)
    canvas.eosin_HW += np.where(canvas.solid_HW, 0.27 * bundle, 0.0)
    canvas.hematoxylin_HW += np.where(canvas.solid_HW, 0.05, 0.0)
    # Fibres are the lines of equal `across`, so they run at a right angle to its gradient.
    slope_y, slope_x = np.gradient(wave_px[::COARSE_STEP, ::COARSE_STEP], COARSE_STEP)
    bent = np.arctan2(sin - slope_x, cos + slope_y)
    return bent.repeat(COARSE_STEP, axis=0).repeat(COARSE_STEP, axis=1)[: canvas.height, : canvas.width]


def _fibre_texture(canvas: _Canvas) -> np.ndarray:
    """A periodic texture of streaks along the rows, of unit scale."""
    noise = canvas.rng.standard_normal((FIBRE_TEXTURE_PX, FIBRE_TEXTURE_PX))
    streaks = ndimage.gaussian_filter(noise, (1.1 / canvas.mpp, 16.0 / canvas.mpp), mode="wrap")
    return (streaks / streaks.std()).astype(np.float32)


def _draw_glands(canvas: _Canvas) -> None:
    """Normal glands: a lumen, cells around it, one row of regular nuclei."""
    tissue_mm2 = np.count_nonzero(canvas.tissue_HW) * canvas.mpp**2 / 1e6
    for _ in range(round(canvas.rng.uniform(*GLANDS_PER_MM2) * tissue_mm2)):
        x_um, y_um = _roomiest(canvas, canvas.solid_HW, GLAND_RADIUS_UM[1])
        disc = canvas.disc(x_um, y_um, canvas.rng.uniform(*GLAND_RADIUS_UM), uneven=0.07)
        inside = canvas.tissue_HW[disc.window]
        wall, lumen = inside & (disc.distance_hw < 1), inside & (disc.distance_hw < 0.42)
        canvas.eosin_HW[disc.window][wall] = 0.22
        canvas.hematoxylin_HW[disc.window][wall] = 0.12
        canvas.eosin_HW[disc.window][lumen] = 0.02
        canvas.hematoxylin_HW[disc.window][lumen] = 0.01
        canvas.solid_HW[disc.window] &= ~wall
        num = int(2 * math.pi * 0.8 * disc.rim_um(np.zeros(1))[0] / EPITHELIUM.spacing)
        turns = np.arange(num) * (2 * math.pi / num)
        for turn, rim_um in zip(turns.tolist(), disc.rim_um(turns).tolist(), strict=True):
            reach = rim_um * canvas.rng.uniform(0.74, 0.84)
            canvas.nucleus(EPITHELIUM, x_um + reach * math.cos(turn), y_um + reach * math.sin(turn), turn)


def _draw_nests(canvas: _Canvas, area_um2: float) -> list[Box]:
    """Nests of tumour in solid tissue, of `area_um2` in all; returns the box around the nuclei of each."""
    num = int(canvas.rng.integers(1, 4))
    radius = math.sqrt(area_um2 / (num * math.pi))
    boxes = []
    for _ in range(num):
        disc = canvas.disc(*_roomiest(canvas, canvas.solid_HW, radius), radius)
        inside = (disc.distance_hw < 1) & canvas.solid_HW[disc.window]
        canvas.eosin_HW[disc.window][inside] = 0.1 + 0.3 * canvas.eosin_HW[disc.window][inside]
        canvas.hematoxylin_HW[disc.window][inside] = 0.2
        boxes += _crowd(canvas, TUMOUR, disc.window, inside)
    return boxes


def _draw_aggregates(canvas: _Canvas, area_um2: float) -> None:
    """Lymphocytes in dense crowds, of `area_um2` in all: dark as a nest of tumour, but of small, even nuclei."""
    while area_um2 > math.pi * AGGREGATE_RADIUS_UM[0] ** 2:
        radius = min(canvas.rng.uniform(*AGGREGATE_RADIUS_UM), math.sqrt(area_um2 / math.pi))
        area_um2 -= math.pi * radius**2
        disc = canvas.disc(*_roomiest(canvas, canvas.solid_HW, radius), radius)
        _crowd(canvas, LYMPHOCYTE, disc.window, (disc.distance_hw < 1) & canvas.solid_HW[disc.window])


def _draw_fibroblasts(canvas: _Canvas, angle_HW: np.ndarray) -> None:
    for x_um, y_um in _jittered_grid(canvas, FIBROBLAST.spacing, canvas.solid_HW):
        angle = angle_HW[int(y_um / canvas.mpp), int(x_um / canvas.mpp)] + 0.25 * canvas.rng.standard_normal()
        canvas.nucleus(FIBROBLAST, x_um, y_um, float(angle))


def _crowd(canvas: _Canvas, kind: Nuclei, window: tuple[slice, slice], inside_hw: np.ndarray) -> list[Box]:
    """Fill a part of a window with nuclei; returns the one box around them, or none where there is no room."""
    left_um, top_um = window[1].start * canvas.mpp, window[0].start * canvas.mpp
    edges = []
    for x, y in _jittered_grid(canvas, kind.spacing, inside_hw):
        x_um, y_um = left_um + x, top_um + y
        reach = canvas.nucleus(kind, x_um, y_um, float(canvas.rng.uniform(0, math.pi)))
        edges.append((x_um - reach, y_um - reach, x_um + reach, y_um + reach))
    if not edges:
        return []
    x0, y0, x1, y1 = zip(*edges, strict=True)
    canvas.solid_HW[window] &= ~inside_hw
    return [(round(min(x0), 2), round(min(y0), 2), round(max(x1), 2), round(max(y1), 2))]


def _jittered_grid(
    canvas: _Canvas, spacing_um: float, mask_hw: np.ndarray, *, jitter: float = 0.3
) -> list[tuple[float, float]]:
    """Points (x_um, y_um from the mask's corner) inside a mask, about evenly spaced and without a visible pattern."""
    height, width = mask_hw.shape
    step = spacing_um / canvas.mpp
    row, col = np.mgrid[0 : height / (0.87 * step), 0 : width / step]
    jitter_y, jitter_x = canvas.rng.uniform(-jitter, jitter, (2, *row.shape))
    y = ((row + 0.5 + jitter_y) * 0.87 * step).ravel()
    x = ((col + 0.25 + 0.5 * (row % 2) + jitter_x) * step).ravel()  # every other row is shifted: a hexagonal grid
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x[inside], y[inside]
    hit = mask_hw[y.astype(np.int64), x.astype(np.int64)]
    return list(zip((x[hit] * canvas.mpp).tolist(), (y[hit] * canvas.mpp).tolist(), strict=True))


def _roomiest(canvas: _Canvas, room_HW: np.ndarray, radius_um: float) -> tuple[float, float]:
    """A random point with `radius_um` of room around it, or else one of those with the most."""
    step = COARSE_STEP
    room_um = ndimage.distance_transform_edt(np.pad(room_HW[::step, ::step], 1))[1:-1, 1:-1] * step * canvas.mpp
    rows, cols = np.nonzero(room_um >= min(radius_um, 0.9 * room_um.max()))
    pick = canvas.rng.integers(len(rows))
    return float(cols[pick]) * step * canvas.mpp, float(rows[pick]) * step * canvas.mpp


def _colour(canvas: _Canvas, fat_HW: np.ndarray) -> np.ndarray:
    """Beer-Lambert: density of both stains -> uint8 RGB, with this slide's own stain, light and sensor noise."""
    rng = canvas.rng
    blurred = canvas.nuclei.filter(ImageFilter.GaussianBlur(0.45 / canvas.mpp))
    nuclei_HW = np.asarray(blurred, dtype=np.float32) / DENSITY_STEPS
    nuclei_HW *= 1 + 0.18 * canvas.noise(1.6)  # chromatin
    eosin_HW = canvas.eosin_HW * np.clip(1 - 0.7 * nuclei_HW, 0.2, 1.0)
    eosin_HW[fat_HW] = 0.01
    hematoxylin_HW = canvas.hematoxylin_HW + nuclei_HW
    gains = np.exp(rng.normal(0, 0.13, 2))
    stains = np.array([HEMATOXYLIN, EOSIN]) * gains[:, None] + rng.normal(0, 0.02, (2, 3))
    light = rng.uniform(240, 248) + rng.normal(0, 1.5, 3)
    noise_HW = rng.standard_normal(eosin_HW.shape, dtype=np.float32) * 1.5
    image_HW3 = np.empty((canvas.height, canvas.width, 3), np.uint8)
    for channel in range(3):
        density = hematoxylin_HW * np.float32(stains[0, channel]) + eosin_HW * np.float32(stains[1, channel])
        bright = np.float32(light[channel]) * np.exp(np.float32(-math.log(10)) * density) + noise_HW
        image_HW3[..., channel] = np.clip(np.rint(bright), 0, 255).astype(np.uint8)
    return image_HW3

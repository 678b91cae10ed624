"""One picture per slide: the slide, the slide with its attention, and the most attended tiles.

What the colour means: attention x N, the attention of a tile in units of an even share, on a logarithmic scale from 1
up. The raw weight is no choice: it sums to 1, so it is about 1e-5 on a slide of a hundred thousand tiles whatever the
model does. The rank within the slide is a poor one: it paints the first tenth dark even where the model has no
preference at all, which is what a reader must be able to see. Attention x N is 1 for a model without a preference,
means the same on slides of any size, and says "this tile weighs 20 tiles". Tiles below their even share get one faint
tint: tissue that was read and counted for little. The scale reaches at least 10, so that weak preferences look weak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gigamil.evaluate.attention import Attention, Box
from gigamil.evaluate.style import INK, MUTED, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LogNorm
    from matplotlib.figure import Figure

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

COLOUR_MAP = "YlOrRd"  # lightness falls all the way, so it reads in grey and with any colour vision
LEAST_TOP_OF_SCALE = 10.0
OPACITY = 0.8
TINT = (0.34, 0.71, 0.91, 0.16)  # sky blue, faint
LESION_COLOUR = PALETTE[0]
STRIP_TILES = 8
VIEW_MARGIN = 0.04  # around the tiles, of the longer side
SMALLEST_MARK = 0.012  # of the longer side: a true outline of one tile would be a dot on a large slide

# Layout in inches.
EDGE, GAP, BAR, BAR_LABELS = 0.3, 0.2, 0.16, 1.0
HEADER, PANEL_TITLE, FOOTER, STRIP_TITLE = 0.78, 0.28, 0.42, 0.5
LETTER_WIDTH = {"bold": 0.7, "normal": 0.58}  # of the font size, DejaVu Sans on average
WIDE_VIEW = 1.7  # width / height from which the panels lie one above the other


@dataclass(frozen=True)
class View:
    """The part of a slide that is shown, micron from the level-0 origin."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Micron."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Micron."""
        return self.y1 - self.y0

    @property
    def longer(self) -> float:
        """The longer side in micron."""
        return max(self.width, self.height)


def draw_heatmap(
    thumbnail_HW3: Pixels,
    thumb_mpp: float,
    attention: Attention,
    out_png: Path,
    *,
    title: str,
    note: str = "",
    top_tiles: Sequence[Pixels] = (),
    boxes_um: Sequence[Box] = (),
) -> None:
    """Draw a slide beside its attention map, with colour bar and scale bar, and its most attended tiles below.

    The colour is attention x N (see the top of this file). The view is cut to the tiles and a margin. The slide panel
    outlines the tiles of the strip, and known lesions where given.

    Args:
        thumbnail_HW3: picture of the slide; pixel (0, 0) starts at the corner of level 0.
        thumb_mpp: its micron per pixel.
        attention: of the slide.
        out_png: file to write.
        title: first line.
        note: starts the second line, which also says how concentrated the attention is.
        top_tiles: pictures of the most attended tiles in the order of `attention.top`; the first eight are shown.
        boxes_um: lesions to outline, micron from the level-0 origin.
    Test: unit/evaluate/test_heatmap.py
    """
    size_um = thumbnail_HW3.shape[1] * thumb_mpp, thumbnail_HW3.shape[0] * thumb_mpp
    extent = (0.0, size_um[0], size_um[1], 0.0)
    view = tiles_view(attention, *size_um)
    page = Page.of(view, with_strip=len(top_tiles) > 0)
    strip = top_tiles[:STRIP_TILES]
    with drawing(out_png, page.width, page.height, constrained=False) as figure:
        page.text(figure, 0.24, title, 13, "bold")
        page.text(figure, 0.52, f"{note}. {concentration(attention)}".removeprefix(". "), 9.5)
        slide_axes, map_axes = (page.axes(figure, *page.panel(number)) for number in (0, 1))
        slide_axes.imshow(thumbnail_HW3, extent=extent, interpolation="antialiased")
        slide_axes.set_title("Slide, known lesions in blue" if len(boxes_um) else "Slide")
        _outline(slide_axes, view, attention, len(strip), boxes_um)
        map_axes.imshow(faded(thumbnail_HW3), extent=extent, interpolation="antialiased")
        map_axes.set_title("Attention")
        for axes in (slide_axes, map_axes):
            axes.set(xticks=[], yticks=[], anchor="NW")
            axes.spines[:].set_visible(False)
        scale = _draw_attention(map_axes, attention)
        for axes in (slide_axes, map_axes):
            axes.set(xlim=(view.x0, view.x1), ylim=(view.y1, view.y0))
        _draw_colour_bar(figure, page.axes(figure, *page.colour_bar()), *scale)
        draw_scale_bar(slide_axes, view, page.panel_height)
        _draw_strip(figure, page, strip, attention)


def concentration(attention: Attention) -> str:
    """One sentence on how concentrated the attention of a slide is."""
    falling = np.sort(attention.attention_N.astype(np.float64))[::-1]
    half = int(np.searchsorted(np.cumsum(falling), falling.sum() / 2)) + 1
    tiles = "tile" if half == 1 else "tiles"
    return f"Half of the attention is on {half:,} {tiles} of {len(falling):,} ({half / len(falling):.1%})"


@dataclass(frozen=True)
class Page:
    """Where things lie, in inches from the upper left corner: figures of slides have as many shapes as slides."""

    panel_width: float
    panel_height: float
    stacked: bool
    with_strip: bool

    @staticmethod
    def of(view: View, *, with_strip: bool) -> "Page":
        aspect = view.width / view.height
        if aspect >= WIDE_VIEW:
            return Page(9.4, max(2.0, 9.4 / aspect), True, with_strip)
        height = min(4.7 / aspect, 6.5)
        return Page(max(2.6, height * aspect), height, False, with_strip)

    @property
    def width(self) -> float:
        panels = self.panel_width if self.stacked else 2 * self.panel_width + GAP
        return EDGE + panels + GAP + BAR + BAR_LABELS

    @property
    def panels_bottom(self) -> float:
        last_x_y = self.panel(1)
        return last_x_y[1] + self.panel_height

    @property
    def tile_side(self) -> float:
        return (self.width - 2 * EDGE - (STRIP_TILES - 1) * GAP / 2) / STRIP_TILES

    @property
    def height(self) -> float:
        return self.panels_bottom + FOOTER + (STRIP_TITLE + self.tile_side + 0.15 if self.with_strip else 0.0)

    def panel(self, number: int) -> tuple[float, float, float, float]:
        """x, y, width, height of the slide panel (0) or the attention panel (1)."""
        upper = HEADER + PANEL_TITLE
        if self.stacked:
            y = upper + number * (self.panel_height + FOOTER + PANEL_TITLE)
            return EDGE, y, self.panel_width, self.panel_height
        return EDGE + number * (self.panel_width + GAP), upper, self.panel_width, self.panel_height

    def colour_bar(self) -> tuple[float, float, float, float]:
        """Right of the attention panel, not longer than it is readable."""
        x, y, width, height = self.panel(1)
        return x + width + GAP, y, BAR, min(height, 3.5)

    def strip_tile(self, number: int) -> tuple[float, float, float, float]:
        side = self.tile_side
        return EDGE + number * (side + GAP / 2), self.panels_bottom + FOOTER + STRIP_TITLE, side, side

    def axes(self, figure: "Figure", x: float, y: float, width: float, height: float) -> "Axes":
        lower = self.height - y - height
        return figure.add_axes((x / self.width, lower / self.height, width / self.width, height / self.height))

    def text(self, figure: "Figure", y: float, words: str, fontsize: float, weight: str = "normal") -> None:
        """Write one line at the left edge, smaller where it would leave the page."""
        fits = (self.width - 2 * EDGE) * 72 / (LETTER_WIDTH[weight] * max(len(words), 1))
        size = min(fontsize, fits)
        place = EDGE / self.width, 1 - y / self.height
        figure.text(*place, words.replace("$", r"\$"), va="center", fontsize=size, fontweight=weight)


def tiles_view(attention: Attention, width_um: float, height_um: float) -> View:
    """The tiles and a margin, within the slide; a grid may hang over its edge."""
    x_um, y_um, (tile_w, tile_h) = attention.x_um_N, attention.y_um_N, attention.tile_um
    x0, x1 = x_um.min(), min(x_um.max() + tile_w, width_um)
    y0, y1 = y_um.min(), min(y_um.max() + tile_h, height_um)
    margin = VIEW_MARGIN * max(x1 - x0, y1 - y0)
    return View(max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, width_um), min(y1 + margin, height_um))


def faded(image_HW3: Pixels) -> Pixels:
    """Pale grey, so that colour is attention only."""
    grey_HW = image_HW3.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pale_HW = (255 - 0.6 * (255 - grey_HW)).astype(np.uint8)
    return np.repeat(pale_HW[..., None], 3, axis=2)


def attention_colours(attention: Attention) -> Floats:
    """Colour and opacity (N, 4) of each tile, 0..1: painted from an even share up, tinted below."""
    norm, cmap = _scale(attention)
    rgba_N4 = np.tile(np.array(TINT, dtype=float), (len(attention), 1))
    above_N = attention.times_even_N >= 1
    rgba_N4[above_N] = cmap(norm(attention.times_even_N[above_N]))
    rgba_N4[above_N, 3] = OPACITY
    return rgba_N4


def on_white(rgba_N4: Floats) -> Pixels:
    """Colours with their opacity as they look on white, uint8 (N, 3)."""
    return np.rint(255 * (rgba_N4[:, :3] * rgba_N4[:, 3:] + 1 - rgba_N4[:, 3:])).astype(np.uint8)


def _scale(attention: Attention) -> tuple["LogNorm", "Colormap"]:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    largest = max(LEAST_TOP_OF_SCALE, float(attention.times_even_N.max()))
    return LogNorm(1.0, largest, clip=True), colormaps[COLOUR_MAP]


def _draw_attention(axes: "Axes", attention: Attention) -> tuple["LogNorm", "Colormap"]:
    """Paint tiles from an even share up; tint the others. Returns the scale for the colour bar."""
    times_even, corner_um = _on_grid(attention)
    rows, cols = times_even.shape
    norm, cmap = _scale(attention)
    has_tile = ~np.isnan(times_even)
    rgba = np.zeros((rows, cols, 4))
    rgba[has_tile] = TINT
    above = has_tile & (np.nan_to_num(times_even) >= 1)
    rgba[above] = cmap(norm(times_even[above]))
    rgba[above, 3] = OPACITY
    x0, y0 = corner_um
    extent = (x0, x0 + cols * attention.stride_um[0], y0 + rows * attention.stride_um[1], y0)
    axes.imshow(rgba, extent=extent, interpolation="nearest")
    return norm, cmap


def _on_grid(attention: Attention) -> tuple[Floats, tuple[float, float]]:
    """Attention x N as an image of one pixel per tile, NaN without a tile; and its upper left corner in micron.

    A pixel is as large as the stride, and lies on the middle of its tile: of tiles that overlap each shows the part that
    is nearest to it, so that none hides another.
    """
    (x0, col_N), (y0, row_N) = (
        (float(corner_N.min()), np.rint((corner_N - corner_N.min()) / stride).astype(np.int64))
        for corner_N, stride in zip((attention.x_um_N, attention.y_um_N), attention.stride_um, strict=True)
    )
    image = np.full((row_N.max() + 1, col_N.max() + 1), np.nan)
    np.fmax.at(image, (row_N, col_N), attention.times_even_N)
    shift_x, shift_y = ((t - s) / 2 for t, s in zip(attention.tile_um, attention.stride_um, strict=True))
    return image, (x0 + shift_x, y0 + shift_y)


def _draw_colour_bar(figure: "Figure", axes: "Axes", norm: "LogNorm", cmap: "Colormap") -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    bar = figure.colorbar(ScalarMappable(norm, cmap), cax=axes, alpha=OPACITY)
    top = float(norm.vmax or LEAST_TOP_OF_SCALE)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 2_000 else (1,)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:,.0f}×"))
    bar.set_label("Attention × number of tiles\n(1 = an even share; below: pale blue)", fontsize=9)
    bar.outline.set_visible(False)


def _outline(axes: "Axes", view: View, attention: Attention, num_top: int, boxes_um: Sequence[Box]) -> None:
    """Frame the tiles of the strip and the known lesions on the slide panel."""
    width, height = (max(side, SMALLEST_MARK * view.longer) for side in attention.tile_um)
    rows = attention.top(num_top)
    x_um, y_um = (
        corner_N[rows] - (side - tile) / 2
        for corner_N, side, tile in zip(
            (attention.x_um_N, attention.y_um_N), (width, height), attention.tile_um, strict=True
        )
    )
    _frame(axes, [(x, y, x + width, y + height) for x, y in zip(x_um, y_um, strict=True)], INK)
    _frame(axes, boxes_um, LESION_COLOUR)


def _frame(axes: "Axes", boxes_um: Sequence[Box], colour: str) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    halo = [Stroke(linewidth=3, foreground="white"), Normal()]  # seen on pale stroma and on dark nuclei
    style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 1.3, "path_effects": halo}
    for x0, y0, x1, y1 in boxes_um:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))


def draw_scale_bar(axes: "Axes", view: View, panel_height_in: float) -> None:
    """A bar below the panel, where it hides no tissue."""
    length = scale_bar_um(view.longer)
    words = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    transform = axes.get_xaxis_transform()
    y = -0.17 / panel_height_in
    clean: dict[str, Any] = {"clip_on": False, "solid_capstyle": "butt"}
    axes.plot([view.x0, view.x0 + length], [y, y], transform=transform, color=INK, linewidth=3, **clean)
    axes.text(view.x0 + length + 0.02 * view.longer, y, words, transform=transform, va="center", fontsize=9.5)


def scale_bar_um(side_um: float) -> float:
    """The longest of 1, 2, 5, 10, 20, ... micron that takes at most a fifth of a side."""
    decade = 10.0 ** np.floor(np.log10(side_um / 5))
    return float(max(step * decade for step in (1, 2, 5) if step * decade <= side_um / 5))


def _draw_strip(figure: "Figure", page: Page, strip: Sequence[Pixels], attention: Attention) -> None:
    if len(strip):
        words = f"Most attended tiles, {attention.tile_um[0]:.4g} µm a side (black frames)"
        page.text(figure, page.panels_bottom + FOOTER + 0.08, words, 11, "bold")
    for number, (tile_HW3, row) in enumerate(zip(strip, attention.top(len(strip)), strict=True)):
        axes = page.axes(figure, *page.strip_tile(number))
        axes.imshow(tile_HW3)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=MUTED, linewidth=0.6)
        times = attention.times_even_N[row]
        axes.set_title(
            f"{times:,.0f}×" if times >= 10 else f"{times:.1f}×", fontsize=9, fontweight="normal", loc="center", pad=3
        )

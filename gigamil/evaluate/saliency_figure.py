"""One picture per slide: the slide, and how much each part of it moves the logit of a class.

Colour is linear from 0, in units of the slide's root mean square: the size of a gradient says nothing by itself, where it
is larger than elsewhere does. Layout and colour map are the heatmap's.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gigamil.evaluate.attention import Attention
from gigamil.evaluate.heatmap_figure import (
    COLOUR_MAP,
    OPACITY,
    Page,
    Pixels,
    View,
    draw_scale_bar,
    faded,
    on_white,
    tiles_view,
)
from gigamil.evaluate.pyramid import write_pyramid
from gigamil.evaluate.saliency_maps import Saliency
from gigamil.evaluate.style import drawing, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

WANTED_SQUARES = 1200  # along the longer side of the view: about the pixels of a panel


def draw_saliency(
    thumbnail_HW3: Pixels,
    thumb_mpp: float,
    attention: Attention,
    saliency: Saliency,
    out_png: Path,
    *,
    title: str,
    note: str,
) -> None:
    """Draw a slide beside its saliency, with colour bar and scale bar.

    Args:
        thumbnail_HW3: picture of the slide; pixel (0, 0) starts at the corner of level 0.
        thumb_mpp: its micron per pixel.
        attention: of the slide: the view is cut to its tiles and a margin.
        saliency: of the slide. Where it has more squares than a panel has pixels, their root mean square is shown.
        out_png: file to write.
        title: first line.
        note: second line.
    """
    size_um = thumbnail_HW3.shape[1] * thumb_mpp, thumbnail_HW3.shape[0] * thumb_mpp
    extent = (0.0, size_um[0], size_um[1], 0.0)
    view = tiles_view(attention, *size_um)
    page = Page.of(view, with_strip=False)
    with drawing(out_png, page.width, page.height, constrained=False) as figure:
        page.text(figure, 0.24, title, 13, "bold")
        page.text(figure, 0.52, note, 9.5)
        slide_axes, map_axes = (page.axes(figure, *page.panel(number)) for number in (0, 1))
        slide_axes.imshow(thumbnail_HW3, extent=extent, interpolation="antialiased")
        slide_axes.set_title("Slide")
        map_axes.imshow(faded(thumbnail_HW3), extent=extent, interpolation="antialiased")
        map_axes.set_title("Saliency")
        shown_hw, shown_extent = _shown(saliency, view)
        level_hw = saliency.levels(shown_hw)
        map_axes.imshow(_colours()(level_hw), extent=shown_extent, interpolation="nearest")
        for axes in (slide_axes, map_axes):
            axes.set(xticks=[], yticks=[], anchor="NW", xlim=(view.x0, view.x1), ylim=(view.y1, view.y0))
            axes.spines[:].set_visible(False)
        _draw_colour_bar(figure, page.axes(figure, *page.colour_bar()), saliency)
        draw_scale_bar(slide_axes, view, page.panel_height)


def write_saliency_tiff(out: Path, saliency: Saliency) -> None:
    """Write a pyramid over the whole slide in the colours of the picture, a pixel per square.

    White is where nothing moves the logit.

    Args:
        out: file to write, name ending in .tiff.
    Cost: memory of about ten bytes per square.
    """
    write_pyramid(out, on_white(_colours()(np.arange(256)))[saliency.levels(saliency.value_hw)], *saliency.square_um)


def saliency_note(class_name: str, square_px: int) -> str:
    """What a picture of saliency shows, in a line."""
    return (
        f"Size of the gradient of the logit of {short_name(class_name)} by the pixels (RGB in 0..1), over squares of "
        f"{square_px} px"
    )


def _colours() -> "ListedColormap":
    """The colour of each of 256 levels; the lowest quarter fades in, so that tissue is seen through what hardly counts."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    rgba_L4 = colormaps[COLOUR_MAP](np.arange(256))
    rgba_L4[:, 3] = OPACITY * np.minimum(1, np.arange(256) / 64)
    return ListedColormap(rgba_L4)


def _shown(saliency: Saliency, view: View) -> tuple[NDArray[np.float32], tuple[float, float, float, float]]:
    """The squares of a view, several to one where there are too many; and their left, right, lower and upper edge."""
    width_um, height_um = saliency.square_um
    rows, cols = saliency.value_hw.shape
    top, left = int(view.y0 / height_um), int(view.x0 / width_um)
    bottom, right = min(rows, int(view.y1 / height_um) + 1), min(cols, int(view.x1 / width_um) + 1)
    side = max(1, -(-max(bottom - top, right - left) // WANTED_SQUARES))
    num_y, num_x = -(-(bottom - top) // side), -(-(right - left) // side)
    sum_hw, count_hw = np.zeros((num_y, num_x)), np.zeros((num_y, num_x))
    for y in range(side):
        for x in range(side):
            part_hw = saliency.value_hw[top + y : bottom : side, left + x : right : side]
            inside = slice(part_hw.shape[0]), slice(part_hw.shape[1])
            sum_hw[inside] += np.square(part_hw, dtype=np.float64)
            count_hw[inside] += 1
    x0, y0 = left * width_um, top * height_um
    extent = (x0, x0 + num_x * side * width_um, y0 + num_y * side * height_um, y0)
    return np.sqrt(sum_hw / count_hw).astype(np.float32), extent


def _draw_colour_bar(figure: "Figure", axes: "Axes", saliency: Saliency) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    bar = figure.colorbar(ScalarMappable(Normalize(0, saliency.top), _colours()), cax=axes)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}×"))
    bar.set_label("Gradient\n(1 = root mean square of the slide)", fontsize=9)
    bar.outline.set_visible(False)

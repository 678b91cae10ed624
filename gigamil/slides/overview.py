"""Pictures to look a cohort over: a slide with its tissue and its tiles, and contact sheets of many slides."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from gigamil.files import replace_file
from gigamil.slides.grid import TileGrid
from gigamil.slides.tissue import TissueMask

# Longer side of an overview: small slides are enlarged, so that lines stay thin beside the tissue, large ones reduced.
SMALLEST_PX, LARGEST_PX = 1000, 2400
# Told apart with any colour vision, and from eosin and hematoxylin (Okabe and Ito 2008).
OUTLINE, TILES = (213, 94, 0), (0, 114, 178)
SMALLEST_FRAME_PX = 6  # tiles that are smaller in the picture are tinted, frames would hide the slide
TINT = 0.35

# A contact sheet: 5 x 4 slides, about A4 across at 150 dpi.
COLUMNS, ROWS = 5, 4
CELL_W, PICTURE_H, TEXT_H, GAP = 340, 300, 44, 12
LETTERS = 42  # of a caption; at 13 points these fill a cell
PAGE_NAME, INDEX_NAME = "page-{:03d}.jpg", "index.html"


def draw_overview(thumbnail_HW3: np.ndarray, mask: TissueMask, grid: TileGrid, chosen: np.ndarray) -> Image.Image:
    """Draw a slide with the outline of its tissue (vermillion) and the tiles that were chosen (blue).

    Tiles get frames; a tint where the grid's cells are closer than a few pixels, as those of a `PointGrid` are.

    Args:
        thumbnail_HW3: uint8, the slide on the pixels of the mask.
        chosen: numbers of tiles in `grid`.
    Returns:
        RGB, 1000 to 2400 pixels on the longer side. Equal input gives equal pixels.
    """
    height, width = mask.mask_HW.shape
    longer = max(height, width)
    zoom = min(max(longer, SMALLEST_PX), LARGEST_PX) / longer
    size = max(1, round(width * zoom)), max(1, round(height * zoom))
    picture = Image.fromarray(thumbnail_HW3).resize(size, Image.Resampling.BICUBIC)
    pixels_HW3 = np.array(picture)
    _mark_tiles(pixels_HW3, grid, chosen, zoom / mask.mpp)
    mask_HW = np.asarray(Image.fromarray(mask.mask_HW).resize(size, Image.Resampling.NEAREST))
    inner_HW = ndimage.binary_erosion(mask_HW, iterations=max(1, round(max(size) / 600)), border_value=0)
    pixels_HW3[mask_HW & ~inner_HW] = OUTLINE
    return Image.fromarray(pixels_HW3)


def write_contact_sheet(folder: Path, slides: Sequence[tuple[str, str, Path]]) -> Path:
    """Write pages of small overviews and an index.html that shows them, to look through a cohort in minutes.

    Args:
        folder: for page-001.jpg and so on, and index.html; pages of an earlier, longer cohort are deleted.
        slides: slide id, caption of a line, path of the overview; in this order. A picture that is missing or damaged
            leaves its place grey.
    Returns:
        Path of index.html. It loads nothing but the pages beside it, and holds no script.
    Cost: decodes each picture once at reduced size, about 10 ms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_page = COLUMNS * ROWS
    names = [PAGE_NAME.format(number + 1) for number in range(math.ceil(len(slides) / per_page))]
    for number, name in enumerate(names):
        staged = folder / f".{name}.tmp"
        _page(slides[number * per_page : (number + 1) * per_page]).save(staged, format="JPEG", quality=88)
        staged.replace(folder / name)
    for old in folder.glob("page-*.jpg"):
        if old.name not in names:
            old.unlink()
    index = folder / INDEX_NAME
    replace_file(index, _index_html(slides, names, per_page))
    return index


def _mark_tiles(pixels_HW3: np.ndarray, grid: TileGrid, chosen: np.ndarray, px_per_um: float) -> None:
    if not len(chosen):
        return
    x_um, y_um = grid.position_um(np.asarray(chosen))
    height, width = pixels_HW3.shape[:2]
    # Both edges are rounded, not corner and size: the frames of neighbours then share a line.
    left, right = (np.rint(x * px_per_um).astype(np.int64) for x in (x_um, x_um + grid.tile_width_um))
    top, bottom = (np.rint(y * px_per_um).astype(np.int64) for y in (y_um, y_um + grid.tile_height_um))
    frames = min(grid.stride_x_um, grid.stride_y_um) * px_per_um >= SMALLEST_FRAME_PX
    covered_HW = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in zip(left.tolist(), top.tolist(), right.tolist(), bottom.tolist(), strict=True):
        if frames:
            # A last column may start within half a pixel of the edge, and rounded, behind it.
            x0, y0, x1, y1 = min(x0, width - 1), min(y0, height - 1), min(x1, width - 1), min(y1, height - 1)
            covered_HW[[y0, y1], x0 : x1 + 1] = True
            covered_HW[y0 : y1 + 1, [x0, x1]] = True
        else:
            covered_HW[y0:y1, x0:x1] = True
    strength = 1.0 if frames else TINT
    pixels_HW3[covered_HW] = ((1 - strength) * pixels_HW3[covered_HW] + strength * np.array(TILES)).astype(np.uint8)


def _page(slides: Sequence[tuple[str, str, Path]]) -> Image.Image:
    rows = math.ceil(len(slides) / COLUMNS)
    step_x, step_y = CELL_W + GAP, PICTURE_H + TEXT_H + GAP
    page = Image.new("RGB", (COLUMNS * step_x + GAP, rows * step_y + GAP), "white")
    draw = ImageDraw.Draw(page)
    fonts = [ImageFont.load_default(size) for size in (14, 13)]
    for number, (slide_id, caption, path) in enumerate(slides):
        row, col = divmod(number, COLUMNS)
        x, y = GAP + col * step_x, GAP + row * step_y
        small = _small(path)
        if small is None:
            draw.rectangle((x, y, x + CELL_W, y + PICTURE_H), fill=(225, 225, 225))
            draw.text((x + 8, y + 8), "no picture", fill="black", font=fonts[0])
        else:
            page.paste(small, (x + (CELL_W - small.width) // 2, y + PICTURE_H - small.height))
        for line, (text, font) in enumerate(zip((slide_id, caption), fonts, strict=True)):
            place = x, y + PICTURE_H + 4 + 19 * line
            draw.text(place, _shortened(text), fill="black" if line == 0 else (90, 90, 90), font=font)
    return page


def _small(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (CELL_W, PICTURE_H))  # JPEG is decoded at an eighth, a quarter or half
            small = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((CELL_W, PICTURE_H), Image.Resampling.BOX)
    return small


def _shortened(text: str) -> str:
    """One line of printable characters; the middle of a long id tells least."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= LETTERS else f"{plain[: LETTERS - 16]}…{plain[-15:]}"


def _index_html(slides: Sequence[tuple[str, str, Path]], names: Sequence[str], per_page: int) -> str:
    parts = []
    for number, name in enumerate(names):
        ids = [slide_id for slide_id, _, _ in slides[number * per_page : (number + 1) * per_page]]
        words = html.escape(f"{_shortened(ids[0])} to {_shortened(ids[-1])}")
        source = html.escape(quote(name))
        parts.append(f'<h2>{words}</h2>\n<a href="{source}"><img src="{source}" alt="{words}" loading="lazy"></a>')
    policy = "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>Contact sheet</title>\n'
        "<style>body { font: 15px system-ui, sans-serif; margin: 2rem; } img { max-width: 100%; }\n"
        "h2 { font-size: 1rem; overflow-wrap: anywhere; }</style>\n</head>\n<body>\n"
        f"<h1>{len(slides)} slides</h1>\n<p>Orange: outline of the tissue. Blue: tiles.</p>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )

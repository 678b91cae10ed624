"""Tissue masks from elsewhere, and for elsewhere: PNG, GeoJSON (QuPath) and XML (ASAP).

Nothing in such a file is trusted: its size is looked at before its content, and one that does not fit its slide is
refused, never stretched or taken for "no tissue".
"""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from scipy import ndimage

from gigamil.errors import SlideError
from gigamil.files import replace_file
from gigamil.slides.backend import shown
from gigamil.slides.reader import SlideInfo
from gigamil.slides.tissue import STRIP_PX, TissueMask, mask_mpp

SUFFIXES = (".png", ".geojson", ".xml")
# A slide of 25 x 20 mm at 8 um has 8 million pixels, and one of 100 x 80 mm 125 million: a PNG of just the slide's mask
# pixels is read at any size. Polygons of such masks take a few megabytes, 16 at most. What is larger was made at the
# wrong resolution, or to harm.
MAX_PNG_VALUES = 64_000_000
PNG_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3}  # modes that are read, and what a pixel of them takes
MAX_TEXT_BYTES = 16 << 20
# Rows that the edges of one polygon may cross, 200 MB of work. The outline of a mask crosses each row a few times.
MAX_CROSSINGS = 4_000_000
# Vertices may lie this share of a side beyond the slide (a brush at its edge); further out the units are others.
MAX_OUTSIDE = 0.05
CLASSIFICATION = {"name": "Tissue", "color": [0, 158, 115]}

_UNITS = "Coordinates are level-0 pixels of the slide: export the annotations again from it"


def mask_file(folder: Path, slide_id: str) -> Path:
    """The one mask of a slide in a folder of masks: SLIDE_ID.png, .geojson or .xml.

    Raises:
        SlideError: there is none, or more than one.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{slide_id}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    wanted = ", ".join(f"{slide_id}{suffix}" for suffix in SUFFIXES)
    if not found:
        raise SlideError(
            f"slide '{slide_id}': no mask in '{shown(folder)}' (looked for {wanted}). Put one there, set slides.masks to null "
            "to have tissue found, or remove its row."
        )
    names = " and ".join(f"'{path.name}'" for path in found)
    raise SlideError(f"slide '{slide_id}': several masks in '{shown(folder)}': {names}. Keep one of them.")


def load_mask(path: Path, info: SlideInfo, mpp: float) -> TissueMask:
    """Read a mask by its suffix. It is taken as it is: specks are not dropped, holes are not filled.

    - .png: black (0) is no tissue, everything else is. The picture covers the slide, so its sides have the proportions
      of the slide's to within a pixel. Modes 1, L, P, and RGB without colour.
    - .geojson: Polygon and MultiPolygon of any class, with holes, in level-0 pixels from the corner that QuPath counts
      from (`openslide.bounds-x/y`); overlapping ones are united.
    - .xml: polygons and rectangles of ASAP of any group, in level-0 pixels from the corner of level 0; united.

    Args:
        mpp: micron per pixel of the mask; a slide that is coarser gets one of its own mpp, as by `find_tissue`.
    Returns:
        The mask on the pixels of `slide.thumbnail(mask.mpp)`: True where the centre of the pixel is tissue; for a finer
        PNG, where at least half of the pixel is.
    Raises:
        SlideError: the file is missing, too large, damaged, of another kind, or does not fit the slide.
    Cost: a PNG or polygons of a large slide take a tenth of a second. Memory: below 500 MB for a PNG (a few bytes per
        pixel if it has the slide's mask pixels), below 900 MB for any text; 16 MiB of brackets take the most.
    """
    mpp = mask_mpp(info, mpp)
    if path.suffix == ".png":
        return _read_png(path, info, mpp)
    if path.suffix == ".geojson":
        polygons = _geojson_polygons(path)
        offset = info.bounds_x, info.bounds_y
    elif path.suffix == ".xml":
        polygons = _asap_polygons(path)
        offset = 0, 0
    else:
        _refuse(path, f"suffix {path.suffix[:20]!r} is none of {', '.join(SUFFIXES)}", "Convert it to one of these")
    return _painted(path, polygons, offset, info, mpp)


def write_mask_geojson(path: Path, mask: TissueMask, info: SlideInfo) -> None:
    """Write a mask as annotations that QuPath imports (File > Import objects from file).

    One polygon per piece of tissue, with its holes, in level-0 pixels less `openslide.bounds-x/y`, cut at the slide's
    edge. The outline runs between the centres of mask pixels, and its corners are cut: it differs from the mask by at
    most 1/8 of a mask pixel at each corner. `load_mask` gives the same mask back, but for a last row or column of
    pixels whose centres hang over the slide's edge. Equal masks give equal bytes.
    """
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", "name": "tissue", "classification": CLASSIFICATION},
        }
        for rings in _outlines(mask, info)
    ]
    collection = {"type": "FeatureCollection", "features": features}
    replace_file(path, json.dumps(collection, separators=(",", ":"), allow_nan=False))


def _read_png(path: Path, info: SlideInfo, mpp: float) -> TissueMask:
    again = "Save it as PNG in grey, 0 where there is no tissue"
    smaller = f"Save it in grey at about slides.tissue_mpp={mpp:g} micron per pixel"
    try:
        with PngImageFile(path) as image:  # not Image.open, whose limit of pixels is one for pictures
            (cols, rows), channels = image.size, PNG_CHANNELS.get(image.mode)
            if channels is None:
                _refuse(path, f"is of mode {image.mode}", again)
            is_of_grid = (rows, cols) == info.shape_at(mpp)
            if cols * rows * channels > MAX_PNG_VALUES and not (is_of_grid and channels == 1):
                _refuse(path, f"{cols} x {rows} pixels of mode {image.mode} are too many", smaller)
            _check_proportions(path, cols, rows, info, mpp)
            pixels = np.asarray(image if channels == 1 else image.convert("RGB"))
    except SlideError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        _refuse(path, f"cannot be read as PNG: {error}", again, error)
    if channels == 3 and (pixels != pixels[..., :1]).any():
        _refuse(path, "has colours", again)
    mask_hw = (pixels if channels == 1 else pixels[..., 0]) > 0
    # A mask of ours has its last pixels hang over the edge.
    return TissueMask.of(info, mask_hw if is_of_grid else _resampled(mask_hw, info, mpp), mpp)


def _check_proportions(path: Path, cols: int, rows: int, info: SlideInfo, mpp: float) -> None:
    """A mask of micron per pixel m has width / m columns and height / m rows; each may be rounded by up to a pixel."""
    finest = max(info.width_um / (cols + 1), info.height_um / (rows + 1))
    coarsest = min(info.width_um / max(cols - 1, 1e-9), info.height_um / max(rows - 1, 1e-9))
    if finest > coarsest:
        wanted_rows, wanted_cols = info.shape_at(mpp)
        _refuse(
            path,
            f"{cols} x {rows} pixels do not have the proportions of the slide, {info.width} x {info.height}",
            f"Make the mask of the whole slide, for example {wanted_cols} x {wanted_rows} pixels",
        )


def _resampled(mask_hw: np.ndarray, info: SlideInfo, mpp: float) -> np.ndarray:
    rows, cols = info.shape_at(mpp)
    height, width = mask_hw.shape
    scale_x, scale_y = info.width_um / width, info.height_um / height
    box = (0.0, 0.0, cols * mpp / scale_x, rows * mpp / scale_y)
    padded = np.zeros((math.ceil(box[3]) + 1, math.ceil(box[2]) + 1), np.uint8)
    padded[:height, :width] = mask_hw * np.uint8(255)
    small = Image.fromarray(padded).resize((cols, rows), Image.Resampling.BOX, box=box)
    return np.asarray(small) > 127


Polygon = list[np.ndarray]  # rings of float64 (n, 2), the outer one first; points inside an odd number of rings


def _geojson_polygons(path: Path) -> Iterator[Polygon]:
    try:
        found = json.loads(_bounded_bytes(path), parse_constant=float)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"is not JSON: {error}", "Export it again", error)
    if isinstance(found, list):  # older versions of QuPath export a bare list of features
        found = {"type": "FeatureCollection", "features": found}
    return (_rings(path, rings) for rings in _ring_lists(path, found))


def _ring_lists(path: Path, found: Any) -> Iterator[Any]:
    """Coordinates of every polygon of a GeoJSON object."""
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "FeatureCollection":
        members = found.get("features")
    elif kind == "GeometryCollection":
        members = found.get("geometries")
    elif kind == "Feature":
        members = [found.get("geometry")]
    elif kind == "MultiPolygon" and isinstance(found.get("coordinates"), list):
        yield from found["coordinates"]
        return
    elif kind == "Polygon":
        yield found.get("coordinates")
        return
    else:
        kinds = "Only Polygon and MultiPolygon can be tissue: remove the other annotations, and export again"
        _refuse(path, f"holds {_quoted(kind) if isinstance(found, dict) else type(found).__name__}", kinds)
    if not isinstance(members, list):
        _refuse(path, f"{_quoted(kind)} without its list of members", "Export it again")
    for member in members:
        yield from _ring_lists(path, member)


def _rings(path: Path, rings: Any) -> Polygon:
    try:
        polygon = [np.array(ring, dtype=np.float64)[:, :2] for ring in rings]
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        _refuse(path, "a polygon is not a list of rings of points", "Export it again", error)
    if any(ring.ndim != 2 for ring in polygon):
        _refuse(path, "a polygon's coordinates are nested too deep: those of a MultiPolygon?", "Export it again")
    if not polygon or any(ring.shape[0] < 3 or ring.shape[1] != 2 or not np.isfinite(ring).all() for ring in polygon):
        _refuse(path, "a ring has fewer than three points, or one that is not finite", "Export it again")
    return polygon


class _AsapReader:
    """Target of an XML parser: keeps the kind and the points of each annotation, and nothing else."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.annotations: list[tuple[str | None, list[tuple[str | None, str | None]]]] = []

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        # Entities are declared in a DOCTYPE, which ASAP does not write: without one there is nothing to expand.
        raise ValueError("it has a DOCTYPE, which could declare entities")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if self.root is None:
            self.root = tag
        if tag == "Annotation":
            self.annotations.append((attributes.get("Type"), []))
        elif tag == "Coordinate" and self.annotations:
            self.annotations[-1][1].append((attributes.get("X"), attributes.get("Y")))


def _asap_polygons(path: Path) -> Iterator[Polygon]:
    found = _AsapReader()
    parser = ElementTree.XMLParser(target=found)
    try:
        parser.feed(_bounded_bytes(path))
        parser.close()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        _refuse(path, f"is not XML as ASAP writes it: {error}", "Export it again", error)
    if found.root != "ASAP_Annotations":
        _refuse(path, f"its root is {_quoted(found.root)}, not 'ASAP_Annotations'", "Save the annotations with ASAP")
    for kind, _ in found.annotations:
        if kind not in ("Polygon", "Rectangle"):
            _refuse(
                path, f"holds a {_quoted(kind)}", "Only Polygon and Rectangle can be tissue: remove the other kinds"
            )
    return (_rings(path, [points]) for _, points in found.annotations)


def _painted(
    path: Path, polygons: Iterable[Polygon], offset_px0: tuple[int, int], info: SlideInfo, mpp: float
) -> TissueMask:
    mask_HW = np.zeros(info.shape_at(mpp), bool)
    size = np.array([info.width, info.height])
    for polygon in polygons:
        points = np.concatenate(polygon) + offset_px0
        beyond = max((-points / size).max(), (points / size - 1).max())
        if beyond > MAX_OUTSIDE:
            _refuse(path, f"a polygon reaches {beyond:.0%} of a side beyond the slide", _UNITS)
        scale = np.array([info.mpp_x, info.mpp_y]) / mpp
        _paint(path, mask_HW, [(ring + offset_px0) * scale for ring in polygon])
    return TissueMask.of(info, mask_HW, mpp)


def _paint(path: Path, mask_HW: np.ndarray, polygon: Polygon) -> None:
    """Set the pixels whose centres a polygon holds. Rows are crossed by edges; an odd number of crossings is inside."""
    rows, cols = mask_HW.shape
    points = np.concatenate(polygon)
    left, top = np.clip(np.floor(points.min(axis=0)), 0, (cols, rows)).astype(np.int64)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (cols, rows)).astype(np.int64)
    start = points - (left, top)
    stop = np.concatenate([np.roll(ring, -1, axis=0) for ring in polygon]) - (left, top)
    upper, lower = (np.where((start[:, 1:] <= stop[:, 1:]) == keep, start, stop) for keep in (True, False))
    # An edge crosses the rows whose centres lie in [y of its upper end, y of its lower end).
    first, end = (np.clip(np.ceil(ends[:, 1] - 0.5), 0, bottom - top).astype(np.int64) for ends in (upper, lower))
    count = end - first
    total = int(count.sum())
    if total > MAX_CROSSINGS:
        _refuse(path, f"a polygon of {len(points):,} points is too tangled", "Simplify the annotations")
    edge = np.repeat(np.arange(len(points)), count)
    row = np.arange(total) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    along = (row + 0.5 - upper[edge, 1]) / (lower[edge, 1] - upper[edge, 1])
    x = upper[edge, 0] + along * (lower[edge, 0] - upper[edge, 0])
    col = np.clip(np.ceil(x - 0.5), 0, right - left).astype(np.int64)
    is_odd = np.zeros((bottom - top, right - left + 1), bool)
    np.logical_xor.at(is_odd, (row, col), True)
    mask_HW[top:bottom, left:right] |= np.logical_xor.accumulate(is_odd, axis=1)[:, :-1]


def _outlines(mask: TissueMask, info: SlideInfo) -> Iterator[list[list[list[float]]]]:
    """Rings of each piece of tissue, closed, the outer one first, in level-0 pixels from the corner of the bounds."""
    scale = mask.mpp / np.array([info.mpp_x, info.mpp_y])
    size = np.array([info.width, info.height])
    corner = np.array([info.bounds_x, info.bounds_y])
    for rings in _traced(mask.mask_HW):
        yield [np.round(np.clip(ring * scale, 0, size) - corner, 2).tolist() for ring in rings]


def _traced(mask_HW: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Outlines of each 4-connected piece: closed rings (x, y) float64 in mask pixels, the outer one, then its holes.

    An outline turns only at corners, where one or three of four pixels are in the mask. Read row by row, each second
    corner ends the horizontal edge that the one before it began, and column by column the same holds for vertical
    edges; following both in turn gives the rings. Where two pixels touch at a corner, two outlines meet: it counts
    twice. Memory is a few bytes per pixel (contourpy takes 30).
    """
    y, x, is_second, up = _corners(mask_HW)
    # Of the two at one place the first ends the edge from the left, the second begins that to the right. The first
    # goes on upwards where the pixel to the upper left is in the mask, else downwards, so that pieces stay apart.
    down_the_column = np.lexsort((is_second == up, y, x))
    above_or_below = np.empty(len(x), np.int64)
    above_or_below[down_the_column[::2]] = down_the_column[1::2]
    above_or_below[down_the_column[1::2]] = down_the_column[::2]

    piece_HW, _ = ndimage.label(mask_HW)
    rings_of: dict[int, list[np.ndarray]] = {}
    following, is_done = above_or_below.tolist(), bytearray(len(x))
    for start in range(len(x)):
        ring: list[int] = []
        corner = start
        while not is_done[corner]:
            beside = corner ^ 1
            ring += (corner, beside)
            is_done[corner] = is_done[beside] = True
            corner = following[beside]
        if not ring:
            continue
        # The uppermost corner, and of these the leftmost: to its lower right is the mask, or a hole in it.
        row, col = int(y[start]), int(x[start])
        is_outer = bool(mask_HW[row, col])
        piece = int(piece_HW[row, col] if is_outer else piece_HW[row - 1, col - 1])
        points = np.stack([x[ring], y[ring]], axis=1).astype(np.float64)
        rings_of.setdefault(piece, []).append(_bevelled(points if is_outer else points[::-1]))
    del piece_HW, following, is_done  # 4 bytes a pixel, before the caller makes lists of the rings
    yield from rings_of.values()


def _corners(mask_HW: np.ndarray) -> tuple[np.ndarray, ...]:
    """Corners of the outlines, row by row: y, x, whether it is the second at its place, and the pixel upper left of it.

    Worked on in strips: the masks of a whole slide would take 200 MB.
    """
    inside = np.pad(mask_HW, 1)
    rows, cols = inside.shape
    step = max(1, STRIP_PX // cols)
    found = []
    for top in range(0, rows - 1, step):
        strip = inside[top : top + step + 1]
        upper_left, upper_right, lower_left, lower_right = (
            strip[:-1, :-1],
            strip[:-1, 1:],
            strip[1:, :-1],
            strip[1:, 1:],
        )
        touch = (upper_left == lower_right) & (upper_right == lower_left) & (upper_left != upper_right)
        y, x = np.nonzero((upper_left ^ upper_right ^ lower_left ^ lower_right) | touch)
        point = np.repeat(np.arange(len(x)), 1 + touch[y, x])
        y, x = y[point], x[point]
        found.append((y + top, x, np.diff(point, prepend=-1) == 0, upper_left[y, x]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _bevelled(points: np.ndarray) -> np.ndarray:
    """Cut half a pixel off each side of each corner, so that outlines never touch, and close the ring."""
    edges = np.roll(points, -1, axis=0) - points
    half = np.sign(edges) / 2
    cut = np.stack([points + half, points + edges - half], axis=1)
    keep = np.ones(cut.shape[:2], bool)
    keep[:, 1] = np.abs(edges).sum(axis=1) > 1  # both ends of an edge of one pixel are its middle
    ring = cut[keep]
    return np.concatenate([ring, ring[:1]])


def _bounded_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        _refuse(path, f"cannot be read: {error}", "Correct slides.masks, or the file's permissions", error)
    if len(content) > MAX_TEXT_BYTES:
        _refuse(path, f"is larger than {MAX_TEXT_BYTES >> 20} MiB", "Simplify the annotations, or save a PNG mask")
    return content


def _quoted(text: object) -> str:
    # Names in a file are free text: `repr` shows newlines and escape sequences instead of sending them to a terminal.
    return repr(text)[:60]


def _refuse(path: Path, what: str, cure: str, error: Exception | None = None) -> NoReturn:
    raise SlideError(f"mask '{shown(path)}': {shown(what)}. {cure}, or remove the slide's row.") from error

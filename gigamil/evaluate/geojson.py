"""Most attended tiles of a slide as GeoJSON that QuPath imports (File > Import objects from file)."""

import json
from pathlib import Path
from typing import Any

from gigamil.evaluate.attention import Attention
from gigamil.files import replace_file

# Vermillion: seen on pink and purple stain with any colour vision.
CLASSIFICATION = {"name": "Attention", "color": [213, 94, 0]}


def write_geojson(
    out: Path,
    attention: Attention,
    *,
    top: int,
    mpp_x: float,
    mpp_y: float,
    bounds_x_px0: int = 0,
    bounds_y_px0: int = 0,
) -> None:
    """Write the `top` tiles with the most attention as QuPath detections, highest first.

    QuPath counts pixels from the corner of the scanned area (`openslide.bounds-x/y`, MRXS above all), OpenSlide from
    the corner of level 0: the difference is subtracted. Measurements per tile: `Attention x N` (1 = an even share),
    `Attention` (sums to 1 over the slide) and `Attention rank` (1 = highest), so that QuPath's measurement maps colour
    the tiles and its tables sort them.

    Args:
        out: file to write, name ending in .geojson.
        attention: of one slide, in micron.
        top: number of tiles; a slide may have a hundred thousand, which QuPath shows but slowly.
        mpp_x, mpp_y: micron per level-0 pixel.
        bounds_x_px0, bounds_y_px0: `openslide.bounds-x/y`; 0 where the slide has none.
    Source: QuPath 0.4 and later, `qupath.lib.io.QuPathTypeAdapters`. Test: unit/evaluate/test_geojson.py
    """
    width, height = attention.tile_um[0] / mpp_x, attention.tile_um[1] / mpp_y
    features = []
    for rank, row in enumerate(attention.top(top), start=1):
        left = attention.x_um_N[row] / mpp_x - bounds_x_px0
        upper = attention.y_um_N[row] / mpp_y - bounds_y_px0
        measurements = {
            "Attention x N": float(attention.times_even_N[row]),
            "Attention": float(attention.attention_N[row]),
            "Attention rank": rank,
        }
        features.append(
            {
                "type": "Feature",
                "geometry": _rectangle(left, upper, left + width, upper + height),
                "properties": {
                    "objectType": "detection",
                    "name": f"tile {attention.number_N[row]}",
                    "classification": CLASSIFICATION,
                    "measurements": measurements,
                },
            }
        )
    collection = {"type": "FeatureCollection", "features": features}
    replace_file(out, json.dumps(collection, separators=(",", ":"), allow_nan=False).encode())


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    return {"type": "Polygon", "coordinates": [[[round(float(x), 2), round(float(y), 2)] for x, y in corners]]}

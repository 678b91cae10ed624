"""Heatmaps of a run: for each slide a picture, a GeoJSON and a TIFF, from its attention and its shards; no slide file.

Of features alone there is no picture of the slide: attention is then drawn on a plain background.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gigamil.data.features import FeatureSet
from gigamil.data.source import TilePlaces
from gigamil.errors import CohortError, ShardError
from gigamil.evaluate.attention import Attention, Box, attention_path, read_attention
from gigamil.evaluate.attention_tiff import write_attention_tiff
from gigamil.evaluate.geojson import write_geojson
from gigamil.evaluate.heatmap_figure import STRIP_TILES, Pixels, draw_heatmap
from gigamil.evaluate.picture import WANTED_PX, ReadTiles, read_tiles, slide_picture
from gigamil.evaluate.predictions import FILE_NAME, Predictions
from gigamil.evaluate.saliency_figure import draw_saliency, saliency_note, write_saliency_tiff
from gigamil.evaluate.saliency_maps import Saliency
from gigamil.evaluate.values import Values, read_run
from gigamil.shards.manifest import SlideManifest

if TYPE_CHECKING:
    from gigamil.data.features import SlideFeatures
    from gigamil.shards.read import ShardSet

FOLDER = "heatmaps"
_GREY = 225  # of tiles that there is no picture of
GEOJSON_TILES = 1000  # QuPath shows as many without delay; a file of about 0.3 MB

__all__ = ["draw_heatmap", "heatmap_run"]


def heatmap_run(
    run: Path,
    shards: "ShardSet | FeatureSet",
    slide_ids: Sequence[str] | None = None,
    n: int = 4,
    *,
    geojson_tiles: int = GEOJSON_TILES,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
    pictures: "ShardSet | None" = None,
    read: ReadTiles | None = None,
    saliency: Callable[[str, int], Saliency] | None = None,
) -> list[Path]:
    """Draw `<run>/heatmaps/<slide_id>.png` and write `<slide_id>.geojson` and `<slide_id>.tiff` beside it.

    Args:
        run: folder with predictions.csv and attention/, as `gigamil evaluate` leaves it.
        shards: where the tiles, thumbnails and manifests of the slides are, or their features.
        slide_ids: slides to draw; default: `n` held-out slides, the surest of each predicted class in turn, the last
            (positive) class first.
        n: slides drawn when none is named.
        geojson_tiles: most attended tiles per slide in the GeoJSON.
        lesions_um: known lesions to outline, micron from the level-0 origin.
        pictures: of features: the shards that these slides may have, for thumbnails and tiles.
        read: reads and decodes tiles; None reads those that are stored.
        saliency: (slide id, class number) -> saliency for the logit of that class. With it, that of the predicted class
            is drawn as `<slide_id>.saliency.png` and written as `<slide_id>.saliency.tiff`.
    Returns:
        The files written, slide by slide: PNG, GeoJSON and TIFF, then those of saliency.
    Raises:
        CohortError: a named slide was not predicted.
        ShardError: attention or shards of a slide are missing, damaged, or do not belong together.
    Cost: per slide a second of drawing, and one decoding of a slide of less than a few hundred tiles.
    """
    predictions = read_run(run)
    chosen = predictions.shown_first(n) if slide_ids is None else list(dict.fromkeys(slide_ids))
    unknown = [slide_id for slide_id in chosen if slide_id not in predictions.slide_ids]
    if unknown:
        raise CohortError(
            f"'{run / FILE_NAME}' has no slide {', '.join(map(repr, unknown))}; it has {len(predictions)} slides, "
            f"for example '{predictions.slide_ids[0]}'. Names are slide ids, not files."
        )
    boxes = lesions_um or {}
    files: list[Path] = []
    for slide_id in chosen:
        row = predictions.slide_ids.index(slide_id)
        attention = read_attention(attention_path(run, slide_id))
        _check_same_tiles(attention, shards)
        drawn = _shards_of(attention, shards, pictures) if isinstance(shards, FeatureSet) else shards
        note = predictions.words(row)
        files += _heatmap_slide(
            run, attention, shards.manifest(slide_id), drawn, note, geojson_tiles, boxes.get(slide_id, ()), read
        )
        if saliency is not None and drawn is not None:
            files += _saliency_slide(run, attention, drawn, predictions, row, read, saliency)
    return files


def _heatmap_slide(
    run: Path,
    attention: Attention,
    manifest: "SlideManifest | SlideFeatures",
    shards: "ShardSet | None",
    note: str,
    geojson_tiles: int,
    boxes_um: Sequence[Box],
    read: ReadTiles | None,
) -> tuple[Path, ...]:
    slide_id = attention.slide_id
    png, geojson, tiff = (run / FOLDER / f"{slide_id}.{kind}" for kind in ("png", "geojson", "tiff"))
    top_tiles: list[Pixels] = []
    if shards is None:
        picture_HW3, mpp = _plain_picture(attention)
        note += ". No picture of the slide: its features are all that is here"
    else:
        picture_HW3, mpp = slide_picture(shards, slide_id, read)
        top_tiles = _top_tiles(attention, read or partial(read_tiles, shards))
    draw_heatmap(picture_HW3, mpp, attention, png, title=slide_id, note=note, top_tiles=top_tiles, boxes_um=boxes_um)
    write_geojson(
        geojson,
        attention,
        top=geojson_tiles,
        mpp_x=manifest.mpp_x,
        mpp_y=manifest.mpp_y,
        bounds_x_px0=manifest.bounds_x_px0,
        bounds_y_px0=manifest.bounds_y_px0,
    )
    write_attention_tiff(tiff, attention, *_slide_um(manifest))
    return png, geojson, tiff


def _saliency_slide(
    run: Path,
    attention: Attention,
    shards: "ShardSet",
    predictions: Predictions | Values,
    row: int,
    read: ReadTiles | None,
    saliency: Callable[[str, int], Saliency],
) -> tuple[Path, Path]:
    slide_id, (number, called) = attention.slide_id, predictions.output(row)
    png, tiff = (run / FOLDER / f"{slide_id}.saliency.{kind}" for kind in ("png", "tiff"))
    found = saliency(slide_id, number)
    note = f"{predictions.words(row)}. {saliency_note(called, found.square_px)}"
    draw_saliency(*slide_picture(shards, slide_id, read), attention, found, png, title=slide_id, note=note)
    write_saliency_tiff(tiff, found)
    return png, tiff


def _slide_um(manifest: "SlideManifest | SlideFeatures") -> tuple[float, float]:
    """Width and height of the slide, micron; 0 of features, which do not tell."""
    if not isinstance(manifest, SlideManifest):
        return 0.0, 0.0
    return manifest.width_px0 * manifest.mpp_x, manifest.height_px0 * manifest.mpp_y


def _shards_of(attention: Attention, features: "FeatureSet", pictures: "ShardSet | None") -> "ShardSet | None":
    """Shards that hold the tiles of which a slide's features were made; None without any."""
    if pictures is None or attention.slide_id not in pictures.slide_ids:
        return None
    if not pictures.manifest(attention.slide_id).stored:  # positions alone: there is no tile to show
        return None
    manifest, index = features.manifest(attention.slide_id), pictures.index(attention.slide_id)
    # Features know the level-0 pixel that a tile starts at, shards the point.
    return pictures if _is_at(attention, index, within_um=max(manifest.mpp_x, manifest.mpp_y)) else None


def _plain_picture(attention: Attention) -> tuple[Pixels, float]:
    """An empty slide as large as its tiles reach, which are grey."""
    corner_N2 = np.stack([attention.x_um_N, attention.y_um_N], axis=1)
    end_N2 = corner_N2 + attention.tile_um
    mpp = float(end_N2.max()) / WANTED_PX
    width, height = np.maximum(1, np.rint(end_N2.max(axis=0) / mpp)).astype(int)
    picture_HW3 = np.full((height, width, 3), 255, dtype=np.uint8)
    edges_N4 = np.rint(np.concatenate([corner_N2, end_N2], axis=1) / mpp).astype(int)
    for left, upper, right, lower in edges_N4:
        picture_HW3[upper : max(lower, upper + 1), left : max(right, left + 1)] = _GREY
    return picture_HW3, mpp


def _check_same_tiles(attention: Attention, shards: "ShardSet | FeatureSet") -> None:
    """Attention of an earlier tiling would be drawn over the wrong tissue, and look plausible."""
    index = shards.index(attention.slide_id)
    if _is_at(attention, index, within_um=0.01):
        return
    raise ShardError(
        f"slide '{attention.slide_id}': its attention ({len(attention)} tiles) belongs to other tiles than its shards "
        f"({len(index)} tiles), which were made since. Run `gigamil evaluate` again."
    )


def _is_at(attention: Attention, index: TilePlaces, within_um: float) -> bool:
    """Whether all tiles lie where an index has them."""
    number_N = attention.number_N
    if not len(attention) or number_N.min() < 0 or number_N.max() >= len(index.x_um):
        return False
    x_um_N, y_um_N = index.x_um[number_N], index.y_um[number_N]
    return np.allclose(x_um_N, attention.x_um_N, rtol=0, atol=within_um) and np.allclose(
        y_um_N, attention.y_um_N, rtol=0, atol=within_um
    )


def _top_tiles(attention: Attention, read: ReadTiles) -> list[Pixels]:
    numbers = attention.number_N[attention.top(STRIP_TILES)].tolist()
    return [read(attention.slide_id, number, number + 1)[0] for number in numbers]

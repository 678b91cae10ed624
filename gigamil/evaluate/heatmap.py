"""Heatmaps of a run: for each slide one picture and one GeoJSON, from its attention and its shards; no slide file."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gigamil.errors import CohortError, ShardError
from gigamil.evaluate.attention import Attention, Box, attention_path, read_attention
from gigamil.evaluate.geojson import write_geojson
from gigamil.evaluate.heatmap_figure import STRIP_TILES, Pixels, draw_heatmap
from gigamil.evaluate.picture import read_tiles, slide_picture
from gigamil.evaluate.predictions import FILE_NAME, Predictions, read_predictions

if TYPE_CHECKING:
    from gigamil.shards.read import ShardSet

FOLDER = "heatmaps"
GEOJSON_TILES = 1000  # QuPath shows as many without delay; a file of about 0.3 MB

__all__ = ["draw_heatmap", "heatmap_run"]


def heatmap_run(
    run: Path,
    shards: "ShardSet",
    slide_ids: Sequence[str] | None = None,
    n: int = 4,
    *,
    geojson_tiles: int = GEOJSON_TILES,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
) -> list[Path]:
    """Draw `<run>/heatmaps/<slide_id>.png` and write `<slide_id>.geojson` beside it.

    Args:
        run: folder with predictions.csv and attention/, as `gigamil evaluate` leaves it.
        shards: where the tiles, thumbnails and manifests of the slides are.
        slide_ids: slides to draw; default: `n` held-out slides, the surest of each predicted class in turn, the last
            (positive) class first.
        n: slides drawn when none is named.
        geojson_tiles: most attended tiles per slide in the GeoJSON.
        lesions_um: known lesions to outline, micron from the level-0 origin.
    Returns:
        The files written, two per slide, in the order of the slides.
    Raises:
        CohortError: a named slide was not predicted.
        ShardError: attention or shards of a slide are missing, damaged, or do not belong together.
    Cost: per slide a second of drawing, and one decoding of a slide of less than a few hundred tiles.
    """
    predictions = read_predictions(run / FILE_NAME)
    chosen = _surest(predictions, n) if slide_ids is None else list(dict.fromkeys(slide_ids))
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
        note = _prediction_words(predictions, row)
        files += _heatmap_slide(run, shards, slide_id, note, geojson_tiles, boxes.get(slide_id, ()))
    return files


def _heatmap_slide(
    run: Path, shards: "ShardSet", slide_id: str, note: str, geojson_tiles: int, boxes_um: Sequence[Box]
) -> tuple[Path, Path]:
    attention = read_attention(attention_path(run, slide_id))
    _check_same_tiles(attention, shards)
    manifest = shards.manifest(slide_id)
    png, geojson = (run / FOLDER / f"{slide_id}.{kind}" for kind in ("png", "geojson"))
    picture_HW3, mpp = slide_picture(shards, slide_id)
    draw_heatmap(
        picture_HW3,
        mpp,
        attention,
        png,
        title=slide_id,
        note=note,
        top_tiles=_top_tiles(attention, shards),
        boxes_um=boxes_um,
    )
    write_geojson(
        geojson,
        attention,
        top=geojson_tiles,
        mpp_x=manifest.mpp_x,
        mpp_y=manifest.mpp_y,
        bounds_x_px0=manifest.bounds_x_px0,
        bounds_y_px0=manifest.bounds_y_px0,
    )
    return png, geojson


def _check_same_tiles(attention: Attention, shards: "ShardSet") -> None:
    """Attention of an earlier tiling would be drawn over the wrong tissue, and look plausible."""
    index = shards.index(attention.slide_id)
    in_range = len(attention) and attention.number_N.min() >= 0 and attention.number_N.max() < len(index)
    if in_range:
        x_um_N, y_um_N = index.x_um[attention.number_N], index.y_um[attention.number_N]
        if np.allclose(x_um_N, attention.x_um_N, atol=0.01) and np.allclose(y_um_N, attention.y_um_N, atol=0.01):
            return
    raise ShardError(
        f"slide '{attention.slide_id}': its attention ({len(attention)} tiles) belongs to other tiles than its shards "
        f"({len(index)} tiles), which were made since. Run `gigamil evaluate` again."
    )


def _top_tiles(attention: Attention, shards: "ShardSet") -> list[Pixels]:
    numbers = attention.number_N[attention.top(STRIP_TILES)].tolist()
    return [read_tiles(shards, attention.slide_id, number, number + 1)[0] for number in numbers]


def _surest(predictions: Predictions, n: int) -> list[str]:
    """Up to n slides of the headline split: of each predicted class in turn (the last first), the most probable."""
    split = predictions.headline_split
    rows = [i for i in range(len(predictions)) if predictions.splits[i] == split]

    def surest_first(name: str) -> list[int]:
        called = [i for i in rows if predictions.predicted[i] == name]
        return sorted(called, key=lambda i: (-predictions.probs_NK[i].max(), predictions.slide_ids[i]))

    queues = [surest_first(name) for name in reversed(predictions.classes)]
    turns = [i for turn in zip_longest(*queues) for i in turn if i is not None]
    return [predictions.slide_ids[i] for i in turns[:n]]


def _prediction_words(predictions: Predictions, row: int) -> str:
    called = predictions.predicted[row]
    probability = predictions.probs_NK[row].max()
    label = predictions.labels[row]
    truth = f", label {label}" if label is not None else ""
    return f"Predicted {called} ({probability:.3f}){truth}, split {predictions.splits[row]}"

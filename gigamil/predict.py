"""Slides that no run has seen, predicted by a trained model: numbers, attention and heatmaps in a folder.

from gigamil.predict import load_model
load_model("runs/my").predict("slide.svs").values
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigamil.evaluate.attention import attention_path, write_attention
from gigamil.evaluate.exported import FACTS_FILE, ExportedModel, SlideResult, load_exported, model_of_run
from gigamil.evaluate.heatmap import heatmap_run
from gigamil.evaluate.new_slides import NewSlides, tile_new
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.values import Values, write_values
from gigamil.registry import import_plugins
from gigamil.tasks.classification import Multiclass
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.store import save_task


def load_model(folder: Path | str, *, device: str = "auto") -> ExportedModel:
    """The model of a trained run, or of `gigamil export`.

    Args:
        folder: of either.
        device: auto, cpu or cuda.
    Raises:
        CheckpointError, CohortError, ConfigError: it is neither, or damaged; as `export_run` and `load_exported`.
    """
    folder = Path(folder)
    return (load_exported if (folder / FACTS_FILE).is_file() else model_of_run)(folder, device=device)


def predict_files(
    slides: Sequence[Path],
    run: Path,
    to: Path | None = None,
    *,
    mpp: float | None = None,
    heatmaps: bool = True,
    plugins: Sequence[str] = (),
) -> list[SlideResult]:
    """Predict slide files; writes predictions.csv, attention/ and heatmaps/. Tiles that are there already are used.

    Args:
        slides: files, or DICOM folders.
        run: trained run, or folder of `gigamil export`.
        to: folder for all of it; None: `<run>/new_slides`.
        mpp: of files that carry none.
        heatmaps: draw them.
        plugins: modules that register the parts of the model.
    Raises:
        SlideError: a file has no tiles; names it and why. Otherwise as `load_model` and `ExportedModel.predict`.
    """
    import_plugins(plugins)
    model = load_model(run)
    folder = run / "new_slides" if to is None else to
    new = tile_new(model.config, slides, folder, mpp)
    found = model.predict_tiled(new)
    for one in found:
        path = attention_path(folder, one.slide_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_attention(path, one.attention)
    _write(folder, model, new, found)
    if heatmaps:
        heatmap_run(folder, new.tiles, new.slide_ids)
    return found


def predictions_text(found: Sequence[SlideResult]) -> str:
    """For people: a line per slide."""
    names = list(found[0].values)
    has_classes = found[0].predicted is not None
    rows = [["slide", "tiles", *names, *(["predicted"] if has_classes else [])]]
    for one in found:
        numbers = [f"{value:.4g}" for value in one.values.values()]
        rows.append([one.slide_id, str(one.num_tiles), *numbers, *([one.predicted] if one.predicted else [])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _write(folder: Path, model: ExportedModel, new: NewSlides, found: Sequence[SlideResult]) -> None:
    save_task(model.task, folder)
    ids, splits = tuple(new.slide_ids), ("new",) * len(found)
    value_NP = np.array([list(one.values.values()) for one in found], dtype=np.float64)
    task: Any = model.task
    if isinstance(task, Multiclass | Ordinal):
        nothing = (None,) * len(found)
        write_predictions(folder / FILE_NAME, Predictions(ids, ids, nothing, splits, task.classes, value_NP))
        return
    target_NX = np.full((len(found), task.num_targets), np.nan)
    write_values(folder / FILE_NAME, Values(ids, ids, splits, task, target_NX, value_NP))

"""The verbs as Python calls: each does one stage of a run, and `run_pipeline` does all of them, skipping what is done."""

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.data.scan import slide_id_of
from gigamil.data.split import Splits, load_splits, make_splits, save_splits, split_method
from gigamil.data.tile import TileReport, tile_cohort
from gigamil.errors import CohortError, SlideError
from gigamil.evaluate.attention import Box, attention_path, write_attention
from gigamil.evaluate.heatmap import heatmap_run
from gigamil.evaluate.predict import SlidePrediction, load_model, predict_slides
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.report import evaluate_run, write_report
from gigamil.evaluate.summary import Evaluation
from gigamil.parallel.topology import Topology
from gigamil.registry import import_plugins
from gigamil.shards.read import ShardSet
from gigamil.train.api import train_model
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import TrainingData, load_training_data
from gigamil.train.identity import refuse_other_run, run_identity
from gigamil.train.recorder import MLFLOW_STATUS
from gigamil.train.records import RunRecord
from gigamil.train.tracking import Tracker
from gigamil.train.worker import choose_device


def split_cohort(config: RunConfig, *, again: bool = False) -> Splits:
    """Split the tiled slides by patient and freeze the result in `<out>/splits.json`.

    Args:
        config: `cohort` says how; a split column in the table wins.
        again: make a new split even if one is there; refused once the run has a checkpoint.
    Raises:
        CohortError: a wrong table, a class that is missing from a split, a patient in two splits, or a frozen split
            that does not fit the table any more.
    """
    path = config.bookkeeping.out / "splits.json"
    table = load_cohort(config.cohort, need_files=False)
    if path.is_file() and not again:
        frozen = load_splits(path, table)
        method = split_method(table, config.cohort, config.bookkeeping.limit)
        if frozen.method != method:
            raise CohortError(
                f"'{path}' was split otherwise ({frozen.method}) than configured ({method}). Type `gigamil split --again`, "
                "or choose another bookkeeping.out."
            )
        return frozen
    if (config.bookkeeping.out / "checkpoints" / "latest").is_file():
        raise CohortError(
            f"'{config.bookkeeping.out}' was trained on its split; another split needs another bookkeeping.out"
        )
    shards = ShardSet(config.bookkeeping.shard_root)
    settings = config.slides.model_dump()
    tiled = [slide_id for slide_id in shards.slide_ids if shards.made_with(slide_id, settings)]
    splits = make_splits(table, tiled, config.cohort, limit=config.bookkeeping.limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_splits(splits, path)
    return splits


def evaluate_model(config: RunConfig) -> Evaluation:
    """Predict validation and test slides with the best checkpoint; write predictions, metrics, figures, report.

    Raises:
        CheckpointError: nothing was trained yet, or the checkpoint is damaged.
        CohortError, ShardError: as `train_model`.
    """
    out = config.bookkeeping.out
    data = load_training_data(config)
    _refuse_other_checkpoint(config, data)
    slide_ids = [*data.splits.val, *data.splits.test] or list(data.splits.train)
    _predict_into(out, config, data.shards, slide_ids, data)
    evaluation = evaluate_run(out, num_bootstrap=config.science.bootstrap, seed=config.science.seed)
    _track_evaluation(config, evaluation)
    return evaluation


def draw_heatmaps(
    config: RunConfig,
    slides: Sequence[str] = (),
    *,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
    mpp: float | None = None,
) -> list[Path]:
    """Draw attention heatmaps of evaluated slides, or of slide files that the run has never seen.

    Args:
        config: of a trained run.
        slides: slide ids of the run, or paths of slide files, which are tiled and predicted first (their results go to
            `<out>/new_slides`); none takes `bookkeeping.heatmaps` held-out slides.
        lesions_um: known lesions to outline, micron from the level-0 origin.
        mpp: of slide files that carry none.
    Returns:
        PNG and GeoJSON files.
    """
    out = config.bookkeeping.out
    files = [Path(name) for name in slides if Path(name).exists()]
    ids = [name for name in slides if not Path(name).exists()]
    drawn: list[Path] = []
    if files:
        drawn += _heatmap_new(config, files, mpp)
    if ids or not files:
        shards = ShardSet(config.bookkeeping.shard_root)
        drawn += heatmap_run(out, shards, ids or None, config.bookkeeping.heatmaps, lesions_um=lesions_um)
        write_report(out)
        _track_files(config, [out / "heatmaps", out / "report.html"])
    return drawn


def run_pipeline(
    config: RunConfig,
    *,
    plugins: Sequence[str] = (),
    resume: bool = True,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
) -> dict[str, Any]:
    """Tile, split, train, evaluate, draw heatmaps; what is done already is not done again.

    Args:
        config: the whole run.
        plugins: modules that register encoders, aggregators or losses.
        resume: False refuses a run folder that holds a trained or half-trained run.
        lesions_um: known lesions, outlined in heatmaps.
    Returns:
        auc, auc_ci (of the held-out slides), slides, tiles, ranks, seconds, out; None where undefined.
    Raises:
        SlideError: more slides failed than `slides.max_failed` allows; the others are tiled.
    """
    start = time.monotonic()
    import_plugins(plugins)
    config = absolute_paths(config)
    out = config.bookkeeping.out
    if not resume and (out / "checkpoints" / "latest").is_file():
        raise CohortError(f"'{out}' holds a run already; delete it or choose another bookkeeping.out")
    show = config.bookkeeping.progress
    _say(show, "tile", f"slides of '{config.cohort.table}' -> shards")
    report = tile_cohort(config, progress=show)
    refuse_failures(report, config.slides.max_failed)
    _say(show, "split", "by patient")
    splits = split_cohort(config)
    if show:
        print(
            f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test slides ({splits.method})"
        )
    _say(show, "train", f"on {config.execution.ranks} ranks")
    if RunRecord(out / "run.json").facts.get("status") == "finished":
        _refuse_other_checkpoint(config, load_training_data(config))
        print("already trained")
    else:
        train_model(config, plugins=plugins)
    _say(show, "evaluate", "held-out slides")
    evaluation = evaluate_model(config)
    _say(show, "heatmap", "attention of held-out slides")
    draw_heatmaps(config, lesions_um=lesions_um)
    auc = evaluation["splits"][evaluation["headline_split"]]["auc"]
    return {
        "auc": auc["value"],
        "auc_ci": auc["ci"],
        "slides": sum(len(splits.of(name)) for name in ("train", "val", "test")),
        "tiles": report.num_tiles,
        "ranks": config.execution.ranks,
        "seconds": round(time.monotonic() - start, 1),
        "out": str(out),
    }


def refuse_failures(report: TileReport, max_failed: int) -> None:
    """Refuse to go on when more slides are bad than allowed.

    Raises:
        SlideError: lists them.
    """
    if len(report.bad) > max_failed:
        lines = "\n".join("  " + row.line() for row in report.bad)
        raise SlideError(
            f"{len(report.bad)} slides have no tiles, more than slides.max_failed={max_failed}:\n{lines}\n"
            "Mend or remove them, or set slides.max_failed."
        )


def _refuse_other_checkpoint(config: RunConfig, data: TrainingData) -> None:
    """Refuse to use a trained model with a configuration, a split or tiles that it was not trained with."""
    out = config.bookkeeping.out
    refuse_other_run(run_identity(config, data), CheckpointStore(out / "checkpoints").facts(), out)


def _predict_into(
    folder: Path, config: RunConfig, shards: ShardSet, slide_ids: Sequence[str], data: TrainingData | None
) -> None:
    """Write predictions.csv and attention/ of slides; without `data` they have no labels."""
    classes = data.splits.classes if data else load_training_data(config).splits.classes
    device = choose_device(config.execution.device, Topology())
    found: list[SlidePrediction] = []
    model = load_model(config, len(classes))
    for prediction in predict_slides(config, model, shards, slide_ids, device):
        path = attention_path(folder, prediction.slide_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_attention(path, prediction.attention)
        found.append(prediction)
    split_of = data.splits.split_of() if data else {}
    predictions = Predictions(
        slide_ids=tuple(slide_ids),
        patient_ids=tuple(data.table.row(slide_id).patient_id if data else slide_id for slide_id in slide_ids),
        labels=tuple(data.table.row(slide_id).label if data else None for slide_id in slide_ids),
        splits=tuple(split_of.get(slide_id, "new") for slide_id in slide_ids),
        classes=classes,
        probs_NK=torch.tensor([prediction.probs_K.tolist() for prediction in found], dtype=torch.float64).numpy(),
    )
    write_predictions(folder / FILE_NAME, predictions)


def _heatmap_new(config: RunConfig, files: Sequence[Path], mpp: float | None) -> list[Path]:
    folder = config.bookkeeping.out / "new_slides"
    folder.mkdir(parents=True, exist_ok=True)
    names = _distinct([slide_id_of(path.resolve().name) for path in files])
    table = folder / "slides.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "path", "patient_id", "mpp"])
        for name, path in zip(names, files, strict=True):
            writer.writerow([name, path.resolve(), name, "" if mpp is None else mpp])
    cohort = config.cohort.model_copy(update={"table": table, "root": None, "columns": type(config.cohort.columns)()})
    book = config.bookkeeping.model_copy(update={"shards": folder / "shards", "limit": None})
    new = config.model_copy(update={"cohort": cohort, "bookkeeping": book})
    refuse_failures(tile_cohort(new, progress=config.bookkeeping.progress), 0)
    shards = ShardSet(book.shard_root)
    _predict_into(folder, config, shards, names, None)
    return heatmap_run(folder, shards, names)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before: a slide may be given as SVS and as DICOM."""
    before = [names[:position].count(name) for position, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


def _track_evaluation(config: RunConfig, evaluation: Evaluation) -> None:
    out = config.bookkeeping.out
    metrics: dict[str, float] = {}
    for name, values in evaluation["splits"].items():
        estimates = {"auc": values["auc"], "balanced_accuracy": values["balanced_accuracy"], "f1": values["f1"]}
        metrics |= {f"{name}/{key}": est["value"] for key, est in estimates.items() if est["value"] is not None}
    files = [out / name for name in (FILE_NAME, "evaluation.json", "report.html", "figures")]
    _track_files(config, files, metrics)


def _track_files(config: RunConfig, files: Sequence[Path], metrics: Mapping[str, float] | None = None) -> None:
    """Add files and numbers to the run's MLflow run, if it has one."""
    out = config.bookkeeping.out
    facts = RunRecord(out / "run.json").facts
    if not config.bookkeeping.mlflow or not facts.get("mlflow_run"):
        return
    tracker = Tracker(out, config.bookkeeping.experiment, config.bookkeeping.name, facts["mlflow_run"])
    if metrics:
        tracker.log(metrics, step=facts.get("steps", 0))
    for path in files:
        if path.exists():
            tracker.artefact(path, path.name if path.is_dir() else None)
    tracker.finish(MLFLOW_STATUS[facts.get("status", "finished")])


def _say(show: bool, verb: str, words: str) -> None:
    if show:
        print(f"\n== {verb}: {words}", flush=True)


__all__ = ["draw_heatmaps", "evaluate_model", "refuse_failures", "run_pipeline", "split_cohort", "train_model"]

"""The verbs as Python calls: each does one stage of a run, and `run_pipeline` does all of them, skipping what is done."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.coupling import train_coupled
from gigamil.data.cohort import load_cohort
from gigamil.data.features import FeatureSet
from gigamil.data.folds import freeze_folds, make_folds
from gigamil.data.split import (
    Splits,
    check_splits,
    load_splits,
    make_splits,
    makes_folds,
    save_splits,
    sources_digest,
    split_method,
    tile_leaks,
)
from gigamil.data.targets import load_target_table, read_targets
from gigamil.data.tile import refuse_failures, tile_cohort
from gigamil.errors import CohortError, ConfigError, EnvironmentFault, ShardError
from gigamil.evaluate.attention import Box, attention_path, write_attention
from gigamil.evaluate.features import cache_features
from gigamil.evaluate.heatmap import heatmap_run
from gigamil.evaluate.new_slides import tile_new
from gigamil.evaluate.picture import ReadTiles
from gigamil.evaluate.predict import SlidePrediction, load_model, predict_slides
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.report import evaluate_run, write_report
from gigamil.evaluate.saliency_maps import Saliencies, refuse_tile_encoder
from gigamil.evaluate.summary import Evaluation
from gigamil.evaluate.values import Values, read_run, write_values
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.registry import import_plugins
from gigamil.shards.read import ShardSet
from gigamil.tasks.classification import Multiclass
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.store import save_task
from gigamil.train import api
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import (
    TiledSlides,
    TrainingData,
    feature_dim,
    load_training_data,
    open_source,
    open_tiles,
    pictured_shards,
    tiled_slides,
)
from gigamil.train.identity import refuse_other_run, run_identity
from gigamil.train.records import RunRecord
from gigamil.train.sync import sync_run
from gigamil.train.task import task_of_run
from gigamil.train.worker import choose_device

_MAX_LISTED = 20
_log = logging.getLogger(__name__)


def split_cohort(config: RunConfig, *, again: bool = False) -> Splits:
    """Split the tiled slides by patient and freeze the result in `<out>/splits.json`.

    Where there are folds, `splits.json` is the one that `cohort.fold` names, and all of them are written to `folds.json`
    and `folds.csv`.

    Args:
        config: `cohort` says how; a split column in the table wins.
        again: make a new split even if one is there; refused once the run has a checkpoint.
    Raises:
        CohortError: a wrong table, a class that is missing from a split, a patient, a file or a picture in two splits,
            or a frozen split that does not fit the table or the tiles any more.
        ShardError: there are no tiles.
    """
    path = config.bookkeeping.out / "splits.json"
    table = load_target_table(config.cohort, config.science)
    tiles = open_tiles(config, table)
    shards = pictured_shards(config, tiles)
    if path.is_file() and not again:
        frozen = load_splits(path, table, shards, config.cohort.near_duplicates)
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
    splits = make_splits(table, tiled_slides(config, table), config.cohort, limit=config.bookkeeping.limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    if shards is not None:
        splits = replace(splits, sources_sha256=sources_digest(shards, splits.split_of()))
        leaks = tile_leaks(splits, shards, path.parent, near_duplicates=config.cohort.near_duplicates)
        check_splits(splits, table, leaks=leaks)
    if makes_folds(table, config.cohort):
        freeze_folds(make_folds(table, config.cohort), path.parent, table, again=True)
    save_splits(splits, path)
    return splits


def train_model(config: RunConfig, *, plugins: Sequence[str] = ()) -> dict[str, object]:
    """Train, or continue: `gigamil.train.api.train_model`, or the phases of `gigamil.coupling.train_coupled`.

    Raises:
        GigamilError: as these.
    """
    import_plugins(plugins)
    if config.science.regime.name != "coupled":
        return api.train_model(config, plugins=plugins)
    return train_coupled(config, plugins=plugins, say=lambda words: _say(config.bookkeeping.progress, "train", words))


def evaluate_model(config: RunConfig) -> Evaluation:
    """Predict validation and test slides with the best checkpoint; write predictions, metrics, figures, report.

    Raises:
        CheckpointError: nothing was trained yet, or the checkpoint is damaged.
        CohortError, ShardError: as `train_model`.
    """
    out = config.bookkeeping.out
    data = load_training_data(config)
    refuse_other_checkpoint(config, data)
    slide_ids = [*data.splits.val, *data.splits.test] or list(data.splits.train)
    _predict_into(out, config, data.shards, slide_ids, data)
    science = config.science
    evaluation = evaluate_run(out, num_bootstrap=science.bootstrap, seed=science.seed, unit=science.bag)
    _send_results(config)
    return evaluation


def draw_heatmaps(
    config: RunConfig,
    slides: Sequence[str] = (),
    *,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
    mpp: float | None = None,
    saliency: bool = False,
) -> list[Path]:
    """Draw attention heatmaps of evaluated slides, or of slide files that the run has never seen.

    Args:
        config: of a trained run.
        slides: slide ids of the run, or paths of slide files, which are tiled and predicted first (their results go to
            `<out>/new_slides`); none takes `bookkeeping.heatmaps` held-out slides. An id of an evaluated slide is an id,
            also where a file or folder has that name.
        lesions_um: known lesions to outline, micron from the level-0 origin.
        mpp: of slide files that carry none.
        saliency: also compute and draw how much each part of a slide moves the logit of the class that it is predicted to
            be, with the best checkpoint; for runs with a dense encoder.
    Returns:
        PNG, GeoJSON and TIFF files.
    Raises:
        ConfigError: the run was trained with another configuration, or new slides would get features of another encoder,
            or saliency is asked of an encoder of tiles.
    """
    out = config.bookkeeping.out
    model = _saliency_model(config) if saliency else None
    known = read_run(out).slide_ids if (out / FILE_NAME).is_file() else ()
    files = [Path(name) for name in slides if name not in known and Path(name).exists()]
    ids = [name for name in slides if name in known or not Path(name).exists()]
    drawn: list[Path] = []
    if files:
        drawn += _heatmap_new(config, files, mpp, lesions_um, model)
    if ids or not files:
        shards = open_tiles(config, load_cohort(config.cohort, need_labels=False, need_files=False))
        number = config.bookkeeping.heatmaps
        drawn += heatmap_run(
            out,
            shards,
            ids or None,
            number,
            lesions_um=lesions_um,
            saliency=_saliencies(config, model, shards),
            **_sights(config, shards),
        )
        write_report(out)
        _send_results(config)
    return drawn


def run_pipeline(
    config: RunConfig,
    *,
    plugins: Sequence[str] = (),
    resume: bool = True,
    lesions_um: Mapping[str, Sequence[Box]] | None = None,
) -> dict[str, Any]:
    """Tile, split, train, evaluate, draw heatmaps; what is done already is not done again.

    With `data.source: features` tiles are encoded after tiling; with `data.features` too, features are taken from there,
    and nothing is tiled or encoded.

    Args:
        config: the whole run.
        plugins: modules that register encoders, aggregators or losses.
        resume: False refuses a run folder that holds a trained or half-trained run.
        lesions_um: known lesions, outlined in heatmaps.
    Returns:
        auc, auc_ci (of the held-out slides; or the metric of another task), slides, tiles, ranks, seconds, out; None where
        undefined.
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
    has_features = config.data.source == "features" and config.data.features is not None
    if has_features:
        _refuse_missing_features(config)
    else:
        _say(show, "tile", f"slides of '{config.cohort.table}' -> shards")
        refuse_failures(tile_cohort(config, progress=show), config.slides.max_failed)
        if config.data.source == "features":
            _say(show, "features", f"of {config.science.encoder.name}, on {config.execution.ranks} ranks")
            made = cache_features(config, plugins=plugins)
            if show:
                print(made.text())
    _say(show, "split", "by patient")
    splits = split_cohort(config)
    if show:
        print(
            f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test slides ({splits.method})"
        )
    _say(show, "train", f"on {config.execution.ranks} ranks")
    if RunRecord(out / "run.json").facts.get("status") == "finished":
        refuse_other_checkpoint(config)
        print("already trained")
    else:
        train_model(config, plugins=plugins)
    _say(show, "evaluate", "held-out slides")
    evaluation = evaluate_model(config)
    _say(show, "heatmap", "attention of held-out slides")
    draw_heatmaps(config, lesions_um=lesions_um)
    name = evaluation["headline_metric"]
    found = evaluation["splits"][evaluation["headline_split"]]["metrics"][name]
    data = load_training_data(config)
    return {
        name: found["value"],
        f"{name}_ci": found["ci"],
        "slides": sum(len(splits.of(name)) for name in ("train", "val", "test")),
        "tiles": sum(data.shards.manifest(slide_id).num_tiles for slide_id in splits.split_of()),
        "ranks": config.execution.ranks,
        "seconds": round(time.monotonic() - start, 1),
        "out": str(out),
    }


def _refuse_missing_features(config: RunConfig) -> None:
    """Refuse to go on when more slides have no features than may fail, before they are left out of a split for good."""
    table = load_cohort(config.cohort, need_labels=False, need_files=False)
    there = set(tiled_slides(config, table))
    missing = [row.slide_id for row in table.rows if row.slide_id not in there]
    if len(missing) > config.slides.max_failed and config.bookkeeping.limit is None:
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise ShardError(
            f"{len(missing)} of {len(table.rows)} slides have no features in '{config.data.features}', more than "
            f"slides.max_failed={config.slides.max_failed}: {', '.join(missing[:_MAX_LISTED])}{more}. Make them, take these "
            "slides out of the table, or set slides.max_failed."
        )


def refuse_other_checkpoint(config: RunConfig, data: TrainingData | None = None) -> None:
    """Refuse to use a trained model with a configuration, a split or tiles that it was not trained with.

    Args:
        data: from `load_training_data`; None: it is loaded.
    Raises:
        ConfigError: names what differs.
        CheckpointError, CohortError, ShardError: as what it reads.
    """
    out, data = config.bookkeeping.out, data or load_training_data(config)
    refuse_other_run(run_identity(config, data), CheckpointStore(out / "checkpoints").facts(), out)


def _predict_into(
    folder: Path,
    config: RunConfig,
    shards: TiledSlides,
    slide_ids: Sequence[str],
    data: TrainingData | None,
    paths: Mapping[str, Path] | None = None,
) -> None:
    """Write predictions.csv, task.json and attention/ of slides; without `data` nothing is known of them, and `paths` tells their files."""
    trained = data or load_training_data(config)
    task = task_of_run(config, trained)
    device = choose_device(config.execution.device, Topology())
    found: list[SlidePrediction] = []
    model = load_model(config, task.num_outputs, dim=feature_dim(shards, slide_ids))
    bags = data.bags(slide_ids) if data else None
    for prediction in predict_slides(config, model, task, shards, slide_ids, device, paths, bags):
        path = attention_path(folder, prediction.slide_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_attention(path, prediction.attention)
        found.append(prediction)
    save_task(task, folder)
    split_of = data.splits.split_of() if data else {}
    splits = tuple(split_of.get(slide_id, "new") for slide_id in slide_ids)
    patients = tuple(data.table.row(slide_id).patient_id if data else slide_id for slide_id in slide_ids)
    value_of = {prediction.slide_id: prediction.value_P for prediction in found}
    value_NP = np.array([value_of[slide_id] for slide_id in slide_ids], dtype=np.float64)
    if isinstance(task, Multiclass | Ordinal):
        labels = tuple(data.table.row(slide_id).label if data else None for slide_id in slide_ids)
        predictions = Predictions(tuple(slide_ids), patients, labels, splits, task.classes, value_NP)
        write_predictions(folder / FILE_NAME, predictions)
        return
    target_NX = np.full((len(found), task.num_targets), np.nan)
    if data:
        target_NX = read_targets(config.science, data.table, slide_ids).numpy()
    write_values(folder / FILE_NAME, Values(tuple(slide_ids), patients, splits, task, target_NX, value_NP))


def _saliency_model(config: RunConfig) -> SlideModel:
    """The best model of a run with a dense encoder, before anything else is done."""
    data = load_training_data(config)
    refuse_other_checkpoint(config, data)
    model = load_model(config, task_of_run(config, data).num_outputs, dim=data.dim)
    refuse_tile_encoder(model, config)
    return model


def _saliencies(
    config: RunConfig, model: SlideModel | None, shards: TiledSlides, paths: Mapping[str, Path] | None = None
) -> Saliencies | None:
    if model is None:
        return None
    return Saliencies(config, model, shards, choose_device(config.execution.device, Topology()), paths)


def _heatmap_new(
    config: RunConfig,
    files: Sequence[Path],
    mpp: float | None,
    lesions_um: Mapping[str, Sequence[Box]] | None,
    model: SlideModel | None,
) -> list[Path]:
    folder = config.bookkeeping.out / "new_slides"
    if config.data.source == "features" and config.data.features is not None:
        raise ConfigError(
            f"'{files[0]}' is a slide file, and this run takes features from '{config.data.features}' (data.features). Put "
            "the slide's features there, name it in the slide table, and give its id."
        )
    data = load_training_data(config)
    refuse_other_checkpoint(config, data)
    new = tile_new(config, files, folder, mpp)
    _refuse_other_encoder(data.shards, new.tiles, new.slide_ids)
    _predict_into(folder, config, new.tiles, new.slide_ids, None, new.paths)
    saliency = _saliencies(config, model, new.tiles, new.paths)
    sights = _sights(new.config, new.tiles, new.paths)
    return heatmap_run(folder, new.tiles, new.slide_ids, lesions_um=lesions_um, saliency=saliency, **sights)


def _refuse_other_encoder(trained: TiledSlides, new: TiledSlides, names: Sequence[str]) -> None:
    """Refuse features of new slides that were not made as those that the head was trained on."""
    if not (isinstance(trained, FeatureSet) and isinstance(new, FeatureSet)):
        return
    made, found = trained.manifest(trained.slide_ids[0]), new.manifest(names[0])
    if made.encoder_sha256 and made.encoder_sha256 != found.encoder_sha256:
        raise ConfigError(
            f"the features of this run were made by the encoder '{made.encoder}' ({made.encoder_sha256[:12]}), and those of "
            f"'{names[0]}' by '{found.encoder}' ({found.encoder_sha256[:12]}): other weights, options or precision. Set "
            "science.encoder and science.precision to what `gigamil features` was given, or name the slide in the slide "
            "table, make its features in the same way, and give its id."
        )


class _Sights(TypedDict, total=False):
    """What a heatmap shows of a slide beside its attention, where its shards hold no tiles."""

    pictures: ShardSet
    read: ReadTiles


def _sights(config: RunConfig, shards: TiledSlides, paths: Mapping[str, Path] | None = None) -> _Sights:
    if config.data.source == "features":
        try:
            return _Sights(pictures=ShardSet(config.bookkeeping.shard_root))
        except ShardError:  # features of others, without shards
            return _Sights()
    if config.data.source == "slides":
        return _Sights(read=open_source(config, shards, shards.slide_ids, torch.device("cpu"), paths).read_tiles)
    return _Sights()


def _send_results(config: RunConfig) -> None:
    """Send what is new in the run folder to MLflow. That it cannot is a warning: `gigamil sync` sends it later."""
    out = config.bookkeeping.out
    if not config.bookkeeping.mlflow or not (out / "run.json").is_file():
        return
    try:
        sync_run(out, tries=1, timeout_s=10.0)
    except EnvironmentFault as error:
        _log.warning("%s", error)


def _say(show: bool, verb: str, words: str) -> None:
    if show:
        print(f"\n== {verb}: {words}", flush=True)


__all__ = ["draw_heatmaps", "evaluate_model", "refuse_failures", "run_pipeline", "split_cohort", "train_model"]

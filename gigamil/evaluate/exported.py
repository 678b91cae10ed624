"""A trained model without its run: weights, what they mean, and how slides are to be tiled; `predict(slide)` for a slide file.

model = load_exported("runs/my/export")
model.predict("slide.svs").values      # {"prob_normal": 0.03, "prob_tumour": 0.97}
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gigamil.config.load import load_config
from gigamil.config.schema import Bookkeeping, Cohort, Data, RunConfig
from gigamil.errors import CheckpointError, CohortError, ConfigError
from gigamil.evaluate.attention import Attention
from gigamil.evaluate.new_slides import NewSlides, tile_new
from gigamil.evaluate.predict import predict_slides
from gigamil.evaluate.report import CONFIG_FILE
from gigamil.evaluate.summary import EVALUATION_FILE, read_evaluation
from gigamil.files import file_sha256, parse_object, replace_file
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.topology import Topology
from gigamil.registry import import_plugins
from gigamil.tasks.classification import Multiclass
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.store import load_task, task_from_json, task_to_json
from gigamil.tasks.task import Task
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.records import versions
from gigamil.train.stale import encoder_of_features
from gigamil.train.worker import choose_device

_log = logging.getLogger("gigamil")
FORMAT = 1
FACTS_FILE, WEIGHTS_FILE = "model.json", "weights.safetensors"
_ENCODER = "encoder."


@dataclass(frozen=True)
class SlideResult:
    """What a model says of a slide file.

    Attributes:
        slide_id: name of the file.
        values: by name, as in predictions.csv: probabilities of classes or labels, numbers, risk.
        predicted: the most probable class; None of a task without classes.
        num_tiles: tissue tiles that were looked at, all of them.
        attention: of each.
    """

    slide_id: str
    values: dict[str, float]
    predicted: str | None
    num_tiles: int
    attention: Attention


class ExportedModel:
    """A model of `gigamil export`; made by `load_exported`.

    Attributes:
        task: what it predicts.
        threshold: probability from which on a slide is called positive, chosen on validation; None where none was.
    """

    def __init__(self, config: RunConfig, task: Task, model: SlideModel, threshold: float | None) -> None:
        self.config = config
        self.task = task
        self.threshold = threshold
        self._model = model

    def predict(self, slide: Path | str, *, mpp: float | None = None) -> SlideResult:
        """Tile a slide file in a temporary folder and predict it on all of its tissue.

        Args:
            slide: any file that OpenSlide reads, or a DICOM folder.
            mpp: micron per pixel, of a file that carries none.
        Raises:
            SlideError: it cannot be read, or has no tissue.
            BagError: it has fewer tiles than the aggregator takes.
        Cost: reading and encoding all tissue tiles; disk for them as JPEG meanwhile.
        """
        return self.predict_all([Path(slide)], mpp=mpp)[0]

    def predict_all(
        self, slides: Sequence[Path], *, mpp: float | None = None, folder: Path | None = None
    ) -> list[SlideResult]:
        """`predict` of several slides; tiles stay in `folder`, so that what is done is not done again, or in none."""
        if folder is None:
            with tempfile.TemporaryDirectory() as made:
                return self.predict_all(slides, mpp=mpp, folder=Path(made))
        return self.predict_tiled(tile_new(self.config, slides, folder, mpp))

    def predict_tiled(self, new: NewSlides) -> list[SlideResult]:
        """Predict slides that `tile_new` has tiled with this model's `config`."""
        device = choose_device(self.config.execution.device, Topology())
        found = predict_slides(self.config, self._model, self.task, new.tiles, new.slide_ids, device, new.paths)
        return [self._result(one.slide_id, one.value_P.tolist(), one.attention) for one in found]

    def _result(self, slide_id: str, values: Sequence[float], attention: Attention) -> SlideResult:
        named = dict(zip(self.task.predicted_names, values, strict=True))
        predicted = None
        if isinstance(self.task, Multiclass | Ordinal):
            predicted = self.task.classes[max(range(len(values)), key=values.__getitem__)]
        return SlideResult(slide_id, named, predicted, len(attention), attention)


def export_run(run: Path, to: Path, *, plugins: Sequence[str] = ()) -> Path:
    """Write the best model of a run as `<to>/weights.safetensors` and `<to>/model.json`.

    A model on features is joined with the encoder that made them, so that it takes slides.

    Args:
        run: folder of a run that is trained and evaluated.
        to: made if it is not there.
        plugins: modules that register the parts of the model; `load_exported` imports them, wherever it is called.
    Raises:
        CohortError: the run was not evaluated.
        CheckpointError: it has no checkpoint, or a damaged one.
        ConfigError: it is no run; or it was trained on features of others, whose encoder nobody knows.
    """
    import_plugins(plugins)
    found = _read_run(run)
    to.mkdir(parents=True, exist_ok=True)
    weights = to / WEIGHTS_FILE
    save_file({name: value.contiguous() for name, value in found.state.items()}, weights)
    described = {
        "format": FORMAT,
        "name": found.config.bookkeeping.name,
        "task": json.loads(task_to_json(found.task)),
        "predicts": found.task.predicted_names,
        "threshold": found.threshold,
        "config": json.loads(found.config.model_dump_json()),
        "epoch": found.epoch,
        "sha256": file_sha256(weights),
        "plugins": list(plugins),
        "versions": versions(),
    }
    replace_file(to / FACTS_FILE, (json.dumps(described, indent=1) + "\n").encode())
    return to


def model_of_run(run: Path, *, device: str = "auto") -> ExportedModel:
    """The best model of a run as `load_exported` gives it, without files; errors as `export_run`."""
    found = _read_run(run)
    return _made(found.config, found.task, found.state, found.threshold, device)


def load_exported(folder: Path | str, *, device: str = "auto") -> ExportedModel:
    """Load what `export_run` wrote.

    Args:
        folder: of model.json.
        device: auto, cpu or cuda.
    Raises:
        CheckpointError: it is no exported model, or a damaged one.
        ConfigError: a module that registers its parts cannot be imported.
    """
    folder = Path(folder)
    path = folder / FACTS_FILE
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is no exported model: it has no {FACTS_FILE}. Type: gigamil export RUN")
    facts: dict[str, Any] = parse_object(path.read_text(encoding="utf-8"), f"'{path}'", "export the run again")
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"'{path}' has format {facts.get('format')}; this gigamil reads {FORMAT}")
    try:
        if file_sha256(folder / WEIGHTS_FILE) != facts["sha256"]:
            raise CheckpointError(f"'{folder / WEIGHTS_FILE}' is not what was exported; export the run again")
        import_plugins(facts.get("plugins", ()))
        config = RunConfig.model_validate(facts["config"])
        task = task_from_json(json.dumps(facts["task"]))
        return _made(config, task, load_file(folder / WEIGHTS_FILE), facts.get("threshold"), device)
    except (CheckpointError, ConfigError):
        raise
    except (KeyError, ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"'{folder}' cannot be loaded: {error}. Export the run again.") from error


def run_config(run: Path) -> RunConfig:
    """The configuration of a run, wherever its folder is now.

    Raises:
        ConfigError: it is no run folder.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"'{run}' is no run folder: it has no {CONFIG_FILE}. Give the bookkeeping.out of a trained run."
        )
    config = load_config(path, [])
    return config.model_copy(update={"bookkeeping": config.bookkeeping.model_copy(update={"out": run.resolve()})})


class _Found(NamedTuple):
    """What is exported of a run; `config` is without what prediction does not need."""

    config: RunConfig
    task: Task
    state: dict[str, Tensor]
    threshold: float | None
    epoch: int | None


def _read_run(run: Path) -> _Found:
    config = run_config(run)
    task = load_task(run)
    if task is None:
        raise CohortError(f"'{run}' was not evaluated; run `gigamil evaluate` first")
    store = CheckpointStore(run / "checkpoints")
    state, facts = store.load_parameters("best"), store.facts("best")
    if config.data.source == "features":
        state = _with_encoder(config, state)
    threshold = read_evaluation(run)["threshold"] if (run / EVALUATION_FILE).is_file() else None
    return _Found(_without_run(config), task, state, threshold, facts.get("best_epoch"))


def _made(
    config: RunConfig, task: Task, state: dict[str, Tensor], threshold: float | None, device: str
) -> ExportedModel:
    model = build_model(config.science, task.num_outputs)
    model.load_state_dict(state)
    execution = config.execution.model_copy(update={"device": device})
    return ExportedModel(config.model_copy(update={"execution": execution}), task, model.eval(), threshold)


def _without_run(config: RunConfig) -> RunConfig:
    """What prediction needs: no table, no folders, no start of the weights; on one process."""
    encoder = config.science.encoder.model_copy(update={"weights": None})
    science = config.science.model_copy(update={"encoder": encoder, "warm_start": None})
    if config.data.source == "features":
        science = science.model_copy(update={"regime": type(science.regime)()})
    execution = config.execution.model_copy(
        update={"ranks": 1, "group_size": None, "shard_cache": None, "halo": "read"}
    )
    given = [f"slides.{key}" for key in ("masks", "coords") if getattr(config.slides, key) is not None]
    if given:
        _log.warning(
            "%s of the run are of its own slides: tissue of new slides is found as slides.min_tissue says",
            " and ".join(given),
        )
    slides = config.slides.model_copy(update={"masks": None, "coords": None, "extra_mpp": ()})
    source = "slides" if config.data.source == "slides" else "shards"  # what the encoder saw: pixels, or JPEG of them
    return RunConfig(
        cohort=Cohort(),
        slides=slides,
        data=Data(source=source),
        science=science,
        execution=execution,
        bookkeeping=Bookkeeping(name=config.bookkeeping.name, mlflow=False, progress=False),
    )


def _with_encoder(config: RunConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if config.data.features is not None:
        raise ConfigError(
            f"this run was trained on features of '{config.data.features}', whose encoder gigamil does not have: a model that takes "
            "slides cannot be exported. Put the weights of the encoder into science.encoder.weights, and let `gigamil features` "
            "make the features."
        )
    encoder = encoder_of_features(config)
    with torch.no_grad():
        return {f"{_ENCODER}{name}": value for name, value in encoder.state_dict().items()} | state

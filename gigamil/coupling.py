"""Iterative coupling of tile encoder and bag classifier: phases that are runs of their own, chosen by validation slides.

Round r: encode all tiles with the encoder as it is and train the bag classifier on the features; then teach a student encoder by that
classifier (`gigamil.train.taught`). After the last round the classifier is trained once more. Of all classifiers the one that
is best on validation slides is kept, with its encoder; the first of them is the frozen baseline, so coupling has to earn its keep.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigamil.config.load import to_yaml
from gigamil.config.schema import Regime, RunConfig
from gigamil.errors import ConfigError, Interrupted
from gigamil.evaluate.features import cache_features
from gigamil.files import replace_file
from gigamil.metrics.task import is_better
from gigamil.models.slide_model import build_model
from gigamil.train.api import train_model
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import load_training_data
from gigamil.train.engine import TrainingState
from gigamil.train.follow import METRICS
from gigamil.train.identity import refuse_other_run, run_identity
from gigamil.train.records import RunRecord, versions
from gigamil.train.stale import encoder_of_features, refuse_stale
from gigamil.train.task import task_of_run
from gigamil.train.taught import refuse_untaught
from gigamil.train.tracking import one_store

_SPENT = ("tiles_seen", "tile_forwards", "seconds", "rank_seconds")


@dataclass(frozen=True)
class Phase:
    """One run of a coupling.

    Attributes:
        number: of the round, from 1; the classifier after the last one has the next number.
        kind: bags, the classifier on features, or tiles, the encoder that it teaches.
        before: the phase whose weights are the start; None of the first.
    """

    number: int
    kind: str
    before: "Phase | None" = None

    @property
    def folder(self) -> str:
        """Of its run, in that of the coupling."""
        return f"round{self.number}_{self.kind}"


def phases(rounds: int) -> list[Phase]:
    """bags, tiles, bags, tiles, ..., bags: one more classifier than rounds."""
    found: list[Phase] = []
    for number in range(1, rounds + 2):
        for kind in ("bags", "tiles"):
            if number <= rounds or kind == "bags":
                found.append(Phase(number, kind, found[-1] if found else None))
    return found


def phase_config(config: RunConfig, phase: Phase) -> RunConfig:
    """The configuration of a phase: a run on features, or of a student; everything else is that of the coupling."""
    out, science = config.bookkeeping.out, config.science
    start = science.warm_start if phase.before is None else out / phase.before.folder
    regime = Regime(name="frozen")
    if phase.kind == "tiles":
        regime = Regime(name="taught", tiles=science.regime.tiles, confidence=science.regime.confidence)
    changes: dict[str, Any] = {"regime": regime, "warm_start": start}
    if phase.kind == "tiles":
        changes["epochs"] = science.regime.tile_epochs
        changes["optim"] = science.optim.model_copy(update={"freeze_encoder_epochs": 0})
        changes["early_stop_epochs"] = None
    source = "features" if phase.kind == "bags" else config.data.source
    book = config.bookkeeping.model_copy(
        update={"out": out / phase.folder, "shards": config.bookkeeping.shard_root, "name": phase.folder}
    )
    return config.model_copy(
        update={
            "science": science.model_copy(update=changes),
            "data": config.data.model_copy(update={"source": source, "features": None}),
            "bookkeeping": book,
        }
    )


def train_coupled(
    config: RunConfig, *, plugins: Sequence[str] = (), say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train all phases that are not trained yet, and leave the best encoder and classifier as a checkpoint of `config`'s own.

    Args:
        config: with `science.regime: coupled`; `<out>/splits.json` and the shards must exist.
        plugins: modules that register encoders, aggregators or losses.
        say: is told which phase is next.
    Returns:
        The facts of run.json: status, what each round's classifier reached on validation slides, which was taken, what was spent.
    Raises:
        ConfigError: the phases there were trained with another configuration; or there are no validation slides to choose by.
        Interrupted: a signal; the same command goes on in the phase that it stopped in.
    Cost: rounds + 1 passes of encoding, as many classifiers, and `rounds` times `tile_epochs` passes of teaching.
    """
    out = config.bookkeeping.out
    todo = phases(config.science.regime.rounds)
    data = load_training_data(config)
    identity = run_identity(config, data)
    if not len(data.slides("val")):
        raise ConfigError(
            "science.regime=coupled chooses the round by validation slides, and there are none: set cohort.val_fraction above 0"
        )
    record = RunRecord(out / "run.json")
    if "coupling" in record.facts:
        refuse_other_run(identity, record.facts["coupling"], out)
    task = task_of_run(config, data)
    refuse_untaught(config, build_model(config.science, task.num_outputs, data.dim), task)
    record.update(status="running", error=None, coupling=identity, name=config.bookkeeping.name)
    replace_file(out / "config.resolved.yaml", to_yaml(config))
    try:
        _run_phases(config, todo, plugins, say)
        return _finish(config, todo, identity, record)
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        record.update(status=status, error=f"{type(error).__name__}: {error}")
        raise


def _run_phases(config: RunConfig, todo: Sequence[Phase], plugins: Sequence[str], say: Callable[[str], object]) -> None:
    out = config.bookkeeping.out
    with one_store(out, config.bookkeeping.name):
        for number, phase in enumerate(todo, start=1):
            own = phase_config(config, phase)
            folder = own.bookkeeping.out
            folder.mkdir(parents=True, exist_ok=True)
            if RunRecord(folder / "run.json").facts.get("status") == "finished":
                if phase.kind == "bags":  # its classifier belongs to the encoder that made these
                    refuse_stale(own, load_training_data(own))
                continue
            say(f"phase {number} of {len(todo)}: {phase.folder}")
            shutil.copyfile(out / "splits.json", folder / "splits.json")
            if phase.kind == "bags":
                cache_features(own, plugins=plugins)
            train_model(own, plugins=plugins)


def _finish(config: RunConfig, todo: Sequence[Phase], identity: dict[str, Any], record: RunRecord) -> dict[str, Any]:
    out = config.bookkeeping.out
    facts = {phase.folder: RunRecord(out / phase.folder / "run.json").facts for phase in todo}
    bags = [phase for phase in todo if phase.kind == "bags"]
    metric = facts[bags[0].folder]["best_val"]["metric"]
    values = {phase.folder: facts[phase.folder]["best_val"]["value"] for phase in bags}
    best = bags[0]
    for phase in bags[1:]:
        before, value = values[best.folder], values[phase.folder]
        if value is not None and (before is None or is_better(metric, value, before)):
            best = phase
    encoder = encoder_of_features(phase_config(config, best))
    parameters = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    parameters |= CheckpointStore(out / best.folder / "checkpoints").load_parameters("best")
    store = CheckpointStore(out / "checkpoints")
    spent = _added([facts[phase.folder].get("spent", {}) for phase in todo])
    progress = identity | {"versions": versions(), "best_epoch": None}
    store.commit(TrainingState(parameters, {}, ()), progress, step=0, best=True)
    _join_metrics(out, todo)
    record.update(
        status="finished",
        error=None,
        best_round=best.number,
        rounds={f"{name} {metric}": value for name, value in values.items()},
        best_val={"metric": metric, "value": values[best.folder]},
        spent=spent,
        steps=sum(int(facts[phase.folder].get("steps", 0)) for phase in todo),
        versions=versions(),
    )
    return record.facts


def _added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(part.get(key, 0) for part in parts) for key in _SPENT}


def _join_metrics(out: Path, todo: Sequence[Phase]) -> None:
    """metrics.jsonl of all phases in one, steps and epochs counted on, and what was spent added up."""
    lines, steps, epochs = [], 0, 0
    spent: dict[str, float] = dict.fromkeys(_SPENT, 0)
    for phase in todo:
        last_step = last_epoch = 0
        own: dict[str, float] = dict.fromkeys(_SPENT, 0)
        for line in (out / phase.folder / METRICS).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["kind"] not in ("step", "epoch", "skipped"):
                continue
            last_step, last_epoch = max(last_step, entry["step"]), max(last_epoch, entry.get("epoch", 0))
            own |= {key: entry[key] for key in _SPENT if key in entry}
            entry |= {"step": entry["step"] + steps, "phase": phase.folder}
            entry |= {key: entry[key] + spent[key] for key in _SPENT if key in entry}
            if "epoch" in entry:
                entry["epoch"] += epochs
            if entry["kind"] == "step" and phase.kind == "tiles":
                entry["taught_loss"] = entry.pop("loss")  # of another kind than that of slides
            lines.append(json.dumps(entry))
        steps, epochs, spent = steps + last_step, epochs + last_epoch, _added([spent, own])
    replace_file(out / METRICS, ("\n".join(lines) + "\n").encode())

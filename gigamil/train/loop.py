"""The training loop: epochs of exact steps, validation, checkpoints; every decision is taken by all ranks together."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from gigamil.config.load import science_digest_data, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.data.augment import augment_tiles
from gigamil.data.pipeline import DrawKeys, StepLoader, StepTiles
from gigamil.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from gigamil.keyed import text_key
from gigamil.memory.budget import chunks_to_keep, memory_budget
from gigamil.metrics import auc
from gigamil.models.encoder import refuse_train_batchnorm
from gigamil.models.slide_model import build_model
from gigamil.partition.schedule import StepPlan, epoch_order, plan_steps
from gigamil.train.agree import StopSignals, agree
from gigamil.train.checkpoint import CheckpointStore, replace_file
from gigamil.train.cohort import SlideSet, TrainingData, load_training_data
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, make_optimizer
from gigamil.train.loss import class_weights, losses
from gigamil.train.memory import peak_memory_bytes
from gigamil.train.records import MetricsLog, RunRecord, git_commit, versions
from gigamil.train.schedule import learning_rates
from gigamil.train.step import ExactStep, Ranks, StepResult, measure_chunk_bytes
from gigamil.train.tracking import Tracker

_log = logging.getLogger(__name__)
_MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds besides weights and moments.

    Attributes:
        epoch, step_in_epoch: next step to make.
        step: optimiser steps made, skipped ones included (draws and learning rates count them).
        best_auc, best_loss, best_epoch: of validation; None before the first. Of equal AUCs the lower loss is better.
        epochs_without_better: for early stopping.
        skipped_in_a_row: steps whose loss was not finite.
        num_keep: chunks whose graphs are kept; part of the state, so that a resumed run does the same work.
        memory_settings: what `num_keep` was chosen for; other settings choose anew.
        metrics_bytes: size of metrics.jsonl at the commit.
        mlflow_run: id of the MLflow run.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_auc: float | None = None
    best_loss: float | None = None
    best_epoch: int | None = None
    epochs_without_better: int = 0
    skipped_in_a_row: int = 0
    num_keep: int | None = None
    memory_settings: str = ""
    metrics_bytes: int = 0
    mlflow_run: str | None = None


class Trainer:
    """Trains what a configuration describes, on the ranks that it is given. All ranks make one and call `fit`.

    Args:
        config: resolved configuration; equal on all ranks.
        ranks: process groups (`gigamil.train.engine.start_distributed`).
        device: of this rank.
    Raises:
        ConfigError, CohortError, ShardError: before anything is trained.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, device: torch.device) -> None:
        self.config = config
        self.out = config.bookkeeping.out
        self.data: TrainingData = load_training_data(config)
        self._ranks = ranks
        self._device = device
        self._is_first = ranks.topology.rank == 0
        self._train, self._val = self.data.slides("train"), self.data.slides("val")
        science = config.science
        loss = losses[science.loss]
        num_classes = len(self.data.splits.classes)
        self._class_weight_K = class_weights(science.class_weights, self._train.label_S.tolist(), num_classes)
        model = build_model(science, num_classes)
        model.train()
        refuse_train_batchnorm(model)
        settings = deepspeed_config(config)
        self.engine = DeepSpeedEngine(model, make_optimizer(model, config), settings, device)
        self._store = CheckpointStore(self.out / "checkpoints", config.bookkeeping.keep_checkpoints)
        self.progress = self._resume()
        self._step = ExactStep(
            self.engine,
            ranks,
            loss,
            chunk=config.execution.chunk,
            num_keep=self._choose_num_keep(),
            keys=DrawKeys(science.seed, self._train.slide_ids),
            augment=partial(augment_tiles, settings=science.augment),
        )
        self.progress = replace(self.progress, num_keep=self._step.num_keep, memory_settings=self._memory_settings())
        self._evaluator = ExactStep(  # the same step; its keys are never drawn from
            self.engine, ranks, loss, chunk=config.execution.chunk, num_keep=0, keys=DrawKeys(0, self._val.slide_ids)
        )
        self._steps_per_epoch = -(-len(self._train) // science.slides_per_step)
        self._num_steps = self._steps_per_epoch * science.epochs
        self._last_save = time.monotonic()
        self._last_wait = 0.0
        self._stop = StopSignals()
        if self._is_first:
            self._open_records(settings)

    def fit(self) -> Progress:
        """Train to the end, or from where the last checkpoint stands.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was committed.
            TrainingError: three steps in a row had a loss that is not finite, or a rank met an error.
        """
        with self._stop, self._recorded():
            while self.progress.epoch < self.config.science.epochs and not self._is_early_stop():
                self._train_epoch()
                self._finish_epoch()
        return self.progress

    def _train_epoch(self) -> None:
        epoch = self.progress.epoch
        train_encoder = epoch >= self.config.science.optim.freeze_encoder_epochs
        if epoch and epoch == self.config.science.optim.freeze_encoder_epochs and self.progress.step_in_epoch == 0:
            self.engine.restart_bias_correction(group=0)
        plans = self._plans(self._train, epoch_order(len(self._train), self.config.science.seed, epoch))
        todo = plans[self.progress.step_in_epoch :]
        loader = self._loader(self._train)
        self._last_wait = 0.0
        with self._bar(f"epoch {epoch + 1}/{self.config.science.epochs}", len(plans)) as bar:
            bar.update(self.progress.step_in_epoch)
            steps = loader.iterate(todo)
            start = time.perf_counter()
            for plan, tiles in steps:
                self._agree(tiles if isinstance(tiles, Exception) else None)
                result, rates = self._train_step(plan, tiles, train_encoder)  # type: ignore[arg-type]
                seconds = time.perf_counter() - start
                start = time.perf_counter()
                self._report_step(plan, result, rates, seconds, loader)
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.4f}")
                self._refuse_endless_skips(plan, result)

    def _train_step(self, plan: StepPlan, tiles: StepTiles, train_encoder: bool) -> tuple[StepResult, list[float]]:
        # Layers of others draw from torch's own generator: seeded by the step, it needs no place in a checkpoint.
        torch.manual_seed(text_key(f"{self.config.science.seed}/{self.progress.step}/{self._ranks.topology.rank}"))
        label_S = self._train.label_S[list(plan.slides)]
        rates = learning_rates(self.config.science.optim, self.progress.step, self._num_steps, train_encoder)
        result = self._step.train(
            plan,
            tiles,
            label_S,
            self._class_weight_K[label_S],
            step=self.progress.step,
            learning_rates=rates,
            train_encoder=train_encoder,
        )
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            step_in_epoch=self.progress.step_in_epoch + 1,
            skipped_in_a_row=self.progress.skipped_in_a_row + 1 if result.skipped else 0,
        )
        return result, rates

    def _finish_epoch(self) -> None:
        done = self.progress.epoch
        score, loss = self._validate()
        better = self._is_better(score, loss)
        self.progress = replace(self.progress, epoch=done + 1, step_in_epoch=0)
        if better:
            best = replace(self.progress, best_auc=score, best_loss=loss, best_epoch=done + 1)
            self.progress = replace(best, epochs_without_better=0)
        else:
            self.progress = replace(self.progress, epochs_without_better=self.progress.epochs_without_better + 1)
        if self._is_first:
            values = {"val_auc": score, "val_loss": loss}
            self._metrics.write("epoch", epoch=done + 1, step=self.progress.step, better=better, **values)
            known = {f"val/{name[4:]}": value for name, value in values.items() if value is not None}
            self._log_mlflow(known)
            if self.config.bookkeeping.progress:
                words = ", ".join(f"{name} {value:.4f}" for name, value in known.items()) or "no validation slides"
                tqdm.write(f"epoch {done + 1}: {words}{' (best so far)' if better else ''}")
        self._save(best=better)

    def _validate(self) -> tuple[float | None, float | None]:
        """AUC and mean loss over the validation slides; None without any."""
        if not len(self._val):
            return None, None
        logits = []
        loader = self._loader(self._val)
        for plan, tiles in loader.iterate(self._plans(self._val, range(len(self._val)))):
            self._agree(tiles if isinstance(tiles, Exception) else None, may_stop=False)
            logits.append(self._evaluator.evaluate(plan, tiles)[0])  # type: ignore[arg-type]
        logits_SK = torch.cat(logits).cpu()
        loss = torch.nn.functional.cross_entropy(logits_SK, self._val.label_S)
        return auc(self._val.label_S.numpy(), logits_SK.softmax(1).numpy()), float(loss)

    def _is_better(self, score: float | None, loss: float | None) -> bool:
        before, before_loss = self.progress.best_auc, self.progress.best_loss
        if loss is None or before_loss is None:
            return True  # no validation slides, or the first epoch: the newest is the best known
        if score is None or before is None or score == before:
            return loss < before_loss
        return score > before

    def _agree(self, error: Exception | None, may_stop: bool = True) -> None:
        minutes = (time.monotonic() - self._last_save) / 60
        due = self._is_first and may_stop and minutes >= self.config.bookkeeping.checkpoint_minutes
        stop = self._stop.asked and may_stop
        decision = agree(self._ranks, self._device, error=error, stop=stop, save=due)
        if decision.stop or decision.save:
            self._save(best=False)
        if decision.stop:
            raise Interrupted(
                f"stopped by a signal after step {self.progress.step}; a checkpoint is in '{self._store.folder}'. "
                "The same command continues."
            )

    def _save(self, best: bool) -> None:
        state = self.engine.state()  # all ranks take part
        error: Exception | None = None
        if self._is_first:
            try:
                progress = replace(self.progress, metrics_bytes=self._metrics.sync())
                facts = asdict(progress) | {"science": science_digest_data(self.config), "versions": versions()}
                facts |= {"splits_sha256": self._splits_sha256()}
                self._store.commit(state, facts, step=progress.step, best=best)
            except CheckpointError as raised:
                error = raised
        agree(self._ranks, self._device, error=error, stop=False, save=False)  # also: nobody runs ahead of a commit
        self._last_save = time.monotonic()

    def _resume(self) -> Progress:
        if self._store.find() is None:
            self._warm_start()
            return Progress()
        state, facts = self._store.load()
        wanted = json.loads(json.dumps(science_digest_data(self.config)))
        if facts["science"] != wanted:
            different = sorted(_differences(facts["science"], wanted))
            raise ConfigError(
                f"'{self.out}' holds a run with another configuration (different: {', '.join(different)}). Choose "
                "another bookkeeping.out, or delete that folder to start again."
            )
        if facts["splits_sha256"] != self._splits_sha256():
            raise ConfigError(f"'{self.out}' was trained on another split; choose another bookkeeping.out")
        self.engine.load_state(state)
        return Progress(**{name: facts[name] for name in Progress.__dataclass_fields__})

    def _splits_sha256(self) -> str:
        return hashlib.sha256(self.data.splits.to_json().encode()).hexdigest()

    def _warm_start(self) -> None:
        folder = self.config.science.warm_start
        if folder is None:
            return
        values = CheckpointStore(folder / "checkpoints").load_parameters("best")
        wanted = {*dict(self.engine.module.named_parameters()), *dict(self.engine.module.named_buffers())}
        if wanted != values.keys():
            odd = sorted(wanted ^ values.keys())[:3]
            raise ConfigError(f"science.warm_start: the model in '{folder}' is another one (for example {odd})")
        self.engine.load_parameters(values)

    def _choose_num_keep(self) -> int:
        """Chunks whose graphs are kept: measured once, agreed by all ranks, and kept for the life of the run."""
        execution = self.config.execution
        if self.progress.num_keep is not None and self.progress.memory_settings == self._memory_settings():
            return self.progress.num_keep
        chunk_bytes = measure_chunk_bytes(self.engine, execution.chunk, self.config.slides.tile_px)
        budget = memory_budget(execution.memory_budget, self._device, self._ranks.topology.local_size)
        num_keep = torch.tensor(chunks_to_keep(execution.memory, chunk_bytes, budget), device=self._device)
        if self._ranks.world is not None:
            dist.all_reduce(num_keep, op=dist.ReduceOp.MIN, group=self._ranks.world)
        return int(num_keep)

    def _memory_settings(self) -> str:
        execution = self.config.execution
        return f"{execution.memory} {execution.memory_budget} {execution.chunk} {self._ranks.topology.world_size}"

    def _plans(self, slides: SlideSet, order: Any) -> list[StepPlan]:
        topology = self._ranks.topology
        per_step = self.config.science.slides_per_step
        return plan_steps(order, slides.sizes, per_step, topology.num_groups, topology.group_size)

    def _loader(self, slides: SlideSet) -> StepLoader:
        prefetch = self.config.execution.prefetch
        tile_px = self.config.slides.tile_px
        return StepLoader(self.data.shards, slides.slide_ids, tile_px, self._ranks.topology, prefetch)

    def _is_early_stop(self) -> bool:
        patience = self.config.science.early_stop_epochs
        return patience is not None and self.progress.epochs_without_better >= patience

    def _refuse_endless_skips(self, plan: StepPlan, result: StepResult) -> None:
        if not result.skipped:
            return
        names = [self._train.slide_ids[plan.slides[position]] for position in result.skipped]
        if self._is_first:
            self._metrics.write("skipped", step=self.progress.step, slides=names)
            _log.warning("step %d skipped on all ranks: the loss of %s is not finite", self.progress.step, names)
        if self.progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the loss was not finite in {_MAX_SKIPPED_IN_A_ROW} steps in a row, last for slides {names}. Weights are "
                "those before these steps. Lower science.optim.lr_*, or look at these slides with `gigamil inspect`."
            )

    def _open_records(self, settings: dict[str, Any]) -> None:
        book = self.config.bookkeeping
        replace_file(self.out / "config.resolved.yaml", to_yaml(self.config))
        replace_file(self.out / "ds_config.resolved.json", json.dumps(settings, indent=1))
        self._metrics = MetricsLog(self.out / "metrics.jsonl", self.progress.metrics_bytes)
        self._record = RunRecord(self.out / "run.json")
        self._tracker: Tracker | None = None
        facts: dict[str, Any] = {
            "name": book.name,
            "world_size": self._ranks.topology.world_size,
            "group_size": self._ranks.topology.group_size,
            "zero_stage": self.config.execution.zero_stage,
            "device": str(self._device),
            "kept_chunks": self.progress.num_keep,
            "slides": {"train": len(self._train), "val": len(self._val), "test": len(self.data.splits.test)},
            "tiles": {"train": sum(self._train.sizes), "val": sum(self._val.sizes)},
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters()),
            "git_commit": git_commit(Path.cwd()),
            "versions": versions(),
        }
        if book.mlflow:
            self._tracker = Tracker(self.out, book.experiment, book.name, self.progress.mlflow_run)
            self.progress = replace(self.progress, mlflow_run=self._tracker.run_id)
            facts["mlflow_run"] = self._tracker.run_id
            # What may change when a run continues on other machines is a tag; a parameter is for ever.
            params = _flat(
                {"science": self.config.science.model_dump(mode="json"), "slides": self.config.slides.model_dump()}
            )
            self._tracker.describe(params, _flat(facts))
            for name in ("config.resolved.yaml", "ds_config.resolved.json", "splits.json"):
                self._tracker.artefact(self.out / name)
        self._record.update(status="running", error=None, **facts)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """run.json and MLflow say how the run ended, however it ends."""
        status, error = "failed", "ended without a word"
        try:
            yield
            status, error = "finished", ""
        except Interrupted as raised:
            status, error = "interrupted", str(raised)
            raise
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            raise
        finally:
            if self._is_first:
                self._metrics.close()
                best = {"best_epoch": self.progress.best_epoch, "best_val_auc": self.progress.best_auc}
                self._record.update(status=status, error=error or None, steps=self.progress.step, **best)
                if self._tracker is not None:
                    self._tracker.artefact(self.out / "metrics.jsonl")
                    latest = self._store.find("best")
                    if status == "finished" and latest is not None:
                        self._tracker.artefact(latest, "checkpoint")
                    self._tracker.finish({"finished": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED"))

    def _report_step(
        self, plan: StepPlan, result: StepResult, rates: list[float], seconds: float, loader: StepLoader
    ) -> None:
        wait, self._last_wait = loader.wait_s - self._last_wait, loader.wait_s
        peak = peak_memory_bytes(self._device)
        if not self._is_first or self.progress.step % self.config.bookkeeping.log_every:
            return
        values = {
            "loss": result.loss,
            "lr_encoder": rates[0],
            "lr_head": rates[1],
            "grad_norm": result.grad_norm,
            "slides_per_s": len(plan.slides) / seconds,
            "tiles_per_s": sum(plan.sizes) / seconds,
            "data_wait_frac": min(1.0, wait / seconds),
            "peak_memory_gb": peak / 1e9,
        }
        self._metrics.write("step", step=self.progress.step, epoch=self.progress.epoch + 1, **values)
        perf = {"slides_per_s", "tiles_per_s", "data_wait_frac", "peak_memory_gb"}
        self._log_mlflow({("perf/" if k in perf else "train/") + k: v for k, v in values.items()})

    def _log_mlflow(self, values: dict[str, float]) -> None:
        if self._tracker is not None and values:
            self._tracker.log(values, self.progress.step)

    def _bar(self, title: str, total: int) -> "tqdm[Any]":
        # disable=None: no bar where the output is not a terminal, so that logs of schedulers stay readable.
        hidden = True if not self._is_first or not self.config.bookkeeping.progress else None
        return tqdm(total=total, desc=title, unit="step", disable=hidden, leave=False)


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    elif a != b:
        yield prefix.rstrip(".")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

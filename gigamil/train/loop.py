"""The training loop: epochs of exact steps, validation, checkpoints; every decision is taken by all ranks together."""

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from gigamil.config.schema import RunConfig
from gigamil.data.augment import augment_block, augment_tiles, draw_turn
from gigamil.data.blocks import SlideGrid
from gigamil.data.features import features_folder
from gigamil.data.pipeline import DrawKeys, StepLoader, StepTiles
from gigamil.errors import CheckpointError, ConfigError, GigamilError, Interrupted, TrainingError
from gigamil.keyed import text_key
from gigamil.memory.budget import chunks_to_keep, memory_budget
from gigamil.metrics.task import is_better
from gigamil.models.blocks import parameters_by_rate
from gigamil.models.networks import has_blank_statistics
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.meeting import Meeting
from gigamil.partition.choose import sampled_sizes
from gigamil.partition.schedule import StepPlan, balanced_order, epoch_order, plan_steps
from gigamil.shards.manifest import SlideManifest
from gigamil.train.agree import StopSignals, agree, all_or_none, first_rank_says
from gigamil.train.average import WeightAverage
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import SlideSet, check_grids, load_training_data, open_source, unused_keys
from gigamil.train.dense import dense_geometry, largest_grids, refuse_patients
from gigamil.train.engine import DeepSpeedEngine, TrainingState, deepspeed_config, make_optimizer
from gigamil.train.handshake import refuse_unlike_data
from gigamil.train.identity import refuse_other_run, run_identity
from gigamil.train.memory import MemoryMeter, import_encoder, peak_memory_bytes
from gigamil.train.monitor import AttentionMonitor, AttentionWatch, encoder_drift
from gigamil.train.plan import best_chunk, memory_of_shared
from gigamil.train.prepare import prepare_model, set_batchnorm, warm_start
from gigamil.train.recorder import Recorder
from gigamil.train.records import git_commit, versions
from gigamil.train.schedule import learning_rates
from gigamil.train.select import sampled_plans, selected_plan
from gigamil.train.spent import Spent
from gigamil.train.stale import read_time, refuse_stale
from gigamil.train.step import FEATURE_ROWS, ExactStep, Ranks, StepResult, fit_chunk
from gigamil.train.stragglers import AgreedShares, RankMeter, StragglerWatch, shares_by_speed
from gigamil.train.system import sample_system
from gigamil.train.task import chosen_metric, refuse_classless, task_of_run, validation_values
from gigamil.train.taught import TaughtStep, TrustedTiles, refuse_phases, refuse_untaught

_log = logging.getLogger("gigamil")
_MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds besides weights and moments.

    Attributes:
        epoch, step_in_epoch: next step to make.
        step: optimiser steps made, skipped ones included (draws and learning rates count them).
        best_score, best_loss, best_epoch: of validation; None before the first. Of equal scores the lower loss is better.
        epochs_without_better: for early stopping.
        skipped_in_a_row: steps whose loss was not finite.
        num_keep: chunks whose graphs are kept; part of the state, so that a resumed run does the same work.
        chunk: tiles per encoder call, smaller than configured once memory ran out; sums depend on it.
        memory_settings: what both were chosen for; other settings choose anew.
        metrics_bytes: size of metrics.jsonl at the commit.
        mlflow_run: id of the MLflow run.
        spent: on training so far.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_score: float | None = None
    best_loss: float | None = None
    best_epoch: int | None = None
    epochs_without_better: int = 0
    skipped_in_a_row: int = 0
    num_keep: int | None = None
    chunk: int | None = None
    memory_settings: str = ""
    metrics_bytes: int = 0
    mlflow_run: str | None = None
    spent: Spent = field(default_factory=Spent)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """Where a checkpoint stands; before there were tasks the score was an AUC, and spending was not counted."""
        known = {name: facts[name] for name in cls.__dataclass_fields__ if name not in ("best_score", "spent")}
        score = facts["best_score"] if "best_score" in facts else facts["best_auc"]
        return cls(**known, best_score=score, spent=Spent(**facts.get("spent", {})))


class Trainer:
    """Trains what a configuration describes, on the ranks that it is given. All ranks make one and call `fit`.

    Args:
        config: resolved configuration; equal on all ranks.
        ranks: process groups (`gigamil.train.engine.start_distributed`).
        device: of this rank.
        stop: signals that were caught since the process started; None catches them during `fit`.
        meeting: of the ranks, to compare their data; None takes them for the same.
    Raises:
        ConfigError, CohortError, ShardError, CheckpointError: before anything is trained, on all ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        device: torch.device,
        stop: StopSignals | None = None,
        meeting: Meeting | None = None,
    ) -> None:
        refuse_phases(config)
        self.config, self._regime = config, config.science.regime
        self.out = config.bookkeeping.out
        self.progress = Progress()
        self._ranks = ranks
        self._device = device
        self._stop = stop
        self._signals = StopSignals() if stop is None else stop
        self._store = CheckpointStore(self.out / "checkpoints", config.bookkeeping.keep_checkpoints)
        self._recorder: Recorder | None = None
        with all_or_none(ranks, device):
            import_encoder(config)
        self._memory = MemoryMeter(device, config)
        self._memory_above = 0
        self._start: dict[str, torch.Tensor] = {}
        self._teacher: SlideModel | None = None
        self._teacher_before: str | None = None  # digest, of a checkpoint
        generation = first_rank_says(ranks, self._store.find())  # a shared folder may look older to some ranks
        with all_or_none(ranks, device):
            model, state = self._load(generation)
        self._meeting = meeting
        if meeting is not None:
            refuse_unlike_data(meeting, self._identity["data_sha256"])
        settings = deepspeed_config(config)
        self.engine = DeepSpeedEngine(
            model, make_optimizer(model, config), settings, device, timeout_s=config.execution.timeout_s
        )
        if state is not None:
            self.engine.load_state(state)
        decay = config.science.optim.ema
        self._average = None if decay is None else WeightAverage(self.engine, decay)
        if self._average is not None and state is not None:
            self._average.load(state.moments)
        self._steps_per_epoch = -(-len(self._train) // config.science.slides_per_step)
        self._num_steps = self._steps_per_epoch * config.science.epochs
        chunk, num_keep = self._choose_memory()
        self.progress = replace(self.progress, chunk=chunk, num_keep=num_keep, memory_settings=self._memory_settings())
        share = partial(memory_budget, config.execution.tile_cache, local_ranks=ranks.topology.local_size, default=0.25)
        self._device_bytes, self._main_bytes = share(device=device), share(device=torch.device("cpu"))
        self._meter, self._watch = RankMeter(ranks, device), StragglerWatch()
        self._attention = AttentionWatch()
        self._span_shares = AgreedShares(config.execution.prefetch)
        self._step = self._make_train_step(chunk, num_keep)
        self._evaluator = self._make_step(self._val, chunk, 0)
        self._scanner = self._make_step(self._train, chunk, 0)
        self._last_save = time.monotonic()
        self._last_wait = 0.0
        with all_or_none(ranks, device):
            if ranks.topology.rank == 0:
                self._open_records(settings)

    def fit(self) -> Progress:
        """Train to the end, or from where the last checkpoint stands.

        Raises:
            Interrupted: a signal asked to stop; a checkpoint was committed.
            TrainingError: three steps in a row had a loss or a gradient that is not finite, or a rank met an error.
        """
        final: dict[str, Any] = {}
        with ExitStack() as stack:
            if self._stop is None:
                stack.enter_context(self._signals)
            if self._recorder is not None:
                stack.enter_context(self._recorder.ended(final, self._store.folder))
            every_s = self.config.bookkeeping.system_metrics_s
            if every_s is not None and self._ranks.topology.local_rank == 0:
                stack.enter_context(sample_system(self.out / "logs", every_s, self._device))
            with self._noted(final), self._settled():
                while self.progress.epoch < self.config.science.epochs and not self._is_early_stop():
                    self._train_epoch()
                    self._finish_epoch()
        return self.progress

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """What all ranks end with together: rank 0 may need a minute for MLflow, and is not to take the others for lost."""
        try:
            yield
        except GigamilError as error:
            if error.is_agreed and self._meeting is not None:
                self._meeting.settle()
            raise

    def _load(self, generation: Path | None) -> tuple[SlideModel, TrainingState | None]:
        """Everything that a rank reads by itself: data, model, checkpoint. No collective in here."""
        self.data = load_training_data(self.config)
        self._train, self._val = self.data.slides("train"), self.data.slides("val")
        if self.config.science.sampling == "balanced" and len(set(self._train.strata)) < 2:
            raise ConfigError(
                "science.sampling=balanced draws training slides of all kinds equally often, and all are of one kind here: set it to uniform"
            )
        self._identity = run_identity(self.config, self.data)
        science = self.config.science
        if self._is_on_features and self._ranks.topology.rank == 0:  # one of them has to load the encoder for it
            refuse_stale(self.config, self.data)
        self._task = task_of_run(self.config, self.data)
        self._score_name = chosen_metric(science, self._task)
        model = build_model(science, self._task.num_outputs, self.data.dim)
        refuse_classless(model, self._task)
        model.train()
        self._geometry = dense_geometry(model.encoder, self.config.slides)
        if self._geometry is not None:
            refuse_patients(science)
            check_grids(self.data.shards, self.data.splits.split_of())
        state = None if generation is None else self._resumed(generation)
        grids = self._largest_grids()
        self._chunk = self._first_chunk(model, grids)
        execution = self.config.execution.model_copy(update={"chunk": self._chunk})
        config = self.config.model_copy(update={"execution": execution})
        prepare_model(model, config, self._train, self._val, self._ranks.topology, self._device, grids)
        self._shares = tuple(parameters_by_rate(model.encoder.backbone, science.optim.layer_decay))
        data = self.data
        slide_ids = list(data.splits.split_of())
        self._bags = data.bags(slide_ids)
        self._source = open_source(self.config, data.shards, slide_ids, self._device, data.paths, self._bags)
        is_started = science.warm_start is None or self._warm_started(model, needed=state is None)
        if science.regime.name == "taught":
            refuse_untaught(self.config, model, self._task)
            self._teacher = copy.deepcopy(model)
            self._refuse_other_teacher(model)
        if self._ranks.topology.rank == 0 and is_started:
            trained = (
                (name, p) for name, p in model.named_parameters() if name.startswith("encoder.") and p.requires_grad
            )
            self._start = {name: parameter.detach().clone() for name, parameter in trained}
        if state is None:
            self.progress = replace(self.progress, spent=self._spent_on_features())
            if self._is_on_features and self._ranks.topology.rank == 0 and unused_keys(self.config):
                _log.warning(
                    "data.source=features trains no encoder; not used: %s", ", ".join(unused_keys(self.config))
                )
            if self._ranks.topology.rank == 0 and has_blank_statistics(model.encoder):
                _log.warning(
                    "BatchNorm of encoder %s keeps mean 0 and variance 1, as in a random start: give it "
                    "science.encoder.weights, or take an encoder with GroupNorm or LayerNorm (docs/encoders.md)",
                    science.encoder.name,
                )
        return model, state

    def _spent_on_features(self) -> Spent:
        """What whoever made the features has spent on the training slides, of whose tiles each was encoded once."""
        if not self._is_on_features:
            return Spent()
        encoded, taken = sum(self._train.sizes), read_time(features_folder(self.config))
        share = encoded / taken.tiles if taken.tiles else 0.0
        return Spent(tile_forwards=encoded, seconds=share * taken.seconds, rank_seconds=share * taken.rank_seconds)

    def _warm_started(self, model: SlideModel, *, needed: bool) -> bool:
        """Give a model the weights that it starts from; whether they are there.

        A continued run has its own from the checkpoint; those of the start tell how far it has come, and are the teacher of a run
        that is taught.
        """
        start = self.config.science.warm_start
        assert start is not None
        try:
            warm_start(model, start)
        except CheckpointError:
            if needed or self._regime.name == "taught":
                raise
            return False
        return True

    def _refuse_other_teacher(self, model: SlideModel) -> None:
        """Note which model teaches; refuse to go on with another one.

        Raises:
            ConfigError: the checkpoint's was another.
        """
        digest = hashlib.sha256()
        for name, values in sorted(model.state_dict().items()):
            digest.update(name.encode() + values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._identity["teacher_sha256"] = digest.hexdigest()
        if self._teacher_before not in (None, digest.hexdigest()):
            raise ConfigError(
                f"'{self.out}' was taught by another model than that of science.warm_start='{self.config.science.warm_start}'. Choose "
                "another bookkeeping.out, or delete that folder to start again."
            )

    def _resumed(self, generation: Path) -> TrainingState:
        """State of a checkpoint; where it stands goes to `progress`."""
        state, facts = self._store.read(generation)
        refuse_other_run(self._identity, facts, self.out)
        self._teacher_before = facts.get("teacher_sha256")
        self.progress = Progress.of(facts)
        is_best_epoch_end = self.progress.epoch > 0 and not (
            self.progress.step_in_epoch or self.progress.epochs_without_better
        )
        if is_best_epoch_end and self._ranks.topology.rank == 0:
            self._store.mark_best(generation)  # a kill between the two pointers of a commit would lose it
        return state

    @property
    def _goes_on(self) -> bool:
        """Whether a checkpoint says how memory is used, and by the settings of now."""
        return self.progress.num_keep is not None and self.progress.memory_settings == self._memory_settings()

    def _largest_grids(self) -> Sequence[SlideGrid]:
        """Where the tiles of a dense encoder's largest slides lie, as many as a step has."""
        if self._geometry is None:
            return ()
        train = self._train
        return largest_grids(self.data.shards, train.slide_ids, train.sizes, self.config.science.slides_per_step)

    def _first_chunk(self, model: SlideModel, grids: Sequence[SlideGrid]) -> int:
        """Tiles per encoder call as the checkpoint or `execution` say; where that is null, what suits this rank's memory."""
        execution, topology = self.config.execution, self._ranks.topology
        if self._goes_on and self.progress.chunk is not None:
            return self.progress.chunk
        if execution.chunk is not None or self._geometry is None or execution.halo == "exchange":
            return execution.tiles_per_call
        set_batchnorm(model.encoder, execution)  # what is measured is what will run
        ranks = topology.world_size, self._device, topology.local_size
        return best_chunk(self.config, model, self._train.sizes, *ranks, grids)

    def _make_step(
        self,
        slides: SlideSet,
        chunk: int,
        num_keep: int,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> ExactStep:
        science, is_dense = self.config.science, self._geometry is not None
        augment = augment_block if is_dense else augment_tiles
        return ExactStep(
            self.engine,
            self._ranks,
            self._task.losses,
            chunk=chunk,
            num_keep=num_keep,
            keys=DrawKeys(science.seed, slides.slide_ids),
            augment=None if self._is_on_features else partial(augment, settings=science.augment),
            cache_bytes=self._device_bytes,
            pad=self.config.execution.compile and not self._is_on_features,
            turn=partial(draw_turn, settings=science.augment) if is_dense else None,
            alone=alone,
            couples=self._task.couples_slides,
            class_of=self._task.class_numbers,
            num_shown=self._task.num_shown,
        )

    def _make_train_step(self, chunk: int, num_keep: int) -> ExactStep | TaughtStep:
        alone = self._meter.clock.running
        if self._teacher is None:
            return self._make_step(self._train, chunk, num_keep, alone)
        science = self.config.science
        trust = None
        if self._regime.confidence and science.warm_start is not None:
            trust = TrustedTiles(self._teacher, science.warm_start, self._train.slide_ids, self._regime.confidence)
        return TaughtStep(
            self.engine,
            self._ranks,
            self._teacher,
            chunk=chunk,
            keys=DrawKeys(science.seed, self._train.slide_ids),
            augment=partial(augment_tiles, settings=science.augment),
            trust=trust,
            alone=alone,
        )

    def _train_epoch(self) -> None:
        epoch = self.progress.epoch
        num_frozen = self.config.science.optim.freeze_encoder_epochs
        train_encoder = epoch >= num_frozen and bool(self._shares)
        if epoch and epoch == num_frozen and self.progress.step_in_epoch == 0:
            self.engine.restart_bias_correction(range(len(self._shares)))
        plans = self._plans(sampled_sizes(self._regime, self._train.sizes), self._order(epoch))
        todo = plans[self.progress.step_in_epoch :]
        loader = self._loader(self._train)
        self._last_wait = 0.0
        with self._bar(f"epoch {epoch + 1}/{self.config.science.epochs}", len(plans)) as bar:
            bar.update(self.progress.step_in_epoch)
            steps = loader.iterate(self._chosen(self._span_shares.given(todo, self.progress.step)))
            start = time.perf_counter()
            for plan, tiles in steps:
                read_s = loader.wait_s
                self._agree(tiles if isinstance(tiles, Exception) else None)
                if self._regime.name == "select":
                    plan, tiles = self._selected(plan, tiles, loader)  # type: ignore[arg-type]
                    self._agree(tiles if isinstance(tiles, Exception) else None)
                result, rates = self._train_step(plan, tiles, train_encoder)  # type: ignore[arg-type]
                seconds = time.perf_counter() - start
                self._spend(plan, train_encoder, seconds)
                start = time.perf_counter()
                wait_s, self._last_wait = loader.wait_s - self._last_wait, loader.wait_s
                inside_s = loader.wait_s - read_s
                self._meter.note(tiles.num_tiles, seconds, wait_s, inside_s, result.signal)  # type: ignore[union-attr]
                self._report_step(plan, result, rates, seconds, wait_s)
                if self.progress.step % self.config.bookkeeping.ranks_every == 0:
                    self._compare_ranks()
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.4f}")
                if result.skipped:
                    self._agree(result.error)
                    self._refuse_endless_skips(plan, result)

    def _spend(self, plan: StepPlan, train_encoder: bool, seconds: float) -> None:
        is_taught = self._teacher is not None
        step = self._step
        kept: int | float = sum(plan.sizes)
        if isinstance(step, ExactStep):
            kept = step.num_keep * step.chunk if self._geometry is None else step.kept_share
        spent = self.progress.spent.plus_step(
            plan, kept=kept, train_encoder=train_encoder, on_features=self._is_on_features
        )
        if self._regime.name == "select" and not self._is_on_features:
            spent = spent.plus_forwards(sum(self._train.sizes[slide] for slide in plan.slides))
        if is_taught:
            spent = spent.plus_forwards(sum(plan.sizes))  # the teacher's
        self.progress = replace(self.progress, spent=spent.plus_time(seconds, self._ranks.topology.world_size))

    def _compare_ranks(self) -> None:
        """All ranks learn how long each took for its tiles: for the records, and for the spans of steps to come."""
        times = self._meter.gather()
        if self.config.execution.balance == "speed":
            # Ranks on unlike processors could round otherwise, and then own other tiles.
            shares = first_rank_says(self._ranks, shares_by_speed(times, self._span_shares.newest))
            self._span_shares.adopt(self.progress.step - 1, shares)
        if self._recorder is not None:
            newest = self._span_shares.newest
            self._recorder.ranks(self.progress.step, self.progress.epoch + 1, times, self._ranks.hosts, newest)
            for straggler in self._watch.look(times):
                _log.warning("%s", straggler.words(self._ranks.name(straggler.rank), self._can_balance()))

    def _can_balance(self) -> bool:
        execution = self.config.execution
        return execution.balance == "even" and execution.halo != "exchange" and self._ranks.topology.group_size > 1

    def _train_step(self, plan: StepPlan, tiles: StepTiles, train_encoder: bool) -> tuple[StepResult, list[float]]:
        # Layers of others draw from torch's own generator: seeded by the step, it needs no place in a checkpoint.
        torch.manual_seed(text_key(f"{self.config.science.seed}/{self.progress.step}/{self._ranks.topology.rank}"))
        target_SX = self._train.target_SX[list(plan.slides)]
        optim = self.config.science.optim
        rates = learning_rates(optim, self.progress.step, self._num_steps, train_encoder, self._shares)
        result = self._step.train(
            plan,
            tiles,
            target_SX,
            self._task.weights(target_SX),
            step=self.progress.step,
            learning_rates=rates,
            train_encoder=train_encoder,
        )
        if self._average is not None and not result.skipped:
            self._average.update(self.progress.step)
        self._memory.above_start()
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            step_in_epoch=self.progress.step_in_epoch + 1,
            skipped_in_a_row=self.progress.skipped_in_a_row + 1 if result.skipped else 0,
        )
        return result, rates

    def _finish_epoch(self) -> None:
        done = self.progress.epoch
        with nullcontext() if self._average is None else self._average.in_place():
            values, drift = self._validate(), self._drift()
        score, loss = values.get(self._score_name), values.get("loss")
        better = self._is_better(score, loss)
        self.progress = replace(self.progress, epoch=done + 1, step_in_epoch=0)
        if better:
            best = replace(self.progress, best_score=score, best_loss=loss, best_epoch=done + 1)
            self.progress = replace(best, epochs_without_better=0)
        else:
            self.progress = replace(self.progress, epochs_without_better=self.progress.epochs_without_better + 1)
        if self._recorder is not None:
            extra = self._spent_so_far() | ({} if drift is None else {"encoder_drift": drift})
            self._recorder.epoch(self.progress.step, done + 1, better, values, self._score_name, extra)
        self._save(best=better)

    def _validate(self) -> dict[str, float | None]:
        """Loss and metrics of the validation slides, equal on all ranks; None where undefined. Empty without any slide.

        The loss is the task's own, without class weights and without what an aggregator adds to it.

        Raises:
            TrainingError: a logit or an embedding is not finite, or a tile cannot be read; on all ranks.
        """
        if not len(self._val):
            return {}
        logits, monitor = [], AttentionMonitor()
        loader = self._loader(self._val)
        self.engine.module.eval()
        shares = self._span_shares.at(self.progress.step)
        plans = [replace(plan, shares=shares) for plan in self._plans(self._val.sizes, range(len(self._val)))]
        for plan, tiles in loader.iterate(plans):
            self._agree(tiles if isinstance(tiles, Exception) else None)
            found_SK, attention_nA = self._evaluator.evaluate(plan, tiles)  # type: ignore[arg-type]
            logits.append(found_SK)
            monitor.note(plan, tiles, attention_nA, self._ranks)  # type: ignore[arg-type]
        self.engine.module.train()
        logits_SK = torch.cat(logits).cpu()
        if not torch.isfinite(logits_SK).all():
            bad = [self._val.slide_ids[i] for i in torch.nonzero(~torch.isfinite(logits_SK).all(1)).flatten()]
            raise TrainingError(f"the prediction of validation slides {bad[:5]} is not finite")
        classes_S = self._task.class_numbers(self._val.target_SX)
        is_negative = [] if classes_S is None else (classes_S == 0).tolist()
        health: dict[str, float | None] = dict(monitor.values(is_negative))
        if self._recorder is not None and self._evaluator.is_attention:
            warning = self._attention.look(monitor, is_negative)
            if warning is not None:
                _log.warning("%s", warning)
        # Ranks on unlike processors could differ in the last bit, and then on early stopping.
        values = validation_values(self._task, self._val.target_SX, logits_SK)
        return first_rank_says(self._ranks, values | health)

    def _drift(self) -> float | None:
        """How far the encoder has come; known to rank 0 alone. All ranks call it."""
        with self.engine.gathered():
            return encoder_drift(dict(self.engine.module.named_parameters()), self._start)

    def _is_better(self, score: float | None, loss: float | None) -> bool:
        before, before_loss = self.progress.best_score, self.progress.best_loss
        if loss is None or before_loss is None:
            return True  # no validation slides, or the first epoch: the newest is the best known
        if score is None or before is None or score == before:
            return loss < before_loss
        return is_better(self._score_name, score, before)

    def _agree(self, error: Exception | None) -> None:
        minutes = (time.monotonic() - self._last_save) / 60
        due = self._recorder is not None and minutes >= self.config.bookkeeping.checkpoint_minutes
        if self._recorder is not None:
            error = error or self._recorder.error
        decision = agree(self._ranks, self._device, error=error, stop=self._signals.asked, save=due)
        if decision.stop or decision.save:
            self._save(best=False)
        if decision.stop:
            raise Interrupted(
                f"stopped by a signal after step {self.progress.step}; a checkpoint is in '{self._store.folder}'. "
                "The same command continues."
            )

    def _save(self, best: bool) -> None:
        state = self._state()  # all ranks take part
        self._memory.above_start()
        self._adopt_chunk()
        # Nobody runs ahead of a commit, and a large one on a slow disk takes longer than `execution.timeout_s`.
        with all_or_none(self._ranks, self._device, first_rank_alone=True):
            if self._recorder is not None:
                self.progress = replace(self.progress, mlflow_run=self._recorder.mlflow_run)
                progress = replace(self.progress, metrics_bytes=self._recorder.sync())
                facts = asdict(progress) | self._identity | {"versions": versions()}
                self._store.commit(state, facts, step=progress.step, best=best)
        self._memory_above = self._over_ranks(self._memory.above_start(), dist.ReduceOp.MAX)
        self._last_save = time.monotonic()

    def _state(self) -> TrainingState:
        if self._average is None:
            return self.engine.state()
        with self._average.away():  # a stop may come in the middle of validation
            state = self.engine.state()
        state.moments.update(self._average.state())
        return state

    def _choose_memory(self) -> tuple[int, int]:
        """Tiles per encoder call, and calls whose graphs are kept: measured once and kept for the life of the run."""
        execution, memory = self.config.execution, self.config.execution.memory
        if self._is_on_features:
            return FEATURE_ROWS, 0  # no encoder, no graphs
        if self._goes_on and self.progress.num_keep is not None:
            return self._chunk, self.progress.num_keep
        largest = self._over_ranks(self._chunk, dist.ReduceOp.MIN)
        if execution.halo == "exchange":
            memory = memory_of_shared(self.config, self._ranks.topology.num_groups)
        if memory != "auto":
            return largest, chunks_to_keep(memory, 0, 0)
        chunk, chunk_bytes = fit_chunk(self.engine, self._ranks, largest, self.config.slides.tile_px, self._geometry)
        # Gradients and the work on a chunk without its graph come beside the kept ones, and are not there yet.
        gradients = sum(
            getattr(p, "ds_numel", p.numel()) * 4 for p in self.engine.module.parameters() if p.requires_grad
        )
        local_size, reserve = self._ranks.topology.local_size, gradients + chunk_bytes + chunk_bytes // 4
        budget = memory_budget(execution.memory_budget, self._device, local_size, reserve=reserve)
        num_keep = chunks_to_keep(memory, chunk_bytes, budget)
        return chunk, self._over_ranks(num_keep, dist.ReduceOp.MIN)

    def _adopt_chunk(self) -> None:
        """Where a rank ran out of memory, all take its smaller chunk: a continued run then sums as this one goes on."""
        self._step.chunk = self._over_ranks(self._step.chunk, dist.ReduceOp.MIN)
        self._step.num_keep = self._over_ranks(self._step.num_keep, dist.ReduceOp.MIN)
        if self._step.chunk != self.progress.chunk and self._recorder is not None:
            _log.warning("memory ran out: %d tiles per encoder call from now on", self._step.chunk)
        self.progress = replace(self.progress, chunk=self._step.chunk, num_keep=self._step.num_keep)

    def _over_ranks(self, number: int, operation: dist.ReduceOp.RedOpType) -> int:
        """The smallest or largest of all ranks' numbers."""
        if self._ranks.world is None:
            return number
        found = torch.tensor(number, device=self._device)
        dist.all_reduce(found, op=operation, group=self._ranks.world)
        return int(found)

    def _memory_settings(self) -> str:
        execution = self.config.execution
        words = (execution.memory, execution.memory_budget, execution.chunk, self._ranks.topology.world_size)
        encoder = (execution.activation_checkpointing, execution.fold_batchnorm, execution.compile, execution.halo)
        return " ".join(map(str, (*words, *encoder)))

    def _plans(self, sizes: Sequence[int], order: Sequence[int] | np.ndarray) -> list[StepPlan]:
        topology = self._ranks.topology
        per_step = self.config.science.slides_per_step
        return plan_steps(order, sizes, per_step, topology.num_groups, topology.group_size)

    def _order(self, epoch: int) -> np.ndarray:
        """Training slides of an epoch."""
        seed = self.config.science.seed
        if self.config.science.sampling == "uniform":
            return epoch_order(len(self._train), seed, epoch)
        return balanced_order(self._train.strata, seed, epoch)

    def _chosen(self, plans: Iterator[StepPlan]) -> Iterator[StepPlan]:
        """Plans with the tiles that take part, where these are drawn before the step."""
        if self._regime.name not in ("sampled", "taught"):
            return plans
        train, seed, stride_um = self._train, self.config.science.seed, self._stride_um
        places = self._source.index
        return sampled_plans(
            plans, self.progress.step, self._regime, seed, train.slide_ids, train.sizes, places, stride_um
        )

    def _stride_um(self, slide_id: str) -> float:
        """Distance of neighbouring tiles of a slide, or of a patient's first."""
        manifest = self.data.shards.manifest(self._bags[slide_id][0])
        if isinstance(manifest, SlideManifest):
            return manifest.stride_px * manifest.pixel_mpp_x
        return manifest.stride_um[0]

    def _selected(self, plan: StepPlan, tiles: StepTiles, loader: StepLoader) -> tuple[StepPlan, StepTiles | Exception]:
        """The tiles that a scan of all of them chooses; all ranks take part."""
        self.engine.module.eval()
        _, attention_nA = self._scanner.evaluate(plan, tiles)
        self.engine.module.train()
        keys = DrawKeys(self.config.science.seed, self._train.slide_ids)
        chosen = selected_plan(
            plan, tiles, attention_nA.mean(dim=1), self._regime, self._ranks, keys, self.progress.step
        )
        return chosen, loader.load_or_error(chosen)

    def _loader(self, slides: SlideSet) -> StepLoader:
        execution, tile_px, topology = self.config.execution, self.config.slides.tile_px, self._ranks.topology
        return StepLoader(
            self._source,
            slides.slide_ids,
            tile_px,
            topology,
            execution.prefetch,
            self._main_bytes,
            execution.decode_workers,
            self._geometry,
            execution.halo == "exchange",
        )

    @property
    def _is_on_features(self) -> bool:
        return self.data.dim is not None

    def _is_early_stop(self) -> bool:
        patience = self.config.science.early_stop_epochs
        return patience is not None and self.progress.epochs_without_better >= patience

    def _refuse_endless_skips(self, plan: StepPlan, result: StepResult) -> None:
        names = [self._train.slide_ids[plan.slides[position]] for position in result.skipped]
        where = ""
        if result.bad_tile is not None:
            position, number = result.bad_tile
            where = (
                f" (the embedding of tile {number} of slide '{self._train.slide_ids[plan.slides[position]]}' is not)"
            )
        if self._recorder is not None:
            self._recorder.skipped(self.progress.step, names)
        if self.progress.skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"loss or gradient not finite in {_MAX_SKIPPED_IN_A_ROW} steps in a row, last for slides {names}{where}. "
                "Weights are those before these steps. Lower science.optim.lr_*, or look at these slides with `gigamil inspect`."
            )

    def _open_records(self, settings: dict[str, Any]) -> None:
        topology = self._ranks.topology
        facts: dict[str, Any] = {
            "name": self.config.bookkeeping.name,
            "world_size": topology.world_size,
            "group_size": topology.group_size,
            "zero_stage": self.config.execution.zero_stage,
            "device": str(self._device),
            "source": self.config.data.source,
            "decoder": getattr(self._source, "decoder", None),
            "kept_chunks": self.progress.num_keep,
            "slides": {"train": len(self._train), "val": len(self._val), "test": len(self.data.splits.test)},
            "tiles": {"train": sum(self._train.sizes), "val": sum(self._val.sizes)},
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters()),
            "memory_start_bytes": self._memory.start,
            "git_commit": git_commit(Path.cwd()),
            "versions": versions(),
        }
        before = self.progress
        self._recorder = Recorder(
            self.config, settings, facts, metrics_bytes=before.metrics_bytes, mlflow_run=before.mlflow_run
        )

    @contextmanager
    def _noted(self, final: dict[str, Any]) -> Iterator[None]:
        """Leave in `final` what run.json says of the end."""
        try:
            yield
        finally:
            final["steps"] = self.progress.step
            best = {"metric": self._score_name, "value": self.progress.best_score}
            final |= {"best_epoch": self.progress.best_epoch, "best_val": best}
            final["peak_memory_above_start_bytes"] = self._memory_above
            final["spent"] = self._spent_so_far()

    def _report_step(
        self, plan: StepPlan, result: StepResult, rates: list[float], seconds: float, wait_s: float
    ) -> None:
        if self._recorder is None or self.progress.step % self.config.bookkeeping.log_every:
            return
        values = {
            "loss": result.loss,
            "lr_encoder": max(rates[:-1], default=0.0),
            "lr_head": rates[-1],
            "grad_norm": result.grad_norm,
            "slides_per_s": len(plan.slides) / seconds,
            "tiles_per_s": sum(plan.sizes) / seconds,
            "data_wait_frac": min(1.0, wait_s / seconds),
            "peak_memory_gb": peak_memory_bytes(self._device) / 1e9,
            **self._spent_so_far(),
        }
        self._recorder.step(self.progress.step, self.progress.epoch + 1, values)

    def _spent_so_far(self) -> dict[str, float]:
        spent = self.progress.spent
        return {
            "tiles_seen": spent.tiles,
            "tile_forwards": spent.tile_forwards,
            "seconds": round(spent.seconds, 3),
            "rank_seconds": round(spent.rank_seconds, 3),
        }

    def _bar(self, title: str, total: int) -> "tqdm[Any]":
        # disable=None: no bar where the output is not a terminal, so that logs of schedulers stay readable.
        hidden = None if self._recorder is not None and self.config.bookkeeping.progress else True
        return tqdm(total=total, desc=title, unit="step", disable=hidden, leave=False)

"""Averaged weights (science.optim.ema) at every ZeRO stage: the recursion, what is validated, what is kept, what goes on."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gigamil.config.schema import RunConfig
from gigamil.errors import Interrupted
from gigamil.parallel.topology import Topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

DECAY = 0.5
STAGES = (0, 1, 2, 3)
SEEN = dict[str, torch.Tensor]


def config_of(folder: Path, stage: int, name: str, ema: float | None = DECAY) -> RunConfig:
    optim = {"lr_encoder": 0.01, "lr_head": 0.02, "warmup_steps": 0, "ema": ema}
    return tiny_run(
        folder,
        science={"epochs": 2, "slides_per_step": 1, "optim": optim},
        execution={"ranks": 2, "zero_stage": stage},
        bookkeeping={"out": folder / f"{name}-{stage}"},
    )


def trainer_of(config: RunConfig, rank: int, num_ranks: int) -> Trainer:
    skip_kernel_build()
    return Trainer(config, make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks)), torch.device("cpu"))


def train(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[list[SEEN]]:
    """Train; of each run the weights before the first step and after each."""
    found = []
    for config in configs:
        trainer = trainer_of(config, rank, num_ranks)
        seen, train_step = [trainer.engine.state().parameters], trainer._step.train

        def noted(
            *args: Any, seen: list[SEEN] = seen, train_step: Any = train_step, t: Trainer = trainer, **named: Any
        ) -> Any:
            result = train_step(*args, **named)
            seen.append(t.engine.state().parameters)
            return result

        trainer._step.train = noted  # type: ignore[method-assign]
        trainer.fit()
        found.append(seen)
    return found


def stop_in_validation(rank: int, num_ranks: int, configs: list[RunConfig]) -> None:
    """A signal comes while slides are validated with the average."""
    for config in configs:
        trainer = trainer_of(config, rank, num_ranks)
        evaluate = trainer._evaluator.evaluate

        def stop(*args: Any, t: Trainer = trainer, evaluate: Any = evaluate) -> Any:
            t._signals.asked = True
            return evaluate(*args)

        with patch.object(trainer._evaluator, "evaluate", stop), pytest.raises(Interrupted):
            trainer.fit()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("average")


@pytest.fixture(scope="module")
def seen(cohort: Path) -> list[list[SEEN]]:
    """Weights of each stage on two ranks, as rank 0 saw them."""
    return run_on_ranks(train, 2, 2, [config_of(cohort, stage, "run") for stage in STAGES], timeout_s=240)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("stage", STAGES)
def test_average_follows_its_recursion_and_is_the_model_that_is_kept(
    cohort: Path, seen: list[list[SEEN]], stage: int
) -> None:
    weights = seen[STAGES.index(stage)]
    assert len(weights) == 17  # two epochs of eight steps
    average = {name: value.double() for name, value in weights[0].items()}
    for step, after in enumerate(weights[1:]):
        decay = min(DECAY, (1 + step) / (10 + step))
        average = {name: decay * value + (1 - decay) * after[name].double() for name, value in average.items()}
    store = CheckpointStore(config_of(cohort, stage, "run").bookkeeping.out / "checkpoints")
    kept, (state, _) = store.load_parameters("latest"), store.load("latest")
    assert kept.keys() == average.keys()
    for name, wanted in average.items():
        torch.testing.assert_close(kept[name].double(), wanted, rtol=1e-5, atol=1e-7)
        assert torch.equal(state.parameters[name], weights[-1][name])  # training goes on with its own
    assert any(not torch.equal(kept[name], state.parameters[name]) for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_validation_goes_on_with_the_same_bits(cohort: Path, seen: list[list[SEEN]], stage: int) -> None:
    config = config_of(cohort, stage, "stopped")
    run_on_ranks(stop_in_validation, 2, 2, [config])
    (after,) = run_on_ranks(train, 2, 2, [config])[0]
    whole = CheckpointStore(config_of(cohort, stage, "run").bookkeeping.out / "checkpoints")
    stopped = CheckpointStore(config.bookkeeping.out / "checkpoints")
    for left, right in (
        (whole.load_parameters("latest"), stopped.load_parameters("latest")),
        (whole.load("latest")[0].moments, stopped.load("latest")[0].moments),
        (seen[STAGES.index(stage)][-1], after[-1]),
    ):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def train_with_slow_average(rank: int, num_ranks: int, configs: list[RunConfig]) -> None:
    with patch("gigamil.train.average.min", lambda decay, _: decay, create=True):
        train(rank, num_ranks, configs)


def test_validation_sees_the_average(cohort: Path) -> None:
    """With a decay of nearly one the average stays where it began, and so does the validation loss."""
    configs = [config_of(cohort, 1, name, ema) for name, ema in (("still", 1 - 1e-9), ("plain", None))]
    run_on_ranks(train_with_slow_average, 1, 1, configs)
    still, plain = (validation_losses(config) for config in configs)
    assert still[0] == pytest.approx(still[1], rel=1e-6)
    assert plain[0] != pytest.approx(plain[1], rel=1e-3)


def validation_losses(config: RunConfig) -> list[float]:
    lines = (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines()
    return [entry["val_loss"] for entry in map(json.loads, lines) if entry["kind"] == "epoch"]

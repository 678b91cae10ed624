"""The real DeepSpeed engine at every ZeRO stage: exact gradients, a state that any other engine continues, a true freeze.

One start of processes per world measures everything; the tests look at what each rank found. Bounds: float32 sums in
another order give 1e-7 or so per step; resumed at the same stage and ranks there is no other order, so no difference.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.data.augment import augment_tiles
from gigamil.data.pipeline import DrawKeys
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.exactness import (
    AUGMENT,
    SEED,
    Case,
    cases,
    check_cases,
    make_case_model,
    make_case_tiles,
    own_tiles,
    slide_names,
)
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import (
    DeepSpeedEngine,
    TrainingState,
    deepspeed_config,
    make_optimizer,
    make_ranks,
    skip_kernel_build,
)
from gigamil.train.loss import cross_entropy
from gigamil.train.step import ExactStep

STAGES = (0, 1, 2, 3)
GRADIENT_BOUND, STATE_BOUND = 1e-5, 1e-6
RATES = [1e-3, 2e-3]  # encoder, head
CLIP_NORM = 0.05  # less than the norm of any of these gradients: all of them are clipped
SIZES = (13, 1, 6)
CHANGES = [(0, 2), (1, 3), (2, 1), (3, 0)]  # saved at, continued at


def few_cases(stage: int) -> list[Case]:
    """Ragged spans in one group, groups of their own, and an empty rank."""
    shapes = [(SIZES, 2, "half"), (SIZES, 1, "none"), ((1,), 2, "all")]
    return [Case(sizes, group_size, keep=keep, zero_stage=stage) for sizes, group_size, keep in shapes]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the checkpoints that two ranks write."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two_ranks(saved: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_on_ranks(measure_two_ranks, 2, 2, saved, timeout_s=240)


@pytest.fixture(scope="module")
def one_rank(saved: Path, two_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What one rank found when it continued from the checkpoints of two."""
    return run_on_ranks(measure_change_of_ranks, 1, 1, saved, CHANGES, timeout_s=240)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_one_sgd_step_has_the_gradient_of_one_process(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for found in two_ranks:
        errors = found["gradients"][stage]
        assert [error for error in errors if not error.within(GRADIENT_BOUND)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_engine_continues_bit_for_bit(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for found in two_ranks:
        assert found["loaded is saved"][stage]
        assert found["moved"][stage] > 1e-3  # the steps after the checkpoint do something
        assert found["resumed"][stage] == 0.0


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_state_continues_at_another_stage(two_ranks: list[dict[str, Any]], before: int, after: int) -> None:
    for found in two_ranks:
        assert found["changed"][before, after] <= STATE_BOUND


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_a_state_continues_on_fewer_ranks(one_rank: dict[str, Any], before: int, after: int) -> None:
    assert one_rank[before, after] <= STATE_BOUND


def test_all_stages_make_the_same_steps(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert max(found["against stage 0"].values()) <= STATE_BOUND
        assert min(found["norms"][0]) > 2 * CLIP_NORM  # so that clipping is compared too
        for stage in STAGES:
            assert found["norms"][stage] == pytest.approx(found["norms"][0], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_encoder_keeps_every_bit(two_ranks: list[dict[str, Any]], stage: int) -> None:
    for found in two_ranks:
        frozen = found["freeze"][stage]
        assert frozen["encoder_moved"] == []
        assert frozen["head_moved"] == frozen["head"]
        assert frozen["counted"] == (3, 3)  # at every stage alike, so that states can be exchanged


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_update_after_the_freeze_is_of_the_size_of_the_rate(
    two_ranks: list[dict[str, Any]], stage: int
) -> None:
    # Adam's first update is the learning rate for every element: m / sqrt(v) = g / |g|, both corrected for their start.
    for found in two_ranks:
        thawed = found["freeze"][stage]
        assert thawed["counted_after"] == (1, 4)
        assert thawed["median_update"] == pytest.approx(RATES[0], rel=0.02)
        assert thawed["largest_update"] <= 1.02 * RATES[0]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_gradients_of_every_case(num_ranks: int) -> None:
    wanted = [case for stage in STAGES for case in cases(num_ranks, stage)]
    for errors in run_on_ranks(check_cases, num_ranks, num_ranks, wanted, timeout_s=280):
        over = [(case, e) for case, e in zip(wanted, errors, strict=True) if not e.within(GRADIENT_BOUND)]
        assert over == []


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_every_change_of_stage_and_ranks(saved: Path, two_ranks: list[dict[str, Any]], num_ranks: int) -> None:
    every = list(itertools.product(STAGES, STAGES))
    for found in run_on_ranks(measure_change_of_ranks, num_ranks, num_ranks, saved, every, timeout_s=280):
        assert {change: error for change, error in found.items() if not error <= STATE_BOUND} == {}


class Training:
    """An engine with AdamW and clipping, and its steps on a fixed set of slides."""

    def __init__(self, stage: int, rank: int, num_ranks: int) -> None:
        config = RunConfig.model_validate(
            {"execution": {"zero_stage": stage, "device": "cpu"}, "science": {"optim": {"clip_norm": CLIP_NORM}}}
        )
        self.case = Case(SIZES, num_ranks)
        model = make_case_model(self.case, torch.float32)
        optimizer = make_optimizer(model, config)
        self.engine = DeepSpeedEngine(model, optimizer, deepspeed_config(config), torch.device("cpu"))
        self._topology = Topology(num_ranks, rank, rank, num_ranks, num_ranks)
        self._step = ExactStep(
            self.engine,
            make_ranks(self._topology),
            cross_entropy,
            chunk=3,
            num_keep=1,
            keys=DrawKeys(SEED, slide_names(self.case)),
            augment=lambda image, key: augment_tiles(image, key, AUGMENT),
        )

    def run(self, start: int, stop: int, train_encoder: bool = True) -> list[float]:
        """Steps start..stop-1; their draws depend on their number. Returns the gradient norms before clipping."""
        images, label_S, weight_S = make_case_tiles(self.case)
        plan = plan_steps(range(len(SIZES)), SIZES, len(SIZES), 1, self._topology.group_size)[0]
        tiles = own_tiles(images, plan, self._topology)
        rates = RATES if train_encoder else [0.0, RATES[1]]
        return [
            self._step.train(
                plan, tiles, label_S, weight_S, step=number, learning_rates=rates, train_encoder=train_encoder
            ).grad_norm
            for number in range(start, stop)
        ]


def measure_two_ranks(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    skip_kernel_build()
    parts = ("gradients", "norms", "loaded is saved", "moved", "resumed", "against stage 0", "freeze")
    found: dict[str, Any] = {name: {} for name in parts}
    finals = {}
    for stage in STAGES:
        found["gradients"][stage] = check_cases(rank, num_ranks, few_cases(stage))
        training = Training(stage, rank, num_ranks)
        norms = training.run(0, 2)
        state = training.engine.state()
        found["norms"][stage] = norms + training.run(2, 4)
        finals[stage] = training.engine.state()
        if rank == 0:
            for name, saved in ((f"stage-{stage}", state), (f"stage-{stage}-final", finals[stage])):
                CheckpointStore(folder / name).commit(saved, {}, step=0)
        torch.distributed.barrier()
        found["moved"][stage] = state_error(finals[stage], state)
        found["against stage 0"][stage] = state_error(finals[stage], finals[0])
        training = Training(stage, rank, num_ranks)
        training.engine.load_state(CheckpointStore(folder / f"stage-{stage}").load()[0])
        found["loaded is saved"][stage] = is_equal(training.engine.state(), state)
        training.run(2, 4)
        resumed = training.engine.state()
        found["resumed"][stage] = 0.0 if is_equal(resumed, finals[stage]) else state_error(resumed, finals[stage])
        found["freeze"][stage] = measure_freeze(stage, rank, num_ranks)
    found["changed"] = {(a, b): continue_error(a, b, rank, num_ranks, folder) for a, b in CHANGES}
    return found


def measure_change_of_ranks(rank: int, num_ranks: int, folder: Path, changes: list[tuple[int, int]]) -> dict:
    skip_kernel_build()
    return {(a, b): continue_error(a, b, rank, num_ranks, folder) for a, b in changes}


def continue_error(before: int, after: int, rank: int, num_ranks: int, folder: Path) -> float:
    """Load what two ranks saved at stage `before`, make two steps at stage `after`, compare with theirs."""
    training = Training(after, rank, num_ranks)
    training.engine.load_state(CheckpointStore(folder / f"stage-{before}").load()[0])
    training.run(2, 4)
    return state_error(training.engine.state(), CheckpointStore(folder / f"stage-{before}-final").load()[0])


def measure_freeze(stage: int, rank: int, num_ranks: int) -> dict[str, Any]:
    training = Training(stage, rank, num_ranks)
    start = training.engine.state()
    training.run(0, 3, train_encoder=False)
    frozen = training.engine.state()
    moved = [name for name, value in frozen.parameters.items() if not torch.equal(value, start.parameters[name])]
    training.engine.restart_bias_correction([0])
    training.run(3, 4)
    thawed = training.engine.state()
    update = torch.cat(
        [
            (thawed.parameters[name] - frozen.parameters[name]).abs().flatten()
            for name in frozen.parameters
            if name.startswith("encoder.")
        ]
    )
    update = update[update > 0]  # buffers, and a weight that dropout hid from the loss
    return {
        "encoder_moved": [name for name in moved if name.startswith("encoder.")],
        "head_moved": [name for name in moved if not name.startswith("encoder.")],
        "head": [name for name in frozen.parameters if not name.startswith("encoder.")],
        "counted": frozen.optimizer_steps,
        "counted_after": thawed.optimizer_steps,
        "median_update": float(update.median()),
        "largest_update": float(update.max()),
    }


def tensors(state: TrainingState) -> dict[str, Tensor]:
    return state.parameters | state.moments


def is_equal(found: TrainingState, wanted: TrainingState) -> bool:
    a, b = tensors(found), tensors(wanted)
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    return same and found.optimizer_steps == wanted.optimizer_steps


def state_error(found: TrainingState, wanted: TrainingState) -> float:
    """Largest ||d|| / ||parameter|| over parameters."""
    errors = [
        float((found.parameters[name] - value).norm() / value.norm()) for name, value in wanted.parameters.items()
    ]
    return max(errors)

"""A run that was stopped in the middle of an epoch goes on at any other rank count, group size and ZeRO stage.

The same slides follow in the same order. In float32 the next five losses are those of the run that was left alone, to 1e-6;
what rounding makes of them later is reported and not asserted. In float64 with SGD, which does not amplify rounding and does
not hide a wrong scale, the whole run is.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.errors import Interrupted
from gigamil.parallel.topology import Topology
from gigamil.testing.faults import StopAfter, is_same_end, step_losses
from gigamil.testing.nodes import rank_environment
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train import loop
from gigamil.train.agree import StopSignals
from gigamil.train.average import AVERAGE
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import TrainingState, make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.plain import PlainEngine

EPOCHS, STEPS_PER_EPOCH = 4, 4
STOP_AFTER = 6  # the second of four steps of an epoch
NUM_LOSSES = 5
FLOAT32_BOUND, FLOAT64_BOUND = 1e-6, 1e-12
STAGES = (0, 1, 2, 3)
WORLDS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4)]  # ranks, group size
TIMEOUT_S = 280.0


@dataclass(frozen=True)
class Job:
    """One training in a world.

    Attributes:
        config: of the run.
        stop_after: a signal comes to the last rank after so many steps; None leaves the run alone.
        float64: torch alone with SGD in the place of DeepSpeed with AdamW.
    """

    config: RunConfig
    stop_after: int | None = None
    float64: bool = False


class Float64Engine(PlainEngine):
    """What the trainer asks of its engine, in float64 and with SGD."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        *_others: Any,
        **_named: Any,
    ) -> None:
        model.double()
        groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
        super().__init__(model, torch.optim.SGD(groups), settings["gradient_clipping"] or None, dist.group.WORLD)

    def state(self) -> TrainingState:
        values = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        return TrainingState(values, {}, ())

    def load_state(self, state: TrainingState) -> None:
        self.module.load_state_dict(state.parameters)


def train(rank: int, num_ranks: int, jobs: Sequence[Job]) -> list[list[tuple[int, ...]]]:
    """Run them in turn on this rank; of each, the slides of every step that was made."""
    skip_kernel_build()
    orders = []
    for job in jobs:
        topology = Topology(num_ranks, rank, rank, num_ranks, job.config.execution.group_size or num_ranks)
        is_asked = job.stop_after is not None and rank == num_ranks - 1
        stop = StopAfter(job.stop_after) if is_asked else StopSignals()  # type: ignore[arg-type]
        with patch.object(loop, "DeepSpeedEngine", Float64Engine) if job.float64 else contextlib.nullcontext():
            trainer = Trainer(job.config, make_ranks(topology), torch.device("cpu"), stop)
            if isinstance(stop, StopAfter):
                stop.trainer = trainer
            orders.append(note_order(trainer))
            with pytest.raises(Interrupted) if job.stop_after is not None else contextlib.nullcontext():
                trainer.fit()
    return orders


def note_order(trainer: Trainer) -> list[tuple[int, ...]]:
    """A list that the slides of each step are put into."""
    order: list[tuple[int, ...]] = []
    make_step: Callable[..., Any] = trainer._step.train

    def noted(plan: Any, *args: Any, **kwargs: Any) -> Any:
        order.append(tuple(int(slide) for slide in plan.slides))
        return make_step(plan, *args, **kwargs)

    trainer._step.train = noted  # type: ignore[method-assign]
    return order


def configured(folder: Path, name: str, *, float64: bool = False, **execution: Any) -> RunConfig:
    science: dict[str, Any] = {"epochs": EPOCHS}
    if not float64:
        # tiny_run's rates, and an average that two epochs do not forget.
        science["optim"] = {"lr_encoder": 1e-3, "lr_head": 1e-3, "warmup_steps": 2, "ema": 0.95}
    if float64:  # SGD's steps are the gradient's size: with Adam's rates nothing would move
        science["optim"] = {"lr_encoder": 0.05, "lr_head": 0.1, "warmup_steps": 2}
        execution |= {"memory": "keep"}
    return tiny_run(folder, science=science, execution=execution, bookkeeping={"out": folder / name})


def continued(folder: Path, stopped: RunConfig, name: str, *, float64: bool = False, **execution: Any) -> RunConfig:
    """A copy of a stopped run, to be continued with other keys of `execution`."""
    shutil.copytree(stopped.bookkeeping.out, folder / name)
    return configured(folder, name, float64=float64, **execution)


@dataclass(frozen=True)
class Source:
    """A run that was left alone, the same one stopped, and the slides of every step."""

    calm: RunConfig
    stopped: RunConfig
    order: list[tuple[int, ...]]


def make_source(folder: Path, num_ranks: int, *, float64: bool = False, **execution: Any) -> Source:
    calm = configured(folder, "calm", float64=float64, **execution)
    stopped = configured(folder, "stopped", float64=float64, **execution)
    jobs = [Job(calm, None, float64), Job(stopped, STOP_AFTER, float64)]
    whole, part = run_on_ranks(train, num_ranks, num_ranks, jobs, timeout_s=TIMEOUT_S)[0]
    assert len(whole) == EPOCHS * STEPS_PER_EPOCH
    assert part == whole[:STOP_AFTER]
    assert step_losses(stopped) == step_losses(calm)[:STOP_AFTER]
    facts = CheckpointStore(stopped.bookkeeping.out / "checkpoints").facts("latest")
    assert (facts["epoch"], facts["step_in_epoch"]) == (1, 2)
    return Source(calm, stopped, whole)


@pytest.fixture(scope="module")
def from_two(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of two ranks that pool together, at stage 1."""
    return make_source(tmp_path_factory.mktemp("from-two"), 2, zero_stage=1)


@pytest.fixture(scope="module")
def from_four(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of four ranks in groups of two, at stage 3."""
    return make_source(tmp_path_factory.mktemp("from-four"), 4, zero_stage=3, group_size=2)


@pytest.fixture(scope="module")
def in_float64(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Of three ranks, in float64 with SGD."""
    return make_source(tmp_path_factory.mktemp("float64"), 3, float64=True)


def name_of(variant: dict[str, Any], num_ranks: int) -> str:
    """Folder of a run that went on."""
    return f"{num_ranks} ranks {variant}".replace("'", "").replace(" ", "-")


def config_of(variant: dict[str, Any], source: Source, num_ranks: int) -> RunConfig:
    """A run that has gone on, as `continue_on` made it."""
    return configured(source.stopped.bookkeeping.out.parent, name_of(variant, num_ranks), **variant)


def continue_on(source: Source, num_ranks: int, variants: Sequence[dict[str, Any]], **more: Any) -> Iterator[Any]:
    """(variant, its losses) of runs that go on from a source; checks the order of slides."""
    folder = source.stopped.bookkeeping.out.parent
    configs = [
        continued(folder, source.stopped, name_of(variant, num_ranks), **more, **variant) for variant in variants
    ]
    jobs = [Job(config, float64=bool(more.get("float64"))) for config in configs]
    orders = run_on_ranks(train, num_ranks, num_ranks, jobs, timeout_s=TIMEOUT_S)[0]
    for variant, config, order in zip(variants, configs, orders, strict=True):
        assert order == source.order[STOP_AFTER:], variant
        yield variant, step_losses(config)


def check(source: Source, num_ranks: int, variants: Sequence[dict[str, Any]]) -> float:
    """Assert the next losses in float32; returns the largest relative difference of later ones."""
    truth, drift = step_losses(source.calm), 0.0
    known = STOP_AFTER + NUM_LOSSES
    for variant, found in continue_on(source, num_ranks, variants):
        assert len(found) == len(truth), variant
        assert found[:STOP_AFTER] == truth[:STOP_AFTER], variant  # of before the stop
        assert found[:known] == pytest.approx(truth[:known], rel=FLOAT32_BOUND, abs=0), variant
        drift = max(drift, *(abs(a - b) / abs(b) for a, b in zip(found[known:], truth[known:], strict=True)))
        check_average(source.calm, config_of(variant, source, num_ranks))
    return drift


def check_average(calm: RunConfig, found: RunConfig) -> None:
    """The moving average went on too: it differs by rounding from that of the run that was left alone, not by what was forgotten."""
    wanted, own = (
        CheckpointStore(config.bookkeeping.out / "checkpoints").load("latest")[0] for config in (calm, found)
    )
    averages = {name: value for name, value in wanted.moments.items() if name.endswith(AVERAGE)}
    assert averages
    forgotten = error = 0.0
    for name, value in averages.items():
        now = wanted.parameters[name.removesuffix(AVERAGE)]
        forgotten += float((value - now).square().sum())
        error += float((own.moments[name] - value).square().sum())
    assert error < 1e-4 * forgotten, (error, forgotten)


def test_two_ranks_go_on_as_one_at_another_stage(from_two: Source) -> None:
    check(from_two, 1, [{"zero_stage": 3}])


@pytest.mark.slow
def test_the_same_ranks_go_on_bit_for_bit(from_two: Source) -> None:
    [(_, found)] = continue_on(from_two, 2, [{"zero_stage": 1}])
    assert found == step_losses(from_two.calm)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_ranks_group_and_stage_go_on(
    from_two: Source, num_ranks: int, record_property: Callable[[str, object], None]
) -> None:
    groups = [group_size for ranks, group_size in WORLDS if ranks == num_ranks]
    variants = [{"group_size": group_size, "zero_stage": stage} for group_size in groups for stage in STAGES]
    drift = check(from_two, num_ranks, variants)
    record_property("later_drift", drift)
    print(f"{num_ranks} ranks: largest relative difference of later losses {drift:.1e}")


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_fewer_ranks_go_on_with_what_four_partitioned(from_four: Source, num_ranks: int) -> None:
    check(from_four, num_ranks, [{"zero_stage": stage} for stage in (0, 3)])


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "group_size"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
def test_whole_runs_are_the_same_in_float64(in_float64: Source, num_ranks: int, group_size: int) -> None:
    truth = step_losses(in_float64.calm)
    assert abs(truth[-1] - truth[0]) > 1e-3  # the steps do something
    variants = [{"group_size": group_size, "chunk": chunk} for chunk in (8, 5)]
    for variant, found in continue_on(in_float64, num_ranks, variants, float64=True):
        assert found == pytest.approx(truth, rel=FLOAT64_BOUND, abs=0), variant


PLUGIN = '''
"""An encoder whose process is killed once, in the middle of a step, as by the kernel when memory is short."""
import os
import signal
from gigamil.models.encoder import SmallCNN, encoders


@encoders.register("killed_once")
class KilledOnce(SmallCNN):
    calls = 0

    def forward(self, image, key):
        KilledOnce.calls += 1
        is_due = os.environ["RANK"] == "1" and KilledOnce.calls > 40 and "KILL" in os.environ
        if is_due and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(image, key)
'''


@pytest.mark.slow
@pytest.mark.timeout(600)  # three starts of two ranks, and up to half a minute until all have left
def test_torchrun_restarts_a_killed_rank_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "killed_once.py").write_text(PLUGIN)
    encoder = {"name": "killed_once", "options": {"width": 4, "dropout": 0.1}}
    configs, printed = [], []
    for name, more in (("calm", {}), ("killed", {"KILL": "1"})):
        book = {"out": tmp_path / name, "checkpoint_minutes": 1e-6}
        science = {"epochs": EPOCHS, "encoder": encoder}
        config = tiny_run(tmp_path, science=science, execution={"memory": "replay"}, bookkeeping=book)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "1", "-m", "gigamil.train.worker", str(tmp_path / f"{name}.yaml")]
        code, output = run_to_end([*command, "--plugin", "killed_once"], tmp_path, more)
        assert code == 0, output[-3000:]
        configs.append(config)
        printed.append(output)
    calm, killed = configs
    assert "SIGKILL" not in printed[0]
    assert "Signal 9 (SIGKILL)" in printed[1] or "exitcode: -9" in printed[1], printed[1][-3000:]
    assert len(step_losses(killed)) == EPOCHS * STEPS_PER_EPOCH
    assert is_same_end(killed, calm)


def run_to_end(command: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a launcher; whatever it leaves behind is killed with its session."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(os.environ) | rank_environment(folder) | {"PYTHONPATH": str(folder)} | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait(10)
        log.seek(0)
        return code, log.read()

"""What `gigamil plan` predicts is what a run takes: real training, measured by the kernel."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gigamil.config.schema import Regime, RunConfig
from gigamil.parallel.topology import detect_topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import noise_run
from gigamil.train.engine import start_distributed
from gigamil.train.loop import Trainer
from gigamil.train.plan import PROCESS_BYTES, plan_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel does not tell the peak")

VIT = "timm/vit_small_patch16_224"
DENSE = "resnet18 to layer3"
OPTIONS = {VIT: {"img_size": 96, "depth": 6}, DENSE: {"dense": "layer3", "pool": 6}}  # cells of 96 px
MAX_RUNS = 5  # equal runs of a ViT on two ranks peaked at 370, 375, 429 and 430 MB: glibc fits blocks in, or does not


def train(_rank: int, config_json: str) -> None:
    config, device = RunConfig.model_validate_json(config_json), torch.device("cpu")
    Trainer(config, start_distributed(detect_topology(), device, 240), device).fit()


def measured_bytes(config: RunConfig) -> int:
    """Train; most memory of a rank above its start, as run.json tells it."""
    run_on_ranks(train, config.execution.ranks, config.model_dump_json(), timeout_s=250)
    record = json.loads((config.bookkeeping.out / "run.json").read_text())
    return int(record["peak_memory_above_start_bytes"])


def make(folder: Path, encoder: str, **execution: object) -> RunConfig:
    """Slides of 96 tiles of 96 px, two in a step: tensors outweigh everything else."""
    return noise_run(folder, encoder.split()[0], OPTIONS.get(encoder), tile_px=96, size=96, execution=execution)


def check_plan(config_of: Callable[[int], RunConfig]) -> None:
    """Compare the plan with the largest peak of runs, of which each has a fresh folder.

    That peak is what a plan must leave room for: more runs never forgive a small plan.
    """
    plan, measured = plan_run(config_of(0)), list[int]()
    while len(measured) < MAX_RUNS and (not measured or plan.peak > 1.15 * max(measured)):
        measured.append(measured_bytes(config_of(len(measured))))
    error = plan.peak / max(measured) - 1
    if os.environ.get("GIGAMIL_SHOW_PLAN"):
        print(plan.text(), f"\nmeasured {measured} bytes, plan {plan.peak / 1e6:.0f} MB, error {error:+.3f}")
    assert abs(error) <= 0.15, (plan.text(), measured)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "ranks", "execution"),
    [
        ("resnet18", 1, {"memory": "keep"}),
        ("resnet18", 1, {"memory": "replay"}),
        ("resnet18", 1, {"memory": "replay", "fold_batchnorm": False}),
        ("resnet18", 1, {"memory": "auto", "memory_budget": 400e6}),  # about half of the graphs
        ("resnet18", 1, {"memory": "replay", "zero_stage": 0}),
        ("resnet18", 2, {"memory": "keep"}),
        ("resnet18", 2, {"memory": "replay", "zero_stage": 2}),
        ("resnet18", 2, {"memory": "replay", "zero_stage": 3}),
        ("resnet50", 1, {"memory": "replay", "chunk": 8}),
        (VIT, 1, {"memory": "keep"}),
        (VIT, 2, {"memory": "replay", "zero_stage": 2}),
        (DENSE, 1, {"memory": "replay", "chunk": 64}),
        (DENSE, 1, {"memory": "keep", "chunk": 16}),
        (DENSE, 2, {"memory": "replay", "halo": "exchange"}),
        (DENSE, 2, {"memory": "keep", "halo": "exchange"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_memory_is_predicted_within_15_percent(
    folder: Path, encoder: str, ranks: int, execution: dict[str, object]
) -> None:
    check_plan(lambda _number: make(folder, encoder, ranks=ranks, **execution))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_of_a_student_is_predicted_within_15_percent(folder: Path, tmp_path: Path, ranks: int) -> None:
    start = make(folder, "resnet18", ranks=ranks, memory="auto")
    measured_bytes(start)
    science = start.science.model_copy(update={"regime": Regime(name="taught"), "warm_start": start.bookkeeping.out})

    def student(number: int) -> RunConfig:
        bookkeeping = start.bookkeeping.model_copy(update={"out": tmp_path / str(number)})
        bookkeeping.out.mkdir(exist_ok=True)
        shutil.copy(start.bookkeeping.out / "splits.json", bookkeeping.out)
        return start.model_copy(update={"science": science, "bookkeeping": bookkeeping})

    check_plan(student)


@pytest.mark.slow
def test_what_is_no_tensor_is_what_a_small_encoder_takes(folder: Path) -> None:
    config = make(folder, "small_cnn", memory="replay")
    plan = plan_run(config)
    measured = measured_bytes(config)
    assert plan.peak - PROCESS_BYTES < 50e6
    if os.environ.get("GIGAMIL_SHOW_PLAN"):
        print(f"measured {measured / 1e6:.0f} MB, tensors {(plan.peak - PROCESS_BYTES) / 1e6:.0f} MB")
    assert abs(measured - plan.peak) <= PROCESS_BYTES

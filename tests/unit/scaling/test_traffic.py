"""The collectives of a step: those that were counted once, and those that a training calls now."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from gigamil.config.schema import RunConfig
from gigamil.parallel.topology import detect_topology
from gigamil.partition.schedule import epoch_order, plan_steps
from gigamil.scaling.traffic import Collective, step_collectives
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.testing.traffic import Call, calls_of_steps, count_traffic
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.plan import build_planned_model


def planned(config: RunConfig, ranks: int, sizes: tuple[int, ...] = (20, 10)) -> tuple[Collective, ...]:
    return step_collectives(config, build_planned_model(config), sizes, len(sizes), ranks)


def of(calls: tuple[Collective, ...], purpose: str) -> list[tuple[str, int]]:
    return [(call.name, call.bytes) for call in calls if call.purpose == purpose]


def config(**execution: object) -> RunConfig:
    encoder = {"name": "small_cnn", "options": {"width": 4}}
    science = {"encoder": encoder, "aggregator": {"options": {"hidden": 8}}, "slides_per_step": 2}
    return RunConfig.model_validate({"slides": {"tile_px": 32}, "science": science, "execution": execution})


def test_zero_1_reduces_all_and_gathers_what_was_updated() -> None:
    calls = planned(config(), 3)
    numbers = sum(p.numel() for p in build_planned_model(config()).parameters())
    assert of(calls, "gradients") == [("all_reduce", 4 * numbers)]
    assert of(calls, "norm") == [("all_reduce", 4)] * 2  # encoder and head
    gathered = of(calls, "parameters")
    assert [name for name, _ in gathered] == ["all_gather_into_tensor"] * 2
    assert 0 <= 3 * sum(size for _, size in gathered) - 4 * numbers < 2 * 3 * 8
    assert of(calls, "losses") == [("all_reduce", 16)]
    assert [call.ranks for call in calls] == [3] * len(calls)


def test_a_large_model_is_reduced_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [p.numel() for p in build_planned_model(config()).parameters()]
    settings = {"zero_optimization": {"reduce_bucket_size": max(numbers)}}
    monkeypatch.setattr("gigamil.scaling.traffic.deepspeed_config", lambda config: settings)
    sizes = [size // 4 for _, size in of(planned(config(), 2), "gradients")]
    assert sum(sizes) == sum(numbers)
    assert 1 < len(sizes) < len(numbers)
    assert max(sizes) <= max(numbers)


def test_pooling_is_within_a_group() -> None:
    calls = planned(config(group_size=2), 8, (5,))
    assert {call.ranks for call in calls if call.purpose == "pooling"} == {2}
    assert {call.ranks for call in calls if call.purpose != "pooling"} == {8}
    assert not of(planned(config(group_size=1), 8, (5,)), "pooling")


def count(rank: int, configs: list[RunConfig]) -> list[list[Call]]:
    skip_kernel_build()
    found = []
    with count_traffic() as calls:
        for config in configs:
            trainer = Trainer(config, make_ranks(detect_topology(config.execution.group_size)), torch.device("cpu"))
            steps = calls_of_steps(trainer, calls)
            trainer.fit()
            found.append(steps[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_training_calls_what_was_predicted(ranks: int, tmp_path: Path) -> None:
    configs = [
        tiny_run(
            tmp_path,
            execution={"zero_stage": stage, "ranks": ranks} | ({"group_size": ranks // 2} if ranks == 4 else {}),
            science={"epochs": 1, "aggregator": {"name": name, "options": options}},
            bookkeeping={"out": tmp_path / f"run{stage}{name}"},
        )
        for stage in (0, 1, 2, 3)
        for name, options in (("gated_attention", {"hidden": 8}), ("clam_sb", {"k": 1}))
    ]
    for config, seen in zip(configs, run_on_ranks(count, ranks, configs, timeout_s=240)[0], strict=True):
        group_size = config.execution.group_size or ranks
        sizes = (23, 17, 30, 1, 12, 26, 8, 19)
        order = epoch_order(len(sizes), config.science.seed, 0)
        step = plan_steps(order, sizes, 2, ranks // group_size, group_size)[0]
        wanted = step_collectives(config, build_planned_model(config), step.group_sizes(0), 2, ranks)
        predicted = Counter((c.name, c.operation, c.bytes) for c in wanted if c.purpose != "agreement")
        assert predicted == Counter((c.name, c.operation, c.sent) for c in seen), config.execution.zero_stage

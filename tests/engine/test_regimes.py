"""Regimes that learn from some tiles: what they take depends on no rank, and the step is exact for what they take.

Float64 with SGD, so that nothing but the order of sums differs: a selection by attention is the same on any ranks.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gigamil.config.schema import RunConfig
from gigamil.parallel.topology import Topology
from gigamil.testing.faults import step_losses
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train import loop
from gigamil.train.engine import TrainingState, make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.plain import PlainEngine

TILES = 6
REGIMES: dict[str, dict[str, Any]] = {
    "uniform": {"regime": {"name": "sampled", "tiles": TILES}},
    "regions": {"regime": {"name": "sampled", "tiles": TILES, "how": "regions"}},
    "top": {"regime": {"name": "select", "tiles": TILES}},
    "weighted": {"regime": {"name": "select", "tiles": TILES, "how": "weighted"}},
    "balanced": {"sampling": "balanced"},
    "last_blocks": {"regime": {"name": "last_blocks", "blocks": 2}},
}


class Float64Engine(PlainEngine):
    """What the trainer asks of its engine, in float64 and with SGD."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        model.double()
        groups = [{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups]
        super().__init__(model, torch.optim.SGD(groups), settings["gradient_clipping"] or None, dist.group.WORLD)

    def state(self) -> TrainingState:
        return TrainingState({name: value.detach().clone() for name, value in self.module.state_dict().items()}, {}, ())


def _train(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[list[list[int]]]:
    """Train; of each run the numbers of tiles of every step, over the slides."""
    skip_kernel_build()
    found = []
    for config in configs:
        topology = Topology(num_ranks, rank, rank, num_ranks, config.execution.group_size or num_ranks)
        with patch.object(loop, "DeepSpeedEngine", Float64Engine):
            trainer = Trainer(config, make_ranks(topology), torch.device("cpu"))
            sizes: list[list[int]] = []
            train_step = trainer._step.train

            def noted(
                plan: Any, *args: Any, sizes: list[list[int]] = sizes, train_step: Any = train_step, **named: Any
            ) -> Any:
                sizes.append(list(plan.sizes))
                return train_step(plan, *args, **named)

            trainer._step.train = noted  # type: ignore[method-assign]
            trainer.fit()
        found.append(sizes)
    return found


def _configs(folder: Path, num_ranks: int, group_size: int | None = None) -> list[RunConfig]:
    optim = {"lr_encoder": 0.05, "lr_head": 0.1, "warmup_steps": 2}
    return [
        tiny_run(
            folder,
            science={"epochs": 2, "optim": optim} | science,
            execution={"ranks": num_ranks, "group_size": group_size, "chunk": 4},
            bookkeeping={"out": folder / f"{name}-{num_ranks}-{group_size}"},
        )
        for name, science in REGIMES.items()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("regimes")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[float]]:
    """Losses of each regime on one rank."""
    configs = _configs(folder, 1)
    sizes = run_on_ranks(_train, 1, 1, configs, timeout_s=240)[0]
    for name, steps in zip(REGIMES, sizes, strict=True):
        largest = max(map(max, steps))
        assert largest == (30 if name in ("balanced", "last_blocks") else TILES)
    return [step_losses(config) for config in configs]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "group_size"), [(2, None), (2, 1), (3, None), (4, 2)])
def test_a_regime_is_the_same_on_any_ranks(
    folder: Path, alone: list[list[float]], num_ranks: int, group_size: int | None
) -> None:
    configs = _configs(folder, num_ranks, group_size)
    run_on_ranks(_train, num_ranks, num_ranks, configs, timeout_s=240)
    for name, config, truth in zip(REGIMES, configs, alone, strict=True):
        assert abs(truth[-1] - truth[0]) > 1e-4
        assert step_losses(config) == pytest.approx(truth, rel=1e-10, abs=0), name

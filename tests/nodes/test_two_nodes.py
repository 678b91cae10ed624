"""Training on 2 nodes x 2 ranks, started by the real launchers, is training on one machine: 1 x 4 and 1 x 1."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.parallel.topology import Topology
from gigamil.testing.faults import is_same_end, step_losses
from gigamil.testing.nodes import PORT, Launcher, Nodes, last_words, rank_environment, start_on_nodes, wait_for_all
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

NUM_LOSSES = 5
BOUND = 1e-6  # float32: sums over ranks in another order
LIMIT_S = 200.0
LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def configured(folder: Path, name: str) -> RunConfig:
    """Two epochs of four steps; runs of one folder differ in nothing but their own folder."""
    config = tiny_run(folder, bookkeeping={"out": folder / name})
    (folder / f"{name}.yaml").write_text(to_yaml(config))
    return config


def train(rank: int, num_ranks: int, config: RunConfig) -> None:
    """On one machine, without a launcher."""
    skip_kernel_build()
    ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
    Trainer(config, ranks, torch.device("cpu")).fit()


def train_on_nodes(nodes: Nodes, launcher: Launcher, folder: Path, name: str) -> list[float]:
    """Losses of 2 nodes x 2 ranks."""
    config = configured(folder, name)
    codes = wait_for_all(nodes, start_on_nodes(nodes, launcher, 2, [str(folder / f"{name}.yaml")]), LIMIT_S)
    assert codes == [0, 0], last_words(nodes)
    assert [nodes.pids(node) for node in (0, 1)] == [[], []]
    return step_losses(config)


def losses_here(folder: Path, num_ranks: int) -> list[float]:
    """Losses of as many ranks on one machine."""
    config = configured(folder, f"here-{num_ranks}")
    run_on_ranks(train, num_ranks, num_ranks, config, timeout_s=LIMIT_S)
    return step_losses(config)


def assert_same_start(found: list[float], truth: list[float]) -> None:
    assert len(found) == len(truth) == 8
    assert len(set(truth)) == 8  # it does learn
    assert found[:NUM_LOSSES] == pytest.approx(truth[:NUM_LOSSES], rel=BOUND, abs=0)


def test_two_nodes_under_deepspeed_train_as_one_process(nodes: Nodes, tmp_path: Path) -> None:
    found = train_on_nodes(nodes, "deepspeed", tmp_path, "nodes")
    assert nodes.bytes_sent(1) > 1e5  # gradients of 8 steps went over the link
    assert_same_start(found, losses_here(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_nodes_train_as_four_ranks_of_one_machine(nodes: Nodes, tmp_path: Path, launcher: Launcher) -> None:
    found = train_on_nodes(nodes, launcher, tmp_path, "nodes")
    assert_same_start(found, losses_here(tmp_path, 4))
    assert_same_start(found, losses_here(tmp_path, 1))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts in launch/ need bash")
def test_the_scripts_start_the_same_run(nodes: Nodes, tmp_path: Path) -> None:
    """As a user types them on each machine; both launchers, and torchrun's two ways to meet, end with the same bits."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two nodes\n\nnode0 slots=2\nnode1 slots=2\n")
    meeting = {"MASTER_ADDR": nodes.address(0), "MASTER_PORT": str(PORT)}
    variants: dict[str, tuple[str, dict[str, str]]] = {
        "deepspeed": ("deepspeed.sh", meeting | {"HOSTFILE": str(hostfile)}),
        "static": ("torchrun.sh", meeting | {"NNODES": "2", "RANKS": "2"}),
        "c10d": ("torchrun.sh", {"RDZV": f"{nodes.address(0)}:{PORT}", "NNODES": "2", "RANKS": "2"}),
    }
    configs = {}
    for name, (script, variables) in variants.items():
        configs[name] = configured(tmp_path, name)
        env = rank_environment(nodes.folder) | {"PYTHON": sys.executable} | variables
        words = ["bash", str(LAUNCH / script), str(tmp_path / f"{name}.yaml")]
        processes = [nodes.run(node, words, env | {"NODE_RANK": str(node)}) for node in (0, 1)]
        assert wait_for_all(nodes, processes, LIMIT_S) == [0, 0], last_words(nodes)
        assert f"+ {sys.executable} -m" in nodes.output(1)
    assert is_same_end(configs["static"], configs["deepspeed"])
    assert is_same_end(configs["c10d"], configs["deepspeed"])
    assert "RANK" not in os.environ

"""A rank or a node is killed or frozen, a link is cut, a job is ended: the others leave soon with one message, nothing is
left behind, and the same command continues to the same bits. benchmarks/faults.py makes more of these."""

import sys
from pathlib import Path

import pytest

from gigamil.config.schema import RunConfig
from gigamil.testing import faults
from gigamil.testing.faults import (
    KINDS,
    PROMISE_S,
    Fault,
    await_exit,
    await_step,
    faults_run,
    step_losses,
    strike,
    train_undisturbed,
    try_fault,
    wrong_messages,
)
from gigamil.testing.nodes import (
    PORT,
    Launcher,
    Nodes,
    deepspeed_part,
    last_words,
    rank_environment,
    start_on_nodes,
    wait_for_all,
    why_no_nodes,
    write_hostfile,
)

TIMEOUT_S = 900  # of a test: two launches of four ranks that may share two cores, and a wait of up to a minute
NUM_AFTER = 3  # losses compared after the fault; the checkpoint that was continued from is a little older
BOUND = 1e-6  # float32, continued on fewer ranks
# Where ranks meet and what reports is on node0, with rank 0.
FAULTS = [
    Fault("kill", 3, 5),
    Fault("kill", 0, 6),
    Fault("freeze", 3, 5),
    Fault("freeze", 0, 3),
    Fault("node", 2, 6),
    Fault("node", 0, 5),
    Fault("frozen-node", 2, 5),
    Fault("frozen-node", 0, 6),
    Fault("cut", 2, 5),
    Fault("term", 2, 5),
    Fault("term", 0, 6),
]
TRIES: list[tuple[Launcher, Fault]] = [("deepspeed", fault) for fault in FAULTS]
TRIES += [("torchrun", fault) for fault in (FAULTS[0], FAULTS[2], FAULTS[5], FAULTS[8], FAULTS[9])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs of this file."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> RunConfig:
    """The run that nothing happens to."""
    reason = why_no_nodes()
    if reason is not None:
        pytest.skip(reason)
    with Nodes(2, folder / "nodes") as nodes:
        return train_undisturbed(nodes, "deepspeed", folder)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize(("launcher", "fault"), TRIES, ids=[f"{launcher}: {fault}" for launcher, fault in TRIES])
def test_the_others_leave_and_the_restart_continues(
    nodes: Nodes, folder: Path, undisturbed: RunConfig, launcher: Launcher, fault: Fault
) -> None:
    found = try_fault(nodes, launcher, folder, fault, undisturbed)
    assert found.problems == [], found.words


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_a_node_is_lost_and_the_run_goes_on_without_it(nodes: Nodes, folder: Path, undisturbed: RunConfig) -> None:
    """The scheduler gives one node less: the same steps on two ranks, under DeepSpeed's launcher."""
    config, path = faults_run(folder, "on-one-node")
    processes = start_on_nodes(nodes, "deepspeed", 2, [str(path)])
    await_step(nodes, processes, config, 6)
    strike(nodes, Fault("node", 2, 6))
    exit_s = await_exit(nodes, [0])
    assert exit_s is not None, last_words(nodes)
    assert exit_s <= PROMISE_S

    part = deepspeed_part(nodes, 0, write_hostfile(nodes.folder / "one-host", [("node0", 2)]))
    again = nodes.run(0, [*part, "gigamil.train.worker", str(path)], rank_environment(nodes.folder))
    assert wait_for_all(nodes, [again], 300) == [0], last_words(nodes)
    assert_continued(config, undisturbed, 6)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_torchrun_starts_again_by_itself_with_the_node_that_is_left(
    nodes: Nodes, folder: Path, undisturbed: RunConfig
) -> None:
    """`--nnodes 1:2 --max-restarts`: nobody types anything after the node is lost."""
    config, path = faults_run(folder, "torchrun-elastic")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "elastic"]
    command += ["--rdzv-endpoint", f"{nodes.address(0)}:{PORT}", "-m", "gigamil.train.worker", str(path)]
    env = rank_environment(nodes.folder)
    processes = [nodes.run(node, command, env) for node in (0, 1)]
    await_step(nodes, processes, config, 6)
    strike(nodes, Fault("node", 2, 6))
    assert wait_for_all(nodes, processes[:1], 400) == [0], last_words(nodes)
    assert nodes.pids(0) == []
    assert_continued(config, undisturbed, 6)


def assert_continued(config: RunConfig, undisturbed: RunConfig, step: int) -> None:
    """All steps were made; those after the fault are those of the run that was left alone."""
    found, truth = step_losses(config), step_losses(undisturbed)
    assert len(found) == len(truth)
    known = step + NUM_AFTER
    assert found[:known] == pytest.approx(truth[:known], rel=BOUND, abs=0)


def test_what_counts_as_one_message() -> None:
    said = "rank 3 on host 'node1' is gone. All ranks end; the same command continues"
    kill = Fault("kill", 3, 5)
    assert wrong_messages(kill, [[said], []]) == []
    assert "0 messages in place of one" in wrong_messages(kill, [[], []])[0]
    assert "2 messages in place of one on node0, node1" in wrong_messages(kill, [[said], [said]])[0]
    assert "does not say rank 3" in wrong_messages(kill, [["rank 2 on host 'node1' is gone"], []])[0]
    assert wrong_messages(Fault("node", 2, 5), [[said], ["of the node that was killed"]]) == []

    cut = Fault("cut", 2, 5)
    other = "host 'node1' has had no answer from host 'node0'"
    assert wrong_messages(cut, [[said], [other]]) == []
    assert len(wrong_messages(cut, [["something"], []])) == 2
    assert wrong_messages(Fault("term", 2, 5), [["gigamil: rank 0: stopped by a signal after step 6"], []]) == []


def test_every_kind_of_fault_is_tried() -> None:
    assert {fault.kind for fault in FAULTS} == set(KINDS)


def test_runs_that_differ_in_one_bit_are_told_apart(tmp_path: Path) -> None:
    import torch

    from gigamil.train.checkpoint import CheckpointStore
    from gigamil.train.engine import TrainingState

    def finished(name: str, value: float, loss: float) -> RunConfig:
        config = RunConfig.model_validate({"bookkeeping": {"out": tmp_path / name}})
        state = TrainingState({"w": torch.tensor([value])}, {"w/exp_avg": torch.tensor([1.0])}, (1,))
        CheckpointStore(config.bookkeeping.out / "checkpoints").commit(state, {}, step=1, best=True)
        line = f'{{"kind": "step", "step": 1, "loss": {loss!r}, "tiles_per_s": {value}}}\n'
        (config.bookkeeping.out / "metrics.jsonl").write_text(line + '{"kind": "epoch", "st')  # a line half written
        return config

    run = finished("run", 1.0, 0.5)
    assert faults.metrics(run) == [("step", 1, 0.5, None, None)]
    assert faults.is_same_end(run, finished("same", 1.0, 0.5))
    assert not faults.is_same_end(run, finished("weights", 1.0 + 2**-23, 0.5))
    assert not faults.is_same_end(run, finished("loss", 1.0, 0.5000000000000001))

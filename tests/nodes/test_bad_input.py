"""What goes wrong when a job is started on several machines is refused on all of them, with the host and the cure."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import gigamil
from gigamil.config.load import to_yaml
from gigamil.testing.faults import await_exit
from gigamil.testing.nodes import (
    HIDE,
    PORT,
    Nodes,
    deepspeed_part,
    last_words,
    rank_environment,
    wait_for_all,
    write_hostfile,
)
from gigamil.testing.runs import tiny_run

TIMEOUT_S = 20  # of collectives and of meeting
LIMIT_S = 90.0  # 30, and what two ranks need to start on cores that others use too
OCCUPY = """
import socket, sys, time
with socket.create_server(("0.0.0.0", int(sys.argv[1]))):
    time.sleep(600)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """YAML of a run."""
    config = tiny_run(tmp_path, execution={"timeout_s": TIMEOUT_S})
    yaml = tmp_path / "run.yaml"
    yaml.write_text(to_yaml(config))
    return yaml


def start(
    nodes: Nodes,
    path: Path,
    *,
    words: tuple[Sequence[str], Sequence[str]] = ((), ()),
    slots: tuple[Sequence[int], Sequence[int]] = ((1, 1), (1, 1)),
    around_second: Sequence[str] = (),
) -> str:
    """Start both nodes' parts, wait until both have ended with an error, and return what they printed.

    Args:
        words: more of them, on each node.
        slots: of both hosts, in each node's own hostfile.
        around_second: what runs the command on node 1.
    """
    processes = []
    for node in (0, 1):
        hostfile = write_hostfile(nodes.folder / f"hosts-{node}", list(zip(nodes.hosts, slots[node], strict=True)))
        command = [*deepspeed_part(nodes, node, hostfile), "gigamil.train.worker", str(path), *words[node]]
        if node == 1:
            command = [*around_second, *command]
        processes.append(nodes.run(node, command, rank_environment(nodes.folder)))
    codes = wait_for_all(nodes, processes, LIMIT_S)
    assert all(codes), last_words(nodes)
    assert await_exit(nodes, [1]) is not None
    return "\n".join(nodes.output(node) for node in (0, 1))


def test_two_nodes_with_different_configurations(nodes: Nodes, path: Path) -> None:
    said = start(nodes, path, words=((), ("--science.seed", "7")))
    assert "the ranks have different configurations: science.seed is 0 on host 'node0' (rank 0) and 7 on host" in said
    assert said.count("science.seed is") == 1


def test_two_nodes_with_different_code(nodes: Nodes, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(Path(gigamil.__file__).parent, other / "gigamil", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "gigamil" / "units.py").open("a") as stream:
        stream.write("# another version\n")
    # In front of the path of `python -m` is the folder that it is started in.
    said = start(nodes, path, around_second=["sh", "-c", 'cd "$0" && exec "$@"', str(other)])
    assert "the ranks are not alike: code of gigamil is" in said
    assert "on host 'node1' (rank 1)" in said
    assert "the same gigamil on all machines" in said


def test_a_run_folder_that_is_not_shared(nodes: Nodes, path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(out, tmp_path / "copied")  # the second machine has its own copy of what `gigamil split` wrote
    copy = f'cp -r {tmp_path / "copied"}/. "$0" && exec "$@"'
    said = start(nodes, path, around_second=[*HIDE, str(out), "sh", "-c", copy, str(out)])
    assert "is not shared: rank 0 on host 'node0' wrote a file there that host 'node1' did not see" in said
    assert "storage that all hosts share" in said


def test_a_rank_without_the_data(nodes: Nodes, path: Path, tmp_path: Path) -> None:
    said = start(nodes, path, around_second=[*HIDE, str(tmp_path / "cohort" / "shards")])
    assert "rank 1 on host 'node1': " in said
    assert "shards" in said
    assert "Traceback" not in nodes.output(0)


def test_a_port_that_is_in_use(nodes: Nodes, path: Path) -> None:
    nodes.run(0, [sys.executable, "-S", "-c", OCCUPY, str(PORT)])
    said = start(nodes, path)
    assert f"rank 0 of 2 on host 'node0' could not listen for the others at {nodes.address(0)}:{PORT}" in said
    assert "Choose another MASTER_PORT" in said
    assert "rank 1 of 2 on host 'node1' could not reach the others" in nodes.output(1)
    assert "If another program uses the port" in nodes.output(1)


def test_a_host_file_with_more_slots_than_are_started(nodes: Nodes, path: Path) -> None:
    said = start(nodes, path, slots=((1, 2), (1, 1)))
    assert f"2 of 3 ranks came within {TIMEOUT_S} s (hosts 'node0', 'node1'), without rank 2" in said
    assert "number of ranks" in said


def test_machines_with_unequal_numbers_of_ranks(nodes: Nodes, path: Path) -> None:
    said = start(nodes, path, slots=((2, 1), (2, 1)))
    assert "ranks per machine is 2 on host 'node0' (rank 0) and 1 on host 'node1' (rank 2)" in said
    assert "slots in the hostfile" in said


def test_a_group_size_that_does_not_divide(nodes: Nodes, path: Path) -> None:
    wrong = ("--execution.group_size", "3")
    said = start(nodes, path, words=(wrong, wrong))
    assert "execution.group_size=3 does not divide world size 2; use one of [1, 2]" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there(nodes: Nodes, path: Path) -> None:
    wanted = ("--execution.device", "cuda")
    said = start(nodes, path, words=(wanted, wanted))
    assert "local rank 0 has no GPU: this machine shows 0" in said
    assert "set execution.device to cpu" in said

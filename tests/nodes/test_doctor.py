"""`gigamil doctor --dist` on two hosts: what it says of good ones, and that it names the one that is not fit."""

import time
from pathlib import Path

import pytest

from gigamil.testing.nodes import (
    HIDE,
    Launcher,
    Nodes,
    deepspeed_part,
    last_words,
    rank_environment,
    start_on_nodes,
    torchrun_part,
    wait_for_all,
    write_hostfile,
)

LIMIT_S = 100.0


def one_rank(nodes: Nodes, node: int, *words: object) -> list[str]:
    """The command of a machine with one rank; torchrun's agents meet before they start it."""
    return [*torchrun_part(nodes, node, 1), "gigamil", "doctor", "--dist", *map(str, words)]


def rows(nodes: Nodes) -> dict[str, str]:
    """What rank 0 reports: status and detail by name."""
    lines = [line for line in nodes.output(0).splitlines() if line.startswith(("ok  ", "warn", "fail"))]
    assert lines, last_words(nodes)
    return {
        line[6:].split("  ")[0].strip(): f"{line[:4].strip()} {line[6:].partition('  ')[2].strip()}" for line in lines
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_good_hosts(nodes: Nodes, tmp_path: Path, launcher: Launcher) -> None:
    words = ["doctor", "--dist", "--out", str(tmp_path / "runs" / "new")]
    processes = start_on_nodes(nodes, launcher, 2, words, module="gigamil")
    assert wait_for_all(nodes, processes, LIMIT_S) == [0, 0], last_words(nodes)
    found = rows(nodes)
    assert found["ranks"] == "ok 4 on 2 hosts, 2 on each, all came"
    assert found["host node1"].startswith("ok ranks 2, 3, local 0, 1")
    assert found["network"] == "ok node0 eth0 10.77.0.1, node1 eth0 10.77.0.2"
    assert found["shared folder"].startswith("ok ")
    assert found["clocks"].startswith("ok ")
    assert "node1" in found["clocks"]
    assert found["all-reduce"].startswith("ok gloo, exact;")
    assert nodes.output(0).count("these ranks can train together.") == 1
    assert "ranks" not in nodes.output(1) or launcher == "torchrun"  # rank 0 alone reports
    assert not (tmp_path / "runs").exists()
    assert nodes.bytes_sent(1) > 1e7  # the sums went over the link


@pytest.mark.slow
def test_a_folder_that_is_not_shared_names_the_host(nodes: Nodes, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    env = rank_environment(nodes.folder)
    processes = [
        nodes.run(0, one_rank(nodes, 0, "--out", out), env),
        nodes.run(1, [*HIDE, str(out), *one_rank(nodes, 1, "--out", out)], env),
    ]
    assert wait_for_all(nodes, processes, LIMIT_S) == [1, 1]  # torchrun's code for any failure
    found = rows(nodes)
    assert found["shared folder"].startswith(f"fail '{out}' of node0 is not that of node1")
    assert [name for name, text in found.items() if text.startswith("fail")] == ["shared folder"]
    assert "-> set bookkeeping.out (here --out) to a folder on storage that all hosts share" in nodes.output(0)
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_an_interface_that_one_host_does_not_have_is_named(nodes: Nodes, tmp_path: Path) -> None:
    env = rank_environment(nodes.folder)
    wrong = env | {"GLOO_SOCKET_IFNAME": "ib7"}
    words = ("--out", tmp_path)
    processes = [nodes.run(i, one_rank(nodes, i, *words), (env, wrong)[i]) for i in (0, 1)]
    assert wait_for_all(nodes, processes, LIMIT_S) == [1, 1]
    found = rows(nodes)
    assert found["network"] == "fail GLOO_SOCKET_IFNAME=ib7 is no interface of node1 that is up"
    assert found["all-reduce"].startswith("fail gloo on ")
    assert "node1" in found["all-reduce"]


@pytest.mark.slow
def test_a_host_that_never_comes_is_missed_by_the_number_of_its_ranks(nodes: Nodes, tmp_path: Path) -> None:
    hostfile = write_hostfile(nodes.folder / "hostfile", [(host, 2) for host in nodes.hosts])
    command = [*deepspeed_part(nodes, 0, hostfile), "gigamil", "doctor", "--dist", "--out", str(tmp_path)]
    start = time.monotonic()
    process = nodes.run(0, command, rank_environment(nodes.folder))
    assert process.wait(LIMIT_S) == 4
    said = [line for line in nodes.output(0).splitlines() if line.startswith("gigamil: ")]
    assert said[:-1] == ["gigamil: waiting for ranks 2, 3"] * 2  # after 10 and 20 s
    assert "2 of 4 ranks came within 25 s (hosts 'node0'), without ranks 2, 3." in said[-1]
    assert time.monotonic() - start < 60  # imports on a busy machine included

"""Nodes on one machine: they reach each other and nothing else, a cable can be pulled or made slow, nothing is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gigamil.errors import EnvironmentFault
from gigamil.testing import nodes as module
from gigamil.testing.nodes import Nodes, why_no_nodes

LIMIT_S = 20.0
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[3])) as link:
    link.sendall(bytes(int(sys.argv[2])))
    link.shutdown(socket.SHUT_WR)
    print("answer", link.recv(100).decode())
"""
MAKE = """
import sys, time
from pathlib import Path
from gigamil.testing.nodes import Nodes

with Nodes(1, Path(sys.argv[1])) as nodes:
    print(nodes.run(0, ["sleep", "600"]).pid, flush=True)
    time.sleep(600)
"""
COUNT = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    link, _ = server.accept()
    total = 0
    while data := link.recv(2**16):
        total += len(data)
    link.sendall(str(total).encode())
"""


def python(nodes: Nodes, node: int, code: str, *words: object) -> "subprocess.Popen[bytes]":
    return nodes.run(node, [sys.executable, "-S", "-c", code, *map(str, words)])


def wait_for_output(nodes: Nodes, node: int, text: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while text not in nodes.output(node):
        assert time.monotonic() < deadline, f"{nodes.hosts[node]} never said {text!r}: {nodes.output(node)}"
        time.sleep(0.01)


def send(nodes: Nodes, target: str, num_bytes: int, timeout_s: float = LIMIT_S) -> str:
    """From node 0 to what listens on node 1; what the sender printed."""
    python(nodes, 0, SEND, target, num_bytes, timeout_s).wait(LIMIT_S)
    return nodes.output(0)


def own_interfaces() -> str:
    return subprocess.run(["ip", "link", "show"], check=True, capture_output=True, text=True).stdout


def test_nodes_reach_each_other_by_name_and_have_host_names(nodes: Nodes) -> None:
    python(nodes, 1, COUNT)
    wait_for_output(nodes, 1, "ready")
    before = nodes.bytes_sent(0)
    assert "answer 100000" in send(nodes, "node1", 100_000)
    assert 100_000 < nodes.bytes_sent(0) - before < 150_000

    code = "import os, socket; print(socket.gethostname(), os.environ['GLOO_SOCKET_IFNAME'], os.environ['MINE'])"
    nodes.run(1, [sys.executable, "-c", code], {"MINE": "mine"}).wait(LIMIT_S)
    assert nodes.output(1).split() == ["node1", "eth0", "mine"]
    assert own_host() not in nodes.hosts


def own_host() -> str:
    return subprocess.run(["hostname"], check=True, capture_output=True, text=True).stdout.strip()


def test_a_cable_that_is_pulled_carries_nothing_until_it_is_put_back(nodes: Nodes) -> None:
    python(nodes, 1, COUNT)
    wait_for_output(nodes, 1, "ready")
    nodes.cut(1)
    assert "timed out" in send(nodes, nodes.address(1), 10, timeout_s=0.3)
    nodes.mend(1)
    assert "answer 10" in send(nodes, nodes.address(1), 10)


def test_a_link_can_be_made_slow(nodes: Nodes) -> None:
    python(nodes, 1, COUNT)
    wait_for_output(nodes, 1, "ready")
    nodes.limit(0, 1.6e6)  # 200 kB a second; 64 kB pass at once
    start = time.monotonic()
    assert "answer 264000" in send(nodes, "node1", 264_000)
    assert time.monotonic() - start > 0.9


def test_packets_are_held_back_where_the_kernel_can(nodes: Nodes) -> None:
    if not nodes.has_netem():
        with pytest.raises(EnvironmentFault, match="this kernel has no netem"):
            nodes.delay(0, 50)
        return
    nodes.delay(0, 50)
    python(nodes, 1, COUNT)
    wait_for_output(nodes, 1, "ready")
    start = time.monotonic()
    assert "answer 10" in send(nodes, "node1", 10)
    assert time.monotonic() - start > 0.2  # there and back for the connection, and again for the answer


def test_nothing_is_left_after_an_error() -> None:
    if why_no_nodes() is not None:
        pytest.skip(str(why_no_nodes()))
    before = own_interfaces()
    with pytest.raises(ZeroDivisionError), Nodes(2) as nodes:
        sleeper = nodes.run(0, ["sleep", "600"])
        stopped = nodes.run(1, ["sleep", "600"])
        while nodes.pids(0) != [sleeper.pid] or nodes.pids(1) != [stopped.pid]:
            time.sleep(0.01)
        nodes.signal(1, signal.SIGSTOP)
        assert own_interfaces() == before
        folder, prefix = nodes.folder, nodes._prefix
        _ = 1 / 0
    assert sleeper.poll() == stopped.poll() == -signal.SIGKILL
    assert [name for name in module._namespaces() if name.startswith(prefix)] == []
    assert own_interfaces() == before
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_by_the_next(nodes: Nodes, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", MAKE, str(tmp_path / "left")], stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        sleeper = psutil.Process(int(maker.stdout.readline()))
        left = f"gm{maker.pid}-0-node0"
        assert left in module._namespaces()
        maker.kill()
    with Nodes(1):
        assert left not in module._namespaces()
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE
    assert nodes.pids(0) == []  # those of a process that lives stay as they are


def test_the_reason_for_a_skip_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    why = why_no_nodes.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "geteuid", lambda: 1000)
        assert why() == "network namespaces need root"
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
        assert str(why()).startswith("not installed: tc (packages")
    monkeypatch.setattr(module.shutil, "which", lambda tool: f"/sbin/{tool}")

    def refuse(*words: str) -> str:
        raise EnvironmentFault("Operation not permitted")

    monkeypatch.setattr(module, "_call", refuse)
    assert why() == "network namespaces are not permitted here: Operation not permitted"

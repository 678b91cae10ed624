"""Several hosts on one machine: Linux network namespaces on a bridge, in which the real launchers start their nodes' parts.

    with Nodes(2) as nodes:
        processes = start_on_nodes(nodes, "deepspeed", 2, ["run.yaml"])
        codes = wait_for_all(nodes, processes, 120)

What nodes share here and not in a cluster: cores, memory, files, the clock and process numbers. What they have of their own:
network, address, host name; so messages name hosts, and a link can be cut, or made slow.
"""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil

from gigamil.errors import EnvironmentFault

Launcher = Literal["deepspeed", "torchrun"]
INTERFACE = "eth0"  # of every node
PORT = 29500  # where ranks meet: every set of nodes is a network of its own, so the port is free
# Words of a shell on a node, then a folder and a command: for the command the folder is empty, and its own.
HIDE = ("sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "sh")
_TOOLS = ("ip", "tc", "unshare", "mount", "hostname")  # iproute2, util-linux, hostname
_PREFIX = re.compile(r"gm(\d+)-\d+-")
_LEAVE_S = 10.0  # for processes that were killed
# In the mount namespace that `ip netns exec` makes: the machine's own host name and /etc/hosts stay as they are.
_BECOME_NODE = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
_numbers = itertools.count()  # of the sets of nodes of this process


@functools.cache
def why_no_nodes() -> str | None:
    """Why nodes cannot be made here, for the reason of a skip; None if they can. It makes one and removes it."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (packages iproute2, util-linux, hostname)"
    try:
        with Nodes(1) as nodes:
            if nodes.run(0, ["true"]).wait(10):
                return f"no process starts in a network namespace: {nodes.output(0).strip()}"
    except (EnvironmentFault, subprocess.TimeoutExpired) as error:
        return f"network namespaces are not permitted here: {error}"
    return None


class Nodes:
    """Hosts "node0", "node1", ... with a link each to a common switch; a context manager that leaves nothing behind.

    The switch is a bridge in a namespace of its own, so the machine's own interfaces and routes are not touched, and sets of
    nodes do not see each other. At the end every process that is still inside is killed. What a process left that was
    killed itself is removed when the next set is made.

    Args:
        count: 1 to 200.
        folder: keeps what processes print; None takes a temporary one, which is removed.
    Attributes:
        folder: for files that all nodes see.
        hosts: names, by number.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self.hosts = tuple(f"node{node}" for node in range(count))
        self._wanted_folder = folder
        self._prefix = f"gm{os.getpid()}-{next(_numbers)}-"
        self._switch = f"{self._prefix}switch"
        self._logs: dict[int, Path] = {}
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._wanted_folder is None:
                self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gigamil-nodes-")))
            else:
                self.folder = self._wanted_folder.resolve()
                self.folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers()
            stack.callback(self._remove)
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def address(self, node: int) -> str:
        """IPv4 address of a node; its name resolves to it on all nodes, but not outside."""
        return f"10.77.0.{node + 1}"

    def run(self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """Start a command on a node, in a session of its own.

        Args:
            env: beside this process's own variables and those that name the node's network interface.
        Returns:
            The command's own process: no shell or wrapper stays around it.
        """
        log = self.folder / f"{self.hosts[node]}-{len(self._processes)}.log"
        enter = ["ip", "netns", "exec", self._namespace(node), "unshare", "--uts", "sh", "-c", _BECOME_NODE, "sh"]
        interfaces = {"GLOO_SOCKET_IFNAME": INTERFACE, "NCCL_SOCKET_IFNAME": INTERFACE}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*enter, self.hosts[node], str(self.folder / "hosts"), *command],
                env=dict(os.environ) | interfaces | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._logs[node] = log
        self._processes.append(process)
        return process

    def output(self, node: int) -> str:
        """What the last command of a node has printed so far: its terminal."""
        return self._logs[node].read_text(errors="replace") if node in self._logs else ""

    def pids(self, node: int) -> list[int]:
        """Processes that run, or are stopped, on a node."""
        return _pids(self._namespace(node))

    def signal(self, node: int, number: signal.Signals) -> None:
        """Send a signal to every process of a node."""
        for pid in self.pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, node: int) -> None:
        """SIGKILL to every process of a node, until none is left."""
        _kill_inside(self._namespace(node))

    def cut(self, node: int) -> None:
        """Pull the node's cable, at the switch: nothing is sent on, and nobody is told."""
        _call("ip", "-n", self._switch, "link", "set", f"port{node}", "down")

    def mend(self, node: int) -> None:
        """Put the cable back."""
        _call("ip", "-n", self._switch, "link", "set", f"port{node}", "up")

    def limit(self, node: int, bits_per_s: float) -> None:
        """Bound what the node's link carries in each direction (tc tbf); replaces an earlier limit or delay.

        A burst of 10 ms, at least 64 KiB, passes at once.
        """
        burst = max(2**16, int(bits_per_s / 8 / 100))
        self._shape(node, "tbf", "rate", f"{int(bits_per_s)}bit", "burst", str(burst), "latency", "50ms")

    def delay(self, node: int, ms: float) -> None:
        """Hold each packet of the node's link back, in each direction (tc netem); replaces an earlier limit or delay.

        Raises:
            EnvironmentFault: the kernel has no netem (`has_netem`).
        """
        if not self.has_netem():
            raise EnvironmentFault(
                "links cannot be delayed: this kernel has no netem (module sch_netem). Only `limit` works here."
            )
        self._shape(node, "netem", "delay", f"{ms}ms")

    def has_netem(self) -> bool:
        """Whether the kernel can delay packets."""
        try:
            _call("tc", "-n", self._switch, "qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1ms")
        except EnvironmentFault:
            return False
        return True

    def bytes_sent(self, node: int) -> int:
        """Bytes that the node has put on its link so far: headers, acknowledgements and what was sent again included."""
        path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(_call("ip", "netns", "exec", self._namespace(node), "cat", path))

    def _namespace(self, node: int) -> str:
        return f"{self._prefix}{self.hosts[node]}"

    def _build(self) -> None:
        names = [f"{self.address(node)} {host}\n" for node, host in enumerate(self.hosts)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        switch = self._switch
        _call("ip", "netns", "add", switch)
        _call("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        _call("ip", "-n", switch, "link", "set", "switch", "up")
        for node in range(len(self.hosts)):
            inside, port = self._namespace(node), f"port{node}"
            _call("ip", "netns", "add", inside)
            peer = ("peer", "name", INTERFACE, "netns", inside)
            _call("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
            _call("ip", "-n", switch, "link", "set", port, "master", "switch", "up")
            _call("ip", "-n", inside, "address", "add", f"{self.address(node)}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _call("ip", "-n", inside, "link", "set", interface, "up")

    def _shape(self, node: int, *words: str) -> None:
        # A queue shapes what leaves an interface: one end of the cable for each direction.
        for namespace, interface in ((self._namespace(node), INTERFACE), (self._switch, f"port{node}")):
            _call("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *words)

    def _remove(self) -> None:
        for name in _namespaces():
            if name.startswith(self._prefix):
                _remove_namespace(name)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):  # one that never came as far as its namespace
                process.wait(_LEAVE_S)


def start_on_nodes(
    nodes: Nodes,
    launcher: Launcher,
    ranks_per_node: int,
    words: Sequence[str],
    *,
    module: str = "gigamil.train.worker",
    env: Mapping[str, str] | None = None,
) -> "list[subprocess.Popen[bytes]]":
    """Start each node's part of a launcher, as a user without ssh types it on each machine; ranks are on the CPU.

    Args:
        ranks_per_node: processes on each node, of one thread.
        words: what the module is given: for training, the YAML and overrides.
        env: more variables, of all ranks.
    Returns:
        The launcher's process on each node.
    """
    hostfile = write_hostfile(nodes.folder / "hostfile", [(host, ranks_per_node) for host in nodes.hosts])
    variables = rank_environment(nodes.folder) | dict(env or {})
    if launcher == "deepspeed":
        launch = [deepspeed_part(nodes, node, hostfile) for node in range(len(nodes.hosts))]
    else:
        launch = [torchrun_part(nodes, node, ranks_per_node) for node in range(len(nodes.hosts))]
    return [nodes.run(node, [*part, module, *words], variables) for node, part in enumerate(launch)]


def write_hostfile(path: Path, slots: Sequence[tuple[str, int]]) -> Path:
    """A hostfile of DeepSpeed: hosts, and ranks on each."""
    path.write_text("".join(f"{host} slots={number}\n" for host, number in slots))
    return path


def deepspeed_part(nodes: Nodes, node: int, hostfile: Path) -> list[str]:
    """What is typed on a node, up to the module: DeepSpeed's launcher without ssh."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank"]
    command += ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
    return [*command, "--master_addr", nodes.address(0), "--master_port", str(PORT), "--module"]


def torchrun_part(nodes: Nodes, node: int, ranks_per_node: int) -> list[str]:
    """What is typed on a node, up to the module: torchrun with fixed numbers of nodes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks_per_node)]
    command += ["--nnodes", str(len(nodes.hosts)), "--node-rank", str(node), "--max-restarts", "0"]
    return [*command, "--master-addr", nodes.address(0), "--master-port", str(PORT), "-m"]


def rank_environment(folder: Path) -> dict[str, str]:
    """Variables of ranks that share a machine's cores; builds of DeepSpeed, should there be any, go to `folder`."""
    return {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


def wait_for_all(nodes: Nodes, processes: "Sequence[subprocess.Popen[bytes]]", timeout_s: float) -> list[int]:
    """Exit codes of what `start_on_nodes` has started.

    Raises:
        RuntimeError: some did not end in time; with the end of what each node has printed.
    """
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nodes did not end within {timeout_s:g} s\n{last_words(nodes)}") from None


def last_words(nodes: Nodes, num_characters: int = 3000) -> str:
    """The end of what each node has printed, for messages."""
    return "\n".join(f"{host}:\n{nodes.output(node)[-num_characters:]}" for node, host in enumerate(nodes.hosts))


def _namespaces() -> list[str]:
    listed: list[dict[str, str]] = json.loads(_call("ip", "-j", "netns", "list") or "[]")
    return [entry["name"] for entry in listed]


def _pids(namespace: str) -> list[int]:
    return [int(word) for word in _call("ip", "netns", "pids", namespace).split()]


def _kill_inside(namespace: str) -> None:
    deadline = time.monotonic() + _LEAVE_S
    while (pids := _pids(namespace)) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _remove_namespace(name: str) -> None:
    _kill_inside(name)
    _call("ip", "netns", "delete", name)


def _remove_leftovers() -> None:
    """Namespaces of a process that was killed, and what still runs in them."""
    for name in _namespaces():
        maker = _PREFIX.match(name)
        if maker is not None and not psutil.pid_exists(int(maker[1])):
            with suppress(EnvironmentFault):  # another process may remove the same one
                _remove_namespace(name)


def _call(*words: str) -> str:
    """What a tool prints.

    Raises:
        EnvironmentFault: it failed; with its own words.
    """
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFault(f"`{shlex.join(words)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout

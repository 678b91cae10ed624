"""What happens to a training on several nodes when a rank or a node is killed or frozen, a link is cut, a job is ended.

One try: start, strike in the middle of the steps, measure until everybody has left, start again by the same command, compare
with a run that was left alone. A hang is a result here, not an error: what takes longer than `HANG_S` is killed and reported.
"""

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import psutil
import torch

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.testing.nodes import Launcher, Nodes, last_words, start_on_nodes, wait_for_all
from gigamil.testing.runs import tiny_run
from gigamil.train.agree import StopSignals
from gigamil.train.checkpoint import CheckpointStore

if TYPE_CHECKING:
    from gigamil.train.loop import Trainer

Kind = Literal["kill", "freeze", "node", "frozen-node", "cut", "term"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROMISE_S = 30.0  # in which everybody leaves
HANG_S = 60.0
RANKS_PER_NODE = 2
_START_S, _RUN_S = 240.0, 420.0  # four ranks may share two cores
# A checkpoint each 0.3 s: some steps are made again after a fault, and some faults hit while one is written.
_CHECKPOINT_MINUTES = 0.005
_EPOCHS = 4  # of four steps


class StopAfter(StopSignals):
    """A signal that comes after a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        super().__init__()
        self.trainer: Trainer | None = None

    @property
    def asked(self) -> bool:
        return self.trainer is not None and self.trainer.progress.step >= self._step

    @asked.setter
    def asked(self, value: bool) -> None:
        """Real signals do not matter here."""


@dataclass(frozen=True)
class Fault:
    """What is done to a run on nodes of two ranks.

    Attributes:
        kind: kill or freeze (SIGKILL, SIGSTOP) one rank; node, frozen-node: the same for all processes of its node; cut: its
            link; term: SIGTERM to all processes of the node, as a scheduler ends its part of a job.
        rank: whom it hits.
        step: after which step, at least.
    """

    kind: Kind
    rank: int
    step: int

    @property
    def node(self) -> int:
        """Whom it hits."""
        return self.rank // RANKS_PER_NODE

    def __str__(self) -> str:
        where = f"rank {self.rank}" if self.kind in ("kill", "freeze") else f"node{self.node}"
        return f"{self.kind} {where} after step {self.step}"


@dataclass(frozen=True)
class Found:
    """What came of a fault.

    Attributes:
        fault: what was done.
        exit_s: until the last process of the nodes that were to leave had gone; None: not within `HANG_S`.
        messages: of each node's terminal, lines in which gigamil said, after the fault, why it ends.
        orphans: processes left on any node when all was over; a node that was frozen may thaw before that.
        recovered: started again by the same command it ended as the run that was left alone, bit for bit.
        words: the end of what the nodes printed, for whoever wants to know why.
    """

    fault: Fault
    exit_s: float | None
    messages: tuple[tuple[str, ...], ...]
    orphans: int
    recovered: bool
    words: str

    @property
    def problems(self) -> list[str]:
        """Which promises were broken; empty if none."""
        found = []
        if self.exit_s is None:
            found.append(f"a hang: processes were left after {HANG_S:g} s")
        elif self.exit_s > PROMISE_S:
            found.append(f"the last process left after {self.exit_s:.1f} s")
        found += wrong_messages(self.fault, self.messages)
        if self.orphans:
            found.append(f"{self.orphans} orphans")
        if not self.recovered:
            found.append("the restart did not end as the run that was left alone")
        return found


def faults_run(folder: Path, name: str) -> tuple[RunConfig, Path]:
    """A small run to be disturbed, and its YAML; runs of one folder differ in nothing but their own folder."""
    book = {"out": folder / name, "checkpoint_minutes": _CHECKPOINT_MINUTES}
    config = tiny_run(folder, science={"epochs": _EPOCHS}, bookkeeping=book)
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(config))
    return config, path


def train_undisturbed(nodes: Nodes, launcher: Launcher, folder: Path) -> RunConfig:
    """The run that others are compared with.

    Raises:
        RuntimeError: it did not end, or not well.
    """
    config, path = faults_run(folder, "undisturbed")
    codes = wait_for_all(nodes, start_on_nodes(nodes, launcher, RANKS_PER_NODE, [str(path)]), _RUN_S)
    if any(codes):
        raise RuntimeError(f"the run that nothing disturbed ended with {codes}\n{last_words(nodes)}")
    return config


def try_fault(nodes: Nodes, launcher: Launcher, folder: Path, fault: Fault, undisturbed: RunConfig) -> Found:
    """Disturb a run, see how it ends, start it again, compare.

    Args:
        nodes: two or more of two ranks.
        folder: that of `undisturbed`; gets a run folder for this try.
    Raises:
        RuntimeError: the run ended before it could be disturbed.
    """
    number = len(list(folder.glob("*.yaml")))  # a fault may be tried again, in a run of its own
    name = f"{number:03d}-{launcher}-" + str(fault).replace(" ", "-")
    config, path = faults_run(folder, name)
    processes = start_on_nodes(nodes, launcher, RANKS_PER_NODE, [str(path)])
    await_step(nodes, processes, config, fault.step)
    before = [len(_messages(nodes, node)) for node in range(len(nodes.hosts))]
    strike(nodes, fault)
    exit_s = await_exit(nodes, leaving(fault, len(nodes.hosts)))
    messages = tuple(tuple(_messages(nodes, node)[count:]) for node, count in enumerate(before))
    _mend(nodes, fault)
    orphans = sum(len(nodes.pids(node)) for node in range(len(nodes.hosts)))
    for node in range(len(nodes.hosts)):
        nodes.kill(node)
    if num_steps(config) >= num_steps(undisturbed):
        raise RuntimeError(f"{fault}: the run had made all its steps; nothing was measured\n{last_words(nodes)}")
    words = last_words(nodes)
    again = start_on_nodes(nodes, launcher, RANKS_PER_NODE, [str(path)])
    try:
        codes = wait_for_all(nodes, again, _RUN_S)
    except RuntimeError as error:  # a restart that hangs has not recovered, and the next fault finds the nodes empty
        words += f"\nrestarted: {error}"
        codes = [-1]
        for node in range(len(nodes.hosts)):
            nodes.kill(node)
    if any(codes):
        words += f"\nrestarted, ended with {codes}: {last_words(nodes)}"
    return Found(fault, exit_s, messages, orphans, not any(codes) and is_same_end(config, undisturbed), words)


def strike(nodes: Nodes, fault: Fault) -> None:
    """Do it."""
    number = {"freeze": signal.SIGSTOP, "frozen-node": signal.SIGSTOP, "term": signal.SIGTERM}.get(fault.kind)
    if fault.kind == "cut":
        nodes.cut(fault.node)
    elif fault.kind == "node":
        nodes.kill(fault.node)
    elif fault.kind in ("kill", "freeze"):
        rank_process(nodes, fault.rank).send_signal(number or signal.SIGKILL)
    elif number is not None:
        nodes.signal(fault.node, number)


def leaving(fault: Fault, num_nodes: int) -> list[int]:
    """Nodes of which every process has to go by itself: all but one that is killed or frozen as a whole."""
    return [node for node in range(num_nodes) if fault.kind not in ("node", "frozen-node") or node != fault.node]


def wrong_messages(fault: Fault, messages: Sequence[Sequence[str]]) -> list[str]:
    """What is wrong with what was said: it has to be one message, of a node that is left, that names what was lost.

    Both sides of a link that is cut lose the other, so each says so once.
    """
    if fault.kind == "cut":
        sides = [[fault.node], [node for node in range(len(messages)) if node != fault.node]]
        names: list[list[str]] = [[], [f"'node{fault.node}'"]]  # it has lost several nodes: any of them may be named
    else:
        sides = [leaving(fault, len(messages))]
        rank = [f"rank {fault.rank}"] if fault.kind in ("kill", "freeze") else []
        names = [["stopped by a signal"] if fault.kind == "term" else [*rank, f"'node{fault.node}'"]]
    found = []
    for side, wanted in zip(sides, names, strict=True):
        said = [line for node in side for line in messages[node]]
        where = ", ".join(f"node{node}" for node in side)
        if len(said) != 1:
            found.append(f"{len(said)} messages in place of one on {where}: {said}")
        elif not all(name in said[0] for name in wanted):
            found.append(f"the message on {where} does not say {' and '.join(wanted)}: {said[0]}")
    return found


def rank_process(nodes: Nodes, rank: int) -> psutil.Process:
    """The process of a rank, on its node.

    Raises:
        RuntimeError: it is not there.
    """
    for pid in nodes.pids(rank // RANKS_PER_NODE):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            words = process.cmdline()
            is_rank = "gigamil.train.worker" in words and not any(
                "launch" in w or "distributed.run" in w for w in words
            )
            if is_rank and process.environ().get("RANK") == str(rank):
                return process
    raise RuntimeError(f"rank {rank} is not on node{rank // RANKS_PER_NODE}\n{last_words(nodes)}")


def await_step(nodes: Nodes, processes: "Sequence[subprocess.Popen[bytes]]", config: RunConfig, step: int) -> None:
    """Wait until a run has made so many steps.

    Raises:
        RuntimeError: it ended before, or took too long.
    """
    deadline = time.monotonic() + _START_S
    while num_steps(config) < step:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise RuntimeError(f"step {step} of '{config.bookkeeping.out}' was not seen\n{last_words(nodes)}")
        time.sleep(0.02)


def await_exit(nodes: Nodes, which: Sequence[int]) -> float | None:
    """Seconds until no process is left on some nodes; None after `HANG_S`."""
    start = time.monotonic()
    while time.monotonic() - start < HANG_S:
        if not any(nodes.pids(node) for node in which):
            return time.monotonic() - start
        time.sleep(0.1)
    return None


def num_steps(config: RunConfig) -> int:
    """Steps that a run has recorded."""
    return sum(kind == "step" for kind, *_ in metrics(config))


def metrics(config: RunConfig) -> list[tuple[Any, ...]]:
    """What a run measured of its model: (kind, step, loss, validation loss, gradient norm) of each step and epoch."""
    path = config.bookkeeping.out / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    names = ("kind", "step", "loss", "val_loss", "grad_norm")
    return [tuple(line.get(name) for name in names) for line in lines if line["kind"] in ("step", "epoch")]


def step_losses(config: RunConfig) -> list[float]:
    """Loss of each step."""
    return [loss for kind, _, loss, *_ in metrics(config) if kind == "step"]


def is_same_end(left: RunConfig, right: RunConfig) -> bool:
    """Two runs measured the same and end with the same parameters, moments and best state, bit for bit."""
    stores = [CheckpointStore(config.bookkeeping.out / "checkpoints") for config in (left, right)]
    if metrics(left) != metrics(right) or not all(store.find() for store in stores):
        return False
    for pointer in ("latest", "best"):
        a, b = (store.load(pointer)[0] for store in stores)
        ours, theirs = a.parameters | a.moments, b.parameters | b.moments
        if a.optimizer_steps != b.optimizer_steps or ours.keys() != theirs.keys():
            return False
        if not all(torch.equal(values, theirs[name]) for name, values in ours.items()):
            return False
    return True


def _mend(nodes: Nodes, fault: Fault) -> None:
    """What was frozen or cut off comes back, as machines do; its processes have to find that they are late, and leave."""
    if fault.kind == "cut":
        nodes.mend(fault.node)
    elif fault.kind == "frozen-node":
        nodes.signal(fault.node, signal.SIGCONT)
        await_exit(nodes, [fault.node])


def _messages(nodes: Nodes, node: int) -> list[str]:
    # What rank 0 logs has no prefix; each end that a run continues from says so.
    lines = nodes.output(node).splitlines()
    return [line for line in lines if line.startswith("gigamil:") or "same command continues" in line]

"""Decisions that all ranks take together: one small reduction before each step, so that control flow never diverges."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

import torch
import torch.distributed as dist

from gigamil.errors import EnvironmentFault, GigamilError, TrainingError

if TYPE_CHECKING:
    from gigamil.train.step import Ranks

Value = TypeVar("Value")
_LONGEST_WORK_S = 3600.0  # of rank 0 alone: a machine that vanishes may leave its connections open
_works = itertools.count()  # of this process; equal on all ranks, as all come to each one


class FirstRankLost(TrainingError):
    """Rank 0 is gone: each of the others finds out, and speaks, for itself."""

    is_agreed = False


@dataclass(frozen=True)
class Decision:
    """What the world does next; equal on all ranks.

    Attributes:
        stop: some rank was asked to stop (a signal).
        save: rank 0 finds that a checkpoint is due.
    """

    stop: bool
    save: bool


def agree(ranks: "Ranks", device: torch.device, *, error: Exception | None, stop: bool, save: bool) -> Decision:
    """Reduce each rank's wishes; if a rank met an error, all raise the same one.

    Raises:
        GigamilError: the same on every rank: their common error, or a TrainingError that names the lowest failing rank.
    Cost: one all-reduce of 3 numbers; one gather of messages if there is an error.
    """
    if ranks.world is None:
        if error is not None:
            raise error
        return Decision(stop, save)
    flags = torch.tensor([error is not None, stop, save], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.world)
    any_error, any_stop, any_save = (bool(flag) for flag in flags.tolist())
    if any_error:
        _raise_same(ranks, error)
    return Decision(any_stop, any_save)


@contextmanager
def all_or_none(ranks: "Ranks", device: torch.device, *, first_rank_alone: bool = False) -> Iterator[None]:
    """Work that each rank does by itself, without collectives: if it fails on one, all raise.

    Args:
        first_rank_alone: rank 0 does it and may take longer than a collective waits: the others wait without one.
    Raises:
        FirstRankLost: on the other ranks, if rank 0 did not come back.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - agreed on, and raised, in the last line
        error = raised
    if first_rank_alone and ranks.world is not None:
        _wait_for_first_rank(ranks.topology.rank, dist.distributed_c10d._get_default_store())
    agree(ranks, device, error=error, stop=False, save=False)


def _wait_for_first_rank(rank: int, store: dist.Store, longest_s: float = _LONGEST_WORK_S) -> None:
    """Rank 0 says in the store through which the ranks have met that it is done; the others look there until it has."""
    key = f"gigamil/first_rank_done/{next(_works)}"
    if rank == 0:
        store.set(key, "done")
        return
    deadline, pause = time.monotonic() + longest_s, 0.01
    try:
        # Not `store.wait`: it would keep NCCL's own threads from the store, which look there whether all ranks are well.
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"it is not done after {longest_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    except (RuntimeError, OSError) as error:  # the store is gone with rank 0, or with the launcher
        raise FirstRankLost(
            f"rank 0 was lost while the others waited for it: {error}. The same command continues from the last checkpoint."
        ) from error


def first_rank_says(ranks: "Ranks", value: Value) -> Value:
    """The value that rank 0 has, on all ranks. Cost: one broadcast of a small object."""
    if ranks.world is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=ranks.world)
    return box[0]


def _raise_same(ranks: "Ranks", error: Exception | None) -> NoReturn:
    own = None if error is None else (type(error).__name__, str(error), _exit_code(error))
    told: list[tuple[str, str, int] | None] = [None] * ranks.topology.world_size
    dist.all_gather_object(told, own, group=ranks.world)
    first = next(rank for rank, what in enumerate(told) if what is not None)
    if isinstance(error, GigamilError) and all(what == told[first] for what in told):
        error.is_agreed = True
        raise error  # every rank met the same, for example in the configuration
    name, message, exit_code = told[first]  # type: ignore[misc]
    refusal = TrainingError(f"{ranks.name(first)}: {name}: {message}")
    refusal.exit_code = exit_code
    raise refusal from error


def _exit_code(error: Exception) -> int:
    if isinstance(error, OSError) and not isinstance(error, GigamilError):
        return EnvironmentFault.exit_code
    return getattr(error, "exit_code", TrainingError.exit_code)


class StopSignals:
    """Context manager: SIGTERM, SIGINT and SIGUSR1 ask for a stop after the current step instead of ending at once.

    Schedulers send SIGTERM or SIGUSR1 before the time limit.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.asked = False
        self._old: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

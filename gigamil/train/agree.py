"""Decisions that all ranks take together: one small reduction before each step, so that control flow never diverges."""

import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from gigamil.errors import TrainingError
from gigamil.train.step import Ranks


@dataclass(frozen=True)
class Decision:
    """What the world does next; equal on all ranks.

    Attributes:
        stop: some rank was asked to stop (a signal).
        save: rank 0 finds that a checkpoint is due.
    """

    stop: bool
    save: bool


def agree(ranks: Ranks, device: torch.device, *, error: Exception | None, stop: bool, save: bool) -> Decision:
    """Reduce each rank's wishes; if a rank met an error, all raise the same one.

    Raises:
        TrainingError: the error of the lowest failing rank, on every rank, naming it.
    Cost: one all-reduce of 3 numbers; one gather of messages if there is an error.
    """
    if ranks.world is None:
        if error is not None:
            raise _refusal(0, error)
        return Decision(stop, save)
    flags = torch.tensor([error is not None, stop, save], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=ranks.world)
    any_error, any_stop, any_save = (bool(flag) for flag in flags.tolist())
    if any_error:
        messages: list[str | None] = [None] * ranks.topology.world_size
        own = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(messages, own, group=ranks.world)
        first = next(rank for rank, message in enumerate(messages) if message is not None)
        raise TrainingError(f"rank {first}: {messages[first]}") from error
    return Decision(any_stop, any_save)


def _refusal(rank: int, error: Exception) -> TrainingError:
    refusal = TrainingError(f"rank {rank}: {type(error).__name__}: {error}")
    refusal.__cause__ = error
    return refusal


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

"""Count what a rank says to others: every collective of torch.distributed that is called, with its bytes.

    with count_traffic() as calls:
        step()
    assert [call.name for call in calls] == ["all_reduce", "all_reduce"]

Bytes are those of the tensors, what a rank sends to itself included. What a network carries for that is the library's affair
(a ring all-reduce sends 2 (R - 1) / R times as much).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from gigamil.train.loop import Trainer

# Collectives, and their parameters that are sent and received.
_COLLECTIVES = {
    "all_reduce": ("tensor", "tensor"),
    "broadcast": ("tensor", "tensor"),
    "all_gather": ("tensor", "tensor_list"),
    "all_gather_into_tensor": ("input_tensor", "output_tensor"),
    "reduce_scatter_tensor": ("input", "output"),
    "all_to_all": ("input_tensor_list", "output_tensor_list"),
    "all_to_all_single": ("input", "output"),
}


class Call(NamedTuple):
    """One collective call of this rank.

    Attributes:
        name: as in torch.distributed.
        operation: "sum", "max", ... of those that reduce, else empty.
        sent, received: bytes of the tensors.
    """

    name: str
    operation: str
    sent: int
    received: int


@contextmanager
def count_traffic() -> Iterator[list[Call]]:
    """Record the collectives that this rank calls inside, in their order; those of a backward too.

    Sees calls through the names in `torch.distributed`, which is how gigamil and DeepSpeed make them.
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            stack.enter_context(patch.object(dist, name, _counting(name, calls)))
        yield calls


def calls_of_steps(trainer: Trainer, calls: list[Call]) -> list[list[Call]]:
    """What each step of a training calls, once it trains; in a list that grows with its steps.

    Args:
        trainer: that has not begun.
        calls: as `count_traffic` gives them.
    """
    train_step, steps = trainer._train_step, list[list[Call]]()

    def counted(*words: Any) -> Any:
        first = len(calls)
        result = train_step(*words)
        steps.append(calls[first:])
        return result

    trainer._train_step = counted  # type: ignore[method-assign,assignment]
    return steps


def _counting(name: str, calls: list[Call]) -> Callable[..., Any]:
    original = getattr(dist, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        operation = str(given.arguments["op"]).rsplit(".", 1)[-1].lower() if "op" in given.arguments else ""
        sent, received = (_num_bytes(given.arguments[part]) for part in _COLLECTIVES[name])
        calls.append(Call(name, operation, sent, received))
        return original(*args, **kwargs)

    return counted


def _num_bytes(tensors: Tensor | list[Tensor]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_num_bytes, tensors))

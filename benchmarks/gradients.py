"""The gradient that an arm computes is compared before the arm is measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gigamil.testing.compare import gradient_error

BOUND = 1e-4  # float32: the arms add up the same numbers in another order

Gradients = Mapping[str, Tensor]


@contextmanager
def recorded(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Tensor]]:
    """A dict that holds a copy of the gradients that the optimiser was given last."""
    found: dict[str, Tensor] = {}

    def record(*_: object) -> None:
        found.clear()
        found.update({name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None})

    handle = optimizer.register_step_pre_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def checked(name: str, found: Gradients, truth: Gradients, bound: float = BOUND) -> float:
    """Error of the gradient, if it is rounding.

    Raises:
        SystemExit: it is more, or the arm made no step.
    """
    error = gradient_error(found, truth) if found else float("nan")
    if not error <= bound:
        raise SystemExit(f"{name}: its gradient is {error:.1e} off, so its figures mean nothing")
    return error

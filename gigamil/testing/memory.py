"""A device that has no memory left: the CPU raises no `OutOfMemoryError`, so this does."""

from typing import Any

import torch
from torch import Tensor


class NoMemoryInBackward(torch.autograd.Function):
    """Identity; its backward raises `torch.OutOfMemoryError`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("injected")

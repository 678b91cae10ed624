"""What the step asks of an engine, and the plain one: torch alone, any dtype, the reference for DeepSpeed's.

The same step runs over either, so a difference between them is DeepSpeed's doing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigamil.models.bag import Bag, Pooled
from gigamil.models.encoder import Cells


class Engine(Protocol):
    """A model, its gradients and its optimiser."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype  # of images and cotangents

    def gathered(self) -> AbstractContextManager[None]:
        """Parameters are whole inside, where the model is called; all ranks enter."""
        ...

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """Tiles -> embeddings, or a block -> those of its cells; with a graph if grad mode is on."""
        ...

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Bag -> logits (B, K) and all that the aggregator gave."""
        ...

    def backward(self, scalar: Tensor) -> None:
        """Add a scalar's gradient to the local gradients; only inside `one_reduction`."""
        ...

    def one_reduction(self) -> AbstractContextManager[None]:
        """All backwards of a step, with parameters `gathered`; on exit the mean over all ranks is taken once."""
        ...

    def step(self, learning_rates: Sequence[float]) -> float:
        """Clip, update with one learning rate per parameter group, clear gradients; returns the gradient's norm.

        A norm that is not finite leaves weights and moments as they are.
        """
        ...


class PlainEngine:
    """Torch only: local gradients, one all-reduce with mean per step, a torch optimiser.

    Args:
        model: the slide model, any float dtype.
        optimizer: a torch optimiser over its parameters; None if it only predicts.
        clip_norm: largest gradient norm; None does not clip.
        world: ranks that average gradients; None means one process.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        clip_norm: float | None = None,
        world: dist.ProcessGroup | None = None,
    ) -> None:
        self.module = model
        self.optimizer = optimizer
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self._clip_norm = clip_norm
        self._world = world

    def gathered(self) -> AbstractContextManager[None]:
        """Parameters are always whole here."""
        return nullcontext()

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """Tiles -> embeddings, or a block -> those of its cells."""
        result: Tensor = self.module("encode", image_nCHW, tile_key_n, cells)
        return result

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Bag -> logits (B, K) and all that the aggregator gave."""
        result: tuple[Tensor, Pooled] = self.module("classify", bag)
        return result

    def backward(self, scalar: Tensor) -> None:
        """Add a scalar's gradient to the local gradients."""
        scalar.backward()

    @contextmanager
    def one_reduction(self) -> Iterator[None]:
        """All backwards of a step; on exit the mean over all ranks is taken once. An error inside skips it."""
        yield
        if self._world is None:
            return
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        # One all-reduce: its latency, not its size, is what a small model pays for.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        mean = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(mean, group=self._world)
        mean /= dist.get_world_size(self._world)
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def step(self, learning_rates: Sequence[float]) -> float:
        """Clip, update, clear gradients; returns the gradient's norm before clipping."""
        if self.optimizer is None:
            raise ValueError("this engine has no optimiser: it was made to predict")
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        limit = float("inf") if self._clip_norm is None else self._clip_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

"""A moving average of the weights, for validation and for the model that a run leaves (EMA)."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from gigamil.train.engine import DeepSpeedEngine

AVERAGE = "/ema"  # in a checkpoint behind the parameter's name


class WeightAverage:
    """avg <- d avg + (1 - d) w after each optimiser step, d = min(decay, (1 + t) / (10 + t)) at step t.

    Ranks keep what they keep of the weights: at ZeRO 3 a part each.

    Args:
        engine: whose trained parameters are averaged; buffers (BatchNorm's, which do not change) are not.
        decay: below 1.
    Cost: the memory of the weights once more, and a pass over them in each step.
    Source: Polyak and Juditsky 1992; the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage. Tests:
        engine/test_average.py
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self._engine = engine
        self._decay = decay
        self._is_in_place = False
        self._average = {name: part.detach().clone() for name, part in engine.working_parts().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number `step`, from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, part in self._engine.working_parts().items():
            self._average[name].lerp_(part, 1 - decay)

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, the engine's forward uses the average."""
        return self._having(True)

    def away(self) -> AbstractContextManager[None]:
        """Inside, the engine has its own weights, also where this is entered inside of `in_place`."""
        return self._having(False)

    def state(self) -> dict[str, Tensor]:
        """Whole averages on the CPU, to be kept beside the moments. A collective: all ranks call it."""
        with self.in_place(), self._engine.gathered():
            parameters = dict(self._engine.module.named_parameters())
            return {name + AVERAGE: parameters[name].detach().to("cpu", copy=True) for name in self._average}

    def load(self, moments: Mapping[str, Tensor]) -> None:
        """Continue from a state; from one that had no average, with its weights."""
        for name, part in self._average.items():
            whole = moments.get(name + AVERAGE)
            part.copy_(self._engine.working_parts()[name] if whole is None else self._engine.own_part(name, whole))

    @contextmanager
    def _having(self, in_place: bool) -> Iterator[None]:
        before = self._is_in_place
        if before != in_place:
            self._swap()
        try:
            yield
        finally:
            if self._is_in_place != before:
                self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._is_in_place = not self._is_in_place
        for name, part in self._engine.working_parts().items():
            held = part.clone()
            part.copy_(self._average[name])
            self._average[name].copy_(held)

"""A number per slide.

Shapes: as in task.py; X numbers of a slide, K = X outputs.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gigamil.tasks.task import Task, filled


@dataclass(frozen=True)
class Regression(Task):
    """Numbers, each learned in units of its standard deviation over the training slides.

    Args:
        names: of the numbers.
        means, deviations: over the training slides; deviations above 0.
        loss: huber: squared below one standard deviation, absolute beyond; mae: absolute; mse: half the square.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    loss: Literal["huber", "mae", "mse"] = "huber"

    @property
    def num_outputs(self) -> int:
        """One per number."""
        return len(self.names)

    @property
    def num_targets(self) -> int:
        """One per number."""
        return len(self.names)

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """The numbers."""
        return tuple(f"value_{name}" for name in self.names)

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Mean over the known numbers."""
        is_known_SX = torch.isfinite(target_SX)
        mean_X, deviation_X = target_SX.new_tensor(self.means), target_SX.new_tensor(self.deviations)
        wanted_SX = filled((target_SX - mean_X) / deviation_X, is_known_SX).to(output_SK)
        if self.loss == "huber":
            loss_SX = functional.huber_loss(output_SK, wanted_SX, reduction="none")
        elif self.loss == "mae":
            loss_SX = (output_SK - wanted_SX).abs()
        else:
            loss_SX = (output_SK - wanted_SX).square() / 2
        return filled(loss_SX, is_known_SX).sum(dim=1) / is_known_SX.sum(dim=1).clamp(min=1)

    def weights(self, target_SX: Tensor) -> Tensor:
        """How many numbers are known."""
        return torch.isfinite(target_SX).sum(dim=1).double()

    def predict(self, output_SK: Tensor) -> Tensor:
        """The numbers, in their own units."""
        value_SK = output_SK.double()
        return value_SK * value_SK.new_tensor(self.deviations) + value_SK.new_tensor(self.means)

"""The interface of a task: from the numbers that the head gives for a slide to a loss, and to what is predicted.

Shapes: S slides, K outputs of the head, X numbers that are known of a slide (its target), P numbers that are predicted.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor


class Task(ABC):
    """What is learned of slides.

    The loss of a step is the weighted mean over its slides, sum_s w_s l_s / sum_s w_s, whatever the ranks; `losses` gives l and
    `weights` gives w. A slide of which nothing is known has weight 0, and its loss is 0. Where several tasks are learned at once
    (`Several`) both have a column per task.

    Attributes:
        couples_slides: the loss of a slide depends on the outputs of others of its step.
    """

    couples_slides: ClassVar[bool] = False

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """K."""

    @property
    def num_shown(self) -> int:
        """Of the outputs those, from the first on, of which the largest says whose attention is shown where each has its own."""
        return self.num_outputs

    @property
    def num_targets(self) -> int:
        """X."""
        return 1

    @abstractmethod
    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Loss of each slide, (S,), in the dtype of the outputs; finite where the outputs are."""

    @abstractmethod
    def weights(self, target_SX: Tensor) -> Tensor:
        """Weight of each slide in the mean, (S,), float64, 0 or more."""

    @abstractmethod
    def predict(self, output_SK: Tensor) -> Tensor:
        """What is predicted, (S, P), float64, in the order of `predicted_names`."""

    @property
    @abstractmethod
    def predicted_names(self) -> tuple[str, ...]:
        """Columns of predictions.csv, P of them."""

    def class_numbers(self, target_SX: Tensor) -> Tensor | None:
        """Class of each slide, int64 (S,), for aggregators with a loss of their own; None of a task without classes."""
        return None


def filled(values: Tensor, is_known: Tensor) -> Tensor:
    """Values with 0 where they are not known, so that no NaN comes near a gradient."""
    return torch.where(is_known, values, torch.zeros_like(values))


def numbered(target_SX: Tensor) -> tuple[Tensor, Tensor]:
    """Class of each slide, 0 where it is not known, and whether it is."""
    is_known_S = torch.isfinite(target_SX[:, 0])
    return filled(target_SX[:, 0], is_known_S).long(), is_known_S


def weights_by_class(target_SX: Tensor, class_weights: Sequence[float] | None) -> Tensor:
    """Weight of each slide's class, float64 (S,), 1 if there are none; 0 of a slide whose class is not known."""
    class_S, is_known_S = numbered(target_SX)
    if class_weights is None:
        return is_known_S.double()
    return filled(target_SX.new_tensor(class_weights, dtype=torch.float64)[class_S], is_known_S)

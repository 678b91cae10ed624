"""The interface of a task: from the numbers that the head gives for a slide to a loss, and to what is predicted.

Shapes: S slides, K outputs of the head, X numbers that are known of a slide (its target), P numbers that are predicted.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gigamil.errors import CohortError


class Task(ABC):
    """What is learned of slides.

    The loss of a step is the weighted mean over its slides, sum_s w_s l_s / sum_s w_s, whatever the ranks; `losses` gives l and
    `weights` gives w. A slide of which nothing is known has weight 0, and its loss is 0.

    Attributes:
        num_outputs: K.
        num_targets: X.
        couples_slides: the loss of a slide depends on the outputs of others of its step.
    """

    num_outputs: int
    num_targets: int = 1
    couples_slides: bool = False

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

    def check(self, slide_ids: Sequence[str], target_SX: Tensor) -> None:
        """Refuse targets that make no sense.

        Raises:
            CohortError: all of them in one message, the first twenty by slide.
        """
        problems = [
            f"slide '{slide_id}': {problem}"
            for slide_id, target_X in zip(slide_ids, target_SX, strict=True)
            if (problem := self.problem(target_X)) is not None
        ]
        if problems:
            more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CohortError(f"{len(problems)} targets cannot be used:\n  " + "\n  ".join(problems[:20]) + more)

    @abstractmethod
    def problem(self, target_X: Tensor) -> str | None:
        """What is wrong with the target of a slide; None if nothing is."""


def is_class(value: Tensor, num_classes: int) -> bool:
    """A number is that of a class."""
    return bool(torch.isfinite(value)) and float(value).is_integer() and 0 <= float(value) < num_classes


def filled(values: Tensor, is_known: Tensor) -> Tensor:
    """Values with 0 where they are not known, so that no NaN comes near a gradient."""
    return torch.where(is_known, values, torch.zeros_like(values))

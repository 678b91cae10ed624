"""Classes that have an order, such as ISUP grades.

Shapes: as in task.py; C classes, K = C - 1 outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gigamil.tasks.task import Task, filled, numbered, weights_by_class


@dataclass(frozen=True)
class Ordinal(Task):
    """Each output asks of a slide that has passed the thresholds before it whether it passes the next one too (CORN).

    Output k is the logit of P(class > k | class > k - 1), so the probabilities of the classes are a chain that never
    contradicts itself, and the loss of a slide is -log P of its class.

    Args:
        classes: their names, ascending; three at least, as two are `Multiclass`.
        class_weights: of each class in the mean over slides; None: 1.
    Source: Shi, Cao and Raschka 2023, arXiv:2111.08851 (CORN), whose loss divides by the number of (slide, threshold)
        pairs of the batch; here each slide counts once, so that the loss does not depend on who shares its step.
    """

    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None

    @property
    def num_outputs(self) -> int:
        """A logit per threshold."""
        return len(self.classes) - 1

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Probability of each class."""
        return tuple(f"prob_{name}" for name in self.classes)

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """-log P(class)."""
        class_S, is_known_S = numbered(target_SX)
        class_S1 = class_S[:, None]
        threshold_K = torch.arange(self.num_outputs, device=output_SK.device)
        passed_SK = (class_S1 > threshold_K).to(output_SK)
        is_asked_SK = class_S1 >= threshold_K
        loss_SK = functional.binary_cross_entropy_with_logits(output_SK, passed_SK, reduction="none")
        return filled(filled(loss_SK, is_asked_SK).sum(dim=1), is_known_S)

    def weights(self, target_SX: Tensor) -> Tensor:
        """Weight of the class; 0 without one."""
        return weights_by_class(target_SX, self.class_weights)

    def predict(self, output_SK: Tensor) -> Tensor:
        """Probability of each class."""
        passes_SK = output_SK.double().sigmoid()
        one_S1 = torch.ones_like(passes_SK[:, :1])
        beyond_SC = torch.cat([one_S1, passes_SK.cumprod(dim=1)], dim=1)  # P(class >= k)
        return beyond_SC - torch.cat([beyond_SC[:, 1:], torch.zeros_like(one_S1)], dim=1)

    def class_numbers(self, target_SX: Tensor) -> Tensor | None:
        """Class of each slide, 0 where it is not known."""
        return numbered(target_SX)[0]

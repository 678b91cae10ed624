"""One class of several, and several labels of which each is there or not.

Shapes: as in task.py; K classes or labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gigamil.tasks.task import Task, filled, numbered, weights_by_class


@dataclass(frozen=True)
class Multiclass(Task):
    """Each slide is of one class; two classes are the binary task. The target is the class number.

    Args:
        classes: their names; of two, the last is the positive one.
        class_weights: of each class in the mean over slides; None: 1.
        smoothing: share of the target that is spread evenly over all classes (label smoothing).
        focus: exponent of 1 - p of the true class, which mutes slides that are easy (focal loss); 0: none.
        loss: (output_SK, class_S) -> loss_S in place of cross-entropy; smoothing and focus are then its own affair.
    Source: Szegedy et al. 2016, arXiv:1512.00567 (smoothing); Lin et al. 2017, arXiv:1708.02002 (focal loss).
    """

    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    smoothing: float = 0.0
    focus: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def num_outputs(self) -> int:
        """A logit per class."""
        return len(self.classes)

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Probability of each class."""
        return tuple(f"prob_{name}" for name in self.classes)

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Cross-entropy of the class."""
        class_S, is_known_S = numbered(target_SX)
        if self.loss is not None:
            return filled(self.loss(output_SK, class_S), is_known_S)
        log_prob_SK = functional.log_softmax(output_SK, dim=1)
        true_S = log_prob_SK.gather(1, class_S[:, None]).squeeze(1)
        loss_S = -(1 - self.smoothing) * true_S - self.smoothing * log_prob_SK.mean(dim=1)
        if self.focus:
            # 1 - p as expm1 of its logarithm: of p = 1 the power's slope would be infinite for an exponent below 1.
            loss_S = loss_S * (-torch.expm1(true_S)).clamp(min=torch.finfo(true_S.dtype).tiny) ** self.focus
        return filled(loss_S, is_known_S)

    def weights(self, target_SX: Tensor) -> Tensor:
        """Weight of the class; 0 without one."""
        return weights_by_class(target_SX, self.class_weights)

    def predict(self, output_SK: Tensor) -> Tensor:
        """Probability of each class."""
        return output_SK.double().softmax(dim=1)

    def class_numbers(self, target_SX: Tensor) -> Tensor | None:
        """Class of each slide, 0 where it is not known."""
        return numbered(target_SX)[0]


@dataclass(frozen=True)
class Multilabel(Task):
    """Each label is there (1), is not there (0), or is not known (NaN), whatever the others are.

    A step's loss is the mean over all known (slide, label) pairs, so a slide counts by the number of its known labels.

    Args:
        labels: their names.
        positive_weights: of a label that is there, against 1 of one that is not; None: 1.
        focus: as in `Multiclass`.
    """

    labels: tuple[str, ...]
    positive_weights: tuple[float, ...] | None = None
    focus: float = 0.0

    @property
    def num_outputs(self) -> int:
        """A logit per label."""
        return len(self.labels)

    @property
    def num_targets(self) -> int:
        """A number per label."""
        return len(self.labels)

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Probability of each label."""
        return tuple(f"prob_{name}" for name in self.labels)

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Mean binary cross-entropy of the known labels."""
        is_known_SK = torch.isfinite(target_SX)
        target_SK = filled(target_SX, is_known_SK).to(output_SK)
        positive_K = None if self.positive_weights is None else output_SK.new_tensor(self.positive_weights)
        loss_SK = functional.binary_cross_entropy_with_logits(
            output_SK, target_SK, pos_weight=positive_K, reduction="none"
        )
        if self.focus:
            wrong_SK = torch.sigmoid(torch.where(target_SK > 0.5, -output_SK, output_SK))  # 1 - p of what is true
            loss_SK = loss_SK * wrong_SK.clamp(min=torch.finfo(wrong_SK.dtype).tiny) ** self.focus
        return filled(loss_SK, is_known_SK).sum(dim=1) / is_known_SK.sum(dim=1).clamp(min=1)

    def weights(self, target_SX: Tensor) -> Tensor:
        """How many labels are known."""
        return torch.isfinite(target_SX).sum(dim=1).double()

    def predict(self, output_SK: Tensor) -> Tensor:
        """Probability of each label."""
        return output_SK.double().sigmoid()


def balanced_weights(numbers: Sequence[int], num_classes: int) -> tuple[float, ...]:
    """Weight of each class so that all classes count alike: slides / (classes x slides of the class); mean 1 over slides."""
    counts_K = torch.bincount(torch.tensor(numbers), minlength=num_classes).double()
    return tuple((len(numbers) / (num_classes * counts_K.clamp(min=1))).tolist())

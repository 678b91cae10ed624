"""Losses of slides, and the one place where they are scaled.

Shapes: B slides of a group, K classes.
A loss is a callable (logits_BK, target_B) -> loss_B, one number per slide; for a task of classes, targets are their numbers.
Register your own with `@losses.register("name")`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gigamil.errors import ConfigError
from gigamil.models.bag import Pooled
from gigamil.registry import Registry

SlideLoss = Callable[[Tensor, Tensor], Tensor]
losses: Registry[SlideLoss] = Registry("loss", "gigamil.losses")


@losses.register("cross_entropy")
def cross_entropy(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """-log softmax(logits)[label] per slide, (B,); binary tasks have K = 2."""
    return torch.nn.functional.cross_entropy(logits_BK, label_B, reduction="none")


def slide_losses(loss: SlideLoss, logits_BK: Tensor, pooled: Pooled, label_B: Tensor) -> Tensor:
    """Loss of each slide, (B,), or of each task of it, (B, T): of its logits, and of what else the aggregator learns from (`Pooled`).

    What the aggregator adds itself belongs to the first task.
    """
    total_B = loss(logits_BK, label_B) * pooled.weight
    if pooled.extra_logits_MK is not None and pooled.extra_slide_M is not None and pooled.extra_weight_M is not None:
        extra_M = loss(pooled.extra_logits_MK, label_B[pooled.extra_slide_M])
        weight_M = pooled.extra_weight_M.reshape(-1, *[1] * (extra_M.dim() - 1))
        total_B = total_B.index_add(0, pooled.extra_slide_M, extra_M * weight_M)
    if pooled.loss_B is None:
        return total_B
    if total_B.dim() == 1:
        return total_B + pooled.loss_B
    return total_B + torch.nn.functional.pad(pooled.loss_B[:, None], (0, total_B.shape[1] - 1))


def group_loss(loss_B: Tensor, weight_B: Tensor, world_weight: float, num_groups: int) -> Tensor:
    """The scalar that every rank of a group back-propagates.

    The wanted loss is the weighted mean over the slides of the step in all groups, sum_s w_s l_s / sum_s w_s. The
    engine averages gradients over ranks, so over groups: each group's part is multiplied by their number.

    Args:
        loss_B, weight_B: losses and weights of the group's slides; B may be 0.
        world_weight: sum of the weights of all slides of the step; 0 is a step that teaches nothing.
        num_groups: G.
    """
    return (loss_B * weight_B).sum() * (num_groups / world_weight if world_weight else 0.0)


def class_weights(setting: str | Sequence[float], labels: Sequence[int], num_classes: int) -> Tensor:
    """Weight of each class, float64 (K,).

    Args:
        setting: "none", "balanced" (slides / (classes x slides of the class): mean 1 over slides), or K numbers.
        labels: class of each training slide.
    Raises:
        ConfigError: another number of weights than of classes.
    """
    if setting == "none":
        return torch.ones(num_classes, dtype=torch.float64)
    if setting == "balanced":
        counts_K = torch.bincount(torch.tensor(labels), minlength=num_classes).to(torch.float64)
        return len(labels) / (num_classes * counts_K.clamp(min=1))
    if len(setting) != num_classes:
        raise ConfigError(f"science.class_weights has {len(setting)} numbers for {num_classes} classes")
    return torch.tensor([float(number) for number in setting], dtype=torch.float64)

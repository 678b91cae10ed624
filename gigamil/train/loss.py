"""Losses of slides, and the one place where they are scaled.

Shapes: B slides of a group, K classes.
A loss is a callable (logits_BK, target_B) -> loss_B, one number per slide; for a task of classes, targets are their numbers.
Register your own with `@losses.register("name")`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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

    An aggregator that adds a loss of its own has one task (`refuse_classless`).
    """
    total_B = loss(logits_BK, label_B) * pooled.weight
    if pooled.extra_logits_MK is not None and pooled.extra_slide_M is not None and pooled.extra_weight_M is not None:
        extra_M = loss(pooled.extra_logits_MK, label_B[pooled.extra_slide_M])
        weight_M = pooled.extra_weight_M.reshape(-1, *[1] * (extra_M.dim() - 1))
        total_B = total_B.index_add(0, pooled.extra_slide_M, extra_M * weight_M)
    return total_B if pooled.loss_B is None else total_B + pooled.loss_B


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

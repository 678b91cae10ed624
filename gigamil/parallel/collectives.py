"""Collectives inside the step, as autograd functions.

Who divides by what. Every rank of a group of R computes the same loss L from sums over the group, y = sum_r x_r. The
backward of the sum is again a *sum* over ranks of dL/dy, R equal terms, so rank r holds R times its own part of the
gradient of every parameter before the sum (encoder, attention), and the whole gradient of those after it (classifier).
DeepSpeed then takes the mean over all ranks: R parts, each R times too large, give the gradient; R equal copies of the
whole give it too. An identity backward, or a plain in-place all_reduce, leaves the encoder's gradient 1/R too small,
silently.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SumOverRanks(torch.autograd.Function):
    """y = sum over the ranks of a group; backward: the sum over ranks of dL/dy."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """All-reduce a copy of `values`."""
        ctx.group = group
        return _all_reduced(values, dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """All-reduce a copy of the gradient."""
        return _all_reduced(grads[0], dist.ReduceOp.SUM, ctx.group), None


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum equal-shaped tensors over a group; differentiable, the result is equal on all its ranks.

    Cost: one all-reduce of values' size, one more in backward. Test: distributed/test_collectives.py.
    """
    result: Tensor = SumOverRanks.apply(values, group)
    return result


def max_over_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise maximum over a group, detached. Cost: one all-reduce of values' size."""
    return _all_reduced(values.detach(), dist.ReduceOp.MAX, group)


def _all_reduced(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    result = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation, group=group)
    return result

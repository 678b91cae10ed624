"""BatchNorm computed inside the convolution before it: the same function and gradient, about half the memory.

Shapes: n tiles of a chunk, C channels in, K channels out, H W image.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from gigamil.models.networks import FrozenStatistics


def fold_batchnorm(encoder: nn.Module) -> int:
    """Compute each convolution and the BatchNorm right behind it as one convolution.

    With stored statistics BatchNorm is an affine map per channel, s (x - mean) + beta with s = gamma / sqrt(var + eps), so
        BN(W * x + c) = (s W) * x + s (c - mean) + beta.
    The right side is made anew in each call, so W, c, gamma and beta are trained as before. Names of modules, parameters
    and buffers do not change, so that checkpoints fit both. Only networks in `FrozenStatistics` are looked at, and of
    them those whose forward can be traced: the trace shows that nothing else sees what the convolution gives.

    Returns:
        The number of folded pairs; 0 is no error.
    Cost: a weight-sized product per call and three in backward. Autograd saves nothing for BatchNorm, which else keeps the
        convolution's output: about half of a ResNet's graph. Test: unit/models/test_fold.py.
    """
    pairs = [
        pair for part in encoder.modules() if isinstance(part, FrozenStatistics) for pair in _find_pairs(part.network)
    ]
    for conv, norm in pairs:
        conv.forward = partial(_forward, conv, norm)  # type: ignore[method-assign]
        norm.forward = _unchanged  # type: ignore[method-assign, assignment]
    return len(pairs)


def _find_pairs(network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions whose output goes into a BatchNorm, and nowhere else."""
    try:
        nodes = fx.symbolic_trace(network).graph.nodes
    except Exception:  # noqa: BLE001 - whatever a forward does that cannot be traced; it then runs as it is written
        return []
    calls = [node for node in nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    pairs = []
    for node in calls:
        conv, users = network.get_submodule(node.target), list(node.users)
        if len(users) != 1 or users[0].op != "call_module":
            continue
        norm = network.get_submodule(users[0].target)
        # Subclasses may do more than their base: timm's have padding or activation in them.
        if not (type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d):
            continue
        is_plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and norm.running_mean is not None
        is_single = targets.count(node.target) == targets.count(users[0].target) == 1  # called twice: no one neighbour
        if is_plain and is_single and "forward" not in vars(conv):
            pairs.append((conv, norm))
    return pairs


def _forward(conv: nn.Conv2d, norm: nn.BatchNorm2d, image_nCHW: Tensor) -> Tensor:
    assert not norm.training, "FrozenStatistics keeps BatchNorm in evaluation mode"
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    result: Tensor = _FoldedConv.apply(image_nCHW, conv.weight, conv.bias, norm.weight, norm.bias, statistics, settings)
    return result


def _unchanged(image_nCHW: Tensor) -> Tensor:
    return image_nCHW


class _FoldedConv(torch.autograd.Function):
    """The right side of the formula; sW is not saved with the graph, but made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        image_nCHW: Tensor,
        weight: Tensor,
        bias_K: Tensor | None,
        gamma_K: Tensor | None,
        beta_K: Tensor | None,
        statistics: tuple[Tensor, Tensor, float],
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(image_nCHW, weight, bias_K, gamma_K)
        ctx.statistics, ctx.settings = statistics, settings
        shift_K, _, scale_K = _affine(bias_K, gamma_K, *statistics)
        folded_K = scale_K * shift_K if beta_K is None else torch.addcmul(beta_K, scale_K, shift_K)
        return functional.conv2d(image_nCHW, _scaled(weight, scale_K), folded_K, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nKHW: Tensor) -> tuple[Tensor | None, ...]:
        image_nCHW, weight, bias_K, gamma_K = ctx.saved_tensors
        want_image, want_weight, want_bias, want_gamma, want_beta, *_ = ctx.needs_input_grad
        shift_K, rstd_K, scale_K = _affine(bias_K, gamma_K, *ctx.statistics)
        stride, padding, dilation, groups = ctx.settings
        # Under autocast the convolution ran in the type of its output, the parameters keep their own.
        kind = grad_nKHW.dtype
        grad_image, grad_folded, grad_folded_K = torch.ops.aten.convolution_backward(
            grad_nKHW,
            image_nCHW.to(kind),
            _scaled(weight, scale_K).to(kind),
            [len(weight)],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [want_image, want_weight or want_gamma, want_bias or want_gamma or want_beta],
        )
        grad_weight = grad_bias_K = grad_gamma_K = None
        if grad_folded_K is not None:
            grad_folded_K = grad_folded_K.to(weight.dtype)
            grad_bias_K = grad_folded_K * scale_K if want_bias else None
        if grad_folded is not None:
            grad_KX = grad_folded.to(weight.dtype).reshape(len(weight), -1)
            if want_gamma:
                product_K = torch.linalg.vecdot(grad_KX, weight.reshape(len(weight), -1))
                grad_gamma_K = torch.addcmul(product_K, grad_folded_K, shift_K) * rstd_K
            grad_weight = grad_KX.mul_(scale_K[:, None]).view_as(weight) if want_weight else None
        grad_image = None if grad_image is None else grad_image.to(image_nCHW.dtype)
        return grad_image, grad_weight, grad_bias_K, grad_gamma_K, grad_folded_K if want_beta else None, None, None


def _affine(
    bias_K: Tensor | None, gamma_K: Tensor | None, mean_K: Tensor, variance_K: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """c - mean, 1 / sqrt(var + eps), and s."""
    rstd_K = torch.rsqrt(variance_K + eps)
    return -mean_K if bias_K is None else bias_K - mean_K, rstd_K, rstd_K if gamma_K is None else rstd_K * gamma_K


def _scaled(weight: Tensor, scale_K: Tensor) -> Tensor:
    return weight * scale_K[:, None, None, None]

"""Activation checkpointing: blocks of an encoder keep their input only and are run again in backward.

It costs one forward more, which a replayed chunk pays a second time (5 F in place of 4 F), so it is for encoders of which
a single small chunk does not fit. Results do not change: keyed dropout draws the same masks again, and layers of others
get torch's generators back as they were.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gigamil.errors import ConfigError

# (function, inputs) -> what the function returns, saving the inputs in place of what it would save for backward.
Recompute = Callable[..., Any]


def plain_recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """Torch's own activation checkpointing: the reference for DeepSpeed's."""
    return checkpoint(function, *inputs, use_reentrant=False)


def checkpoint_blocks(backbone: nn.Module, recompute: Recompute = plain_recompute) -> int:
    """Make an encoder's blocks keep their input only; returns how many there are.

    Call it before an engine takes the model. Names of parameters stay as they are. Without a graph (the first pass of
    a replayed chunk, evaluation) nothing is recomputed.

    Raises:
        ConfigError: the encoder has no blocks that can be told from its names.
    """
    blocks = _blocks(backbone)
    if not blocks:
        raise ConfigError(
            f"execution.activation_checkpointing: {type(backbone).__name__} has no row of equal blocks that could be "
            "recomputed. Set it to none, and take a smaller execution.chunk."
        )
    for block in blocks:
        block.forward = partial(_forward, block.forward, recompute)
    return len(blocks)


def _forward(forward: Callable[..., Any], recompute: Recompute, *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return recompute(partial(forward, **options) if options else forward, *inputs)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The innermost modules of one kind that stand in a sequence and have layers of their own, from input to output.

    These are the residual blocks of a ResNet and the layers of a transformer, as torchvision and timm write them.
    """
    found: list[nn.Module] = []
    for child in module.children():
        parts = list(child.children())
        inner = _blocks(child)
        is_row = isinstance(child, nn.Sequential | nn.ModuleList) and len({type(part) for part in parts}) == 1
        if not inner and is_row and any(True for part in parts for _ in part.children()):
            inner = parts
        found += inner
    return found

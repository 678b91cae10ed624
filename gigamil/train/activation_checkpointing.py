"""DeepSpeed's activation checkpointing behind one door, as train/engine.py is for its engine (DeepSpeed 0.19)."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gigamil.memory.checkpointing import Recompute, checkpoint_blocks


def checkpoint_encoder(backbone: nn.Module, setting: Literal["none", "blocks", "cpu"]) -> None:
    """Do what `execution.activation_checkpointing` says to an encoder; after the ranks have met, before the engine.

    Args:
        backbone: `model.encoder.backbone`.
        setting: "blocks" keeps the inputs of blocks where they are, "cpu" in main memory; on a CPU both are the same.
    Raises:
        ConfigError: the encoder has no blocks that could be recomputed.
    """
    if setting != "none":
        checkpoint_blocks(backbone, deepspeed_recompute(offload=setting == "cpu"))


def deepspeed_recompute(offload: bool) -> Recompute:
    """DeepSpeed's activation checkpointing, for the whole process: it keeps its settings in globals."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.activation_checkpointing import checkpointing

    # On a CPU the inputs lie in main memory already, and DeepSpeed's "copy" to it is the tensor that it then empties.
    offload = offload and get_accelerator().device_name() != "cpu"
    checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=offload)

    def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
        # DeepSpeed runs backward without the forward's autocast: blocks would be recomputed in float32.
        again = _with_autocast_of_now(function)
        # Aliases: to give memory back, offloading empties the tensors that it is given, which the caller may still use.
        # And of blocks whose inputs want no gradient (the layers before them are fixed), it would lose the parameters'.
        aliases = [_wanting_gradient(value) for value in inputs]
        return checkpointing.checkpoint(again, *aliases)

    return recompute


def _wanting_gradient(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def _with_autocast_of_now(function: Callable[..., Any]) -> Callable[..., Any]:
    kinds = {"cpu"} | ({"cuda"} if torch.cuda.is_initialized() else set())
    states = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)]

    def run(*inputs: Any) -> Any:
        with ExitStack() as stack:
            for kind, dtype, enabled in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            return function(*inputs)

    return run

"""Low-rank updates of an encoder's linear layers, in place of training the layers themselves.

y = W x + b + (alpha / r) B A x with W and b fixed, A (r, in) random and B (out, r) zero at the start.
Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gigamil.errors import ConfigError


class LoRALinear(nn.Module):
    """A linear layer with a low-rank update; its weight and bias keep their names.

    Args:
        linear: the layer to update; its parameters are shared, not copied.
        rank: r.
        alpha: the update is scaled by alpha / r.
    """

    bias: Tensor | None

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Not by assignment: the property `weight` is in its place.
        self._parameters["weight"] = linear.weight  # type: ignore[assignment]
        self.register_parameter("bias", linear.bias)
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.normal_(self.lora_A, std=linear.in_features**-0.5)  # A x is of the size of x
        self._scale = alpha / rank

    @property
    def weight(self) -> Tensor:
        """W + (alpha / r) B A: for networks that take the weight of a layer instead of calling it (BEiT, Swin v2)."""
        return self._parameters["weight"] + self._scale * self.lora_B @ self.lora_A  # type: ignore[operator]

    def forward(self, values_nX: Tensor) -> Tensor:
        """Any shape whose last dimension is `in_features`."""
        fixed = functional.linear(values_nX, self._parameters["weight"], self.bias)  # type: ignore[arg-type]
        return fixed + self._scale * functional.linear(functional.linear(values_nX, self.lora_A), self.lora_B)

    def merged(self) -> nn.Linear:
        """The plain layer of the same function."""
        with torch.no_grad():
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(self.lora_A)
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={len(self.lora_A)}"


def add_lora(backbone: nn.Module, rank: int, alpha: float) -> None:
    """Fix all parameters, and give linear layers a low-rank update to be trained instead.

    Layers that are no larger than the rank get none: their updates would not be of low rank.

    Raises:
        ConfigError: there is no such layer.
    """
    # Exactly nn.Linear: the output layer of nn.MultiheadAttention is a subclass that is never called.
    linears = {name: module for name, module in backbone.named_modules() if type(module) is nn.Linear}
    title = type(getattr(backbone, "network", backbone)).__name__
    if not linears:
        raise ConfigError(
            f"science.encoder.lora_rank={rank}: {title} has no linear layers to update. Use a transformer such as "
            "timm/vit_small_patch16_224, or science.encoder.freeze_blocks."
        )
    widest = max(min(linear.weight.shape) for linear in linears.values())
    if rank >= widest:
        raise ConfigError(
            f"science.encoder.lora_rank={rank} is not below the width of any linear layer of {title}; the widest has "
            f"{widest}, and 4 to 16 are common"
        )
    backbone.requires_grad_(False)
    for name, linear in linears.items():
        if rank < min(linear.weight.shape):
            backbone.set_submodule(name, LoRALinear(linear, rank, alpha))


def merge_lora(backbone: nn.Module) -> int:
    """Put the updates into the weights, for export; gives the number of layers."""
    updated = [(name, module) for name, module in backbone.named_modules() if isinstance(module, LoRALinear)]
    for name, module in updated:
        backbone.set_submodule(name, module.merged())
    return len(updated)

"""Dropout whose masks are keyed: the same for any chunking, any replay and any number of ranks."""

import math

import torch
from torch import Tensor, nn

from gigamil import keyed
from gigamil.errors import ConfigError


class KeyedDropout(nn.Module):
    """Inverted dropout with one mask per key (Srivastava et al. 2014), drawn from (key, layer).

    Args:
        p: probability that an element is zeroed.
        layer: name of this layer, so that two layers draw different masks for one tile.
    """

    def __init__(self, p: float, layer: str) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"dropout p={p} of layer '{layer}' must be in [0, 1)")
        self.p = p
        self.layer = layer
        self._layer_key = keyed.text_key(layer)

    def forward(self, values_nX: Tensor, key_n: Tensor | None) -> Tensor:
        """Drop elements of each row by its key; key None (not training) or p = 0 returns the input.

        Args:
            values_nX: any shape with n rows.
            key_n: int64 key of each row.
        """
        if key_n is None or self.p == 0:
            return values_nX
        draw_nX = keyed.uniform(keyed.fold(key_n, self._layer_key), math.prod(values_nX.shape[1:])).view(
            values_nX.shape
        )
        return torch.where(draw_nX < self.p, 0.0, values_nX / (1 - self.p)).to(values_nX.dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"p={self.p}, layer='{self.layer}'"

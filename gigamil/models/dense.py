"""Dense encoders: the network makes a grid of features of a large image, and each cell is the embedding of a tile.

Shapes: n images, c tiles of a call, C H W image, D embedding, h w grid.
A cell is as large as a tile (`slides.tile_px`) and lies where the tile lies, but sees beyond its borders, as far as the
network's receptive field reaches. What is handed to the network is a block: an image around some tiles.

A backbone is dense if it has an attribute `cell_px`, the pixels along the side of a cell, and an attribute `network`:
image (n, C, H, W) -> grid (n, D, h, w), whose geometry is known (gigamil/memory/geometry.py).
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}  # of a ResNet, in pixels per cell


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: it looks at one pixel, so blocks do not change it."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, image_nCHW: Tensor) -> Tensor:
        """The same shape."""
        return nn.functional.layer_norm(
            image_nCHW.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


def pooled(layers: "OrderedDict[str, nn.Module]", pool: int, kind: Literal["mean", "max"]) -> nn.Sequential:
    """The layers, and behind them a pooling of `pool` x `pool` cells to one."""
    if pool > 1:
        layers["pool"] = nn.AvgPool2d(pool) if kind == "mean" else nn.MaxPool2d(pool)
    return nn.Sequential(layers)

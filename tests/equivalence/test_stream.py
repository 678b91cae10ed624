"""Streamed over blocks = the whole image at once, in float64: the grid, every parameter's gradient, the image's gradient.

Convolutions of other shapes sum in another order, so equality is to rounding: 1e-12 for the grid, 1e-10 for gradients.
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision.models as zoo
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from gigamil.memory.geometry import Geometry, geometry_of, refuse_wrong_geometry
from gigamil.testing.dense import image_blocks, image_errors

GRID_BOUND, GRADIENT_BOUND = 1e-12, 1e-10


def resnet(name: str, last: str) -> nn.Module:
    """Up to a layer, with BatchNorm whose statistics are not those of the start."""
    whole = getattr(zoo, name)(weights=None)
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return nn.Sequential(OrderedDict((part, getattr(whole, part)) for part in names[: names.index(last) + 1]))


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def shared() -> nn.Module:
    conv, pool = nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)
    return plain(conv, pool, conv, nn.Tanh(), pool)


def convnext() -> nn.Module:
    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]
    return ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=0.5).features


NETS = {
    "resnet18 layer3": lambda: resnet("resnet18", "layer3"),
    "resnet18 layer4": lambda: resnet("resnet18", "layer4"),
    "resnet34 layer2": lambda: resnet("resnet34", "layer2"),
    "resnet50 layer2": lambda: resnet("resnet50", "layer2"),
    "convnext": convnext,
    "dilated": lambda: plain(nn.Conv2d(3, 8, 3, dilation=2, padding=2), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, dilation=3)),
    "not square": lambda: plain(nn.Conv2d(3, 8, (5, 3), (2, 1), (2, 0)), nn.GELU(), nn.Conv2d(8, 4, (1, 7), (1, 2))),
    "grouped, biased": lambda: plain(nn.Conv2d(3, 8, 4, 4), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4)),
    "poolings": lambda: plain(
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Tanh(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    ),
    "layers used twice": shared,
}


def prepared(name: str) -> tuple[nn.Module, Geometry]:
    torch.manual_seed(0)
    network = NETS[name]().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network, geometry_of(network)


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand((batch, 3, height, width), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(name: str, height: int, width: int, cells: int, batch: int = 1, wanted_hw: np.ndarray | None = None) -> None:
    """The wanted cells, by default all, are those of the whole image; so are the gradients."""
    network, geometry = prepared(name)
    if wanted_hw is None:
        wanted_hw = np.ones(geometry.grid_shape(height, width), bool)
    torch.manual_seed(2)
    errors = image_errors(network, image(height, width, batch), wanted_hw, cells)
    assert errors.features <= GRID_BOUND
    assert errors.gradient <= GRADIENT_BOUND


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("height", "width", "cells"), [pytest.param(157, 101, 2, marks=pytest.mark.slow), (64, 130, 4), (33, 200, 128)]
)
def test_blocks_give_the_whole(name: str, height: int, width: int, cells: int) -> None:
    check(name, height, width, cells)


def test_two_images_at_once() -> None:
    check("grouped, biased", 61, 70, 4, batch=2)


@pytest.mark.parametrize("name", ["resnet18 layer3", "convnext", "poolings"])
def test_cells_that_are_not_wanted_are_not_computed(name: str) -> None:
    _, geometry = prepared(name)
    wanted_hw = np.zeros(geometry.grid_shape(200, 260), bool)
    wanted_hw[1:3, 2:4] = wanted_hw[-1, -2] = True
    check(name, 200, 260, 4, wanted_hw=wanted_hw)
    some, all_cells = (image_blocks(geometry, 200, 260, mask, 4) for mask in (wanted_hw, np.ones_like(wanted_hw)))
    assert sum(block.num_pixels for _, block in some) < 0.5 * sum(block.num_pixels for _, block in all_cells)


@pytest.mark.parametrize("name", NETS)
def test_the_geometry_is_that_of_the_network(name: str) -> None:
    """Not one pixel less or more: a cell does not see what lies outside its interval, and sees both of its ends."""
    network, geometry = prepared(name)
    refuse_wrong_geometry(network, geometry)
    before, behind = (max(0, length) for length in geometry.rows.receptive_field)
    stride = geometry.rows.stride
    cell = before // stride + 1
    size = (cell + 1) * stride + behind + 1
    width = sum(geometry.cols.receptive_field) + geometry.cols.stride
    first, last = geometry.rows.needs(cell, cell + 1, size)
    for row, is_seen in ((first - 1, False), (first, True), (last - 1, True), (last, False)):
        if 0 <= row < size:
            pixels = image(size, width)
            pixels[:, :, row] = torch.nan
            with torch.no_grad():
                assert network(pixels)[:, :, cell].isnan().any() == is_seen

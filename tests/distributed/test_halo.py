"""A network whose image lies on several ranks = the network on the whole image, in float64: grid and every gradient.

What each rank finds is compared with one process: its rows of the grid, the sum over ranks of the parameters' gradients,
and its rows of the image's gradient.
"""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision.models as zoo
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.memory.geometry import Geometry
from gigamil.models.dense import ChannelNorm
from gigamil.parallel.halo import ShardedNetwork
from gigamil.partition.halo import Net
from gigamil.testing.compare import gradient_error
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-10
SIZE = 61, 37  # no multiple of any stride
# Cuts for 4 ranks: even, uneven, thinner than a halo, empty ranks.
CUTS = ((0, 15, 30, 45, 61), (0, 1, 40, 43, 61), (0, 0, 61, 61, 61), (0, 20, 20, 58, 61))


def resnet(name: str, last: str) -> nn.Module:
    whole = getattr(zoo, name)(weights=None)
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return nn.Sequential(OrderedDict((part, getattr(whole, part)) for part in names[: names.index(last) + 1]))


def nets() -> dict[str, nn.Module]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    conv = nn.Conv2d
    return {
        "resnet18 layer2": resnet("resnet18", "layer2").eval(),
        "resnet50 layer1": resnet("resnet50", "layer1").eval(),
        "batch statistics": resnet("resnet18", "layer1").train(),
        "convnext": ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=0.5).features,
        "group norm": nn.Sequential(conv(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 4, 5, 1, 2)),
        "dilated": nn.Sequential(conv(3, 6, 3, 1, 2, 2), nn.Tanh(), ChannelNorm(6), conv(6, 4, (4, 3), (3, 2), (1, 0))),
        "poolings": nn.Sequential(
            conv(3, 6, 3, padding="same"), nn.MaxPool2d(3, 2, ceil_mode=True), conv(6, 6, 3), nn.AvgPool2d(3, 2, 1)
        ),
    }


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = nets()[name].double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def whole(name: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Network with gradients, image with gradient, grid, cotangent."""
    network = prepared(name)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand((2, 3, *SIZE), dtype=torch.float64, generator=generator).requires_grad_()
    grid = network(image)
    cotangent = torch.randn(grid.shape, dtype=torch.float64, generator=generator)
    (grid * cotangent).sum().backward()
    return network, image, grid.detach(), cotangent


def measure(rank: int, num_ranks: int) -> dict[Any, tuple[float, float, bool]]:
    group = dist.group.WORLD if num_ranks > 1 else None
    found = {}
    for name in nets():
        truth, image, grid, cotangent = whole(name)
        wanted = {key: p.grad for key, p in truth.named_parameters()}
        for cuts in CUTS if num_ranks == 4 else [tuple(SIZE[0] * r // num_ranks for r in range(num_ranks + 1))]:
            network = copy.deepcopy(prepared(name))
            rows = image.detach()[:, :, cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
            part, bounds = ShardedNetwork(network, group, rank)(rows, cuts)
            own = slice(bounds[rank], bounds[rank + 1])
            (part * cotangent[:, :, own]).sum().backward()
            gradients = {
                key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in network.named_parameters()
            }
            if group is not None:
                for gradient in gradients.values():
                    dist.all_reduce(gradient, group=group)
            lies = image.grad[:, :, cuts[rank] : cuts[rank + 1]]
            gradients["image"], expected = rows.grad, wanted | {"image": lies}
            if not lies.numel():
                del gradients["image"], expected["image"]
            grid_error = float((part.detach() - grid[:, :, own]).norm() / grid.norm())
            buffers = all(
                torch.allclose(a, b, rtol=1e-10) for a, b in zip(network.buffers(), truth.buffers(), strict=True)
            )
            found[name, cuts] = grid_error, gradient_error(gradients, expected), buffers
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW), 4])
def test_rows_on_ranks_are_one_image(num_ranks: int) -> None:
    worlds = [measure(0, 1)] if num_ranks == 1 else run_on_ranks(measure, num_ranks, num_ranks, timeout_s=200)
    for found in worlds:
        assert len(found) == len(nets()) * (len(CUTS) if num_ranks == 4 else 1)
        for case, (grid_error, gradient, buffers) in found.items():
            assert grid_error <= 1e-12, case
            assert gradient <= BOUND, case
            assert buffers, case


def adjoint(rank: int, num_ranks: int) -> tuple[float, float]:
    """<Hx, y> and <x, H'y> of this rank's parts, H being a convolution's exchange."""
    generator = torch.Generator().manual_seed(rank)
    cuts = (0, 3, 3, 9, 16)
    rows = torch.randn(
        (2, 3, cuts[rank + 1] - cuts[rank], 5), dtype=torch.float64, generator=generator
    ).requires_grad_()
    network = nn.Conv2d(3, 2, 5, 1, 2, bias=False).double()
    nn.init.constant_(network.weight, 0.5)
    found, _ = ShardedNetwork(network, dist.group.WORLD, rank)(rows, cuts)
    y = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    (found * y).sum().backward()
    return float((found * y).sum().detach()), float((rows * rows.grad).sum().detach())


def test_the_exchange_and_its_backward_are_adjoint() -> None:
    found = run_on_ranks(adjoint, 4, 4, timeout_s=60)
    forward, backward = (sum(values) for values in zip(*found, strict=True))
    assert forward == pytest.approx(backward, rel=1e-12)
    assert forward != 0


class Clamped(nn.Module):
    """A layer of a user that says where it looks."""

    geometry = Geometry(Net(()), Net(()))

    def forward(self, values: Tensor) -> Tensor:
        return values.clamp(min=0)


class Shifted(nn.Module):
    """A layer that does not."""

    def forward(self, values: Tensor) -> Tensor:
        return values.roll(1, 2)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.AdaptiveAvgPool2d(1), "'1' .AdaptiveAvgPool2d"),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "counts the pixels at the edge otherwise"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "counts the pixels at the edge otherwise"),
        (Shifted(), "'roll' .* is not known to work pixel by pixel"),
    ],
)
def test_a_layer_that_cannot_be_shared_is_named_before_ranks_wait(layer: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ShardedNetwork(nn.Sequential(nn.Conv2d(3, 2, 3), layer), None)


def test_a_layer_that_says_where_it_looks_is_called_as_a_whole() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), Clamped())
    image = torch.randn(1, 3, 9, 9)
    assert torch.equal(ShardedNetwork(network, None)(image, (0, 9))[0], network(image))

"""Networks that cannot be streamed are refused by the name of the layer, with a cure."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import efficientnet_b0, mobilenet_v2, mobilenet_v3_small
from torchvision.models.convnext import CNBlock
from torchvision.ops.misc import SqueezeExcitation

from gigamil.errors import ConfigError
from gigamil.memory.geometry import Geometry, geometry_of, refuse_wrong_geometry
from gigamil.partition.halo import Net, Window

CONV = nn.Conv2d(3, 4, 3)


class Roll(nn.Module):
    """Looks a fixed distance away, and says so or not."""

    def __init__(self, distance: int, geometry: Geometry | None = None) -> None:
        super().__init__()
        self.distance, self.geometry = distance, geometry

    def forward(self, image_nCHW: Tensor) -> Tensor:
        return image_nCHW + image_nCHW.roll(self.distance, 2)


class Elsewhere(nn.ReLU):
    """What a subclass may do."""

    def forward(self, image_nCHW: Tensor) -> Tensor:
        return super().forward(image_nCHW) + image_nCHW.mean(dim=3, keepdim=True)


class Skipping(nn.Sequential):
    def forward(self, image_nCHW: Tensor) -> Tensor:
        return image_nCHW + super().forward(image_nCHW)


def named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (named(a=CONV, norm=nn.GroupNorm(2, 4)), r"layer 'norm' \(GroupNorm\) looks at the whole image"),
        (named(a=CONV, norm=nn.InstanceNorm2d(4)), "looks at the whole image"),
        (named(a=CONV, norm=nn.BatchNorm2d(4).train()), "layer 'norm' .* put it into evaluation mode"),
        (named(a=CONV, norm=nn.BatchNorm2d(4, track_running_stats=False).eval()), "statistics of the whole image"),
        (named(a=named(b=nn.Sequential(CONV, nn.Dropout(0.1).train()))), "layer 'a.b.1' .* set its p to 0"),
        (named(a=CNBlock(4, 1.0, 0.5).train()), "layer 'a.stochastic_depth' .* set its p to 0"),
        (named(a=CONV, up=nn.Upsample(scale_factor=2)), "looks at the whole image"),
        (named(a=CONV, pool=nn.AdaptiveAvgPool2d(1)), "cut the network off before it"),
        (named(a=CONV, flat=nn.Linear(4, 4)), "layer 'flat' .* looks at the whole image"),
        (named(a=CONV, norm=nn.LayerNorm([4, 9, 9])), "layer 'norm' .* looks at the whole image"),
        (named(a=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), "use padding_mode='zeros'"),
        (named(a=nn.Conv2d(3, 4, 4, padding="same")), "use an odd kernel"),
        (named(a=Skipping(CONV)), "layer 'a' .* has a `forward` of its own"),
        (
            named(a=nn.TransformerEncoderLayer(4, 1)),
            "layer 'a' .* is not known. Give its class an attribute `geometry`",
        ),
        (named(a=CONV, se=SqueezeExcitation(4, 2)), r"layer 'se' \(SqueezeExcitation\) looks at the whole image"),
        # Inside of blocks that are not known either: to say where those look would not help.
        (
            efficientnet_b0(weights=None).features.eval(),
            r"layer '1\.0\.block\.1' \(SqueezeExcitation\) looks at the whole image",
        ),
        (mobilenet_v3_small(weights=None).features.eval(), r"layer '1\.block\.1' \(SqueezeExcitation\) looks at"),
        (mobilenet_v2(weights=None).features.eval(), r"layer '1' \(InvertedResidual\) is not known"),
        (nn.Softmax2d(), r"layer '\(the network\)'"),
    ],
)
def test_layers_that_look_further_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        geometry_of(network)


def test_a_module_of_ones_own_says_where_it_looks() -> None:
    near = Net((Window(3, padding=1),))
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), Roll(1, Geometry(near, Net())), nn.Dropout(0.5).eval())
    geometry = geometry_of(network)
    assert geometry.strides == (2, 2)
    assert geometry.rows.receptive_field == (3, 2)
    assert geometry.grid_shape(9, 12) == (5, 6)
    refuse_wrong_geometry(network, geometry)


def test_a_layer_that_stands_twice_looks_twice() -> None:
    conv, pool = nn.Conv2d(3, 3, 3), nn.MaxPool2d(2)
    network = nn.Sequential(conv, pool, conv, nn.ReLU(), pool)
    geometry = geometry_of(network)
    assert geometry.strides == (4, 4)
    assert geometry.grid_shape(30, 22) == tuple(network(torch.zeros(1, 3, 30, 22)).shape[2:])
    refuse_wrong_geometry(network, geometry)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Roll(4, Geometry(Net((Window(3, padding=1),)), Net())), "depends on rows beyond the 9 pixels"),
        (Elsewhere(), "depends on columns beyond the 5 pixels"),
        (Roll(0, Geometry(Net((Window(2, 2),)), Net())), "by its geometry they are"),
    ],
)
def test_the_probe_sees_what_classes_do_not_tell(layer: nn.Module, message: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), layer)
    with pytest.raises(ConfigError, match=message):
        refuse_wrong_geometry(network, geometry_of(network))


def test_the_probe_leaves_the_network_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    refuse_wrong_geometry(network, geometry_of(network))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())

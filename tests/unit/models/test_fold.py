"""Folded BatchNorm: the function and gradients of the layers one by one, the same names, less memory."""

import copy

import pytest
import torch
from torch import nn

from gigamil.config.schema import Encoder
from gigamil.memory.peak import LiveBytes
from gigamil.models.encoder import SmallCNN, TileEncoder, build_encoder
from gigamil.models.fold import fold_batchnorm
from gigamil.models.networks import FrozenStatistics

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)


def randomise(network: nn.Module) -> None:
    """Statistics and affine parameters that are not those of a fresh layer, which would hide half of the formula."""
    torch.manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.3, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, 0, 0.2)


def pair_of(network: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[TileEncoder, TileEncoder, int]:
    """An encoder, its folded copy, and how many layers were folded."""
    randomise(network)
    plain = TileEncoder(FrozenStatistics(network, 1), MEAN, STD).to(dtype).train()
    folded = copy.deepcopy(plain)
    return plain, folded, fold_batchnorm(folded)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach() - wanted.detach()).norm() / wanted.detach().norm())


def assert_equal(plain: nn.Module, folded: nn.Module, bound: float = 1e-12, **kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(3, 3, 32, 32, generator=generator).to(kind.get("dtype", torch.float64))
    images = [image.clone().requires_grad_() for _ in range(2)]
    outputs = [encoder(image, None) for encoder, image in zip((plain, folded), images, strict=True)]
    cotangent = torch.randn(outputs[0].shape, generator=generator).to(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    assert error(outputs[1], outputs[0]) <= bound
    assert error(images[1].grad, images[0].grad) <= bound
    for (name, a), (_, b) in zip(plain.named_parameters(), folded.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or error(b.grad, a.grad) <= bound, name


def resnet(name: str) -> nn.Module:
    return build_encoder(Encoder(name=name)).backbone.network


@pytest.mark.parametrize(
    ("name", "pairs"), [("resnet18", 20), ("timm/test_resnet", 15), ("timm/resnet10t", 14), ("timm/seresnet18", 20)]
)
def test_networks_keep_their_function_gradients_and_names(name: str, pairs: int) -> None:
    plain, folded, num_pairs = pair_of(resnet(name))
    assert num_pairs == pairs == sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in folded.named_modules()] == [name for name, _ in plain.named_modules()]
    assert_equal(plain, folded)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_kind_of_layer(bias: bool, affine: bool, groups: int) -> None:
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2, groups=groups, bias=bias)
    network = nn.Sequential(conv, nn.BatchNorm2d(6, affine=affine), nn.ReLU(inplace=True), nn.Flatten())
    plain, folded, num_pairs = pair_of(network)
    assert num_pairs == 1
    assert_equal(plain, folded)


@pytest.mark.parametrize("fixed", ["conv.weight", "conv.bias", "norm.weight", "norm.bias", "conv", "norm", "all"])
def test_fixed_parameters_get_no_gradient_and_the_others_the_same(fixed: str) -> None:
    network = nn.Sequential()
    network.add_module("conv", nn.Conv2d(3, 4, 3))
    network.add_module("norm", nn.BatchNorm2d(4))
    network.add_module("flat", nn.Flatten())
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not (fixed == "all" or name.startswith(fixed)))
    plain, folded, num_pairs = pair_of(network)
    assert num_pairs == 1
    assert_equal(plain, folded)


def test_gradients_by_finite_differences() -> None:
    _, folded, _ = pair_of(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, bias=True), nn.BatchNorm2d(2)))
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in folded.named_parameters()]

    def function(image: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(folded, dict(zip(names, values, strict=True)), (image, None))

    # functional_call swaps parameters by name, which the folded forward must look up anew in each call.
    assert torch.autograd.gradcheck(function, (image, *folded.parameters()))


def test_half_of_the_graph_is_not_saved() -> None:
    plain, folded, _ = pair_of(resnet("resnet18"), torch.float32)
    totals = []
    for encoder in (plain, folded):
        with LiveBytes() as live:
            graph_nD = encoder(torch.rand(4, 3, 64, 64), None)
            totals.append(live.now)
        del graph_nD
    assert totals[1] <= 0.6 * totals[0]


def test_under_autocast_it_is_as_exact_as_the_layers() -> None:
    plain, folded, _ = pair_of(resnet("resnet18"), torch.float32)
    exact = copy.deepcopy(plain).double()
    image = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    exact(image.double(), None).square().sum().backward()
    errors = []
    for encoder in (plain, folded):
        with torch.autocast("cpu", torch.bfloat16):
            output = encoder(image, None)
        output.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in encoder.parameters())
        pairs = list(zip(encoder.parameters(), exact.parameters(), strict=True))
        errors.append(sum(error(p.grad.double(), q.grad) for p, q in pairs) / len(pairs))
    assert errors[0] > 2**-9  # autocast was on
    assert errors[1] <= 1.5 * errors[0]


def test_a_change_of_weights_is_seen_and_a_second_call_changes_nothing() -> None:
    plain, folded, _ = pair_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()))
    assert fold_batchnorm(folded) == 0
    for encoder in (plain, folded):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.normal_()
    assert_equal(plain, folded)


class Twice(nn.Module):
    """One convolution before two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, image):
        return self.bn1(self.conv(image)).flatten(1) + self.bn2(self.conv(image)).flatten(1)


class Skip(Twice):
    """The convolution's output goes past its normalisation too."""

    def forward(self, image):
        values = self.conv(image)
        return self.bn1(values).flatten(1) + values.flatten(1)


class Before(Twice):
    """Normalisation before convolution, in spite of the names."""

    def forward(self, image):
        return self.conv(self.bn2(self.bn1(self.conv(image)))[:, :3]).flatten(1)


class Untraceable(Twice):
    """The forward looks at its values."""

    def forward(self, image):
        return self.bn1(self.conv(image)).flatten(1) * (1 if image.sum() > 0 else 2)


@pytest.mark.parametrize("kind", [Twice, Skip, Before, Untraceable])
def test_what_is_not_a_pair_for_certain_is_left_alone(kind: type[nn.Module]) -> None:
    plain, folded, num_pairs = pair_of(kind())
    assert num_pairs == 0
    assert_equal(plain, folded)


def test_encoders_without_batchnorm_have_nothing_to_fold() -> None:
    assert fold_batchnorm(TileEncoder(SmallCNN(4), MEAN, STD)) == 0
    assert fold_batchnorm(build_encoder(Encoder(name="timm/test_vit", options={"img_size": 32}))) == 0

"""The probe: encoders that mix the tiles of a chunk are refused by the layer that does it, all others pass."""

import copy

import pytest
import torch
from torch import nn

from gigamil.config.schema import Encoder
from gigamil.errors import ConfigError
from gigamil.models.dropout import KeyedDropout
from gigamil.models.encoder import TileEncoder, build_encoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.probe import refuse_tile_mixing

MEAN, STD = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
DIM = 6


class Mean(nn.Module):
    """Subtracts a share of the mean over the chunk."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.share = share

    def forward(self, value_nCHW):
        return value_nCHW - self.share * value_nCHW.mean(dim=0)


class Backbone(nn.Module):
    """Layers, then a global mean."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.dim = DIM
        self.layers = nn.Sequential(nn.Conv2d(3, DIM, 3), *layers)

    def forward(self, image_nCHW, tile_key_n):
        return self.layers(image_nCHW).mean(dim=(2, 3))


class Scaled(nn.Module):
    """A residual branch with a small factor, as LayerScale has it at the start."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)

    def forward(self, value_nCHW):
        return value_nCHW + 1e-5 * self.branch(value_nCHW)


class Directly(Backbone):
    """Mixes in a forward of its own, outside of every layer."""

    def forward(self, image_nCHW, tile_key_n):
        embedding_nD = super().forward(image_nCHW, tile_key_n)
        return embedding_nD / embedding_nD.norm()


def encoder(backbone: nn.Module) -> TileEncoder:
    torch.manual_seed(0)
    return TileEncoder(backbone, MEAN, STD).train()


@pytest.mark.parametrize(
    "part",
    [
        Encoder(name="small_cnn", options={"dropout": 0.5}),
        Encoder(name="resnet18"),
        Encoder(name="timm/test_resnet"),
        Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 2}),
        Encoder(
            name="timm/test_vit", options={"img_size": 32, "depth": 2, "drop_path_rate": 0.5, "proj_drop_rate": 0.5}
        ),
        Encoder(name="timm/test_vit", options={"img_size": 32, "depth": 2}, lora_rank=2, freeze_blocks=1),
        Encoder(name="timm/test_convnext"),
        Encoder(name="timm/swin_tiny_patch4_window7_224", options={"img_size": 32, "depths": [1, 1], "window_size": 4}),
    ],
    ids=lambda part: part.name,
)
@pytest.mark.parametrize("is_training", [True, False])
def test_encoders_that_look_at_one_tile_pass(part: Encoder, is_training: bool) -> None:
    torch.manual_seed(0)
    found = build_encoder(part).train(is_training)
    refuse_tile_mixing(found, 32)
    refuse_tile_mixing(found.double(), 32)


def test_a_layer_deep_inside_is_named() -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(DIM, DIM, 1), Mean(), nn.GELU()))
    mixing = encoder(Backbone(nn.GroupNorm(2, DIM), inner, Mean()))
    with pytest.raises(
        ConfigError, match=r"layer 'encoder\.backbone\.layers\.2\.1\.1' \(Mean\) mixes the tiles"
    ) as caught:
        refuse_tile_mixing(mixing, 32)
    assert "GroupNorm or LayerNorm" in str(caught.value)


def test_a_layer_in_a_branch_with_a_small_factor_is_found() -> None:
    with pytest.raises(ConfigError, match=r"layers\.2\.branch\.1' \(Mean\) mixes the tiles"):
        refuse_tile_mixing(encoder(Backbone(nn.ReLU(), Scaled(nn.Conv2d(DIM, DIM, 1), Mean()))), 32)
    refuse_tile_mixing(encoder(Backbone(nn.ReLU(), Scaled(nn.Conv2d(DIM, DIM, 1), nn.ReLU()))), 32)


def test_a_difference_within_rounding_is_none() -> None:
    refuse_tile_mixing(encoder(Backbone(Mean(1e-6))), 32)
    with pytest.raises(ConfigError, match="Mean"):
        refuse_tile_mixing(encoder(Backbone(Mean(1e-2))), 32)


def test_mixing_outside_of_every_layer_is_refused_by_the_encoder() -> None:
    with pytest.raises(ConfigError, match=r"layer 'encoder\.backbone' \(Directly\) mixes"):
        refuse_tile_mixing(encoder(Directly()), 32)


def test_batchnorm_in_training_mode_is_named_first() -> None:
    with pytest.raises(ConfigError, match=r"layer 'backbone\.layers\.1' is BatchNorm in training mode"):
        refuse_tile_mixing(encoder(Backbone(nn.BatchNorm2d(DIM))), 32)
    refuse_tile_mixing(
        encoder(FrozenStatistics(nn.Sequential(nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten()), 4)), 32
    )


@pytest.mark.parametrize(
    ("tail", "shape"),
    [(nn.Identity(), r"\(3, 6, 30, 30\)"), (nn.Flatten(), r"\(3, 5400\)"), (nn.Flatten(0, 1), r"\(18, 30, 30\)")],
)
def test_an_output_that_is_no_embedding_is_refused(tail: nn.Module, shape: str) -> None:
    backbone = FrozenStatistics(nn.Sequential(nn.Conv2d(3, DIM, 3), tail), DIM)
    with pytest.raises(ConfigError, match=rf"encoder Sequential gives {shape} for 3 tiles .* = \(3, 6\)"):
        refuse_tile_mixing(encoder(backbone), 32)


def test_an_output_that_is_no_tensor_is_refused() -> None:
    class Two(Backbone):
        def forward(self, image_nCHW, tile_key_n):
            return super().forward(image_nCHW, tile_key_n), None

    with pytest.raises(ConfigError, match="encoder Two gives tuple for 3 tiles"):
        refuse_tile_mixing(encoder(Two()), 32)


def test_tiles_of_another_size_are_refused_with_the_option() -> None:
    pytest.importorskip("timm")
    fixed = build_encoder(Encoder(name="timm/test_vit", options={"img_size": 32, "dynamic_img_size": False}))
    with pytest.raises(ConfigError, match=r"VisionTransformer does not take tiles of slides.tile_px=48.*img_size: 48"):
        refuse_tile_mixing(fixed, 48)
    refuse_tile_mixing(build_encoder(Encoder(name="timm/test_vit", options={"dynamic_img_size": True})), 48)


@pytest.mark.parametrize("layer", [nn.ReLU(), Mean()], ids=["passes", "refused"])
def test_nothing_is_left_changed(layer: nn.Module) -> None:
    drawing = encoder(Backbone(nn.Dropout(0.5), layer, nn.BatchNorm2d(DIM)))
    drawing.backbone.layers[3].eval()
    before, generator = copy.deepcopy(drawing.state_dict()), torch.get_rng_state()
    modes = [module.training for module in drawing.modules()]
    try:
        refuse_tile_mixing(drawing, 32)
    except ConfigError:
        assert isinstance(layer, Mean)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in drawing.state_dict().items())
    assert [module.training for module in drawing.modules()] == modes
    assert not any(module._forward_hooks for module in drawing.modules())
    assert all(parameter.grad is None for parameter in drawing.parameters())


def test_keyed_dropout_gets_keys() -> None:
    class Keyed(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.keyed = KeyedDropout(0.5, "encoder.keyed")

        def forward(self, image_nCHW, tile_key_n):
            return self.keyed(super().forward(image_nCHW, tile_key_n), tile_key_n)

    refuse_tile_mixing(encoder(Keyed()), 32)
    refuse_tile_mixing(encoder(Keyed()).eval(), 32)

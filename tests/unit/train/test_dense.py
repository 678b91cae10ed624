"""Dense encoders in a run: what is refused before it begins, and a device that has no memory for a block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamil.config.schema import RunConfig, Slides
from gigamil.errors import ConfigError, TrainingError
from gigamil.models.encoder import DenseEncoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import build_model
from gigamil.testing import dense
from gigamil.testing.dense import SHAPES, DenseCase, check_dense_cases
from gigamil.train.dense import dense_geometry

MEAN_STD = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def encoder(cell_px: int, *layers: nn.Module) -> DenseEncoder:
    return DenseEncoder(FrozenStatistics(nn.Sequential(*layers), 4, cell_px=cell_px), *MEAN_STD)


def test_an_encoder_of_tiles_has_no_geometry() -> None:
    config = RunConfig.model_validate({"science": {"encoder": {"name": "small_cnn"}}})
    assert dense_geometry(build_model(config.science, 2).encoder, config.slides) is None


def test_cells_are_as_large_as_tiles() -> None:
    model = encoder(8, nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(4))
    geometry = dense_geometry(model, Slides.model_construct(tile_px=8))
    assert geometry is not None
    assert geometry.strides == (8, 8)
    with pytest.raises(ConfigError, match=r"8 x 8 pixels, and a tile 224: .*slides\.tile_px=8"):
        dense_geometry(model, Slides())


def test_there_are_as_many_cells_as_tiles() -> None:
    model = encoder(8, nn.Conv2d(3, 4, 5, 8))
    with pytest.raises(ConfigError, match=r"as many as there are tiles. Pad its convolutions"):
        dense_geometry(encoder(8, nn.Conv2d(3, 4, 9, 8)), Slides.model_construct(tile_px=8))
    assert dense_geometry(model, Slides.model_construct(tile_px=8)) is not None


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.GroupNorm(2, 4), "layer '1' .GroupNorm. looks at the whole image"),
        (nn.Flatten(), "'1' .Flatten. is not known"),
    ],
)
def test_a_layer_that_is_not_local_is_named(layer: nn.Module, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dense_geometry(encoder(8, nn.Conv2d(3, 4, 8, 8), layer), Slides.model_construct(tile_px=8))


def test_the_configuration_makes_a_dense_resnet_and_refuses_it_of_others() -> None:
    part = {"name": "resnet18", "dense": "layer3", "pool": 4, "pool_kind": "max"}
    config = RunConfig.model_validate({"science": {"encoder": part}, "slides": {"tile_px": 64}})
    model = build_model(config.science, 2).encoder
    assert isinstance(model, DenseEncoder)
    assert (model.dim, model.cell_px) == (256, 64)
    assert model.eval()(torch.zeros(2, 3, 64, 64), None).shape == (2, 256)
    with pytest.raises(ConfigError, match="'small_cnn'"):
        build_model(RunConfig.model_validate({"science": {"encoder": part | {"name": "small_cnn"}}}).science, 2)


class SmallDevice(FrozenStatistics):
    """A network on a device without memory for images of more than `limit` pixels with a graph."""

    limit = 0

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and image_nCHW.shape[-1] * image_nCHW.shape[-2] > self.limit:
            raise torch.OutOfMemoryError("injected")
        return super().forward(image_nCHW, tile_key_n)


@pytest.mark.parametrize("keep", ["none", "half"])
def test_a_block_that_does_not_fit_is_cut_into_quarters(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    made = dense.make_model

    def make_model(*words: Any) -> Any:
        model = made(*words)
        model.encoder.backbone.__class__ = SmallDevice
        return model

    case = DenseCase("convolutions, mean", SHAPES[0], 1, 64, keep)
    truth = check_dense_cases(0, 1, [case])
    assert truth[0].within(1e-10)
    whole = dense.reference(case)
    monkeypatch.setattr(dense, "make_model", make_model)
    monkeypatch.setattr(dense, "reference", lambda _: whole)
    monkeypatch.setattr(SmallDevice, "limit", 50 * 50)  # blocks of 2 x 2 cells, with their halo
    assert check_dense_cases(0, 1, [case])[0].within(1e-10)
    monkeypatch.setattr(SmallDevice, "limit", 10)
    with pytest.raises(TrainingError, match="no memory for a single tile"):
        check_dense_cases(0, 1, [case])

"""Dense encoders in a run: what is refused before it begins, and a device that has no memory for a block."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gigamil.config.schema import RunConfig, Slides
from gigamil.data.blocks import BlockImages
from gigamil.errors import ConfigError, TrainingError
from gigamil.memory.geometry import geometry_of
from gigamil.models.encoder import DenseEncoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import build_model
from gigamil.partition.blocks import block_ranges
from gigamil.testing import dense
from gigamil.testing.dense import SHAPES, DenseCase, check_dense_cases
from gigamil.train.dense import BlockCosts, dense_geometry
from gigamil.train.plan import Plan, best_chunk, plan_run
from gigamil.units import format_bytes

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
    for name in ("small_cnn", "timm/resnet18"):
        other = RunConfig.model_validate({"science": {"encoder": part | {"name": name}}})
        with pytest.raises(ConfigError, match=rf"dense=layer3 is for torchvision's ResNets, not for encoder '{name}'"):
            build_model(other.science, 2)


CONFIG = {
    "science": {"encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 2}}},
    "slides": {"tile_px": 32},
}


def planned(chunk: int, memory: int = 8 * 10**9, strategy: str = "auto") -> Plan:
    config = RunConfig.model_validate(CONFIG | {"execution": {"chunk": chunk, "memory": strategy, "device": "cpu"}})
    return plan_run(config, tiles=4000, device_memory=memory)


@pytest.mark.parametrize("chunk", [1, 4, 7, 16, 64, 1024])
def test_blocks_cost_the_pixels_that_are_read(chunk: int) -> None:
    case = DenseCase("dilated, max", SHAPES[0], 1, chunk)
    images, grids = dense.make_slides(case, 8)
    geometry = geometry_of(dense.make_model(case.net).encoder.network)
    pixels, calls, largest = 0, 0, 0
    for number, grid in enumerate(grids):
        size = len(grid.cell_N2)
        read = BlockImages([(f"slide-{number}", 0, size)], dense.MemorySlides(images, grids), geometry, 8)
        ranges = block_ranges(np.zeros(size, np.int64), grid.cell_N2, chunk)
        sizes = [read.read(*rows).shape[1] * read.read(*rows).shape[2] for rows in ranges]
        pixels, calls, largest = pixels + sum(sizes), calls + len(sizes), max(largest, *sizes)
    found = BlockCosts(geometry, 8, grids).at(chunk)
    tiles = sum(len(grid.cell_N2) for grid in grids)
    assert found.num_calls == calls
    assert found.factor == pytest.approx(pixels / (tiles * 64))
    assert found.mean_area == pytest.approx(pixels / calls / 64)
    assert found.largest_area == largest / 64


def test_blocks_inside_a_slide_cost_what_the_page_on_streaming_says() -> None:
    config = {"science": {"encoder": {"name": "resnet18", "dense": "layer4"}}, "slides": {"tile_px": 32}}
    geometry = geometry_of(build_model(RunConfig.model_validate(config).science, 2).train().encoder.network)
    for side_px, factor in ((2048, 1.45), (4096, 1.21), (8192, 1.10)):
        found = BlockCosts(geometry, 32).at((side_px // 32) ** 2)
        assert found.side_px == side_px
        assert found.factor == pytest.approx(factor, abs=0.015)  # both sides are read in whole strides there


def test_a_plan_tells_the_blocks_and_with_which_the_run_computes_least() -> None:
    plans = {4**power: planned(4**power) for power in range(7)}
    work = {chunk: plan.cost * plan.blocks.factor for chunk, plan in plans.items() if plan.blocks and plan.fits}
    for chunk, plan in plans.items():
        assert plan.blocks is not None
        assert work[plan.blocks.best_chunk or 0] == min(work.values())
        assert plan.blocks.smallest_peak <= plan.peak
        assert f"(execution.chunk {chunk}), read with what is around them as" in plan.text()
    assert "least work that fits, execution.chunk" in plans[1].text()
    assert plans[1].blocks.smallest_peak == planned(1, strategy="replay").peak


def test_memory_for_less_than_one_block_is_told_with_the_least_that_is_needed() -> None:
    need = planned(1).blocks.smallest_peak
    plan = planned(64, memory=need // 2)
    assert not plan.fits
    assert plan.blocks.best_chunk is None
    assert f"smallest, execution.chunk 1: peak {format_bytes(plan.blocks.smallest_peak)}" in plan.text()
    enough = planned(64, memory=int(need * 1.1))
    assert enough.blocks.best_chunk is not None
    assert enough.blocks.best_peak <= need * 1.1


def test_the_size_of_blocks_is_chosen_by_memory() -> None:
    config = RunConfig.model_validate(CONFIG)
    model, cpu = build_model(config.science, 2).train(), torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        chosen = []
        for memory in (10**6, planned(1).blocks.smallest_peak + 10**7, 8 * 10**9):
            patch.setattr("gigamil.memory.budget.free_device_memory", lambda *_, memory=2 * memory: memory)
            chosen.append(best_chunk(config, model, [4000], 1, cpu, 1))
    assert chosen[0] == 1
    assert 1 <= chosen[1] < chosen[2]
    small = config.model_copy(update={"execution": config.execution.model_copy(update={"memory_budget": 10**6})})
    with pytest.raises(
        ConfigError, match=r"memory_budget=1e\+06 is 1 MB, and with the smallest blocks, of one tile, a rank"
    ):
        best_chunk(small, model, [4000], 1, cpu, 1)


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

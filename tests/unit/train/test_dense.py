"""Dense encoders in a run: what is refused before it begins, and a device that has no memory for a block."""

import re
from functools import cache
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
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.partition.blocks import block_ranges, block_side
from gigamil.partition.schedule import plan_steps
from gigamil.testing import dense
from gigamil.testing.dense import SHAPES, DenseCase, check_dense_cases
from gigamil.train.dense import BlockCosts, dense_geometry
from gigamil.train.plan import Plan, best_chunk, plan_run, refuse_unfit
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
        with pytest.raises(ConfigError, match=rf"encoder '{name}' does not take science.encoder.dense and pool"):
            build_model(other.science, 2)


CONFIG = {
    "science": {"encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 2}}, "slides_per_step": 1},
    "slides": {"tile_px": 32},
}


def config_with(**execution: object) -> RunConfig:
    return RunConfig.model_validate(CONFIG | {"execution": {"device": "cpu"} | execution})


@cache
def planned(chunk: int, memory: int = 8 * 10**9, strategy: str = "auto", tiles: int = 4000) -> Plan:
    return plan_run(config_with(chunk=chunk, memory=strategy), tiles=tiles, device_memory=memory)


@pytest.fixture
def model() -> SlideModel:
    return build_model(RunConfig.model_validate(CONFIG).science, 2).train()


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


def chosen(config: RunConfig, model: SlideModel, tiles: int, free: int) -> int:
    """What training chooses where so much memory is free, which is what `gigamil plan` chooses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gigamil.train.plan.free_device_memory", lambda *_: free)
        found = best_chunk(config, model, [tiles], 1, torch.device("cpu"), 1)
    assert plan_run(config, tiles=tiles, device_memory=free).chunk == found
    return found


def test_the_size_of_blocks_is_chosen_by_memory(model: SlideModel) -> None:
    config, enough_for_one = config_with(chunk=None), planned(1).blocks.smallest_peak + 10**7
    sizes = [chosen(config, model, 4000, memory) for memory in (10**6, enough_for_one, 8 * 10**9)]
    assert sizes[0] == 1
    assert 1 <= sizes[1] < sizes[2]


@pytest.mark.parametrize("chunk", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_a_budget_of_bytes_is_for_the_graph_of_a_block_and_not_for_the_whole_rank(
    chunk: int, model: SlideModel
) -> None:
    tiles, free = 40_000, 32 * 10**9
    budget = int(1.5 * planned(chunk, free, tiles=tiles).graph)
    config = config_with(chunk=None, memory_budget=budget)
    assert chosen(config, model, tiles, free) == chunk
    plan = plan_run(config, tiles=tiles, device_memory=free)
    assert plan.num_chunks > plan.num_kept >= 1
    assert plan.fits
    assert plan.peak > budget
    assert f"(execution.chunk {chunk})" in plan.text()
    assert chosen(config_with(chunk=None, memory_budget=1e9), model, tiles, free) > chunk


def test_a_budget_below_the_graph_of_one_block_is_refused_with_what_that_takes(model: SlideModel) -> None:
    graph = planned(1).graph
    small = config_with(chunk=None, memory_budget=graph // 2)
    words = rf"memory_budget=.* is .*, and the graph of the smallest block, of one tile, takes {format_bytes(graph)}"
    for choose in (
        lambda: best_chunk(small, model, [4000], 1, torch.device("cpu"), 1),
        lambda: plan_run(small, tiles=4000, device_memory=8 * 10**9),
    ):
        with pytest.raises(ConfigError, match=words):
            choose()


def test_where_all_graphs_are_kept_and_do_not_fit_blocks_are_those_that_take_least(model: SlideModel) -> None:
    peaks = {4**power: planned(4**power, strategy="keep").peak for power in range(7)}
    best = min(peaks, key=lambda chunk: peaks[chunk])
    assert peaks[1] == max(peaks.values())
    config, cpu = config_with(chunk=None, memory="keep"), torch.device("cpu")
    assert chosen(config, model, 4000, peaks[best] * 3 // 4) == best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gigamil.train.plan.free_device_memory", lambda *_: peaks[best] * 3 // 4)
        with pytest.raises(ConfigError, match=f"take {format_bytes(peaks[best])} on a rank") as refusal:
            refuse_unfit(config_with(chunk=best, memory="keep"), model, [4000], 1, cpu, 1)
    assert "execution.memory auto" in str(refusal.value)


def test_a_chunk_between_two_squares_is_planned_as_the_smaller() -> None:
    plans = [planned(chunk, 2 * 10**8, "keep") for chunk in (64, 100)]
    assert plans[0].num_chunks == plans[1].num_chunks == -(-4000 // 64)
    assert plans[0].peak == plans[1].peak
    assert plans[0].remedies == plans[1].remedies
    sizes = re.findall(r"execution\.chunk (\d+): peak", " ".join(plans[0].remedies))
    assert sizes
    assert all(block_side(int(size)) ** 2 == int(size) for size in sizes)


@pytest.mark.parametrize(("num_groups", "group_size"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_busiest_ranks_calls_are_counted(num_groups: int, group_size: int, chunk: int) -> None:
    case = DenseCase("dilated, max", SHAPES[0], 1, chunk)
    grids = sorted(dense.make_slides(case, 8)[1], key=lambda grid: -len(grid.cell_N2))
    sizes = [len(grid.cell_N2) for grid in grids]
    (step,) = plan_steps(range(len(grids)), sizes, len(grids), num_groups, group_size)
    calls = [0]
    for group, positions in enumerate(step.groups):
        for rank in range(group_size):
            spans = step.spans(group, rank)
            cells = [grids[positions[span.slide]].cell_N2[span.start : span.stop] for span in spans]
            slide_n = np.repeat(np.arange(len(spans)), [len(cell_n2) for cell_n2 in cells])
            calls.append(len(block_ranges(slide_n, np.concatenate([np.zeros((0, 2), np.int64), *cells]), chunk)))
    geometry = geometry_of(dense.make_model(case.net).encoder.network)
    assert BlockCosts(geometry, 8, grids).most_calls(chunk, step) == max(calls)
    if chunk == 1:
        assert max(calls) == max(max(step.counts(group)) for group in range(num_groups))


def test_what_blocks_read_is_held_once_with_what_is_around_them() -> None:
    tiles_bytes = 4000 * 32 * 32 * 3
    for chunk in (1, 64):
        plan = planned(chunk)
        (row,) = (row for row in plan.rows if row.name == "tiles")
        block = plan.blocks.read_px[0] * plan.blocks.read_px[1] * 3
        # Kept between the passes; one in use and one ahead; tiles that blocks have in common.
        assert row.bytes == pytest.approx(plan.num_chunks * block + 2 * block + tiles_bytes, rel=1e-3)
        (row,) = (row for row in planned(chunk, plan.peak // 2).rows if row.name == "tiles")
        assert row.bytes < plan.peak // 8 + 2 * block + tiles_bytes


@pytest.mark.parametrize("keep", ["none", "half"])
def test_a_block_that_does_not_fit_is_cut_into_quarters(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    made, limit = dense.make_model, 50 * 50  # pixels of an image with a graph: blocks of 2 x 2 cells, with their halo

    def refuse_large(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and inputs[0].shape[-1] * inputs[0].shape[-2] > limit:
            raise torch.OutOfMemoryError("injected")

    def make_model(*words: Any) -> Any:
        model = made(*words)
        model.encoder.network.register_forward_pre_hook(refuse_large)
        return model

    case = DenseCase("convolutions, mean", SHAPES[0], 1, 64, keep)
    truth = check_dense_cases(0, 1, [case])
    assert truth[0].within(1e-10)
    whole = dense.reference(case)
    monkeypatch.setattr(dense, "make_model", make_model)
    monkeypatch.setattr(dense, "reference", lambda _: whole)
    assert check_dense_cases(0, 1, [case])[0].within(1e-10)
    limit = 10
    with pytest.raises(TrainingError, match="no memory for a single tile"):
        check_dense_cases(0, 1, [case])

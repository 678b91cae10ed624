"""How much memory a run will take, before it is started: `gigamil plan`.

What an encoder call takes is measured on this machine's CPU with two small numbers of tiles, and is a straight line in
their number. Aggregator and head go through the largest step as one rank of it, with tensors that have shapes and no
memory (torch's meta device). Everything else is counted. Bytes throughout; P parameters to train (float32), W ranks, n tiles of a rank,
c tiles of a chunk.

Why phases add up on a CPU: an encoder's working memory consists of blocks that glibc does not give back to the system
once they are free (below 32 MiB), so it is still resident while gradients are reduced, weights are updated and the
checkpoint is written. On a GPU memory is what tensors hold at the same time, and the largest phase counts.
"""

import copy
import functools
import heapq
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gigamil.config.schema import RunConfig
from gigamil.data.augment import augment_block, augment_tiles, to_float
from gigamil.data.blocks import SlideGrid
from gigamil.data.features import FeatureSet, features_folder
from gigamil.data.h5 import read_features_header
from gigamil.data.source import DECODED_BYTES
from gigamil.errors import ConfigError, GigamilError
from gigamil.memory.budget import chunks_to_keep, free_device_memory
from gigamil.memory.checkpointing import checkpoint_blocks
from gigamil.memory.geometry import Geometry
from gigamil.memory.peak import CallBytes, Linear, LiveBytes, measure_calls
from gigamil.models.aggregator import min_tiles
from gigamil.models.bag import Bag, LocalPool, Pool, Pooled, Ranges
from gigamil.models.encoder import DenseEncoder, TileEncoder
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.shared_slide import SharedSlide
from gigamil.parallel.topology import Topology
from gigamil.partition.blocks import block_side
from gigamil.partition.choose import sampled_sizes
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.partition.spans import owned_range
from gigamil.shards.read import ShardSet
from gigamil.train.cohort import TrainingData, load_training_data
from gigamil.train.dense import BlockCosts, dense_geometry, largest_grids, refuse_patients
from gigamil.train.engine import deepspeed_config, make_optimizer
from gigamil.train.step import FEATURE_ROWS
from gigamil.units import format_bytes

# Resident memory of a rank that is no tensor: code that oneDNN makes, thread buffers, indices, Python's objects.
# Measured with an encoder of 60 kB (tests/engine/test_plan.py), whose tensors are next to nothing.
PROCESS_BYTES = 32 * 2**20
# The same of dense encoders: images of many sizes leave pieces that do not fit the next, and kernels copy whole layers.
# Measured with ResNet-18 to layer3 (tests/engine/test_plan.py): 57 to 84 MB, and 237 and 264 MB where ranks exchange rows,
# which are copied four times on their way. Pieces are below 32 MiB, so larger slides have no larger ones.
BLOCKS_BYTES, EXCHANGE_BYTES = 64 * 2**20, 256 * 2**20
# Without shards, a slide is taken to have so much tissue: a resection of common size.
_TISSUE_MM2 = 100.0
# Tiles of a rank with which an aggregator is measured that cannot do without values: more than a block of
# `gigamil.models.rowwise`, from which on memory is a straight line.
_FEW_TILES = 4608
_NO_CALL = CallBytes(*[Linear(0, 0)] * 4)  # of features, which nothing encodes
_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: what takes memory.
        bytes: on this rank's device.
        note: how the figure comes about.
    """

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What the busiest rank takes in the largest step, and what the step costs.

    Attributes:
        device: "cpu" or "cuda".
        ranks: W.
        slides: how the sizes of slides are known.
        tiles_largest, tiles_typical: of a step, over all ranks.
        tiles_rank: of the busiest rank in the largest step.
        chunk: tiles per encoder call.
        num_chunks, num_kept: encoder calls of that rank, and those whose graphs are kept.
        graph, graph_budget: bytes of the graph of its largest call, and those that `memory: auto` may keep.
        kept_share: f, of its tiles.
        rows: what takes memory; peak is their sum.
        peak: bytes above the process's start.
        available: bytes that there are for a rank; None if that is not known.
        traffic: bytes that a rank sends per step, by purpose.
        cost: forwards of one tile that a tile costs: 4 - f, or 5 - f with activation checkpointing; 0 on features.
        remedies: changes that would make it fit, each with its peak; empty if it fits.
        blocks: of a dense encoder; None for one of tiles.
        shared: what `execution.halo: exchange` has in their place.
    """

    device: Literal["cpu", "cuda"]
    ranks: int
    slides: str
    tiles_largest: int
    tiles_typical: int
    tiles_rank: int
    chunk: int
    num_chunks: int
    num_kept: int
    graph: int
    graph_budget: int
    kept_share: float
    rows: tuple[Row, ...]
    peak: int
    available: int | None
    traffic: tuple[Row, ...]
    cost: float
    remedies: tuple[str, ...]
    blocks: "Blocks | None" = None
    shared: "SharedRows | None" = None

    @property
    def fits(self) -> bool:
        """Whether the peak is within what there is."""
        return self.available is None or self.peak <= self.available

    def text(self) -> str:
        """The table, for people."""
        step = f"step of {self.tiles_largest} tiles at most, {self.tiles_typical} typically ({self.slides})"
        calls = f"{self.num_chunks} chunks of {self.chunk}" if self.shared is None else f"{self.num_chunks} slides"
        chunks = f"{self.tiles_rank} tiles in {calls}, {self.num_kept} kept"
        most = round(self.cost + self.kept_share)  # 4, or 5 with activation checkpointing
        cost = f"{self.cost:.2f} forwards ({most - 1} where all graphs are kept, {most} where none is)"
        lines = [
            f"{self.ranks} rank(s) on {self.device}; {step}",
            f"busiest rank: {chunks}: f = {self.kept_share:.2f}",
            "",
            "memory per rank, above the process's start",
            *_table([*self.rows, Row("peak", self.peak)]),
            "",
            "sent per rank and step",
            *_table(self.traffic),
            "",
            f"cost per tile: {cost if self.cost else 'no encoder: its features are read'}",
        ]
        if self.blocks is not None:
            lines += self.blocks.lines(self)
        if self.shared is not None:
            lines += self.shared.lines(self)
        if self.available is None:
            return "\n".join(lines)
        lines.append(f"available: {format_bytes(self.available)}: {'it fits' if self.fits else 'IT DOES NOT FIT'}")
        if not self.fits:
            lines += ["what would make it fit:", *(f"  {words}" for words in self.remedies or ("nothing known",))]
        return "\n".join(lines)


class SlideShape(NamedTuple):
    """A slide on the grid of its tiles.

    Attributes:
        num_y, num_x: rows and columns.
        num_tiles: cells with tissue.
    """

    num_y: int
    num_x: int
    num_tiles: int

    def share(self, num_ranks: int) -> int:
        """Most cells that one of so many ranks computes, glass and all, however the slide is turned."""
        return max(-(-self.num_y // num_ranks) * self.num_x, -(-self.num_x // num_ranks) * self.num_y)


@dataclass(frozen=True)
class SharedRows:
    """What a rank computes of slides that the ranks of its group share row by row (`execution.halo: exchange`).

    Attributes:
        cells: of its rows of the largest slide, with tissue or without.
        factor: pixels that are computed per pixel of a tile.
        is_known: how large the slides are; else they are taken to be full of tissue, and whether it fits is not said.
    """

    cells: int
    factor: float
    is_known: bool

    def lines(self, plan: Plan) -> list[str]:
        """For the table."""
        work = f"{plan.cost * self.factor:.2f} forwards of its own pixels"
        found = [
            f"execution.halo=exchange: a rank computes {self.cells} cells of the largest slide, glass and all",
            f"  {self.factor:.2f} pixels computed per pixel of a tile: {work}",
            "  the rows that ranks send each other at each layer are not counted above",
        ]
        if not self.is_known:
            found.append(
                "  the size of the slides is not known: these are figures for slides full of tissue, and whether a run fits is "
                "told once they are tiled"
            )
        return found


@dataclass(frozen=True)
class Blocks:
    """The blocks of a dense encoder.

    Attributes:
        side_px: of the tiles of a block.
        read_px: height and width of what is read for it, inside a slide.
        factor: pixels that are computed per pixel of a tile.
        is_measured: of the slides of the largest step; else inside a slide, for full blocks.
        smallest_peak: peak with blocks of one tile and no graph kept: no run takes less.
        best_chunk: the `execution.chunk` that computes least of those that fit; None if none does. The graph of a block
            must also fit into `execution.memory_budget`, unless `memory: keep` keeps all.
        best_factor, best_cost, best_peak: with it.
    """

    side_px: int
    read_px: tuple[int, int]
    factor: float
    is_measured: bool
    smallest_peak: int
    best_chunk: int | None = None
    best_factor: float = 0.0
    best_cost: float = 0.0
    best_peak: int = 0

    def lines(self, plan: Plan) -> list[str]:
        """For the table."""
        whose = "on the slides of this step" if self.is_measured else "inside a large slide"
        (height, width), own = self.read_px, f"{self.side_px} x {self.side_px} px"
        work = f"{plan.cost * self.factor:.2f} forwards of its own pixels"
        found = [
            f"blocks: {own} (execution.chunk {plan.chunk}), read with what is around them as {height} x {width} px",
            f"  {self.factor:.2f} pixels computed per pixel of a tile, {whose}: {work}",
            f"  smallest, execution.chunk 1: peak {format_bytes(self.smallest_peak)}",
        ]
        if self.best_chunk is None:
            return found
        if block_side(self.best_chunk) == block_side(plan.chunk):
            found[1] += ", the least that fits"
            return found
        side = block_side(self.best_chunk) * self.side_px // block_side(plan.chunk)
        found.append(
            f"  least work that fits, execution.chunk {self.best_chunk} ({side} px): {self.best_factor:.2f} pixels per "
            f"pixel, {self.best_cost * self.best_factor:.2f} forwards, peak {format_bytes(self.best_peak)}"
        )
        return found


class PoolCall(NamedTuple):
    """A collective that an aggregator calls on a rank, in forward or backward.

    Attributes:
        name: as in torch.distributed.
        operation: "sum" or "max" of those that reduce, else empty.
        bytes: of the tensor that this rank gives, its own share included.
        sent: bytes that go to other ranks.
    """

    name: str
    operation: str
    bytes: int
    sent: int


class _HeadBytes(NamedTuple):
    """What aggregator and head take of a rank, forward and backward.

    Attributes:
        memory: most at once besides embeddings, their gradient, parameters and theirs.
        calls: collectives.
    """

    memory: int
    calls: tuple[PoolCall, ...]


@dataclass(frozen=True)
class _Model:
    """What is measured and counted once, whatever the settings.

    Attributes:
        trained, fixed: bytes of parameters.
        trained_encoder: of those that are trained, the encoder's.
        largest_group, largest_tensor: bytes of the largest parameter group, and parameter, that is updated.
        call, recomputed: encoder calls, without and with activation checkpointing, which is measured when it is asked
            for; None where it cannot be had.
        head: (tiles of each slide of a group, its ranks) -> bytes of aggregator and head on one of them.
        dim: D.
        row_bytes: of a tile, or of its features.
        has_encoder: False on features.
        blocks: of a dense encoder; None for one of tiles, and where ranks share slides row by row.
        shapes: of slides that ranks share, the largest first, as many as a step has; none if they are not known. None
            where slides are not shared.
    """

    trained: int
    fixed: int
    trained_encoder: int
    largest_group: int
    largest_tensor: int
    call: CallBytes
    recomputed: Callable[[], CallBytes | None]
    head: Callable[[tuple[int, ...], int], _HeadBytes]
    dim: int
    row_bytes: int
    has_encoder: bool
    blocks: BlockCosts | None = None
    shapes: tuple[SlideShape, ...] | None = None


class _Calls(NamedTuple):
    """Encoder calls of the busiest rank.

    Attributes:
        chunk: tiles of a call, at most.
        number: of calls.
        largest, mean: what is computed in one, in tiles.
    """

    chunk: int
    number: int
    largest: float
    mean: float


def plan_run(
    config: RunConfig,
    ranks: int | None = None,
    device_memory: int | None = None,
    tiles: int | None = None,
    model: SlideModel | None = None,
) -> Plan:
    """Predict memory, kept share, communication and cost of a run, in seconds and without training.

    Args:
        config: of the run.
        ranks: W; None takes `execution.ranks`.
        device_memory: bytes of one rank, on a GPU unless `execution.device` is cpu; None takes what is free here (a
            CPU's is shared by the ranks).
        tiles: of a step over all ranks; None takes those of the shards or features, or an area of tissue where there are none.
        model: what the configuration describes, on the CPU, as the engine takes it; None builds it.
    Raises:
        ConfigError: the configuration does not make a model, `execution.group_size` does not divide the ranks, or a
            GPU's memory is neither told nor here.
        ShardError: `data.source: features` and there is none yet.
    Cost: a few forwards and backwards of a handful of tiles; memory of the model and its gradients.
    """
    from gigamil.train.prepare import refuse_unstreamable  # which refuses by a plan

    given, ranks = config, config.execution.ranks if ranks is None else ranks
    _refuse_group_size(config.execution.group_size, ranks)
    device = _device(config, is_planned=device_memory is not None)
    sizes, slides, data = _slide_sizes(config, tiles)
    if device_memory is None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "execution.device=cuda, and no GPU is here whose memory could be asked for: say it, for example with "
                "`--gpu-memory 80GB`"
            )
        device_memory = free_device_memory(torch.device(device), ranks)
    if model is None:
        model = build_planned_model(config)
    geometry = dense_geometry(model.encoder, config.slides)
    if isinstance(model.encoder, TileEncoder):
        refuse_unstreamable(model.encoder, config.execution)
    config = _changed(config, ranks=ranks)
    if geometry is not None and config.execution.halo == "exchange":
        measured = _measure(config, model, geometry, shapes=_shapes(config, data))
    else:
        measured = _measure(config, model, geometry, _largest_grids(config, data) if geometry and data else ())
    if measured.blocks is not None:
        chunk = _own_chunk(config, measured, measured.blocks, sizes, device, device_memory)
        config = _changed(config, chunk=chunk)
    plan = _predict(config, measured, sizes, slides, device, device_memory)
    if measured.blocks is not None:
        plan = replace(plan, blocks=_blocks(config, measured, measured.blocks, sizes, plan))
    if plan.fits:
        return plan
    remedies = _remedies(config, measured, sizes, plan)
    if plan.shared is not None:
        read = plan_run(_changed(given, halo="read", device=device), ranks, device_memory, tiles)
        if read.fits:
            remedies += (f"execution.halo read: peak {format_bytes(read.peak)}, {read.cost:.2f} forwards per tile",)
    return replace(plan, remedies=remedies)


def plan_worlds(
    config: RunConfig,
    worlds: Sequence[int],
    sizes: Sequence[int],
    model: SlideModel,
    device: Literal["cpu", "cuda"],
    device_memory: int,
) -> tuple[Plan, ...]:
    """Plans of one run on several numbers of ranks, without remedies: what is measured is measured once.

    Args:
        worlds: numbers of ranks.
        sizes: tiles of the slides that are trained on.
        model: from `build_planned_model`.
        device, device_memory: of a rank, which need not be here.
    Raises:
        ConfigError: `execution.group_size` does not divide the ranks, or `execution.halo` is exchange, whose plan needs the
            slides themselves.
    Cost: as `plan_run`, for all of them together.
    """
    if config.execution.halo == "exchange":
        raise ConfigError(
            "execution.halo=exchange: what ranks send each other at each layer is not known. Set it to read."
        )
    config = _changed(config, device=device)
    measured = _measure(config, model, dense_geometry(model.encoder, config.slides))
    plans = []
    for ranks in worlds:
        _refuse_group_size(config.execution.group_size, ranks)
        there = _changed(config, ranks=ranks)
        if measured.blocks is not None:
            there = _changed(there, chunk=_own_chunk(there, measured, measured.blocks, sizes, device, device_memory))
        plan = _predict(there, measured, sizes, "", device, device_memory)
        if measured.blocks is not None:
            plan = replace(plan, blocks=_blocks(there, measured, measured.blocks, sizes, plan))
        plans.append(plan)
    return tuple(plans)


def build_planned_model(config: RunConfig) -> SlideModel:
    """The model of a run as the engine takes it, on the CPU, with a random start: a file of weights need not be there."""
    from gigamil.train.prepare import set_batchnorm  # which refuses by a plan
    from gigamil.train.task import num_outputs

    encoder = config.science.encoder.model_copy(update={"weights": None})
    science = config.science.model_copy(update={"encoder": encoder})
    model = build_model(
        science, num_outputs(science, len(config.cohort.classes or (0, 1))), _feature_dim(config)
    ).train()
    if isinstance(model.encoder, TileEncoder):
        set_batchnorm(model.encoder, config.execution)
    return model


def pool_calls(model: SlideModel, sizes: Sequence[int], num_ranks: int) -> tuple[PoolCall, ...]:
    """Collectives that an aggregator calls in a step, forward and backward, on the rank of a group that sees most.

    Args:
        sizes: tiles of the group's slides.
        num_ranks: of the group; none are called by one rank.
    Cost: no memory and no arithmetic, unless the aggregator looks at values (then a forward and backward).
    """
    return _head_bytes(model, tuple(sizes), num_ranks).calls


def best_chunk(
    config: RunConfig,
    model: SlideModel,
    sizes: Sequence[int],
    ranks: int,
    device: torch.device,
    local_ranks: int,
    grids: Sequence[SlideGrid] = (),
) -> int:
    """The `execution.chunk` of a dense encoder with which a run computes least, of those that fit, as `gigamil plan` says.

    Args: as `refuse_unfit`; the model's BatchNorm is folded if the run will do so.
    Raises:
        ConfigError: `execution.memory_budget` has no room for the graph of a single block; says what that takes.
    Cost: a few forwards and backwards of a handful of tiles.
    """
    config, geometry = _changed(config, ranks=ranks, chunk=None), dense_geometry(model.encoder, config.slides, False)
    measured, free = _measure(config, model, geometry, grids), free_device_memory(device, local_ranks)
    assert measured.blocks is not None, "an encoder of tiles has no blocks"
    return _own_chunk(config, measured, measured.blocks, sizes, _device(config), free)


def refuse_unfit(
    config: RunConfig,
    model: SlideModel,
    sizes: Sequence[int],
    ranks: int,
    device: torch.device,
    local_ranks: int,
    grids: Sequence[SlideGrid] = (),
) -> None:
    """Refuse `execution.memory: keep` where the graphs of all chunks do not fit, before the first step.

    Args:
        model: on the CPU, before an engine takes it.
        sizes: tiles of the training slides.
        ranks, local_ranks: of the world, and of this machine.
        device: of this rank.
        grids: of a dense encoder's largest slides (`largest_grids`), as many as a step has; without them blocks are taken
            to be whole and to lie inside large slides.
    Raises:
        ConfigError: with the plan's figures and what would make it fit.
    """
    if config.execution.memory != "keep":
        return
    config, geometry = _changed(config, ranks=ranks), dense_geometry(model.encoder, config.slides, False)
    measured = _measure(config, model, geometry, grids)
    free = free_device_memory(device, local_ranks)
    plan = _predict(config, measured, sizes, "from the shards", _device(config), free)
    if plan.fits:
        return
    remedies = "; ".join(_remedies(config, measured, sizes, plan)) or "fewer tiles per step"
    raise ConfigError(
        f"execution.memory=keep: the graphs of {plan.tiles_rank} tiles take {format_bytes(plan.peak)} on a rank with all "
        f"else, and {format_bytes(free)} are free. What fits: {remedies}. See `gigamil plan`."
    )


def parse_bytes(text: str) -> int:
    """Bytes of "80GB", "512MiB", "1.5 GB" or a plain number.

    Raises:
        ConfigError: no such form.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        assert found is not None
        return int(float(found[1]) * _UNITS[found[2]])
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(f"'{text}' is no size of memory; write for example 80GB, 512MiB or bytes") from None


def _table(rows: Sequence[Row]) -> list[str]:
    width = max(len(row.name) for row in rows)
    return [f"  {row.name:{width}}  {format_bytes(row.bytes):>8}  {row.note}".rstrip() for row in rows]


def _device(config: RunConfig, is_planned: bool = False) -> Literal["cpu", "cuda"]:
    """Of the run; whose memory is told is planned for a GPU, which need not be here."""
    wanted = config.execution.device
    return "cuda" if wanted == "cuda" or (wanted == "auto" and (is_planned or torch.cuda.is_available())) else "cpu"


def _refuse_group_size(group_size: int | None, ranks: int) -> None:
    """Refuse a group that ranks do not fill. One rank with a larger group is what a YAML for a launcher says."""
    if ranks == 1 and group_size is not None and group_size > 1:
        raise ConfigError(
            f"execution.group_size={group_size}, and a plan for 1 rank: say how many the launcher will start, a multiple "
            f"of {group_size}, for example with `--ranks {group_size}`"
        )
    Topology(ranks, group_size=group_size or ranks)


def _slide_sizes(config: RunConfig, tiles: int | None) -> tuple[list[int], str, TrainingData | None]:
    """Tiles of the slides that are trained on, how they are known, and what knows them."""
    per_step = config.science.slides_per_step
    if tiles is not None:
        return [tiles // per_step + (i < tiles % per_step) for i in range(per_step)], "as given", None
    try:
        data = load_training_data(config)
        words = "from the features" if config.data.source == "features" else "from the shards"
        return list(data.slides("train").sizes), words, data
    except (GigamilError, OSError) as error:
        tile_mm = config.slides.tile_px * config.slides.tile_mpp / 1000
        size = max(1, round(_TISSUE_MM2 / tile_mm**2))
        words = (
            f"{_TISSUE_MM2:g} mm2 of tissue a slide assumed, --tiles N says otherwise; its tiles are not known: {error}"
        )
        return [size] * per_step, words, None


def _feature_dim(config: RunConfig) -> int | None:
    """D of any slide, where tiles are features already."""
    if config.data.source != "features":
        return None
    features = FeatureSet(features_folder(config), config.slides.tile_px * config.slides.tile_mpp)
    return read_features_header(features.path(features.slide_ids[0])).dim


def _largest_step(config: RunConfig, sizes: Sequence[int]) -> StepPlan:
    """The step of the largest slides: no epoch has a larger one."""
    per_step, ranks = config.science.slides_per_step, config.execution.ranks
    largest = sorted(sizes, reverse=True)[:per_step]
    group_size = config.execution.group_size or ranks
    return plan_steps(range(len(largest)), largest, per_step, ranks // group_size, group_size)[0]


def _largest_grids(config: RunConfig, data: TrainingData) -> tuple[SlideGrid, ...]:
    refuse_patients(config.science)
    slides = data.slides("train")
    return largest_grids(data.shards, slides.slide_ids, slides.sizes, config.science.slides_per_step)


def _shapes(config: RunConfig, data: TrainingData | None) -> tuple[SlideShape, ...]:
    """Of the slides with most cells, glass and all, as many as a step has; none where they are not known."""
    if data is None or not isinstance(data.shards, ShardSet):
        return ()
    manifests = map(data.shards.manifest, data.splits.train)
    shapes = [SlideShape(manifest.num_y, manifest.num_x, manifest.num_tiles) for manifest in manifests]
    return tuple(heapq.nlargest(config.science.slides_per_step, shapes, key=lambda shape: shape.share(1)))


def _changed(config: RunConfig, **changes: object) -> RunConfig:
    """With other keys of `execution`."""
    return config.model_copy(update={"execution": config.execution.model_copy(update=changes)})


def _measure(
    config: RunConfig,
    model: SlideModel,
    geometry: Geometry | None,
    grids: Sequence[SlideGrid] = (),
    shapes: tuple[SlideShape, ...] | None = None,
) -> _Model:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    groups = make_optimizer(model, config).param_groups
    # Large models at one and two tiles, small ones where more tiles cost nothing.
    numbers = (1, 2) if all_bytes > 200e6 else (2, 6)
    has_encoder = isinstance(model.encoder, TileEncoder)
    call = measure_calls(_encode(config, model), model, numbers) if has_encoder else _NO_CALL
    return _Model(
        trained=trained_bytes,
        fixed=all_bytes - trained_bytes,
        trained_encoder=sum(parameter.nbytes for parameter in model.encoder.parameters() if parameter.requires_grad),
        largest_group=max(sum(parameter.nbytes for parameter in group["params"]) for group in groups),
        largest_tensor=max(parameter.nbytes for parameter in trained),
        call=call,
        recomputed=functools.cache(lambda: _measure_recomputed(config, model, numbers) if has_encoder else None),
        head=functools.cache(functools.partial(_head_bytes, model)),
        dim=model.encoder.dim,
        row_bytes=config.slides.tile_px**2 * 3 if has_encoder else model.encoder.dim * 4,
        has_encoder=has_encoder,
        blocks=BlockCosts(geometry, config.slides.tile_px, grids) if geometry is not None and shapes is None else None,
        shapes=shapes,
    )


def _measure_recomputed(config: RunConfig, model: SlideModel, numbers: tuple[int, int]) -> CallBytes | None:
    backbone = model.encoder.backbone
    before = {name: module.__dict__.get("forward") for name, module in backbone.named_modules()}
    try:
        checkpoint_blocks(backbone)
        return measure_calls(_encode(config, model), model, numbers)
    except ConfigError:
        if config.execution.activation_checkpointing != "none":
            raise
        return None
    finally:
        for name, module in backbone.named_modules():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[name]


def _encode(config: RunConfig, model: SlideModel) -> Callable[[int], Tensor]:
    side = config.slides.tile_px
    is_narrow = config.science.precision == "bfloat16"
    augment = augment_block if isinstance(model.encoder, DenseEncoder) else augment_tiles
    network: ShardedNetwork | None = None
    if config.execution.halo == "exchange" and isinstance(model.encoder, DenseEncoder):
        network = ShardedNetwork(model.encoder.network, None)

    def encode(num_tiles: int) -> Tensor:
        # Of a dense encoder bytes are a line in the area of the block, whatever is around it.
        images, rows = (num_tiles, 1) if network is None else (1, num_tiles)
        key_n, cells = torch.arange(images), None
        if network is not None:
            cells = SharedSlide(network, (0, rows * side), [np.arange(rows)], 0, None)
        with torch.no_grad():
            image_nCHW = to_float(torch.zeros((images, rows * side, side, 3), dtype=torch.uint8), torch.float32)
            image_nCHW = augment(image_nCHW, key_n, settings=config.science.augment)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_narrow):
            return model.encode(image_nCHW, key_n, cells)

    return encode


class _OneOfMany:
    """A `Pool` as one rank of several sees it, without the others: shapes and bytes are right, values are not.

    Args:
        counts, rank: as of `Pool`.
        calls: collectives are appended, in the order of the forward; those of the backward right behind.
    """

    def __init__(self, counts: Sequence[int], rank: int, calls: list[PoolCall]) -> None:
        self.counts = tuple(counts)
        self.rank = rank
        self._calls = calls

    def sum(self, values: Tensor) -> Tensor:
        """An all-reduce, and one in backward."""
        self._calls += [self._all_reduced(values, "sum")] * (2 if values.requires_grad else 1)
        return values.clone()

    def max(self, values: Tensor) -> Tensor:
        """An all-reduce."""
        self._calls.append(self._all_reduced(values, "max"))
        return values.detach().clone()

    def stack(self, values: Tensor) -> Tensor:
        """An all-gather: its values go to all others."""
        self._calls.append(PoolCall("all_gather", "", values.nbytes, values.nbytes * (len(self.counts) - 1)))
        return torch.stack([values.detach()] * len(self.counts))

    def fetch(self, values_nX: Tensor, wanted: Sequence[Ranges]) -> Tensor:
        """An all-to-all of what others want of its rows; in backward of the gradients of theirs."""
        first = sum(self.counts[: self.rank])
        last = first + self.counts[self.rank]
        asked = [sum(max(0, min(stop, last) - max(start, first)) for start, stop in ranges) for ranges in wanted]
        own = asked[self.rank]
        rows = sum(stop - start for start, stop in wanted[self.rank])
        self._exchanged(values_nX, sum(asked), rows, own, math.prod(values_nX.shape[1:]))
        return _moved(values_nX, (rows, *values_nX.shape[1:]))

    def heads_apart(self, values_nHX: Tensor) -> Tensor:
        """An all-to-all of its rows of the others' heads; in backward of their rows of its heads."""
        (own, heads, width), ranks = values_nHX.shape, len(self.counts)
        share = heads // ranks * width
        self._exchanged(values_nHX, own * ranks, sum(self.counts), own, share)
        return _moved(values_nHX, (sum(self.counts), heads // ranks, width))

    def heads_together(self, values_NHX: Tensor) -> Tensor:
        """The inverse of `heads_apart`."""
        (total, heads, width), ranks = values_NHX.shape, len(self.counts)
        own = self.counts[self.rank]
        self._exchanged(values_NHX, total, own * ranks, own, heads * width)
        return _moved(values_NHX, (own, heads * ranks, width))

    def repartitioned(self, counts: Sequence[int]) -> "_OneOfMany":
        """The same ranks with other rows, and the same account."""
        return _OneOfMany(counts, self.rank, self._calls)

    def _all_reduced(self, values: Tensor, operation: str) -> PoolCall:
        """As a reduce-scatter and an all-gather."""
        sent = 2 * values.nbytes * (len(self.counts) - 1) // len(self.counts)
        return PoolCall("all_reduce", operation, values.nbytes, sent)

    def _exchanged(self, values: Tensor, rows_forward: int, rows_backward: int, own: int, width: int) -> None:
        """Rows that it gives away, those among them that stay, and numbers of a row."""
        row_bytes = width * values.element_size()
        for rows in (rows_forward, rows_backward)[: 2 if values.requires_grad else 1]:
            self._calls.append(PoolCall("all_to_all_single", "", rows * row_bytes, (rows - own) * row_bytes))


class _Moved(torch.autograd.Function):
    """Rows that come from elsewhere, in a buffer and in their order; backward: the same for gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = values.shape
        return values.new_zeros(shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_zeros(ctx.shape).clone(), None


def _moved(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    result: Tensor = _Moved.apply(values, shape)
    return result


class _MetaBytes(LiveBytes):
    """`LiveBytes` of tensors on the meta device, as if they took memory."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {storage._cdata for storage in _meta_storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _meta_storages(result):
            if storage._cdata not in before:
                self._count(storage)
        return result


def _meta_storages(values: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta]


class _AttentionKernel(TorchFunctionMode):
    """On the meta device torch would take its attention that stores a matrix; real devices have kernels that do not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        is_plain = func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs
        if is_plain and args[0].is_meta and args[0].dim() == 4 and args[0].shape[-1] == args[2].shape[-1]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def _head_bytes(model: SlideModel, sizes: tuple[int, ...], num_ranks: int) -> _HeadBytes:
    """Aggregator and head on the rank of a group that sees most, for slides of these sizes.

    Without memory or arithmetic, so at the step's own size. An aggregator that looks at values cannot be run so: it is
    measured on the CPU with fewer tiles, and taken to be a straight line beyond.
    """
    least = min_tiles(model.aggregator)
    sizes = tuple(max(least, size) for size in sizes)
    try:
        return _run_head(model, sizes, num_ranks, "meta")
    except (RuntimeError, TypeError):  # NotImplementedError is one of the former
        points = []
        for tiles in (_FEW_TILES, 2 * _FEW_TILES):
            share = min(1.0, tiles * num_ranks / sum(sizes))
            fewer = tuple(max(least, round(share * size)) for size in sizes)
            points.append((sum(fewer), _run_head(model, fewer, num_ranks, "cpu")))
    (few, small), (more, large) = points
    times = (sum(sizes) - more) / (more - few) if more > few else 0.0

    def beyond(a: int, b: int) -> int:
        return max(0, round(b + (b - a) * times))

    calls = tuple(
        PoolCall(a.name, a.operation, beyond(a.bytes, b.bytes), beyond(a.sent, b.sent))
        for a, b in zip(small.calls, large.calls, strict=True)
    )
    return _HeadBytes(beyond(small.memory, large.memory), calls)


def _run_head(model: SlideModel, sizes: tuple[int, ...], num_ranks: int, device: Literal["meta", "cpu"]) -> _HeadBytes:
    bounds = [owned_range(sum(sizes), rank, num_ranks) for rank in range(num_ranks)]
    slides = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))

    def seen(rank: int) -> tuple[int, int]:
        """Tiles of the slides that it owns a tile of; among equals one in the middle, with neighbours on both sides."""
        first, last = bounds[rank]
        touched = sum(stop - start for start, stop in slides if max(start, first) < min(stop, last))
        return touched, -abs(2 * rank - num_ranks)

    rank = max(range(num_ranks), key=seen)
    counts, calls = [stop - start for start, stop in bounds], list[PoolCall]()
    pool: Pool = LocalPool(sum(sizes)) if num_ranks == 1 else _OneOfMany(counts, rank, calls)
    modules = nn.ModuleList(module for module in (model.aggregator, model.head) if module is not None)
    modules = copy.deepcopy(modules).to(device)
    for parameter in modules.parameters():
        parameter.grad = torch.zeros_like(parameter)  # of parameters and their gradients the plan has rows
    embedding_nD = torch.zeros((counts[rank], model.encoder.dim), device=device, requires_grad=True)
    bag = Bag(
        embedding_nD,
        torch.zeros((counts[rank], 2), dtype=torch.float64, device=device),
        sizes,
        pool,
        torch.zeros(counts[rank], dtype=torch.int64, device=device),
        torch.zeros(len(sizes), dtype=torch.int64, device=device),
        torch.zeros(len(sizes), dtype=torch.int64, device=device),
    )
    with _AttentionKernel(), _MetaBytes() if device == "meta" else LiveBytes() as live:
        pooled: Pooled = modules[0](bag)
        logits_BK = modules[-1](pooled.slide_BX) if len(modules) == 2 else pooled.slide_BX
        parts = (logits_BK, pooled.extra_logits_MK, pooled.loss_B)
        torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    return _HeadBytes(max(0, live.peak - embedding_nD.nbytes), tuple(calls))


def _predict(
    config: RunConfig, model: _Model, sizes: Sequence[int], slides: str, device: Literal["cpu", "cuda"], available: int
) -> Plan:
    execution, science, ranks = config.execution, config.science, config.execution.ranks
    stage, on_gpu = execution.zero_stage, device == "cuda"
    sizes = sampled_sizes(config.science.regime, sizes)
    step = _largest_step(config, sizes)
    group_sizes = max((step.group_sizes(group) for group in range(len(step.groups))), key=sum)
    num_tiles = -(-sum(group_sizes) // step.group_size)
    shared: SharedRows | None = None
    if model.shapes is None:
        calls = _calls(config, model, step, num_tiles)
    else:
        calls, shared = _shared_calls(model.shapes, step)
    chunk, num_chunks, area = calls.chunk, calls.number, calls.largest
    recomputed = None if execution.activation_checkpointing == "none" else model.recomputed()
    call = recomputed or model.call

    trained, everything = model.trained, model.trained + model.fixed
    share = ranks if stage else 1  # of optimiser states
    states = [Row("parameters", everything, f"{format_bytes(model.fixed)} of them fixed" if model.fixed else "")]
    if stage == 3:
        states = [Row("parameters", everything // ranks + everything, "own part, and all of them within a step")]
    host = execution.offload and on_gpu
    where = "in main memory" if host else ""
    if stage:
        states.append(Row("float32 copy that the optimiser updates", 0 if host else trained // share, where))
    states.append(Row("moments", 0 if host else 2 * trained // share, where))
    bucket_setting = int(deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"]) * 4
    bucket = bucket_setting if on_gpu else min(bucket_setting, trained)  # a CPU's is resident only where it is used
    if stage == 3:
        states.append(Row("own part of the gradients, and their bucket", trained // ranks + bucket))
    has_average = science.optim.ema is not None
    if has_average:
        states.append(Row("moving average", trained // (ranks if stage == 3 else 1), "science.optim.ema"))
    if not on_gpu and model.trained_encoder:
        states.append(Row("encoder as it was at the start", model.trained_encoder, "on rank 0, to tell its drift"))
    is_taught = science.regime.name in ("coupled", "taught")
    if is_taught:
        states.append(Row("teacher", everything, f"science.regime={science.regime.name}: whole on every rank"))
    static = sum(row.bytes for row in states)

    tile_bytes = num_tiles * model.row_bytes
    limit = execution.tile_cache if execution.tile_cache is not None else 0.25
    cache = int(limit if limit > 1 else limit * max(0, available - static))
    if model.blocks is None and shared is None:
        held, tiles_note = _tiles(config, tile_bytes, cache, chunk * model.row_bytes, on_gpu)
    else:
        held, tiles_note = _images(calls, model.row_bytes, cache, 0 if on_gpu else sum(sizes) * model.row_bytes)
    embeddings = 2 * num_tiles * model.dim * 4
    head = model.head(group_sizes, step.group_size)

    gradients = trained
    reduced = trained // ranks if stage in (1, 2) else 0
    reduction = {0: trained if not on_gpu else min(trained, 500_000_000 * 4), 1: bucket, 2: bucket, 3: 0}[stage]
    largest = model.largest_group // ranks if stage else model.largest_tensor
    update = (largest if stage else 0) + (0 if on_gpu else 2 * largest)  # AdamW without a fused kernel makes two
    in_files = 0 if on_gpu else (4 if has_average else 3) * trained + model.fixed

    kept_chunk, later = call.kept.at(area), call.later.at(area)
    rest = static + held + embeddings + head.memory + gradients + later + max(reduced + reduction, update)
    process = PROCESS_BYTES + (
        BLOCKS_BYTES if model.blocks is not None else EXCHANGE_BYTES if shared is not None else 0
    )
    rest += 0 if on_gpu else process
    budget = _budget(execution.memory_budget, available, rest)
    memory = execution.memory if shared is None else memory_of_shared(config, len(step.groups))
    if is_taught:
        memory = "replay"  # a student's loss is one of single tiles: no chunk waits for the others
    num_kept = min(num_chunks, chunks_to_keep(memory, kept_chunk, budget)) if model.has_encoder else 0
    if model.blocks is None and shared is None:
        kept_tiles = min(num_tiles, num_kept * chunk)
        kept = sum(call.kept.at(min(chunk, num_tiles - start)) for start in range(0, kept_tiles, chunk))
    else:
        kept_tiles = round(num_tiles * num_kept / num_chunks)
        kept = num_kept * call.kept.at(calls.mean)
    blind = call.blind.at(area)
    if num_kept:
        # The first backward frees a graph while gradients come into being; the next ones work beside them.
        encode = max(kept, kept - kept_chunk + call.first.at(area), kept + blind if num_kept < num_chunks else 0)
        if num_kept > 1:
            encode = max(encode, kept - 2 * kept_chunk + gradients + later)
    else:
        encode = blind
    if num_kept < num_chunks:
        encode = max(encode, gradients + later)
    if on_gpu:
        afterwards = max(0, gradients + max(reduced + reduction, reduced + update - gradients) - encode)
    else:
        # What a chunk gave back lies between gradients, in pieces that seldom hold this rank's part of them.
        encode = max(encode, gradients + later + reduced)
        # About half as much as the gradients were fits into what these gave back. This share is measured: with it runs of
        # six networks were within 10 %, without it up to 15 % too high, with all of them 10 % too low.
        afterwards = max(reduction, update - gradients // 2, in_files - gradients // 2)
        if stage == 0:  # blocks of single parameters, which fit into what the chunks gave back
            afterwards = max(reduction, gradients + update - encode, in_files - encode)
    rows = [
        *states,
        Row("tiles", held, tiles_note),
        Row("embeddings and their gradient", embeddings),
        Row("aggregator and head", head.memory),
        Row("kept graphs", kept, f"{format_bytes(call.kept.per_tile)} a tile"),
        Row(
            "gradients and work on one chunk",
            encode - kept,
            f"gradients are whole on every rank: {format_bytes(gradients)}",
        ),
    ]
    rows.append(Row("reduction, update and checkpoint, the largest of them", afterwards))
    if not on_gpu:
        rows.append(Row("process", process, "code made on first use, thread buffers, pieces of memory, Python"))
    typical = sorted(sizes)[len(sizes) // 2] * min(len(sizes), science.slides_per_step)
    f = kept_tiles / num_tiles if num_tiles else 1.0
    return Plan(
        device=device,
        ranks=ranks,
        slides=slides,
        tiles_largest=sum(step.sizes),
        tiles_typical=typical,
        tiles_rank=num_tiles,
        chunk=chunk,
        num_chunks=num_chunks,
        num_kept=num_kept,
        graph=kept_chunk,
        graph_budget=budget,
        kept_share=f,
        rows=tuple(rows),
        peak=sum(row.bytes for row in rows),
        available=available if shared is None or shared.is_known else None,
        traffic=_traffic(config, model, sum(call.sent for call in head.calls)),
        cost=(4 if execution.activation_checkpointing == "none" else 5) - f if model.has_encoder else 0,
        remedies=(),
        shared=shared,
    )


def _calls(config: RunConfig, model: _Model, step: StepPlan, num_tiles: int) -> _Calls:
    """Of tiles, or of the blocks of a dense encoder."""
    chunk = config.execution.tiles_per_call
    if model.blocks is not None:
        block = model.blocks.at(chunk)
        return _Calls(chunk, model.blocks.most_calls(chunk, step), block.largest_area, block.mean_area)
    most_rows = chunk if model.has_encoder else FEATURE_ROWS
    chunk = min(most_rows, max(1, num_tiles))
    return _Calls(chunk, step.max_calls(most_rows), chunk, chunk)


def _shared_calls(shapes: Sequence[SlideShape], step: StepPlan) -> tuple[_Calls, SharedRows]:
    """Of a rank that computes its rows of each slide of its group."""
    is_known = bool(shapes)
    if not is_known:
        sides = [math.ceil(math.sqrt(size)) for size in step.sizes]
        shapes = [SlideShape(side, side, size) for side, size in zip(sides, step.sizes, strict=True)]
    areas = [[shapes[position].share(step.group_size) for position in group] for group in step.groups]
    largest, busiest = max(map(max, filter(None, areas))), max(areas, key=sum)
    factor = sum(shape.share(1) for shape in shapes) / sum(shape.num_tiles for shape in shapes)
    calls = _Calls(largest, len(busiest), largest, sum(busiest) / len(busiest))
    return calls, SharedRows(largest, factor, is_known)


def memory_of_shared(config: RunConfig, num_groups: int) -> Literal["keep", "replay"]:
    """`execution.memory` where ranks share slides row by row; auto keeps one slide's graph, which takes no more than replay."""
    memory = config.execution.memory
    if memory == "auto":
        return "keep" if config.science.slides_per_step <= num_groups else "replay"
    return memory


def _images(calls: _Calls, row_bytes: int, cache: int, decoded: int) -> tuple[int, str]:
    """Bytes of what a dense encoder's calls read, as ChunkFeed holds it, and of the tiles that a source keeps for the next.

    Args:
        decoded: bytes of all tiles that a source may keep in the device's memory.
    """
    kept = min(round(calls.number * calls.mean * row_bytes), cache)
    held = kept + round(2 * calls.largest * row_bytes) + min(decoded, DECODED_BYTES)
    return held, "with what is around them, kept between the passes, and tiles that blocks have in common"


def _tiles(config: RunConfig, tile_bytes: int, cache: int, chunk_bytes: int, on_gpu: bool) -> tuple[int, str]:
    """Bytes of decoded tiles, or of features, on the device, as StepLoader and ChunkFeed hold them."""
    prefetch = config.execution.prefetch
    steps = prefetch + 2 if prefetch else 1
    two_chunks = 2 * chunk_bytes
    if on_gpu:
        return min(tile_bytes, cache) + two_chunks, "kept between the passes; steps ahead lie in main memory"
    if tile_bytes * steps <= cache:
        return tile_bytes * (steps + 1), f"{steps} steps ahead, and one while it is put together"
    return min(tile_bytes, cache) + two_chunks, "decoded anew in each pass"


def _budget(setting: float | None, available: int, rest: int) -> int:
    if setting is not None and setting > 1:
        return int(setting)
    return int(max(0, available - rest) * (0.5 if setting is None else setting))


def _traffic(config: RunConfig, model: _Model, head_sent: int) -> tuple[Row, ...]:
    ranks, stage = config.execution.ranks, config.execution.zero_stage
    others = (ranks - 1) / ranks
    once = int(model.trained * others)
    everything = int((model.trained + model.fixed) * others)
    # DeepSpeed 0.19 all-reduces at ZeRO 1 and 2 too, and each rank takes its part of the sum; ZeRO 3 scatters.
    rows = [Row("gradients, reduced once", once if stage == 3 else 2 * once)]
    if stage in (1, 2):
        rows.append(Row("updated parameters", once))
    if stage == 3:
        rows.append(Row("parameters, gathered once", everything, "ZeRO 3"))
    return *rows, Row("aggregator, forward and backward", head_sent)


def _blocks(config: RunConfig, model: _Model, costs: BlockCosts, sizes: Sequence[int], plan: Plan) -> Blocks:
    """Of the run as it is configured, and of the size of blocks with which it would compute least."""
    assert plan.available is not None
    here, device, available = costs.at(config.execution.tiles_per_call), plan.device, plan.available
    smallest = _predict(_changed(config, chunk=1, memory="replay"), model, sizes, "", device, available)
    found = Blocks(here.side_px, here.read_px, here.factor, bool(costs.grids), smallest.peak)
    plans = _plans_of_blocks(config, model, costs, sizes, device, available)
    chunk = _least_work(config, costs, plans)
    if chunk is None:
        return found
    best = plans[chunk]
    return replace(
        found, best_chunk=chunk, best_factor=costs.at(chunk).factor, best_cost=best.cost, best_peak=best.peak
    )


def _plans_of_blocks(
    config: RunConfig,
    model: _Model,
    costs: BlockCosts,
    sizes: Sequence[int],
    device: Literal["cpu", "cuda"],
    available: int,
) -> dict[int, Plan]:
    """For each size of blocks, from one tile to a slide, by `execution.chunk`."""
    chunks = [4**power for power in range(costs.largest_chunk.bit_length()) if 4**power <= costs.largest_chunk]
    return {chunk: _predict(_changed(config, chunk=chunk), model, sizes, "", device, available) for chunk in chunks}


def _least_work(config: RunConfig, costs: BlockCosts, plans: Mapping[int, Plan]) -> int | None:
    """The chunk with which the run computes least, of those that fit; None if none does."""
    keeps_all = config.execution.memory == "keep"
    fitting = [chunk for chunk, plan in plans.items() if plan.fits and (keeps_all or plan.graph <= plan.graph_budget)]
    # Of equals (a network without halo) those of fewer calls, and then the smallest: beyond a slide nothing is larger.
    work = {chunk: (plans[chunk].cost * costs.at(chunk).factor, plans[chunk].num_chunks) for chunk in fitting}
    return min(fitting, key=lambda chunk: work[chunk], default=None)


def _own_chunk(
    config: RunConfig,
    model: _Model,
    costs: BlockCosts,
    sizes: Sequence[int],
    device: Literal["cpu", "cuda"],
    available: int,
) -> int:
    """`execution.chunk`; where that is null, the blocks that compute least, and if none fit those that take least.

    Raises:
        ConfigError: `execution.memory_budget` in bytes has no room for the graph of a single block.
    """
    execution = config.execution
    if execution.chunk is not None:
        return execution.chunk
    plans = _plans_of_blocks(config, model, costs, sizes, device, available)
    setting, graph = execution.memory_budget, plans[1].graph
    if setting is not None and setting > 1 and execution.memory != "keep" and graph > setting:
        raise ConfigError(
            f"execution.memory_budget={setting:g} is {format_bytes(int(setting))}, and the graph of the smallest block, of one "
            f"tile, takes {format_bytes(graph)}. Give it so much, or set execution.chunk to 1."
        )
    return _least_work(config, costs, plans) or min(plans, key=lambda chunk: plans[chunk].peak)


def _remedies(config: RunConfig, model: _Model, sizes: Sequence[int], plan: Plan) -> tuple[str, ...]:
    """Changes that fit, from the cheapest; of each kind the first that does."""
    assert plan.available is not None
    execution = config.execution
    found = []

    def fits(**changes: object) -> Plan | None:
        other = _predict(_changed(config, **changes), model, sizes, plan.slides, plan.device, plan.available or 0)
        return other if other.fits else None

    candidates: list[tuple[str, dict[str, object]]] = []
    if plan.shared is not None and plan.num_kept:
        candidates.append(("execution.memory replay", {"memory": "replay"}))
    elif execution.memory == "keep" and model.has_encoder:
        candidates.append(("execution.memory auto", {"memory": "auto"}))
    candidates.append(("execution.tile_cache 0.05", {"tile_cache": 0.05}))
    chunk, parts = plan.chunk, 2
    if model.blocks is not None:  # squares: of a chunk between two of them the smaller one is what runs
        chunk, parts = block_side(chunk) ** 2, 4
    while chunk > 1 and model.has_encoder and plan.shared is None:
        chunk //= parts
        candidates.append((f"execution.chunk {chunk}", {"chunk": chunk, "memory": "auto"}))
    if plan.device == "cuda" and execution.zero_stage in (1, 2):
        candidates.append(("execution.offload true", {"offload": True}))
    if execution.activation_checkpointing == "none" and plan.shared is None and model.recomputed() is not None:
        change = {"activation_checkpointing": "blocks", "memory": "auto"}
        candidates.append(("execution.activation_checkpointing blocks", dict(change)))
        small = {"chunk": 1} | change
        candidates.append(("execution.activation_checkpointing blocks and execution.chunk 1", dict(small)))
    if plan.device == "cuda":  # ranks of a machine share its main memory
        for doublings in range(1, 8):
            more = execution.ranks * 2**doublings
            candidates.append((f"{more} ranks", {"ranks": more, "group_size": None, "memory": "auto"}))
    seen: set[str] = set()
    for words, changes in candidates:
        kind = re.sub(r"[0-9.]+", "", words)
        other = None if kind in seen else fits(**changes)
        if other is not None:
            seen.add(kind)
            found.append(f"{words}: peak {format_bytes(other.peak)}, {other.cost:.2f} forwards per tile")
    return tuple(found)

"""A dense encoder's step against full autograd over whole slides: the cases of tests and of `exactness.py --streaming`.

Shapes: S slides, N tiles of a slide, D embedding. The reference runs the network once over each whole slide, in one graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gigamil.config.schema import Augment
from gigamil.data.augment import augment_block, draw_turn, to_float
from gigamil.data.blocks import BlockImages, SlideGrid, Turn
from gigamil.data.images import TileImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.data.rows import SlideRows
from gigamil.memory.geometry import Geometry, geometry_of
from gigamil.memory.stream import GridBlock, block_of_cells
from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.dense import ChannelNorm, pooled
from gigamil.models.encoder import DenseEncoder, encoders
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.blocks import block_ranges
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.testing.compare import gradient_error
from gigamil.testing.exactness import (
    LEARNING_RATE,
    NUM_CLASSES,
    SEED,
    STEP,
    Case,
    Outcome,
    RecordingDeepSpeedEngine,
    World,
    all_tile_gradients,
    case_settings,
    compare,
)
from gigamil.train.engine import skip_kernel_build
from gigamil.train.loss import cross_entropy, slide_losses
from gigamil.train.plain import Engine, PlainEngine
from gigamil.train.step import ExactStep, Ranks

AUGMENT = Augment(flips=True, turns=True, brightness=0.2, contrast=0.2, saturation=0.2, stain=0.1)
# Rows, columns and share of tissue of each slide: odd shapes, one tile, nothing but a strip; fewer tiles than ranks.
SHAPES = (((7, 5, 0.6), (1, 1, 1.0), (4, 9, 1.0)), ((9, 9, 0.2), (3, 2, 0.7)), ((1, 2, 1.0),))
# Chunk, and kept graphs. One cell a block; one block of 2 x 2, 4 x 4, 8 x 8 cells.
SETTINGS = ((1, "half"), (5, "none"), (16, "half"), (64, "all"))
# Of deep networks: strips longer than what a cell sees to both sides (867 px of ResNet-34's layer4), or to one side.
DEEP_SHAPES = (((1, 30, 0.8), (1, 1, 1.0), (2, 3, 0.7)), ((18, 1, 0.5), (3, 2, 1.0)), ((1, 2, 1.0),))
DEEP_SETTINGS = (((5, "none"), (16, "half")), ((1, "half"), (64, "all")), ((1, "half"),))
NUM_STEPS = 5  # of `check_training`
MOMENTUM = 0.9


def _convolutions() -> tuple[nn.Sequential, int, int]:
    layers = [
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 5, 2, 2, groups=2),
        nn.GELU(),
        nn.Conv2d(8, 5, 3, 1, 1),
    ]
    return pooled(OrderedDict((str(i), layer) for i, layer in enumerate(layers)), 2, "mean"), 5, 8


def _dilated() -> tuple[nn.Sequential, int, int]:
    layers = [nn.Conv2d(3, 6, 4, 4), nn.Tanh(), nn.Conv2d(6, 6, 3, 1, 2, dilation=2), ChannelNorm(6), nn.SiLU()]
    return pooled(OrderedDict((str(i), layer) for i, layer in enumerate(layers)), 2, "max"), 6, 8


def _not_square() -> tuple[nn.Sequential, int, int]:
    layers = [nn.Conv2d(3, 8, (5, 3), 2, (2, 1)), nn.ReLU(), nn.Conv2d(8, 5, (1, 7), 2, (0, 3))]
    return pooled(OrderedDict((str(i), layer) for i, layer in enumerate(layers)), 2, "mean"), 5, 8


def _poolings() -> tuple[nn.Sequential, int, int]:
    layers = [
        nn.Conv2d(3, 6, 3, padding="same"),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Tanh(),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    ]
    return pooled(OrderedDict((str(i), layer) for i, layer in enumerate(layers)), 1, "mean"), 6, 8


def _convnext() -> tuple[nn.Sequential, int, int]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=0.5).features, 16, 8


def _resnet(name: str, last: str, pool: int) -> FrozenStatistics:
    encoder = encoders[name](dense=last, pool=pool)
    assert isinstance(encoder, FrozenStatistics)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder


def _plain(make: Callable[[], tuple[nn.Sequential, int, int]]) -> FrozenStatistics:
    network, dim, cell_px = make()
    return FrozenStatistics(network, dim, cell_px=cell_px)


NETS: dict[str, Callable[[], FrozenStatistics]] = {
    "convolutions, mean": lambda: _plain(_convolutions),
    "dilated, max": lambda: _plain(_dilated),
    "not square": lambda: _plain(_not_square),
    "poolings": lambda: _plain(_poolings),
    "convnext": lambda: _plain(_convnext),
    "resnet18 layer1": lambda: _resnet("resnet18", "layer1", 2),
    "resnet18 layer2": lambda: _resnet("resnet18", "layer2", 1),
    "resnet50 layer2": lambda: _resnet("resnet50", "layer2", 1),
    "resnet18 layer3": lambda: _resnet("resnet18", "layer3", 1),
    "resnet18 layer4": lambda: _resnet("resnet18", "layer4", 1),
    "resnet34 layer3": lambda: _resnet("resnet34", "layer3", 1),
    "resnet34 layer4": lambda: _resnet("resnet34", "layer4", 1),
    "resnet50 layer3": lambda: _resnet("resnet50", "layer3", 1),
    "resnet50 layer4": lambda: _resnet("resnet50", "layer4", 1),
}
DEEP = tuple(name for name in NETS if name.endswith(("layer3", "layer4")))


@dataclass(frozen=True)
class DenseCase:
    """One comparison.

    Attributes:
        net: one of `NETS`.
        shapes: rows, columns and share of tissue of each slide.
        group_size, chunk, keep: as of `exactness.Case`.
        random: slides are turned and recoloured.
        zero_stage: None for torch alone in float64; else DeepSpeed in float32.
        exchange: ranks of a group share each slide row by row.
    """

    net: str
    shapes: tuple[tuple[int, int, float], ...]
    group_size: int
    chunk: int = 16
    keep: str = "half"
    random: bool = True
    zero_stage: int | None = None
    exchange: bool = False


class DenseErrors(NamedTuple):
    """Relative errors of a case: of the embeddings, the loss, the worst parameter's gradient, and the embeddings'."""

    features: float
    loss: float
    parameters: float
    tiles: float

    def within(self, bound: float) -> bool:
        """All of them are, and none is NaN."""
        return all(error <= bound for error in self)

    @property
    def worst(self) -> tuple[float, float]:
        """Of the features, and of the loss and all gradients; NaN if one of them is."""
        return self.features, float(np.max([self.loss, self.parameters, self.tiles]))


class MemorySlides:
    """Slides in memory, as a `BlockSource`."""

    def __init__(self, images: Sequence[Tensor], grids: Sequence[SlideGrid]) -> None:
        self._images, self._grids = images, grids

    def grid(self, slide_id: str) -> SlideGrid:
        """Of the slide with that number."""
        return self._grids[int(slide_id.split("-")[1])]

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """A copy."""
        image_HW3 = self._images[int(slide_id.split("-")[1])]
        block_HW3 = image_HW3[top : top + height, left : left + width]
        assert block_HW3.shape[:2] == (height, width), "blocks stay inside the slide"
        return block_HW3.numpy().copy()


def make_slides(case: DenseCase, tile_px: int) -> tuple[list[Tensor], list[SlideGrid]]:
    """uint8 images (H, W, 3), and which of their tiles are tissue, along the Hilbert curve."""
    generator = np.random.default_rng(SEED)
    images, grids = [], []
    for num_y, num_x, share in case.shapes:
        image_HW3 = generator.integers(0, 256, (num_y * tile_px, num_x * tile_px, 3), dtype=np.uint8)
        chosen = np.sort(generator.permutation(num_y * num_x)[: max(1, round(share * num_y * num_x))])
        row_N, col_N = chosen // num_x, chosen % num_x
        order = hilbert_sort(col_N, row_N)
        images.append(torch.from_numpy(image_HW3))
        grids.append(SlideGrid(num_y, num_x, np.column_stack([row_N, col_N])[order]))
    return images, grids


def make_model(net: str, dtype: torch.dtype = torch.float64) -> SlideModel:
    """Small; the same parameters each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = DenseEncoder(NETS[net](), (0.7, 0.5, 0.6), (0.2, 0.2, 0.2))
        aggregator = build_aggregator("gated_attention", encoder.dim, NUM_CLASSES, {"hidden": 7})
        return SlideModel(encoder, aggregator, NUM_CLASSES).to(dtype).train()


def _dense(model: SlideModel) -> DenseEncoder:
    assert isinstance(model.encoder, DenseEncoder)
    return model.encoder


def slide_names(case: DenseCase) -> list[str]:
    """Ids of the case's slides."""
    return [f"slide-{number}" for number in range(len(case.shapes))]


def labels(case: DenseCase) -> tuple[Tensor, Tensor]:
    """Class and weight of each slide."""
    num = len(case.shapes)
    return torch.arange(num) % NUM_CLASSES, torch.linspace(0.5, 2.0, num, dtype=torch.float64)


def reference(case: DenseCase) -> tuple[Outcome, Tensor]:
    """One process, each slide through the network at once, one graph; and the embeddings (N, D) of all slides."""
    model = make_model(case.net)
    loss, embedding_ND = _whole_slides(case, model, STEP)
    loss.backward()
    assert embedding_ND.grad is not None
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Outcome(float(loss.detach()), gradients, embedding_ND.grad), embedding_ND.detach()


def _whole_slides(case: DenseCase, model: SlideModel, step: int) -> tuple[Tensor, Tensor]:
    """The loss of a step, and the embeddings (N, D) of all slides, which keep their gradient."""
    images, grids = make_slides(case, _dense(model).cell_px)
    slide_key_S = DrawKeys(SEED, slide_names(case)).slides(step, range(len(images)))
    embeddings = []
    for image_HW3, grid, key in zip(images, grids, slide_key_S, strict=True):
        image_1CHW, cell_N2 = to_float(image_HW3[None], torch.float64), torch.from_numpy(grid.cell_N2)
        if case.random:
            turn = draw_turn(int(key), AUGMENT)
            image_1CHW, cell_N2 = _turned(image_1CHW, cell_N2, (grid.num_y, grid.num_x), turn)
            image_1CHW = augment_block(image_1CHW, key[None], AUGMENT)
        embeddings.append(model.encode(image_1CHW, None, cell_N2))
    embedding_ND = torch.cat(embeddings)
    embedding_ND.retain_grad()
    sizes = tuple(len(grid.cell_N2) for grid in grids)
    label_S, weight_S = labels(case)
    bag = Bag(
        embedding_nD=embedding_ND,
        position_n2=torch.zeros((len(embedding_ND), 2), dtype=torch.float64),
        sizes=sizes,
        pool=LocalPool(len(embedding_ND)),
        tile_key_n=None,
        slide_key_B=slide_key_S,
        label_B=label_S,
    )
    logits_SK, found = model.classify(bag)
    loss_S = slide_losses(cross_entropy, logits_SK, found, label_S)
    return (loss_S * weight_S).sum() / weight_S.sum(), embedding_ND


def _turned(image_1CHW: Tensor, cell_N2: Tensor, size: tuple[int, int], turn: Turn) -> tuple[Tensor, Tensor]:
    """By torch, on the whole slide."""
    (num_y, num_x), (row_N, col_N) = size, cell_N2.unbind(1)
    if turn.transpose:
        image_1CHW, row_N, col_N, num_y, num_x = image_1CHW.transpose(2, 3), col_N, row_N, num_x, num_y
    if turn.flip_y:
        image_1CHW, row_N = image_1CHW.flip(2), num_y - 1 - row_N
    if turn.flip_x:
        image_1CHW, col_N = image_1CHW.flip(3), num_x - 1 - col_N
    return image_1CHW, torch.stack([row_N, col_N], dim=1)


def own_blocks(case: DenseCase, model: SlideModel, plan: StepPlan, topology: Topology) -> StepTiles:
    """This rank's tiles of the step, and their blocks."""
    tile_px = _dense(model).cell_px
    images, grids = make_slides(case, tile_px)
    group, names = plan.groups[topology.group], slide_names(case)
    spans = plan.spans(topology.group, topology.group_rank)
    named = [(names[plan.slides[group[span.slide]]], span.start, span.stop) for span in spans]
    geometry = geometry_of(_dense(model).network)
    number_n = torch.cat([torch.arange(0), *(torch.arange(span.start, span.stop) for span in spans)])
    source = MemorySlides(images, grids)
    blocks: TileImages = BlockImages(named, source, geometry, tile_px)
    if case.exchange:
        shares = [plan.spans(topology.group, rank) for rank in range(topology.group_size)]
        slide_ids = [names[plan.slides[position]] for position in group]
        blocks = SlideRows(slide_ids, shares, topology.group_rank, source, tile_px)
    return StepTiles(
        blocks,
        torch.cat([torch.arange(0), *(torch.full((span.num_tiles,), span.slide) for span in spans)]),
        number_n,
        torch.zeros((len(number_n), 2), dtype=torch.float64),
    )


class RecordingEngine(PlainEngine):
    """Keeps the reduced gradients of the step, and the bag that was pooled."""

    def classify(self, bag: Bag) -> Any:
        """Record, then pool."""
        self.bag = bag
        return super().classify(bag)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Record."""
        self.gradients = {name: p.grad.clone() for name, p in self.module.named_parameters() if p.grad is not None}
        return float(torch.nn.utils.get_total_norm(list(self.gradients.values())))


def distributed(case: DenseCase, world: World, wanted_ND: Tensor) -> tuple[Outcome, float]:
    """The same step as training runs it, on this rank; and the relative error of its embeddings."""
    ranks = world.ranks(case.group_size)
    if case.zero_stage is None:
        engine: Any = RecordingEngine(make_model(case.net), world=ranks.world)
    else:
        engine = _deepspeed_engine(case)
    plan, sizes = _plan(case, ranks)
    tiles = own_blocks(case, engine.module, plan, ranks.topology)
    label_S, weight_S = labels(case)
    step = _make_step(case, engine, ranks, plan)
    result = step.train(plan, tiles, label_S, weight_S, step=STEP, learning_rates=[LEARNING_RATE])
    found = Outcome(result.loss, engine.gradients, all_tile_gradients(engine.bag, plan, ranks))
    group = torch.tensor(plan.groups[ranks.topology.group], dtype=torch.int64)
    first_S = torch.tensor([0, *sizes]).cumsum(0)
    own_nD = wanted_ND[first_S[group[tiles.slide_index_n]] + tiles.number_n]
    error = (engine.bag.embedding_nD.detach()[: len(own_nD)].double() - own_nD).norm() / own_nD.norm().clamp(min=1e-300)
    return found, float(error) if len(own_nD) else 0.0


def _plan(case: DenseCase, ranks: Ranks) -> tuple[StepPlan, list[int]]:
    """All slides in one step, and their tiles."""
    sizes = [len(grid.cell_N2) for grid in make_slides(case, 1)[1]]
    return plan_steps(range(len(sizes)), sizes, len(sizes), ranks.topology.num_groups, case.group_size)[0], sizes


def _make_step(case: DenseCase, engine: Engine, ranks: Ranks, plan: StepPlan) -> ExactStep:
    return ExactStep(
        engine,
        ranks,
        cross_entropy,
        chunk=case.chunk,
        num_keep={"all": plan.max_calls(1), "half": 2, "none": 0}[case.keep],
        keys=DrawKeys(SEED, slide_names(case)),
        augment=partial(augment_block, settings=AUGMENT) if case.random else None,
        turn=partial(draw_turn, settings=AUGMENT) if case.random else None,
    )


def _deepspeed_engine(case: DenseCase) -> RecordingDeepSpeedEngine:
    model = make_model(case.net, torch.float32)
    settings = case_settings(Case((1,), 1, zero_stage=case.zero_stage))
    return RecordingDeepSpeedEngine(
        model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), settings, torch.device("cpu")
    )


def dense_cases(num_ranks: int, nets: Sequence[str] = tuple(NETS)) -> Iterator[DenseCase]:
    """Shapes, group sizes, blocks of 1 to 64 cells, kept graphs, with and without draws; of deep networks fewer."""
    for net in nets:
        if net in DEEP:
            yield from _deep_cases(num_ranks, net)
            continue
        for number, shapes in enumerate(SHAPES):
            for group_size in {1, num_ranks}:
                for chunk, keep in SETTINGS:
                    yield DenseCase(net, shapes, group_size, chunk, keep, random=(number + chunk) % 2 == 0)


def _deep_cases(num_ranks: int, net: str) -> Iterator[DenseCase]:
    for number, (shapes, settings) in enumerate(zip(DEEP_SHAPES, DEEP_SETTINGS, strict=True)):
        for chunk, keep in settings:
            # What a deep network adds is the length of its halo: over ranks one strip, and a slide with empty ranks.
            if num_ranks == 1 or number == 2 or chunk == 16:
                yield DenseCase(net, shapes, num_ranks, chunk, keep, random=(number + chunk) % 2 == 0)


def check_dense_cases(rank: int, num_ranks: int, wanted: Sequence[DenseCase]) -> list[DenseErrors]:
    """On this rank: errors of each case against `reference`."""
    if any(case.zero_stage is not None for case in wanted):
        skip_kernel_build()
    world = World(rank, num_ranks)
    truths: dict[tuple[Any, ...], tuple[Outcome, Tensor]] = {}
    errors = []
    for case in wanted:
        key = (case.net, case.shapes, case.random)
        if key not in truths:
            truths[key] = reference(case)
        truth, embedding_ND = truths[key]
        found, feature_error = distributed(case, world, embedding_ND)
        errors.append(DenseErrors(feature_error, *compare(found, truth)))
    return errors


def check_training(rank: int, num_ranks: int, case: DenseCase) -> float:
    """Steps of SGD over blocks on all ranks, against the same steps over whole slides in one process.

    Returns:
        The largest relative difference of a parameter after `NUM_STEPS`; infinite if one has hardly moved.
    """
    ranks, start = World(rank, num_ranks).ranks(case.group_size), make_model(case.net)
    wanted, found = make_model(case.net), make_model(case.net)
    optimizer = _sgd(wanted)
    engine = PlainEngine(found, _sgd(found), world=ranks.world)
    plan, _ = _plan(case, ranks)
    tiles, step, (label_S, weight_S) = (
        own_blocks(case, found, plan, ranks.topology),
        _make_step(case, engine, ranks, plan),
        labels(case),
    )
    for number in range(NUM_STEPS):
        optimizer.zero_grad()
        _whole_slides(case, wanted, number)[0].backward()
        optimizer.step()
        step.train(plan, tiles, label_S, weight_S, step=number, learning_rates=[LEARNING_RATE])
    errors = []
    for was, want, is_now in zip(start.parameters(), wanted.parameters(), found.parameters(), strict=True):
        moved = (want.detach() - was.detach()).norm() > 1e-6 * was.detach().norm()
        error = float((is_now.detach() - want.detach()).norm() / want.detach().norm())
        errors.append(error if moved else float("inf"))
    return max(errors)


def _sgd(model: SlideModel) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


@dataclass(frozen=True)
class ImageCase:
    """A network over images block by block, against the images at once.

    Attributes:
        net: one of `NETS`.
        height, width: in pixels; the stride need not divide them.
        cells: along the side of a block, a power of two.
        batch: number of images.
        share: of the cells that are wanted; without the others' blocks the result is that of all, masked.
    """

    net: str
    height: int
    width: int
    cells: int
    batch: int = 1
    share: float = 1.0


class ImageErrors(NamedTuple):
    """Relative errors: of the grid, and of the worst gradient, of the image or of a parameter."""

    features: float
    gradient: float


def image_cases(net: str) -> Iterator[ImageCase]:
    """Odd sizes: strips with a mask, one cell to a block, smaller than a block and than what a cell sees."""
    with torch.device("meta"):
        side = NETS[net]().cell_px
    assert side is not None
    length = 30 if net in DEEP else 12
    yield ImageCase(net, side + 5, length * side + 7, 2, share=0.4)
    yield ImageCase(net, length * 2 // 3 * side - 3, side + 1, 4)
    yield ImageCase(net, 2 * side + 1, 3 * side - 1, 8, batch=2)
    yield ImageCase(net, 2 * side + 3, 2 * side + 5, 1, batch=2, share=0.5)


def check_image_case(case: ImageCase) -> ImageErrors:
    """In float64, with a gradient for all pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = NETS[case.net]().double().train().network
        image_nCHW = torch.rand((case.batch, 3, case.height, case.width), dtype=torch.float64)
        shape = geometry_of(network).grid_shape(case.height, case.width)
        wanted_hw = torch.rand(shape).numpy() < case.share
        wanted_hw[0, -1] = True
        return image_errors(network, image_nCHW, wanted_hw, case.cells)


def image_errors(network: nn.Module, image_nCHW: Tensor, wanted_hw: np.ndarray, cells: int) -> ImageErrors:
    """A network of known geometry on an image of any size, block by block as a run reads them, against the image at once.

    Args:
        wanted_hw: bool, the cells that are used, one at least.
        cells: along the side of a block, a power of two.
    """
    geometry, image_nCHW = geometry_of(network), image_nCHW.requires_grad_()
    height, width = image_nCHW.shape[2:]
    leaves = dict(network.named_parameters()) | {"image": image_nCHW}
    blocks = list(image_blocks(geometry, height, width, wanted_hw, cells))
    whole_nDhw = network(image_nCHW)
    assert whole_nDhw.shape[2:] == wanted_hw.shape == geometry.grid_shape(height, width)
    wanted_nDN = torch.cat([_at(whole_nDhw, cell_c2) for cell_c2, _ in blocks], dim=2)
    cotangent_nDN = torch.randn_like(wanted_nDN)

    def gradients(cells_nDc: Tensor, cotangent_nDc: Tensor) -> dict[str, Tensor]:
        return dict(zip(leaves, torch.autograd.grad(cells_nDc, list(leaves.values()), cotangent_nDc), strict=True))

    wanted = gradients(wanted_nDN, cotangent_nDN)
    found = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    parts, start = [], 0
    for cell_c2, block in blocks:
        read_nCHW = image_nCHW[:, :, block.rows.start : block.rows.stop, block.cols.start : block.cols.stop]
        part_nDc = _at(network(read_nCHW), block.inside(cell_c2))
        for name, gradient in gradients(part_nDc, cotangent_nDN[:, :, start : start + len(cell_c2)]).items():
            found[name] += gradient
        parts.append(part_nDc.detach())
        start += len(cell_c2)
    wanted_nDN = wanted_nDN.detach()
    error = float((torch.cat(parts, dim=2) - wanted_nDN).norm() / wanted_nDN.norm())
    return ImageErrors(error, gradient_error(found, wanted))


def image_blocks(
    geometry: Geometry, height: int, width: int, wanted_hw: np.ndarray, cells: int
) -> Iterator[tuple[np.ndarray, GridBlock]]:
    """The encoder calls of an image: (row, column) of the wanted cells of each, and what is read for them."""
    row_N, col_N = np.nonzero(wanted_hw)
    cell_N2 = np.column_stack([row_N, col_N])[hilbert_sort(col_N, row_N)]
    for start, stop in block_ranges(np.zeros(len(cell_N2), np.int64), cell_N2, cells**2):
        yield cell_N2[start:stop], block_of_cells(geometry, cell_N2[start:stop], height, width)


def _at(grid_nDhw: Tensor, cell_c2: np.ndarray) -> Tensor:
    """(n, D, c): some cells of a grid."""
    return grid_nDhw[:, :, cell_c2[:, 0], cell_c2[:, 1]]

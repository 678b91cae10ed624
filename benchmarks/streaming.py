"""What does streaming a network over a slide cost, beside the whole image in one graph?

ResNet-18 up to layer4 over a slide of 4096 x 4096 pixels, in cells of 256, gated attention, float32, one thread:
  whole     one graph of the whole image: what streaming replaces, where it fits
  blocks    gigamil's step (`ExactStep`): blocks of 2048 px read with their surroundings, encoded twice
  tissue    the same where 30 % of the cells are tissue, in one region; blocks without any are neither read nor computed
  exchange  the network on two ranks whose layers exchange rows; all activations stay in memory; no head

Expected: blocks compute more pixels than they own, and encode twice where the whole encodes once, so 4/3 of that factor,
which is known before (printed); memory is that of one block, however large the slide. How much tissue saves depends on how
many blocks it touches, so the planned pixels of other places are printed beside.

Also printed: pixels of the backward of StreamingCNN's scheme (Pinckaers et al. 2019, arXiv:1911.04432) over gigamil's, at
the same size of what is read. Both compute a square of T x T pixels at a time. Gigamil owns the outputs that the borders of
the square do not reach: it moves on by T - halo. The scheme takes each layer's gradient where it is whole, which it is only
where every output that depends on it is owned: it loses the receptive field once more, and moves on by
T - halo - (receptive field - stride). That is the least it must lose, by the geometry of the network. The released code
(lightstream a8e464c) finds its borders by a probe, which lost 490 px a side for ResNet-18 (938 for ResNet-34), against 410
(898) by the geometry; the figure with those is given apart.

Before anything is timed, all gradients (and those of the two ranks) are compared with the whole image's in float64, on a
smaller slide of as many blocks. What is timed is compared again in float32. There too: how far bfloat16 autocast is from
float64, streamed and whole.

    python benchmarks/streaming.py [--quick] [--net resnet34] [--tiles FOLDER] [--out FILE]

8 minutes on two idle cores, and 21 GB of memory, which are looked for first; --quick 3 and 8; ResNet-34 three times as long,
and 27 GB. The slide is painted, or made of the tiles that `lung_mosaic.py` takes. User CPU time of a process (page faults
are the kernel's) in which glibc keeps freed memory (MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1), arms in turn, medians of
rounds. Exchange comes after the others, for there is no room for it beside their memory. Memory is resident memory above
the start, in fresh processes where glibc gives back what is freed. The last line is JSON:

    read_over_whole_planned             blocks over whole, over 4/3 of the planned pixels: 1 is what is planned
    tissue_over_full                    tissue over blocks
    peak_over_whole_4096                peak memory of blocks over that of whole
    peak_over_whole_8192_extrapolated   the same, whole by a line through its peaks at smaller sides
    scheme_over_gigamil_backward        pixels, as above
    bf16_drift, bf16_drift_whole        relative error of the gradient in bfloat16, worst parameter, in blocks and whole
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import simplejpeg
import torch
import torch.distributed as dist
from gradients import Gradients, checked
from memory import MMAP_BYTES, peak_bytes
from options import add_sizes
from origin import origin
from torch import Tensor, nn

from gigamil.data.augment import to_float
from gigamil.data.blocks import BlockImages, SlideGrid
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.memory.budget import free_memory
from gigamil.memory.geometry import Geometry, geometry_of
from gigamil.memory.stream import block_around
from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import DenseEncoder, encoders
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.topology import Topology
from gigamil.partition.blocks import block_ranges, block_side
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.schedule import plan_steps
from gigamil.testing.compare import gradient_error
from gigamil.testing.paint import synthetic_slide
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": partial(encoders["resnet18"], dense="layer4", pool=8),
    "resnet34": partial(encoders["resnet34"], dense="layer4", pool=8),
    "thin": partial(encoders["small_dense_cnn"], width=4),
}
PROBED_LOSS_PX = {
    "resnet18": 490,
    "resnet34": 938,
}  # a side, of a gradient: measured by lightstream a8e464c's own probe
MEAN, STD = (0.7, 0.6, 0.7), (0.2, 0.2, 0.2)
# What both ranks of exchange take, which is more than any other arm; measured for sides of 1024 to 4096.
BYTES_PER_PX = {"resnet18": 1080, "resnet34": 1430, "thin": 100}
LIBRARIES_BYTES = 3e9  # three processes, before they compute anything
TISSUE, CENTRE = 0.3, (0.3, 0.3)  # share of the cells, middle of the region (rows, columns)
BASE_PX = 2048  # of the image that slides repeat
RANKS = 2
TIMEOUT_S = 2 * 3600
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
BOUND_FLOAT64 = 1e-12
# Whole and blocks are each 1e-4 to 2e-4 from float64, on 1,024 px as on 3,072: rounding makes ReLU and pooling choose otherwise.
BOUND_FLOAT32 = 1e-3
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        net: one of `NETS`.
        side: pixels of the slide.
        chunk: cells of a block.
        rounds: of all arms in turn.
        peaks: sides at which the whole image's memory is measured; at the last, gigamil's too.
        large: side at which gigamil's memory is measured, and the whole image's only extrapolated.
        checked: side and cells of a block where gradients are compared in float64.
    """

    net: str = "resnet18"
    side: int = 4096
    chunk: int = 64
    rounds: int = 3
    peaks: tuple[int, ...] = (1024, 2048, 4096)
    large: int = 8192
    checked: tuple[int, int] = (1024, 4)


QUICK = Sizes(side=2048, chunk=16, rounds=2, peaks=(512, 1024, 2048), large=3072, checked=(512, 1))
TINY = Sizes(net="thin", side=128, chunk=16, rounds=1, peaks=(128, 256), large=512, checked=(64, 4))


# ---- the slide ----


class Texture:
    """A square slide that repeats one image, as a `BlockSource`: it takes the memory of that image alone.

    Args:
        base_HW3: uint8 RGB.
        grid: of the slide.
    """

    def __init__(self, base_HW3: np.ndarray, grid: SlideGrid) -> None:
        self._base_HW3, self._grid = base_HW3, grid

    def grid(self, slide_id: str) -> SlideGrid:
        """The same for every id."""
        return self._grid

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        """uint8 RGB (height, width, 3), from part after part of the image."""
        side_y, side_x = self._base_HW3.shape[:2]
        block_HW3 = np.empty((height, width, 3), np.uint8)
        bottom, right = top + height, left + width
        tops, lefts = range(top - top % side_y, bottom, side_y), range(left - left % side_x, right, side_x)
        for y, x in itertools.product(tops, lefts):
            y0, y1, x0, x1 = max(top, y), min(bottom, y + side_y), max(left, x), min(right, x + side_x)
            block_HW3[y0 - top : y1 - top, x0 - left : x1 - left] = self._base_HW3[y0 - y : y1 - y, x0 - x : x1 - x]
        return block_HW3


def painted(side: int) -> np.ndarray:
    """uint8 RGB (side, side, 3): synthetic tissue."""
    return synthetic_slide(1, tumour=True, size_um=(side * 0.5, side * 0.5), mpp=0.5).image_HW3[:side, :side]


def laid_out(folder: Path, side: int) -> np.ndarray:
    """uint8 RGB, a square of at most `side` pixels: real tiles side by side."""
    from lung_mosaic import read_tiles  # loads all that a run needs, which processes that are measured do not

    tiles = [simplejpeg.decode_jpeg(tile.jpeg, colorspace="RGB") for tile in read_tiles(folder)]
    number = max(1, min(side // len(tiles[0]), math.isqrt(len(tiles))))
    rows = [np.concatenate(tiles[row * number : (row + 1) * number], axis=1) for row in range(number)]
    return np.concatenate(rows)


def cells_of(number: int, share: float = 1.0, centre: tuple[float, float] = CENTRE) -> SlideGrid:
    """All cells of a slide of number x number, or the share of them that lies nearest to a point of it."""
    row, col = np.divmod(np.arange(number**2), number)
    distance = np.hypot(row + 0.5 - centre[0] * number, col + 0.5 - centre[1] * number)
    chosen = np.sort(np.argsort(distance, kind="stable")[: round(share * number**2)])
    row, col = row[chosen], col[chosen]
    return SlideGrid(number, number, np.column_stack([row, col])[hilbert_sort(col, row)])


# ---- the arms ----


class SmallerBlocks(SystemExit):
    """Memory ran out, and the step was made with smaller blocks than were asked for."""


class Engine(PlainEngine):
    """Torch alone; keeps the gradients of a step and updates nothing.

    Args:
        model: the slide model.
        bfloat16: the encoder runs under autocast, as DeepSpeed's engine has it in a bfloat16 run.
    """

    def __init__(self, model: SlideModel, bfloat16: bool = False) -> None:
        super().__init__(model)
        self._bfloat16 = bfloat16

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cell_c2: Tensor | None = None) -> Tensor:
        """A block -> embeddings of its cells."""
        with torch.autocast(self.device.type, torch.bfloat16) if self._bfloat16 else nullcontext():
            return super().encode(image_nCHW, tile_key_n, cell_c2)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Record."""
        self.gradients = taken(self.module)
        return 1.0


def taken(module: nn.Module) -> dict[str, Tensor]:
    """The gradients, which the module then has no more."""
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


@dataclass(frozen=True)
class Problem:
    """A model and a slide.

    Attributes:
        base_HW3: uint8 RGB, what the slide repeats.
        grid: its cells that are tissue.
    """

    model: SlideModel
    base_HW3: np.ndarray
    grid: SlideGrid

    @property
    def encoder(self) -> DenseEncoder:
        """Of the model."""
        assert isinstance(self.model.encoder, DenseEncoder)
        return self.model.encoder

    @property
    def geometry(self) -> Geometry:
        """Of the network."""
        return geometry_of(self.encoder.network)

    @property
    def side(self) -> int:
        """Of the slide in pixels."""
        return self.grid.num_y * self.encoder.cell_px

    def rows(self, top: int, bottom: int) -> Tensor:
        """uint8 RGB (1, bottom - top, W, 3) of the slide."""
        return torch.from_numpy(Texture(self.base_HW3, self.grid).read_block("", top, 0, bottom - top, self.side))[None]


def make_problem(
    net: str, base_HW3: np.ndarray, side: int, share: float = 1.0, dtype: torch.dtype = torch.float32
) -> Problem:
    """A dense encoder with gated attention, the same each time, and a slide of which a share is tissue."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = DenseEncoder(NETS[net](), MEAN, STD)
        aggregator = build_aggregator("gated_attention", encoder.dim, 2, {"hidden": 128})
        model = SlideModel(encoder, aggregator, 2).to(dtype).train()
    return Problem(model, base_HW3, cells_of(side // encoder.cell_px, share))


def to_planes(image_1HW3: Tensor, dtype: torch.dtype) -> Tensor:
    """RGB in 0..1, plane by plane (1, C, H, W).

    Where channels come last, as in the file, oneDNN has nothing but its reference loop for the gradient of the first layer's
    weights as soon as that layer's output takes 512 MiB (a ResNet on 3,072 px), a hundred times as slow. Below that,
    planes cost 4 % more CPU time (ResNet-18, 2,048 px).
    """
    return to_float(image_1HW3, dtype).contiguous()


def whole(problem: Problem, bfloat16: bool = False) -> Gradients:
    """One graph of the whole image."""
    model, like = problem.model, next(problem.model.parameters())
    image_1CHW = to_planes(problem.rows(0, problem.side).to(like.device), like.dtype)
    cell_N2 = torch.from_numpy(problem.grid.cell_N2).to(like.device)
    with torch.autocast(like.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        embedding_ND = model.encode(image_1CHW, None, cell_N2)
    size = len(embedding_ND)
    bag = Bag(embedding_ND.to(like.dtype), torch.zeros((size, 2), dtype=torch.float64), (size,), LocalPool(size))
    cross_entropy(model.classify(bag)[0], torch.ones(1, dtype=torch.int64, device=like.device)).sum().backward()
    return taken(model)


def blocks(problem: Problem, chunk: int, bfloat16: bool = False) -> Gradients:
    """The step that training runs.

    Raises:
        SmallerBlocks: there was no memory for blocks of this size.
    """
    size, engine = len(problem.grid.cell_N2), Engine(problem.model, bfloat16)
    source = Texture(problem.base_HW3, problem.grid)
    tiles = StepTiles(
        BlockImages([("slide", 0, size)], source, problem.geometry, problem.encoder.cell_px),
        torch.zeros(size, dtype=torch.int64),
        torch.arange(size),
        torch.zeros((size, 2), dtype=torch.float64),
    )
    keys = DrawKeys(0, ["slide"])
    step = ExactStep(engine, Ranks(Topology()), cross_entropy, chunk=chunk, num_keep=0, keys=keys)
    plan = plan_steps([0], [size], 1, 1, 1)[0]
    label, weight = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    result = step.train(plan, tiles, label, weight, step=0, learning_rates=[])
    assert not result.skipped, result
    if step.chunk != chunk:
        raise SmallerBlocks(f"no memory for blocks of {chunk} cells; {step.chunk} fit")
    return engine.gradients


def warm_up(problem: Problem) -> None:
    """Steps over a slide of one cell: libraries and thread pools are loaded by the first ones."""
    small = replace(problem, grid=cells_of(1))
    whole(small)
    blocks(small, 1)


def exchange(rank: int, num_ranks: int, net: str, file: Path, side: int, dtype: torch.dtype) -> tuple[float, Gradients]:
    """On a rank: user seconds of a step of the network over its rows of the slide, and its part of the gradient."""
    torch.set_num_threads(1)
    problem = make_problem(net, np.load(file), side, dtype=dtype)
    warm_up(problem)
    network, cell_px = problem.encoder.network, problem.encoder.cell_px
    sharded = ShardedNetwork(network, dist.group.WORLD, rank)
    cuts = tuple(problem.grid.num_y * r // num_ranks * cell_px for r in range(num_ranks + 1))
    start = user_time()
    image_1CHW = to_planes(problem.rows(cuts[rank], cuts[rank + 1]), dtype)
    sharded(image_1CHW, cuts)[0].square().sum().backward()
    return user_since(start), taken(network)


# ---- before anything is timed ----


def refuse_little_memory(sizes: Sizes) -> None:
    """The kernel would end a process in the middle.

    Raises:
        SystemExit: says how much is free and how much it takes.
    """
    needed, free = LIBRARIES_BYTES + BYTES_PER_PX[sizes.net] * sizes.side**2, free_memory()
    if free < needed:
        raise SystemExit(
            f"{sizes.net} on {sizes.side} px takes {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free. Close "
            "what else runs, or take --quick."
        )


def give_back_memory() -> None:
    """To the kernel, what this process has freed: after the check a gigabyte, which exchange needs."""
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def check(net: str, file: Path, side: int, chunk: int) -> dict[str, float]:
    """Errors of all arms' gradients against one graph of the whole image, in float64; and how far bfloat16 is from it.

    Raises:
        SystemExit: an error is more than rounding.
    """
    base_HW3 = np.load(file)
    full, part = (make_problem(net, base_HW3, side, share, torch.float64) for share in (1.0, TISSUE))
    truth = whole(full)
    errors = {
        "blocks": checked("blocks", blocks(full, chunk), truth, BOUND_FLOAT64),
        "tissue": checked("tissue", blocks(part, chunk), whole(part), BOUND_FLOAT64),
    }
    network = full.encoder.network
    network(to_planes(full.rows(0, side), torch.float64)).square().sum().backward()
    parts = [part for _, part in run_on_ranks(exchange, RANKS, RANKS, net, file, side, torch.float64, timeout_s=600)]
    summed = {name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]}
    errors["exchange"] = checked("exchange", summed, taken(network), BOUND_FLOAT64)
    narrow = make_problem(net, base_HW3, side)
    errors["bfloat16 blocks"] = gradient_error(blocks(narrow, chunk, bfloat16=True), truth)
    errors["bfloat16 whole"] = gradient_error(whole(narrow, bfloat16=True), truth)
    return errors


def planned_pixels(problem: Problem, chunk: int) -> float:
    """Pixels that the network computes in one pass over the blocks, over those of the slide."""
    cell_n2, side = problem.grid.cell_N2, problem.side
    pixels = 0
    for start, stop in block_ranges(np.zeros(len(cell_n2), np.int64), cell_n2, chunk):
        low_2, high_2 = cell_n2[start:stop].min(axis=0), cell_n2[start:stop].max(axis=0) + 1
        rows, cols = zip(low_2.tolist(), high_2.tolist(), strict=True)
        pixels += block_around(problem.geometry, rows, cols, side, side).num_pixels
    return pixels / side**2


def planned_elsewhere(problem: Problem, chunk: int) -> list[float]:
    """`planned_pixels` of tissue over those of the full slide, with the region around each of the slide's cells."""
    number = problem.grid.num_y
    places = ((np.arange(number) + 0.5) / number).tolist()
    grids = [cells_of(number, TISSUE, centre) for centre in itertools.product(places, places)]
    full = planned_pixels(problem, chunk)
    return sorted(planned_pixels(replace(problem, grid=grid), chunk) / full for grid in grids)


def scheme_over_gigamil(problem: Problem, chunk: int, lost_px: int | None = None) -> float | None:
    """Pixels of the scheme's backward over gigamil's, where both compute squares as large as a block inside a slide.

    Args:
        lost_px: of a gradient on each side; None: the least, by the geometry.
    Returns:
        None if the scheme does not move on at all.
    """
    cells, network = block_side(chunk), problem.encoder.network
    owned_px = cells * problem.encoder.cell_px
    read_px = problem.geometry.rows.block(4 * cells, 5 * cells, 9 * owned_px).size
    # The scheme pools its grid afterwards, so it need not move on by whole cells.
    net = geometry_of(nn.Sequential(*(layer for name, layer in network.named_children() if name != "pool"))).rows
    lost = net.halo + sum(net.receptive_field) if lost_px is None else 2 * lost_px
    advance = (read_px - lost) // net.stride * net.stride
    return (owned_px / advance) ** 2 if advance > 0 else None


# ---- memory ----


def one_peak(arm: str, problem: Problem, chunk: int) -> int:
    """Bytes above the start of one step; in a process of its own, or the peak is somebody else's."""
    warm_up(problem)
    base = psutil.Process().memory_info().rss
    if arm == "whole":
        whole(problem)
    else:
        blocks(problem, chunk)
    return max(0, peak_bytes() - base)


def fresh_peak(arm: str, net: str, side: int, chunk: int, file: Path) -> int:
    """`one_peak` by a fresh interpreter, whose glibc gives back what is freed. Nothing is timed: all cores work."""
    command = [sys.executable, os.path.abspath(__file__), "--one", arm, net, str(side), str(chunk), str(file)]
    env = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    env |= {"OMP_NUM_THREADS": str(os.cpu_count()), "MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES)}
    done = subprocess.run(command, env=env, timeout=TIMEOUT_S, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


# ---- report ----


def arms(rank: int, num_ranks: int, sizes: Sizes, file: Path) -> tuple[dict[str, list[float]], float]:
    """User seconds of the arms of one process in each round, and the error of what was timed, in float32.

    In a process of its own, which keeps the memory of the largest arm.
    """
    torch.set_num_threads(1)
    base_HW3 = np.load(file)
    full = make_problem(sizes.net, base_HW3, sizes.side)
    part = replace(full, grid=cells_of(full.grid.num_y, TISSUE))
    wanted: dict[str, Callable[[], Gradients]] = {
        "whole": lambda: whole(full),
        "blocks": lambda: blocks(full, sizes.chunk),
        "tissue": lambda: blocks(part, sizes.chunk),
    }
    warm_up(full)
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    errors = []
    for _ in range(sizes.rounds):
        found = {}
        for name, arm in wanted.items():
            start = user_time()
            found[name] = arm()
            seconds[name].append(user_since(start))
        errors.append(checked("blocks", found["blocks"], found["whole"], BOUND_FLOAT32))
    return seconds, max(errors)


def compare(sizes: Sizes, file: Path) -> tuple[dict[str, list[float]], float]:
    """User seconds of all arms in each round, and the worst error of what was timed; in processes that keep freed memory."""
    words = (sizes.net, file, sizes.side, torch.float32)
    before = dict(os.environ)
    os.environ.update(KEEP_FREED_MEMORY)  # for glibc of the processes that are started here
    try:
        ((seconds, error),) = run_on_ranks(arms, 1, 1, sizes, file, timeout_s=TIMEOUT_S)
        # Kept memory falls to pieces: in a second round these processes would need a tenth more, and there are two.
        exchanged = [run_on_ranks(exchange, RANKS, RANKS, *words, timeout_s=TIMEOUT_S) for _ in range(sizes.rounds)]
    finally:
        for name in KEEP_FREED_MEMORY:
            os.environ.pop(name)
        os.environ.update(before)
    seconds["exchange"] = [sum(spent for spent, _ in ranks) for ranks in exchanged]
    return seconds, error


def peaks(sizes: Sizes, file: Path) -> tuple[dict[int, int], dict[int, int], float]:
    """Peak bytes of the whole image and of blocks by side, and the whole's at the largest side by a line."""
    net, chunk = sizes.net, sizes.chunk
    whole_by_side = {side: fresh_peak("whole", net, side, chunk, file) for side in sizes.peaks}
    own_by_side = {side: fresh_peak("blocks", net, side, chunk, file) for side in (sizes.peaks[-1], sizes.large)}
    slope, offset = np.polyfit([side**2 for side in whole_by_side], list(whole_by_side.values()), 1)
    return whole_by_side, own_by_side, float(slope * sizes.large**2 + offset)


def user_time() -> float:
    """CPU seconds of this process outside the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def user_since(start: float) -> float:
    """User time since `start`, at least a tick: the kernel sees no less, and an arm of --tiny may end within one."""
    return max(user_time() - start, TICK_S)


def over(seconds: Mapping[str, Sequence[float]], arm: str, other: str = "whole") -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[arm], seconds[other], strict=True))


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Sizes(), QUICK, TINY, "slides of half the side, blocks of half the side")
    parser.add_argument("--net", choices=sorted(PROBED_LOSS_PX), help="(resnet18)")
    parser.add_argument("--tiles", type=Path, help="folder with lung_tiles.tar and tiles.csv; default: painted tissue")
    parser.add_argument("--out", type=Path, help="JSON with every round")
    parser.add_argument("--one", nargs=5, metavar=("ARM", "NET", "SIDE", "CHUNK", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        arm, net, side, chunk, file = arguments.one
        print(one_peak(arm, make_problem(net, np.load(file), int(side)), int(chunk)))
        return 0
    sizes: Sizes = arguments.sizes
    if arguments.net:
        sizes = replace(sizes, net=arguments.net)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texture.npy"  # for the processes that are measured, so that none of them has painted it
        base_px = min(sizes.side, BASE_PX)
        np.save(file, painted(base_px) if arguments.tiles is None else laid_out(arguments.tiles, base_px))
        result, raw = measure(sizes, file)
    if arguments.out is not None:
        about = origin(__file__, words, load=[round(load, 2) for load in os.getloadavg()], torch=torch.__version__)
        settings = vars(sizes) | {"texture": "painted" if arguments.tiles is None else "lung tiles"}
        arguments.out.write_text(json.dumps(about | {"settings": settings, "result": result} | raw, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def measure(sizes: Sizes, file: Path) -> tuple[dict[str, object], dict[str, object]]:
    """All of it: the last line, and what is kept beside it."""
    refuse_little_memory(sizes)
    errors = check(sizes.net, file, *sizes.checked)
    give_back_memory()
    words = ", ".join(f"{name} {errors[name]:.1e}" for name in ("blocks", "tissue", "exchange"))
    print(f"{sizes.net}: gradients against the whole image, float64, {sizes.checked[0]} px: {words}")
    narrow, narrow_whole = errors["bfloat16 blocks"], errors["bfloat16 whole"]
    print(f"bfloat16 autocast against float64: blocks {narrow:.2e}, whole image {narrow_whole:.2e}\n", flush=True)

    problem = make_problem(sizes.net, np.load(file), sizes.side)
    owned_px = block_side(sizes.chunk) * problem.encoder.cell_px
    factor, elsewhere = planned_pixels(problem, sizes.chunk), planned_elsewhere(problem, sizes.chunk)
    tissue = replace(problem, grid=cells_of(problem.grid.num_y, TISSUE))
    tissue_factor = planned_pixels(tissue, sizes.chunk)
    print(f"slide of {sizes.side} px, blocks of {owned_px} px: {factor:.3f} of its pixels are computed in a pass;")
    print(f"of {TISSUE:.0%} tissue {tissue_factor:.3f}, {tissue_factor / factor:.3f} of the full slide's")
    spread = f"{elsewhere[0]:.3f} to {elsewhere[-1]:.3f}, median {statistics.median(elsewhere):.3f}"
    print(f"({spread}, for a region anywhere on the slide)\n", flush=True)

    seconds, error = compare(sizes, file)
    print(f"gradient of blocks as timed, float32: {error:.1e}\n")
    print("arm         user s     min     max  over whole")
    for name, values in seconds.items():
        spent = f"{statistics.median(values):7.2f} {min(values):7.2f} {max(values):7.2f}"
        print(f"{name:10} {spent} {over(seconds, name):11.3f}", flush=True)

    whole_by_side, own_by_side, line = peaks(sizes, file)
    print("\nside       whole MB  blocks MB above the start")
    for side in sorted({*whole_by_side, *own_by_side}):
        at_whole = f"{whole_by_side[side] / 1e6:.0f}" if side in whole_by_side else f"({line / 1e6:.0f})"
        print(f"{side:6} {at_whole:>12} {own_by_side[side] / 1e6 if side in own_by_side else math.nan:10.0f}")
    print("(in brackets: extrapolated)\n")

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 3)

    last = sizes.peaks[-1]
    result: dict[str, object] = {
        "read_over_whole_planned": rounded(over(seconds, "blocks") / (4 / 3 * factor)),
        "tissue_over_full": rounded(over(seconds, "tissue", "blocks")),
        f"peak_over_whole_{last}": rounded(own_by_side[last] / whole_by_side[last]),
        f"peak_over_whole_{sizes.large}_extrapolated": rounded(own_by_side[sizes.large] / line),
        "scheme_over_gigamil_backward": rounded(scheme_over_gigamil(problem, sizes.chunk)),
        "bf16_drift": float(f"{narrow:.3g}"),
        "bf16_drift_whole": float(f"{narrow_whole:.3g}"),
        "read_over_whole": rounded(over(seconds, "blocks")),
        "planned_pixels": rounded(factor),
        "tissue_planned": rounded(tissue_factor / factor),
        "tissue_planned_elsewhere": [rounded(value) for value in (elsewhere[0], elsewhere[-1])],
        "exchange_over_whole": rounded(over(seconds, "exchange")),
        "gradient_error_float64": max(errors[name] for name in ("blocks", "tissue", "exchange")),
    }
    if sizes.net in PROBED_LOSS_PX:
        probed = scheme_over_gigamil(problem, sizes.chunk, PROBED_LOSS_PX[sizes.net])
        result["scheme_over_gigamil_backward_probed"] = rounded(probed)
    raw: dict[str, object] = {
        "errors": errors,
        "user_s": seconds,
        "peak_bytes": {"whole": whole_by_side, "blocks": own_by_side, "whole extrapolated": line},
        "tissue_planned_elsewhere": elsewhere,
    }
    return result, raw


if __name__ == "__main__":
    sys.exit(main())

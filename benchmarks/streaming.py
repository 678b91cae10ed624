"""What does streaming a network over a slide cost, beside the whole image in one graph?

ResNet-18 up to layer4 over a slide of 4096 x 4096 pixels, in cells of 256, gated attention, one thread:
  whole     one graph of the whole image: what streaming replaces, where it fits
  blocks    gigamil: blocks of 2048 px read with their surroundings, encoded twice
  tissue    gigamil, where 30 % of the cells are tissue, in compact regions
  exchange  gigamil on two ranks, whose layers exchange rows; all activations stay in memory

What to expect: blocks read more pixels than they own (printed), and encode twice where the whole encodes once, so 4/3 of that
factor; memory is that of one block. StreamingCNN's scheme also filters gradients layer by layer, and so moves on by a block
less twice what a layer's gradient loses at a border: 490 px for this network (Pinckaers et al. 2019, computed).

    python benchmarks/streaming.py [--quick] [--out FILE]

CPU time of the process, arms in turn, medians, memory kept by the allocator; peaks in processes of their own. The last line is
JSON: read_over_whole_planned (1 is what is planned), tissue_over_full, peak_over_whole_4096, peak_over_whole_8192_extrapolated,
scheme_over_gigamil_backward (pixels).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from memory import peak_bytes
from options import add_sizes
from origin import origin
from torch import Tensor

from gigamil.data.augment import to_float
from gigamil.data.blocks import BlockImages, SlideGrid
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.memory.geometry import geometry_of
from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import DenseEncoder, encoders
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.topology import Topology
from gigamil.partition.blocks import block_ranges
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.schedule import plan_steps
from gigamil.testing.compare import gradient_error
from gigamil.testing.dense import MemorySlides
from gigamil.testing.paint import synthetic_slide
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

TILE_PX = 256
GRADIENT_LOST_PX = 490  # per side, ResNet-18 up to layer4
BOUND = 1e-4  # float32; float64 in tests/equivalence/test_dense.py
TISSUE = 0.3


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        side: pixels of the slide.
        chunk: cells of a block.
        rounds: of all arms in turn.
        peaks: sides at which the whole image's memory is measured, the last with gigamil's beside it.
        large: side at which gigamil's memory is measured, and the whole image's only extrapolated.
    """

    side: int = 4096
    chunk: int = 64
    rounds: int = 5
    peaks: tuple[int, ...] = (1024, 2048, 4096)
    large: int = 8192


QUICK = Sizes(rounds=2)
TINY = Sizes(side=512, chunk=1, rounds=1, peaks=(256, 512), large=1024)


class Engine(PlainEngine):
    """Keeps the gradients of a step, and updates nothing."""

    def step(self, learning_rates: Sequence[float]) -> float:
        """Record."""
        self.gradients = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        for parameter in self.module.parameters():
            parameter.grad = None
        return 1.0


@cache
def slide(side: int) -> Tensor:
    """uint8 (H, W, 3): painted tissue, side by side."""
    base = min(side, 2048)
    image_HW3 = synthetic_slide(1, tumour=True, size_um=(base * 0.5, base * 0.5), mpp=0.5).image_HW3[:base, :base]
    return torch.from_numpy(np.tile(image_HW3, (side // base, side // base, 1)))


def grid(side: int, share: float) -> SlideGrid:
    """All cells, or a share of them in four discs."""
    number = side // TILE_PX
    row, col = np.divmod(np.arange(number**2), number)
    if share < 1:
        centre_42 = np.array([[0.25, 0.25], [0.3, 0.75], [0.75, 0.3], [0.7, 0.75]]) * number
        distance = np.hypot(row[:, None] + 0.5 - centre_42[:, 0], col[:, None] + 0.5 - centre_42[:, 1]).min(axis=1)
        chosen = np.sort(np.argsort(distance, kind="stable")[: round(share * number**2)])
        row, col = row[chosen], col[chosen]
    order = hilbert_sort(col, row)
    return SlideGrid(number, number, np.column_stack([row, col])[order])


def make_model() -> SlideModel:
    """ResNet-18 up to layer4, cells of 256 px, gated attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = DenseEncoder(encoders["resnet18"](dense="layer4", pool=8), (0.7, 0.6, 0.7), (0.2, 0.2, 0.2))
        return SlideModel(encoder, build_aggregator("gated_attention", encoder.dim, 2, {"hidden": 128}), 2).train()


def whole(model: SlideModel, side: int) -> dict[str, Tensor]:
    """One graph of the whole image; its gradients."""
    cell_N2 = torch.from_numpy(grid(side, 1).cell_N2)
    embedding_ND = model.encode(to_float(slide(side)[None]), None, cell_N2)
    bag = Bag(
        embedding_nD=embedding_ND,
        position_n2=torch.zeros((len(embedding_ND), 2), dtype=torch.float64),
        sizes=(len(embedding_ND),),
        pool=LocalPool(len(embedding_ND)),
        tile_key_n=None,
        slide_key_B=None,
        label_B=torch.tensor([1]),
    )
    cross_entropy(model.classify(bag)[0], torch.tensor([1])).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def blocks(model: SlideModel, side: int, chunk: int, share: float = 1.0) -> dict[str, Tensor]:
    """gigamil's step; its gradients."""
    engine, tiles = Engine(model), step_tiles(model, side, share)
    plan = plan_steps([0], [tiles.num_tiles], 1, 1, 1)[0]
    ExactStep(engine, Ranks(Topology()), cross_entropy, chunk=chunk, num_keep=0, keys=DrawKeys(0, ["slide-0"])).train(
        plan, tiles, torch.tensor([1]), torch.ones(1, dtype=torch.float64), step=0, learning_rates=[]
    )
    return engine.gradients


def step_tiles(model: SlideModel, side: int, share: float) -> StepTiles:
    """The cells of the slide, and their blocks."""
    found = grid(side, share)
    number = len(found.cell_N2)
    assert isinstance(model.encoder, DenseEncoder)
    source = MemorySlides([slide(side)], [found])
    return StepTiles(
        BlockImages([("slide-0", 0, number)], source, geometry_of(model.encoder.network), TILE_PX),
        torch.zeros(number, dtype=torch.int64),
        torch.arange(number),
        torch.zeros((number, 2), dtype=torch.float64),
    )


def planned(side: int, chunk: int, share: float = 1.0) -> float:
    """Pixels that blocks read, over those of the slide."""
    tiles = step_tiles(make_model(), side, share)
    images = tiles.images
    assert isinstance(images, BlockImages)
    ranges = block_ranges(tiles.slide_index_n.numpy(), images.cell_n2, chunk)
    return sum(images._block(start, stop).num_pixels for start, stop in ranges) / side**2


def cpu_seconds(function: object, *words: object) -> float:
    """User time of this process: what the allocator asks of the system is not counted."""
    before = os.times().user
    function(*words)  # type: ignore[operator]
    return os.times().user - before


def exchange(rank: int, num_ranks: int, side: int, rounds: int) -> tuple[list[float], int]:
    """User seconds of forward and backward over this rank's rows, and peak bytes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    model = make_model()
    assert isinstance(model.encoder, DenseEncoder)
    network = ShardedNetwork(model.encoder.network, dist.group.WORLD if num_ranks > 1 else None, rank)
    cuts = tuple(side * r // num_ranks // TILE_PX * TILE_PX for r in range(num_ranks + 1))
    seconds = []
    for _ in range(rounds + 1):
        start = os.times().user
        image_1CHW = to_float(slide(side)[None, cuts[rank] : cuts[rank + 1]])
        network(image_1CHW, cuts)[0].square().mean().backward()
        seconds.append(os.times().user - start)
    return seconds[1:], peak_bytes()


def one_peak(arm: str, side: int, chunk: int, file: Path) -> int:
    """Bytes above the start of one step, in a process of its own, which has not painted the slide."""
    torch.set_num_threads(1)
    model = make_model()
    image_HW3 = torch.from_numpy(np.load(file))
    globals()["slide"] = lambda wanted: image_HW3[:wanted, :wanted]
    blocks(model, TILE_PX, 1)  # libraries are loaded by the first step
    base = peak_bytes()
    if arm == "whole":
        whole(model, side)
    else:
        blocks(model, side, chunk)
    return peak_bytes() - base


def fresh_peak(arm: str, side: int, chunk: int) -> int:
    """`one_peak` by a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "slide.npy"
        np.save(file, slide(side).numpy())
        return _fresh_peak(arm, side, chunk, file)


def _fresh_peak(arm: str, side: int, chunk: int, file: Path) -> int:
    command = [sys.executable, os.path.abspath(__file__), "--one", arm, str(side), str(chunk), str(file)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    env.pop("MALLOC_MMAP_MAX_", None)
    done = subprocess.run(command, env=env, timeout=3600, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.splitlines()[-1])


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Sizes(), QUICK, TINY, "two rounds")
    parser.add_argument("--out", type=Path, help="JSON with every round")
    parser.add_argument("--one", nargs=4, metavar=("ARM", "SIDE", "CHUNK", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        arm, side_px, chunk_tiles, file = arguments.one
        print(one_peak(arm, int(side_px), int(chunk_tiles), Path(file)))
        return 0
    if "MALLOC_MMAP_MAX_" not in os.environ:  # glibc gives large blocks back at every free, and faults them in again
        keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, os.path.abspath(__file__), *(sys.argv[1:] if words is None else words)]
        return subprocess.run(command, env=os.environ | keep, check=False).returncode
    sizes: Sizes = arguments.sizes
    torch.set_num_threads(1)
    side, chunk = sizes.side, sizes.chunk
    model = make_model()
    error = gradient_error(blocks(model, side, chunk), whole(model, side))
    print(f"gradient of blocks against the whole image, float32: {error:.1e}")
    if not error <= BOUND:
        raise SystemExit(f"more than {BOUND:g}: nothing is measured")
    factor, tissue_factor = planned(side, chunk), planned(side, chunk, TISSUE)
    print(f"pixels that are read, over those of the slide: {factor:.3f}; of {TISSUE:.0%} tissue {tissue_factor:.3f}\n")
    arms = {
        "whole": lambda: whole(model, side),
        "blocks": lambda: blocks(model, side, chunk),
        "tissue": lambda: blocks(model, side, chunk, TISSUE),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(sizes.rounds):
        for name, arm in arms.items():
            seconds[name].append(cpu_seconds(arm))
    apart = run_on_ranks(exchange, 2, 2, side, sizes.rounds, timeout_s=3600)
    print("arm         user s  over whole")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["exchange"] = sum(statistics.median(values) for values, _ in apart)
    for name, median in medians.items():
        print(f"{name:10} {median:7.2f} {median / medians['whole']:11.3f}", flush=True)
    peaks = {at: fresh_peak("whole", at, chunk) for at in sizes.peaks}
    own = {at: fresh_peak("blocks", at, chunk) for at in (sizes.peaks[-1], sizes.large)}
    slope, offset = np.polyfit([at**2 for at in peaks], list(peaks.values()), 1)
    line = slope * sizes.large**2 + offset
    print("\nside      whole MB  blocks MB")
    for at in sorted({*peaks, *own}):
        whole_mb = f"{peaks[at] / 1e6:9.0f}" if at in peaks else f"({line / 1e6:.0f}, extrapolated)"
        print(f"{at:6} {whole_mb:>12} {own[at] / 1e6 if at in own else float('nan'):10.0f}")
    block_px = round(chunk**0.5) * TILE_PX + geometry_of(model.encoder.network).rows.halo  # type: ignore[union-attr]
    ours = (block_px / (round(chunk**0.5) * TILE_PX)) ** 2
    advance = block_px - 2 * GRADIENT_LOST_PX
    result = {
        "read_over_whole_planned": round(medians["blocks"] / medians["whole"] / (4 / 3 * factor), 3),
        "tissue_over_full": round(medians["tissue"] / medians["blocks"], 3),
        "peak_over_whole_4096": round(own[sizes.peaks[-1]] / peaks[sizes.peaks[-1]], 3),
        "peak_over_whole_8192_extrapolated": round(own[sizes.large] / line, 3),
        "scheme_over_gigamil_backward": round((block_px / advance) ** 2 / ours, 2) if advance > 0 else None,
        "exchange_over_whole": round(medians["exchange"] / medians["whole"], 3),
        "gradient_error": error,
    }
    if arguments.out is not None:
        raw = {"seconds": seconds, "exchange": apart, "peaks_whole": peaks, "peaks_blocks": own, "result": result}
        arguments.out.write_text(json.dumps(origin(__file__, words, torch=torch.__version__) | raw, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

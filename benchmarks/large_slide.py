"""Does a training step over a slide of 65,536 x 65,536 pixels go through, and in how much memory?

A slide file is painted (a pyramid of JPEG tiles, one part of 4096 px repeated; made once), `gigamil tile` finds its tissue,
and two ranks on the CPU make one step as training makes it, DeepSpeed included: a thin dense encoder (`small_dense_cnn` of
width 4) sees every pixel of tissue, in blocks of 2048 px that are read from the file with their surroundings, and every
parameter gets its exact gradient. The same on slides of half the side, a quarter, ... shows how memory grows.

Expected: from 8192 px on, where blocks have surroundings on all sides, memory is that of a block and of OpenSlide's cache, and
grows by what a tile leaves behind: its embedding, the gradient of that, what the head saves of it, and its place in the
index. That is a few hundred bytes for a tile of 65,536 pixels, below what peaks of equal runs differ by, some megabytes; so
bytes_per_tile says little below --side 65536, and may be negative.

    python benchmarks/large_slide.py [--side 65536] [--ranks 2] [--folder runs/large_slide]

About a quarter of an hour on two idle cores, and half a gigabyte of disk; `--side 16384` takes two minutes. Peaks are resident
memory of a rank above its start, when libraries are loaded and ranks have met; glibc gives buffers back as in memory.py. The
last line is JSON of the largest slide: side, tiles, seconds (of the step, reading included), peak_mb (of the rank with most),
loss, bytes_per_tile (growth of a rank's peak from a quarter of the side on, over its tiles).
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from memory import MMAP_BYTES
from origin import origin

from gigamil.config.schema import RunConfig
from gigamil.data.pipeline import DrawKeys, StepLoader
from gigamil.data.slide_source import SlideSource
from gigamil.data.tile import tile_cohort
from gigamil.models.slide_model import build_model
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.tiff import write_pyramid_tiff
from gigamil.train.dense import dense_geometry
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, make_optimizer, make_ranks, skip_kernel_build
from gigamil.train.loss import cross_entropy
from gigamil.train.memory import MemoryMeter
from gigamil.train.step import ExactStep

SLIDE_ID, MPP = "slide", 0.5
LEVELS = 4  # of the pyramid
TIMEOUT_S = 2 * 3600


@dataclass(frozen=True)
class Sizes:
    """How large slides and blocks are.

    Attributes:
        base: pixels along the side of what is painted and repeated; also the smallest slide.
        tile_px: side of a tile, of the file's own and of the encoder's cells; a multiple of 16.
        chunk: tiles of a block.
    """

    base: int = 4096
    tile_px: int = 256
    chunk: int = 64


TINY = Sizes(base=512, tile_px=32, chunk=4)


@dataclass(frozen=True)
class Row:
    """One slide.

    Attributes:
        side: in pixels.
        tiles: of tissue.
        seconds: of the step on the slowest rank.
        peak_mb: above the start, on the rank with most.
        loss: of the slide.
    """

    side: int
    tiles: int
    seconds: float
    peak_mb: float
    loss: float


def sides_up_to(side: int, base: int) -> list[int]:
    """The base, twice that, ... and the side.

    Raises:
        SystemExit: the side is none of these.
    """
    sides = [base]
    while sides[-1] < side:
        sides.append(2 * sides[-1])
    if sides[-1] != side:
        raise SystemExit(f"--side {side}: must be {base} or twice, four times, ... that")
    return sides


def paint(folder: Path, side: int, sizes: Sizes) -> Path:
    """The file of a slide: stained noise, with a lane of glass around each part that is repeated."""
    path = folder / f"slide-{side}.tiff"
    if not path.is_file():
        cells, lane = sizes.base // 16, sizes.base // 32
        coarse_HW3 = np.random.default_rng(0).normal(0, 30, (cells, cells, 3)).repeat(16, 0).repeat(16, 1)
        image_HW3 = np.clip(coarse_HW3 + [190, 90, 150], 0, 255).astype(np.uint8)
        image_HW3[:lane], image_HW3[:, :lane] = 245, 245
        unfinished = path.with_suffix(".part")  # so that one that was interrupted is not taken for the slide
        repeat = (side // sizes.base, side // sizes.base)
        write_pyramid_tiff(unfinished, image_HW3, MPP, tile=sizes.tile_px, levels=LEVELS, repeat=repeat)
        unfinished.replace(path)
    return path


def configuration(folder: Path, side: int, ranks: int, sizes: Sizes) -> RunConfig:
    """One slide, a thin dense encoder, gated attention."""
    table = folder / f"slides-{side}.csv"
    table.write_text(f"slide_id,path,patient_id,label\n{SLIDE_ID},{paint(folder, side, sizes).resolve()},p,a\n")
    encoder = {"name": "small_dense_cnn", "options": {"width": 4, "pool": sizes.tile_px // 16}}
    return RunConfig.model_validate(
        {
            "cohort": {"table": table, "classes": ["a", "b"]},
            "slides": {"tile_px": sizes.tile_px, "tile_mpp": MPP},
            "data": {"source": "slides"},
            "science": {"encoder": encoder},
            "execution": {"ranks": ranks, "device": "cpu", "chunk": sizes.chunk},
            "bookkeeping": {"out": folder / f"run-{side}", "progress": False, "mlflow": False},
        }
    )


def step(rank: int, num_ranks: int, config: RunConfig, path: Path) -> tuple[int, float, int, float]:
    """On a rank: tiles of the slide, seconds, peak bytes above the start, loss.

    Raises:
        RuntimeError: no update was made, or not with blocks of this size.
    """
    skip_kernel_build()
    topology, device = Topology(num_ranks, rank, rank, num_ranks, num_ranks), torch.device("cpu")
    meter = MemoryMeter(device, config)
    shards = ShardSet(config.bookkeeping.shard_root)
    source = SlideSource(shards, {SLIDE_ID: path}, config)
    model = build_model(config.science, len(config.cohort.classes)).train()
    geometry = dense_geometry(model.encoder, config.slides)
    optimizer = make_optimizer(model, config)
    engine = DeepSpeedEngine(model, optimizer, deepspeed_config(config), device)
    tile_px, chunk = config.slides.tile_px, config.execution.chunk
    loader = StepLoader(source, [SLIDE_ID], tile_px, topology, prefetch=0, geometry=geometry)
    num_tiles = shards.manifest(SLIDE_ID).num_tiles
    plan = plan_steps([0], [num_tiles], 1, 1, num_ranks)[0]
    ranks, keys = make_ranks(topology), DrawKeys(0, [SLIDE_ID])
    exact = ExactStep(engine, ranks, cross_entropy, chunk=chunk, num_keep=0, keys=keys)
    label, weight = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
    rates = [1e-3] * len(optimizer.param_groups)
    start = perf_counter()
    made = exact.train(plan, loader.load(plan), label, weight, step=0, learning_rates=rates)
    seconds = perf_counter() - start
    if made.skipped or exact.chunk != chunk:
        raise RuntimeError(f"the step did not go through at chunk {chunk}: {made}")
    return num_tiles, seconds, meter.above_start(), made.loss


def growth(rows: Sequence[Row], ranks: int) -> float:
    """Bytes that a rank's peak grows by for each tile of its own, from a quarter of the side on."""
    last = rows[-1]
    first = next((row for row in rows if row.side == last.side // 4), rows[0])
    return (last.peak_mb - first.peak_mb) * 1e6 * ranks / max(1, last.tiles - first.tiles)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, help="pixels: 4096 or twice, four times, ... that (65536)")
    parser.add_argument("--ranks", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/large_slide"), help="keeps the slides (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="for tests: figures mean nothing")
    arguments = parser.parse_args(words)
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES)}  # of the ranks
    sizes, ranks = TINY if arguments.tiny else Sizes(), arguments.ranks
    folder = arguments.folder / "tiny" if arguments.tiny else arguments.folder
    sides = sides_up_to(arguments.side or (2 * TINY.base if arguments.tiny else 65536), sizes.base)
    folder.mkdir(parents=True, exist_ok=True)
    print("  side px    tiles  seconds  peak MB  loss")
    rows = []
    for side in sides:
        config = configuration(folder, side, ranks, sizes)
        tile_cohort(config, progress=False)
        found = run_on_ranks(step, ranks, ranks, config, paint(folder, side, sizes), timeout_s=TIMEOUT_S)
        tiles, seconds, peaks, loss = zip(*found, strict=True)
        rows.append(Row(side, tiles[0], round(max(seconds), 1), round(max(peaks) / 1e6, 1), round(loss[0], 4)))
        print(f"{side:9} {tiles[0]:8} {max(seconds):8.1f} {max(peaks) / 1e6:8.0f}  {loss[0]:.4f}", flush=True)
    last = asdict(rows[-1]) | {"bytes_per_tile": round(growth(rows, ranks), 1), "ranks": ranks}
    print(json.dumps(last | origin(__file__, words, torch=torch.__version__)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

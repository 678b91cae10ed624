"""Does one training step over a slide of 65,536 x 65,536 pixels go through, and in how much memory?

A slide file is painted once (a pyramid of JPEG tiles, one part of it repeated), its tiles are placed, and two ranks make one
step with a dense encoder: every pixel of tissue goes through one network, in blocks, with the exact gradient. The same
step over smaller parts of the slide tells how memory grows.

    python benchmarks/large_slide.py [--side 65536] [--ranks 2] [--folder DIR]

The last line is JSON: side, tiles, seconds, peak_mb (above the process's start, the largest rank), growth (of that
memory per tile, over what embeddings and their gradient take).
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

BASE_PX = 4096
CHUNK = 64  # tiles of 256 px: blocks of 2048 px and what is around them


def paint(folder: Path, side: int) -> Path:
    """A slide of tissue with a lane of glass around each 4096 pixels."""
    path = folder / f"slide-{side}.tiff"
    if not path.is_file():
        generator = np.random.default_rng(0)
        base = min(side, BASE_PX)
        coarse = generator.normal(0, 30, (base // 16, base // 16, 3)).repeat(16, 0).repeat(16, 1)
        image = np.clip(coarse + [190, 90, 150], 0, 255).astype(np.uint8)
        image[:128], image[:, :128] = 245, 245
        write_pyramid_tiff(path, image, 0.5, levels=4, repeat=(side // base, side // base))
    return path


def configuration(folder: Path, side: int, ranks: int) -> RunConfig:
    """A thin dense encoder and CLAM's attention on one slide."""
    path, table = paint(folder, side), folder / f"slides-{side}.csv"
    table.write_text(f"slide_id,path,patient_id,label\nslide,{path},p,a\n")
    return RunConfig.model_validate(
        {
            "cohort": {"table": table, "classes": ["a", "b"]},
            "slides": {"tile_px": 256, "tile_mpp": 0.5},
            "data": {"source": "slides"},
            "science": {"encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 16}}},
            "execution": {"ranks": ranks, "device": "cpu", "chunk": CHUNK},
            "bookkeeping": {"out": folder / f"run-{side}", "progress": False, "mlflow": False},
        }
    )


def step(rank: int, num_ranks: int, config: RunConfig, path: Path) -> tuple[int, float, int, float]:
    """On a rank: tiles, seconds, peak bytes above the start, loss."""
    skip_kernel_build()
    topology, device = Topology(num_ranks, rank, rank, num_ranks, num_ranks), torch.device("cpu")
    shards = ShardSet(config.bookkeeping.shard_root)
    source = SlideSource(shards, {"slide": path}, config)
    model = build_model(config.science, 2).train()
    geometry = dense_geometry(model.encoder, config.slides)
    engine = DeepSpeedEngine(model, make_optimizer(model, config), deepspeed_config(config), device)
    loader = StepLoader(source, ["slide"], config.slides.tile_px, topology, 0, decode_workers=1, geometry=geometry)
    num_tiles = shards.manifest("slide").num_tiles
    plan = plan_steps([0], [num_tiles], 1, 1, num_ranks)[0]
    meter, start = MemoryMeter(device, config), time.perf_counter()
    made = ExactStep(
        engine, make_ranks(topology), cross_entropy, chunk=CHUNK, num_keep=0, keys=DrawKeys(0, ["slide"])
    ).train(
        plan,
        loader.load(plan),
        torch.tensor([1]),
        torch.ones(1, dtype=torch.float64),
        step=0,
        learning_rates=[1e-3] * 2,
    )
    return num_tiles, time.perf_counter() - start, meter.above_start(), made.loss


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=65536, help="pixels, a power of two from 4096 on (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="keeps the slides; default: a temporary folder")
    arguments = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = "1"
    print("  side px    tiles  seconds  peak MB  loss")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sides = [side for side in (4096, 8192, 16384, 32768, 65536) if side < arguments.side] + [arguments.side]
        for side in sides:
            config = configuration(folder, side, arguments.ranks)
            tile_cohort(config, progress=False)
            rows = run_on_ranks(step, arguments.ranks, arguments.ranks, config, paint(folder, side), timeout_s=3600)
            tiles, seconds, peak, loss = max(rows, key=lambda row: row[2])
            found.append({"side": side, "tiles": tiles, "seconds": seconds, "peak_mb": peak / 1e6, "loss": loss})
            print(f"{side:9} {tiles:8} {seconds:8.1f} {peak / 1e6:8.0f}  {loss:.4f}", flush=True)
    last = found[-1]
    print(json.dumps(last | origin(__file__, words, torch=torch.__version__)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

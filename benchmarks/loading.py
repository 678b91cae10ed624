"""How near does loading come to plain decoding, and to webdataset's own loader?

Expected: between a JPEG in memory and a tile in a step lie reading, a checksum, a header, and memory that is not in the
cache yet: some 15 % of what decoding costs, so 0.85 of the limit per core. webdataset parses each member with tarfile,
groups members to samples and sends pixels from its worker processes to the step, so it comes behind that at any number
of workers, though it verifies nothing.

Tiles are cut from drawn tissue (224 px, quality 90, 4:2:0), files lie in the page cache, torch has one thread.

    limit         simplejpeg on JPEGs in memory, into one tile's worth of memory that never leaves the cache
    gigamil W     StepLoader on shards: W threads that read and decode, checksums on, tiles of a step in one tensor
    webdataset W  WebDataset -> the same decoder -> batches of 64 tiles, through DataLoader with W worker processes;
                  0: both do everything in the thread that asks

All arms take turns. Per core means CPU time of all threads and children, the least of all rounds; tiles/s is wall
time, the median of all rounds. What is delivered is compared pixel by pixel first. The share of time that a training
waits for data is that of a short real one with the encoder and tile size of the demo; it has four steps in an epoch,
of which the first always waits for its tiles, where the demo has twenty.

    python benchmarks/loading.py [--quick] [--out FILE]

The last line is JSON: loading_over_decode_limit (CPU time, one thread), loading_over_webdataset (wall time, the worst
of the numbers of workers), data_wait_frac.
"""

import argparse
import gc
import hashlib
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from options import add_sizes
from origin import origin
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.data.decode import decode_with_simplejpeg
from gigamil.data.pipeline import StepLoader
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.read import ShardSet
from gigamil.testing.paint import synthetic_slide
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import noise_run
from gigamil.testing.shards import make_shards
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

BATCH = 64
Arm = Callable[[], Iterator[Tensor]]  # yields uint8 (n, H, W, 3)


@dataclass(frozen=True)
class Sizes:
    """How much is loaded.

    Attributes:
        slides, tiles: slides, and tiles of each.
        tile_px: side of a tile.
        field_um: side of the drawn field that tiles are cut from.
        workers: numbers of workers to compare.
        rounds: of all arms in turn.
        training: tiles of each of eight slides of the short training.
    """

    slides: int = 24
    tiles: int = 192
    tile_px: int = 224
    field_um: float = 2000.0
    workers: tuple[int, ...] = (0, 1, 2)
    rounds: int = 7
    training: int = 256


QUICK = Sizes(slides=12, tiles=128, rounds=5, training=128)
TINY = Sizes(slides=2, tiles=70, tile_px=32, field_um=100.0, workers=(0, 1), rounds=2, training=16)


@dataclass
class Figure:
    """One arm: seconds of each round."""

    arm: str
    tiles: int
    wall_s: list[float]
    cpu_s: list[float]

    def line(self, limit: "Figure") -> str:
        """For the table."""
        wall, cpu = statistics.median(self.wall_s), min(self.cpu_s)
        return (
            f"{self.arm:14} {self.tiles / wall:9.0f} {self.tiles / cpu:11.0f} {1e6 * cpu / self.tiles:9.1f}"
            f" {least_over(limit.cpu_s, self.cpu_s):8.3f}"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Sizes(), QUICK, TINY, "fewer tiles and rounds")
    parser.add_argument("--out", type=Path, help="JSON with every round")
    arguments = parser.parse_args(words)
    sizes: Sizes = arguments.sizes
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        jpegs = cut_tiles(sizes)
        shards = write(Path(folder), jpegs, sizes)
        kib = statistics.mean(map(len, jpegs)) / 1024
        print(f"{sizes.slides} slides of {sizes.tiles} tiles, {sizes.tile_px} px, {kib:.1f} KiB each\n")
        check(shards, sizes)
        figures = compare(jpegs, shards, sizes)
        print("arm               tiles/s  tiles/CPU s  us a tile  of limit")
        for figure in figures.values():
            print(figure.line(figures["limit"]))
        wait = training_wait(Path(folder), sizes)
    by_workers = {w: over(figures[f"webdataset {w}"].wall_s, figures[f"gigamil {w}"].wall_s) for w in sizes.workers}
    by_workers_cpu = {w: over(figures[f"webdataset {w}"].cpu_s, figures[f"gigamil {w}"].cpu_s) for w in sizes.workers}
    print("\ngigamil over webdataset: " + ", ".join(f"{r:.2f} with {w} workers" for w, r in by_workers.items()))
    print(f"a training waits for data {100 * wait:.1f} % of its time")
    result = {
        "loading_over_decode_limit": round(least_over(figures["limit"].cpu_s, figures["gigamil 1"].cpu_s), 3),
        "loading_over_webdataset": round(min(by_workers.values()), 3),
        "data_wait_frac": round(wait, 4),
        "over_webdataset_by_workers": {w: round(ratio, 3) for w, ratio in by_workers.items()},
        "over_webdataset_by_workers_cpu": {w: round(ratio, 3) for w, ratio in by_workers_cpu.items()},
    }
    if arguments.out is not None:
        raw = {
            **origin(__file__, words, torch=torch.__version__, webdataset=webdataset.__version__),
            "sizes": asdict(sizes),
            "kib_per_tile": kib,
            "result": result,
            "arms": [asdict(figure) for figure in figures.values()],
        }
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def cut_tiles(sizes: Sizes) -> list[bytes]:
    """The JPEGs of one slide; no two are equal."""
    field_HW3 = synthetic_slide(0, tumour=True, size_um=(sizes.field_um, sizes.field_um)).image_HW3
    draw, (height, width, _) = np.random.default_rng(0), field_HW3.shape
    corners = draw.integers(0, (height - sizes.tile_px, width - sizes.tile_px), (sizes.tiles, 2))
    # Scanners see noise that a drawing has not; without it a JPEG is half as long as a real one.
    tiles = (
        field_HW3[y : y + sizes.tile_px, x : x + sizes.tile_px] + draw.normal(0, 3, (sizes.tile_px,) * 2 + (1,))
        for y, x in corners
    )
    return [
        simplejpeg.encode_jpeg(np.clip(tile, 0, 255).astype(np.uint8), quality=90, colorsubsampling="420")
        for tile in tiles
    ]


def write(folder: Path, jpegs: list[bytes], sizes: Sizes) -> ShardSet:
    """Slides whose tiles begin at different places of the same list."""
    for number in range(sizes.slides):
        make_shards(folder / "shards", f"s{number}", jpegs[number:] + jpegs[:number], tile_px=sizes.tile_px)
    return ShardSet(folder / "shards")


def limit(jpegs: list[bytes], sizes: Sizes) -> Iterator[Tensor]:
    """Decoding alone."""
    tile_HW3 = np.empty((sizes.tile_px, sizes.tile_px, 3), np.uint8)
    for _ in range(sizes.slides):
        for jpeg in jpegs:
            decode_with_simplejpeg(jpeg, tile_HW3)
    yield torch.from_numpy(tile_HW3)[None].expand(sizes.slides * len(jpegs), -1, -1, -1)


def gigamil(shards: ShardSet, sizes: Sizes, workers: int) -> Iterator[Tensor]:
    """One slide a step, as a rank of a training gets them."""
    plans = plan_steps(range(sizes.slides), [sizes.tiles] * sizes.slides, 1, 1, 1)
    loader = StepLoader(shards, shards.slide_ids, sizes.tile_px, Topology(), decode_workers=workers)
    for _, tiles in loader.iterate(plans):
        if isinstance(tiles, Exception):
            raise tiles
        yield tiles.images.read(0, tiles.num_tiles)


class Decode:
    """What webdataset's workers are given: the decoder that gigamil uses."""

    def __init__(self, tile_px: int) -> None:
        self.tile_px = tile_px

    def __call__(self, sample: tuple[bytes]) -> Tensor:
        tile_HW3 = np.empty((self.tile_px, self.tile_px, 3), np.uint8)
        decode_with_simplejpeg(sample[0], tile_HW3)
        return torch.from_numpy(tile_HW3)


def through_webdataset(shards: ShardSet, sizes: Sizes, workers: int) -> Iterator[Tensor]:
    """All tars, by the pipeline that its documentation shows."""
    urls = [str(path) for slide_id in shards.slide_ids for path in sorted(shards.folder(slide_id).glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that it leaves to the garbage collector; workers without a shard
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        batches = dataset.to_tuple("jpg").map(Decode(sizes.tile_px)).batched(BATCH, collation_fn=torch.stack)
        yield from webdataset.WebLoader(batches, batch_size=None, num_workers=workers)
        gc.collect()


def arms(jpegs: list[bytes], shards: ShardSet, sizes: Sizes) -> dict[str, Arm]:
    """All arms by name."""
    found: dict[str, Arm] = {"limit": lambda: limit(jpegs, sizes)}
    for workers in sizes.workers:
        found[f"gigamil {workers}"] = lambda workers=workers: gigamil(shards, sizes, workers)
        found[f"webdataset {workers}"] = lambda workers=workers: through_webdataset(shards, sizes, workers)
    return found


def check(shards: ShardSet, sizes: Sizes) -> None:
    """Both loaders deliver the same tiles. Workers of webdataset take turns, so the order is another."""
    digests = [
        sorted(
            hashlib.sha256(tile.numpy().tobytes()).digest()
            for batch in loader(shards, sizes, workers)
            for tile in batch
        )
        for workers in sizes.workers
        for loader in (gigamil, through_webdataset)
    ]
    if len(digests[0]) != sizes.slides * sizes.tiles or any(other != digests[0] for other in digests):
        raise AssertionError("the loaders do not deliver the same tiles")


def compare(jpegs: list[bytes], shards: ShardSet, sizes: Sizes) -> dict[str, Figure]:
    """Time all arms in turn."""
    found = arms(jpegs, shards, sizes)
    figures = {name: Figure(name, sizes.slides * sizes.tiles, [], []) for name in found}
    for _ in range(sizes.rounds):
        for name, arm in found.items():
            cpu, wall, tiles = cpu_seconds(), time.perf_counter(), 0
            for batch in arm():
                tiles += len(batch)
            figures[name].wall_s.append(time.perf_counter() - wall)
            figures[name].cpu_s.append(cpu_seconds() - cpu)
            if tiles != figures[name].tiles:
                raise AssertionError(f"{name} delivered {tiles} tiles of {figures[name].tiles}")
    return figures


def cpu_seconds() -> float:
    """Of this process, its threads, and its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def over(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a / b, round by round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def least_over(a: Sequence[float], b: Sequence[float]) -> float:
    """Of CPU times: what else runs on a machine only ever adds to them, so the least are compared."""
    return min(a) / min(b)


def training_wait(folder: Path, sizes: Sizes) -> float:
    """Share of the time of training steps that the trainer waited for tiles."""
    config = noise_run(
        folder,
        "small_cnn",
        tile_px=min(64, sizes.tile_px),
        size=sizes.training,
        execution={"chunk": 64},
        epochs=3,
        slides_per_step=1,
    )
    run_on_ranks(train, 1, config, timeout_s=600)
    lines = map(json.loads, (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if line["kind"] == "step"]
    seconds = [1 / step["slides_per_s"] for step in steps]
    return sum(s * step["data_wait_frac"] for s, step in zip(seconds, steps, strict=True)) / sum(seconds)


def train(rank: int, config: RunConfig) -> None:
    """The whole training of `training_wait`."""
    skip_kernel_build()
    Trainer(config, make_ranks(Topology()), torch.device("cpu")).fit()


if __name__ == "__main__":
    sys.exit(main())

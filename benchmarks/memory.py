"""How does the memory of an exact step grow with the slide?

Expected: with replay a tile costs its embedding, the embedding's gradient, what the head saves of it and its place in
the index; a few hundred bytes, where one graph over the bag costs a whole forward's activations. So a slide of
200,000 tiles fits on a laptop, and its tiles need not: they are made when a chunk is encoded and forgotten after it.

Peak resident memory of a fresh process per row. Tiles are 32 x 32, the encoder is `small_cnn`, the head gated
attention, in float32 on one rank with one thread. The formula per tile, in bytes:

    embedding       4 D
    its gradient    4 D
    head            what autograd saves of the head besides embeddings and index, counted by hooks
    index           48: position 2 x 8; slide, number, slide of the bag and key 8 each

The slope is taken between the largest N and a quarter of it, so that what does not depend on N (the interpreter, one
chunk's graph) cancels. glibc is told to take buffers of 128 KiB and more from the kernel and give them back at once
(MALLOC_MMAP_THRESHOLD_): that is where it starts by itself, but its limit moves with what was freed, and buffers that
grow with N then at first fill holes that chunks left, which moved the slope by 6 % from run to run.

Before the rows, the gradient of replay is compared with that of naive, on 100 stored tiles in chunks of 64.

    python benchmarks/memory.py [--largest 200000] [--out FILE]

The last line is JSON: slope_over_formula, largest_n, and the parts.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gradients import checked, recorded
from origin import origin
from torch import Tensor

from gigamil.config.schema import Encoder
from gigamil.data.augment import to_float
from gigamil.data.images import StoredImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import build_encoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

TILE_PX = 32
INDEX_BYTES = 48
TIMEOUT_S = 1200
SIZES = (32, 1024, 4096)  # and a quarter, a half and all of the largest
MMAP_BYTES = 2**17  # where glibc starts, too
NAIVE_UP_TO = 4096  # more would only show the same line

Read = Callable[[str, int, int], Tensor]  # slide, first tile, last but one -> uint8 (n, H, W, 3)


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
        peak_bytes: resident at most.
        base_bytes: resident at most when the model was made and no tile yet.
        seconds: of the step.
    """

    arm: str
    num_tiles: int
    peak_bytes: int
    base_bytes: int
    seconds: float

    def line(self) -> str:
        """For the table."""
        above = self.peak_bytes - self.base_bytes
        return (
            f"{self.arm:8} {self.num_tiles:8} {self.peak_bytes / 2**20:9.1f} {above / 2**20:9.1f}"
            f" {above / self.num_tiles:12.0f} {self.seconds:8.1f}"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=200_000, help="tiles of the largest slide (%(default)s)")
    parser.add_argument("--chunk", type=int, default=64, help="tiles per encoder call (%(default)s)")
    parser.add_argument("--width", type=int, default=16, help="channels of the encoder's first layer (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="rows of the head's gate (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON with every row")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.one:
        arm, num_tiles = arguments.one[0], int(arguments.one[1])
        print(json.dumps(asdict(measure(arm, num_tiles, arguments.chunk, arguments.width, arguments.hidden))))
        return 0

    error = check(arguments.width, arguments.hidden)
    print(f"gradient of replay against naive: {error:.1e}\n")
    largest = arguments.largest
    sizes = sorted({*SIZES, largest // 4, largest // 2, largest})
    print("arm             N  peak MiB above MiB  above B/tile  seconds")
    rows = []
    for arm, num_tiles in [("naive", n) for n in sizes if n <= NAIVE_UP_TO] + [("replay", n) for n in sizes]:
        rows.append(_fresh(arm, num_tiles, arguments))
        print(rows[-1].line(), flush=True)
    replay = {row.num_tiles: row.peak_bytes for row in rows if row.arm == "replay"}
    slope = (replay[largest] - replay[largest // 4]) / (largest - largest // 4)
    parts = formula(arguments.width, arguments.hidden)
    naive = [row for row in rows if row.arm == "naive"]
    print("\nbytes per tile: " + " + ".join(f"{name} {size}" for name, size in parts.items()), end="")
    print(f" = {sum(parts.values())}; measured {slope:.0f}")
    result = {
        "slope_over_formula": round(slope / sum(parts.values()), 3),
        "largest_n": max(replay),
        "slope_bytes": round(slope, 1),
        "formula_bytes": parts,
        "naive_slope_bytes": round(
            (naive[-1].peak_bytes - naive[0].peak_bytes) / max(1, naive[-1].num_tiles - naive[0].num_tiles)
        ),
    }
    if arguments.out is not None:
        settings = {name: getattr(arguments, name) for name in ("largest", "chunk", "width", "hidden")}
        about = origin(__file__, words, torch=torch.__version__)
        raw = about | {"settings": settings | {"tile_px": TILE_PX}, "gradient_error": error, "result": result}
        arguments.out.write_text(json.dumps(raw | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def _fresh(arm: str, num_tiles: int, arguments: argparse.Namespace) -> Row:
    command = [sys.executable, os.path.abspath(__file__), "--one", arm, str(num_tiles)]
    for name in ("chunk", "width", "hidden"):
        command += [f"--{name}", str(getattr(arguments, name))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(MMAP_BYTES)}
    done = subprocess.run(command, env=env, timeout=TIMEOUT_S, check=True, stdout=subprocess.PIPE, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def check(width: int, hidden: int, num_tiles: int = 100, chunk: int = 64) -> float:
    """Error of replay's gradient against naive's, in float32 on one model and the same stored tiles.

    Raises:
        SystemExit: more than rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_model(width, hidden)
    # Each tile has a colour of its own: embeddings of pure noise are all but equal, and their gradient cancels.
    generator = torch.Generator().manual_seed(0)
    colour_N113 = torch.randint(40, 216, (num_tiles, 1, 1, 3), generator=generator)
    noise_NHW3 = torch.randint(-40, 40, (num_tiles, TILE_PX, TILE_PX, 3), generator=generator)
    image_NHW3 = (colour_N113 + noise_NHW3).to(torch.uint8)

    def stored(slide_id: str, start: int, stop: int) -> Tensor:
        return image_NHW3[start:stop]

    gradients = []
    for run in (naive, replay):
        own = copy.deepcopy(model)  # a step changes it
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-3)
        with recorded(own, optimizer) as found:
            run(own, optimizer, num_tiles, chunk, stored)
        gradients.append(found)
    truth, found = gradients
    return checked("replay", found, truth)


def measure(arm: str, num_tiles: int, chunk: int, width: int, hidden: int) -> Row:
    """One step on one slide of `num_tiles` tiles; in a process of its own, or the peak is somebody else's."""
    torch.set_num_threads(1)
    model = make_model(width, hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = {"naive": naive, "replay": replay}[arm]
    run(model, optimizer, 32, chunk)  # libraries and thread pools are loaded by the first step
    base, start = peak_bytes(), time.perf_counter()
    run(model, optimizer, num_tiles, chunk)
    return Row(arm, num_tiles, peak_bytes(), base, round(time.perf_counter() - start, 2))


def make_model(width: int, hidden: int) -> SlideModel:
    """The model of a run with `small_cnn` and gated attention."""
    encoder = build_encoder(Encoder(name="small_cnn", options={"width": width}))
    return SlideModel(encoder, GatedAttention(encoder.dim, hidden), num_classes=2)


def draw_tiles(slide_id: str, start: int, stop: int) -> Tensor:
    """Tiles start..stop - 1 of a slide that is nowhere: drawn whenever they are asked for, the same each time."""
    generator = torch.Generator().manual_seed(start)
    return torch.randint(0, 256, (stop - start, TILE_PX, TILE_PX, 3), dtype=torch.uint8, generator=generator)


def replay(
    model: SlideModel, optimizer: torch.optim.Optimizer, num_tiles: int, chunk: int, read: Read = draw_tiles
) -> None:
    """The step that training runs, nothing kept."""
    tiles = StepTiles(
        StoredImages([("slide", 0, num_tiles)], TILE_PX, read),
        torch.zeros(num_tiles, dtype=torch.int64),
        torch.arange(num_tiles),
        torch.zeros(num_tiles, 2, dtype=torch.float64),
    )
    step = ExactStep(
        PlainEngine(model, optimizer), Ranks(Topology()), cross_entropy,
        chunk=chunk, num_keep=0, keys=DrawKeys(0, ["slide"]),
    )  # fmt: skip
    plan = plan_steps([0], [num_tiles], 1, 1, 1)[0]
    label, weight = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    result = step.train(plan, tiles, label, weight, step=0, learning_rates=[1e-3])
    assert not result.skipped, result


def naive(
    model: SlideModel, optimizer: torch.optim.Optimizer, num_tiles: int, chunk: int, read: Read = draw_tiles
) -> None:
    """The whole bag in one graph."""
    embedding_ND = model.encode(to_float(read("slide", 0, num_tiles)), None)
    bag = Bag(embedding_ND, torch.zeros(num_tiles, 2, dtype=torch.float64), (num_tiles,), LocalPool(num_tiles))
    cross_entropy(model.classify(bag)[0], torch.ones(1, dtype=torch.int64)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def formula(width: int, hidden: int) -> dict[str, int]:
    """Bytes per tile by part."""
    model = make_model(width, hidden)
    dim = model.encoder.dim
    saved = (_saved_by_head(model, dim, 512) - _saved_by_head(model, dim, 256)) // 256
    return {"embedding": 4 * dim, "gradient": 4 * dim, "head": saved, "index": INDEX_BYTES}


def _saved_by_head(model: SlideModel, dim: int, num_tiles: int) -> int:
    """Bytes that autograd saves in the head, embeddings and index left out, each storage once."""
    embedding_nD = torch.randn(num_tiles, dim, requires_grad=True)
    bag = Bag(embedding_nD, torch.zeros(num_tiles, 2, dtype=torch.float64), (num_tiles,), LocalPool(num_tiles))
    there = [embedding_nD, bag.position_n2, bag.slide_index_n, *model.parameters()]
    storages = {tensor.untyped_storage().data_ptr(): 0 for tensor in there}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outcome = model.classify(bag)
    del outcome
    return sum(storages.values())


def peak_bytes() -> int:
    """Resident at most so far, in this program (the limit of `getrusage` is inherited from the one that started it)."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())

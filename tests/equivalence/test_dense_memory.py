"""The memory of a step over a slide is that of a block: it does not grow with the pixels of the slide.

Peaks of resident memory, each in a process of its own, over slides that are nowhere: their pixels are made when they are read.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from gigamil.data.blocks import BlockImages, SlideGrid
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.memory.geometry import geometry_of
from gigamil.models.aggregator import build_aggregator
from gigamil.models.encoder import DenseEncoder, SmallDenseCNN
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.curve import hilbert_sort
from gigamil.partition.schedule import plan_steps
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

CELL_PX, CHUNK = 128, 64  # blocks of 1024 px
SIDES = 4096, 8192, 16384
BLOCK_BYTES = 1024**2 * 3 * 4  # of a block's image in float32: less than a step takes
# Measured: 57 to 59 MB at each of the sides. A cell of 16,384 pixels leaves its embedding, the gradient of that, what the head
# saves of it, and its place in the index, some 300 bytes, 0.02 a pixel; the rest is what peaks of equal runs differ by, a
# few megabytes. The slide as uint8 would take 3 a pixel, a graph of it some 100.
BYTES_PER_PIXEL = 0.1


class Endless:
    """A slide of any size, all tissue, as a `BlockSource`: noise that repeats."""

    def __init__(self, side: int) -> None:
        number = side // CELL_PX
        row, col = np.divmod(np.arange(number**2), number)
        self._grid = SlideGrid(number, number, np.column_stack([row, col])[hilbert_sort(col, row)])
        self._noise_HW3 = np.random.default_rng(0).integers(0, 256, (509, 509, 3), dtype=np.uint8)

    def grid(self, slide_id: str) -> SlideGrid:
        return self._grid

    def read_block(self, slide_id: str, top: int, left: int, height: int, width: int) -> np.ndarray:
        rows, cols = range(top, top + height), range(left, left + width)
        return self._noise_HW3.take(rows, axis=0, mode="wrap").take(cols, axis=1, mode="wrap")


def peak_of_a_step(rank: int, side: int) -> int:
    """Bytes above those of a step over a slide of one cell, which loads libraries."""
    torch.manual_seed(0)
    encoder = DenseEncoder(SmallDenseCNN(width=2, pool=CELL_PX // 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    model = SlideModel(encoder, build_aggregator("gated_attention", encoder.dim, 2, {"hidden": 8}), 2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    step = ExactStep(
        PlainEngine(model, optimizer),
        Ranks(Topology()),
        cross_entropy,
        chunk=CHUNK,
        num_keep=0,
        keys=DrawKeys(0, ["slide"]),
    )
    label, weight = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    before = 0
    for length in (CELL_PX, side):
        before = peak_bytes()
        number = (length // CELL_PX) ** 2
        tiles = StepTiles(
            BlockImages([("slide", 0, number)], Endless(length), geometry_of(encoder.network), CELL_PX),
            torch.zeros(number, dtype=torch.int64),
            torch.arange(number),
            torch.zeros((number, 2), dtype=torch.float64),
        )
        plan = plan_steps([0], [number], 1, 1, 1)[0]
        made = step.train(plan, tiles, label, weight, step=0, learning_rates=[1e-3])
        assert not made.skipped
        assert step.chunk == CHUNK
    return peak_bytes() - before


def peak_bytes() -> int:
    """Resident at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the kernel's account of a process (Linux)")
def test_memory_does_not_grow_with_the_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    # Freed buffers of 128 KiB and more go back to the kernel at once: what is left in holes would look like growth.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
    peaks = [run_on_ranks(peak_of_a_step, 1, side, timeout_s=1800)[0] for side in SIDES]
    assert min(peaks) > BLOCK_BYTES, peaks
    slope = (peaks[-1] - peaks[0]) / (SIDES[-1] ** 2 - SIDES[0] ** 2)
    assert slope < BYTES_PER_PIXEL, peaks

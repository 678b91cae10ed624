"""The tiles that this rank owns in a step: partition + shards -> uint8 tiles, read and decoded ahead in threads.

What a rank gets is a pure function of the plan; threads change when it is read, never what or in which order. Threads
and not processes: decoders give Python's lock back while they work, and pixels need no way from one process to another.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from gigamil import keyed
from gigamil.data.blocks import BlockImages, BlockSource
from gigamil.data.images import HeldImages, RowMemory, Stopwatch, StoredImages, TileImages
from gigamil.data.rows import SlideRows
from gigamil.data.source import ShardSource, TileSource
from gigamil.data.threads import ReadThreads
from gigamil.memory.geometry import Geometry
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan
from gigamil.partition.spans import Span as PlanSpan
from gigamil.shards.read import ShardSet

_BLOCK = 2**16  # rows
Span = tuple[str, int, int]  # slide id, first tile, one past the last


@dataclass(frozen=True)
class StepTiles:
    """This rank's tiles of one step, in pooled order.

    Attributes:
        images: their pixels.
        slide_index_n: int64, which of the group's slides each tile belongs to.
        number_n: int64, the tile's number in its slide (stored order).
        position_n2: float64, top-left corner in micron.
    """

    images: TileImages
    slide_index_n: Tensor
    number_n: Tensor
    position_n2: Tensor

    @property
    def num_tiles(self) -> int:
        """Tiles of this rank."""
        return len(self.number_n)


class StepLoader:
    """Reads the spans of this rank, step by step.

    Args:
        source: tiles of slides; a ShardSet is read with the default decoder.
        slide_ids: the list that `StepPlan.slides` indexes.
        tile_px: side of a tile.
        topology: which group and which rank of it this is.
        prefetch: steps decoded ahead; 0 reads when asked. Of a dense encoder no step is held: its next block is read
            while one is computed, whatever this says.
        hold_bytes: memory for decoded tiles. Where the steps that are there at once need more, tiles are decoded chunk
            by chunk, in each pass anew.
        decode_workers: threads that read and decode tiles, a few at a time each. 0: all is done by the thread that
            asks, when it asks. (A source of a dense encoder's blocks has its own threads for the tiles of a block.)
        geometry: of a dense encoder, whose blocks are then read chunk by chunk.
        exchange: the ranks of a group share a dense encoder's slides row by row.
    """

    def __init__(
        self,
        source: TileSource | ShardSet,
        slide_ids: Sequence[str],
        tile_px: int,
        topology: Topology,
        prefetch: int = 2,
        hold_bytes: int | None = None,
        decode_workers: int = 1,
        geometry: Geometry | None = None,
        exchange: bool = False,
    ) -> None:
        self._geometry = geometry
        self._exchange = exchange
        if isinstance(source, ShardSet):
            source = ShardSource(source, tile_px, decode_workers=decode_workers)
        self._source: TileSource = source
        self._slide_ids = slide_ids
        self._tile_px = tile_px
        self._topology = topology
        self._prefetch = prefetch if decode_workers else 0
        self._hold_bytes = hold_bytes
        self._threads = ReadThreads(decode_workers)
        self._waited = Stopwatch()
        self._memory = RowMemory()

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for tiles: for a step, and for chunks of tiles that are not held."""
        return self._waited.seconds

    def load(self, plan: StepPlan) -> StepTiles:
        """This rank's tiles of a step, decoded if they may be held.

        Raises:
            ShardError: a shard or a tile is damaged; the message names the slide and the tile. Of several, the first in
                pooled order, whatever the number of threads.
        """
        group = plan.groups[self._topology.group]
        spans = [
            (span, self._slide_ids[plan.slides[group[span.slide]]])
            for span in plan.spans(self._topology.group, self._topology.group_rank)
        ]
        slide_index = [np.full(span.num_tiles, span.slide, dtype=np.int64) for span, _ in spans]
        numbers = [_numbers(plan, group[span.slide], span) for span, _ in spans]
        positions = []
        for (_, slide_id), number_n in zip(spans, numbers, strict=True):
            index = self._source.index(slide_id)
            positions.append(np.stack([index.x_um[number_n], index.y_um[number_n]], axis=1))
        runs = [
            (slide_id, *run) for (_, slide_id), number_n in zip(spans, numbers, strict=True) for run in _runs(number_n)
        ]
        return StepTiles(
            self._images(runs, plan),
            torch.from_numpy(_joined(slide_index, (0,), np.int64)),
            torch.from_numpy(_joined(numbers, (0,), np.int64)),
            torch.from_numpy(_joined(positions, (0, 2), np.float64)),
        )

    def _images(self, spans: list[Span], plan: StepPlan) -> TileImages:
        ahead = self._threads.number > 0
        if self._geometry is not None:
            source, topology = cast("BlockSource", self._source), self._topology
            rest = None, self._waited, ahead
            if self._exchange:
                slide_ids = [self._slide_ids[plan.slides[position]] for position in plan.groups[topology.group]]
                shares = [plan.spans(topology.group, rank) for rank in range(topology.group_size)]
                return SlideRows(slide_ids, shares, topology.group_rank, source, self._tile_px, *rest)
            return BlockImages(spans, source, self._geometry, self._tile_px, *rest)
        decode = lambda *span: self._read([span])
        stored = StoredImages(spans, self._tile_px, decode, self._source.dim, self._waited, ahead)
        num_tiles = sum(stop - start for _, start, stop in spans)
        # One step in use, one waiting to be handed over, `prefetch` ahead of it.
        needed = num_tiles * stored.row_bytes * (self._prefetch + 2 if self._prefetch else 1)
        if self._hold_bytes is not None and needed > self._hold_bytes:
            return stored
        return HeldImages(self._read(spans))

    def _read(self, spans: Sequence[Span]) -> Tensor:
        """The rows of some spans, block by block into one tensor."""
        num_tiles = sum(stop - start for _, start, stop in spans)
        if self._source.dim is None:
            rows = self._memory.take((num_tiles, self._tile_px, self._tile_px, 3), np.dtype(np.uint8))
        else:
            rows = self._memory.take((num_tiles, self._source.dim), np.dtype(np.float32))
        # A chunk of a step is shared out evenly, a step goes in blocks of the size that suits its source.
        block = max(1, min(self._source.block, -(-num_tiles // max(1, self._threads.number))))
        reads, row = [], 0
        for slide_id, start, stop in spans:
            for first in range(start, stop, block):
                last = min(first + block, stop)
                reads.append(partial(self._source.read_tiles, slide_id, first, last, rows[row : row + last - first]))
                row += last - first
        self._threads.run(reads)
        return torch.from_numpy(rows)

    def iterate(self, plans: Iterable[StepPlan]) -> Iterator[tuple[StepPlan, StepTiles | Exception]]:
        """Yield each plan with its tiles, or with the error that making the plan or reading them raised: ranks agree on errors first."""
        return self._ahead(plans) if self._prefetch else self._one_by_one(plans)

    def load_or_error(self, plan: StepPlan) -> StepTiles | Exception:
        """As `load`, with an error in the place of the tiles: ranks agree on errors first."""
        try:
            return self.load(plan)
        except Exception as error:  # noqa: BLE001 - handed to the consumer, which agrees on it with the other ranks and raises
            return error

    def _one_by_one(self, plans: Iterable[StepPlan]) -> Iterator[tuple[StepPlan, StepTiles | Exception]]:
        for plan in _made(plans):
            if isinstance(plan, Exception):
                yield _NO_PLAN, plan
                return
            with self._waited.running():
                tiles = self.load_or_error(plan)
            yield plan, tiles

    def _ahead(self, plans: Iterable[StepPlan]) -> Iterator[tuple[StepPlan, StepTiles | Exception]]:
        ready: queue.Queue[tuple[StepPlan, StepTiles | Exception] | None] = queue.Queue(self._prefetch)
        stop = threading.Event()

        def put(item: tuple[StepPlan, StepTiles | Exception] | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            for plan in _made(plans):
                if stop.is_set():
                    return
                put((_NO_PLAN, plan) if isinstance(plan, Exception) else (plan, self.load_or_error(plan)))
            put(None)

        thread = threading.Thread(target=produce, name="gigamil-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                with self._waited.running():
                    item = ready.get()
                if item is None:
                    return
                yield item
        finally:
            stop.set()
            thread.join()


_NO_PLAN = StepPlan((), (), (), 1)  # in the place of one that could not be made: an error comes with it


def _made(plans: Iterable[StepPlan]) -> Iterator[StepPlan | Exception]:
    """Plans, and at the end the error of one that could not be made, for ranks to agree on."""
    try:
        yield from plans
    except Exception as error:  # noqa: BLE001 - handed over, as those of reading
        yield error


class DrawKeys:
    """Keys of the random draws of a step: functions of (seed, step, slide, tile).

    Args:
        seed: `science.seed`.
        slide_ids: the list that `StepPlan.slides` indexes.
    """

    def __init__(self, seed: int, slide_ids: Sequence[str]) -> None:
        self.slide_ids = slide_ids
        self._root = keyed.root_key(seed)
        self._slides = torch.tensor([keyed.text_key(slide_id) for slide_id in slide_ids], dtype=torch.int64)

    def slides(self, step: int, slides: Sequence[int]) -> Tensor:
        """int64 (B,): a key per slide of a group, equal on all its ranks."""
        return keyed.fold(keyed.fold(self._root, step), self._slides[torch.tensor(slides, dtype=torch.int64)])

    @staticmethod
    def tiles(slide_key_B: Tensor, slide_index_n: Tensor, number_n: Tensor) -> Tensor:
        """int64 (n,): a key per tile."""
        key_n = torch.empty_like(number_n)
        for start in range(0, len(number_n), _BLOCK):  # mixing takes several times the memory of its result
            rows = slice(start, start + _BLOCK)
            key_n[rows] = keyed.fold(slide_key_B[slide_index_n[rows]], number_n[rows])
        return key_n


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(empty, dtype)


def _numbers(plan: StepPlan, position: int, span: PlanSpan) -> np.ndarray:
    """Numbers of the tiles of a span in their slide, int64."""
    chosen = None if plan.tiles is None else plan.tiles[position]
    if chosen is None:
        return np.arange(span.start, span.stop, dtype=np.int64)
    return np.array(chosen[span.start : span.stop], dtype=np.int64)


def _runs(number_n: np.ndarray) -> list[tuple[int, int]]:
    """Ascending numbers as runs without a gap: (first, one past the last)."""
    cuts = np.flatnonzero(np.diff(number_n) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(number_n, cuts) if len(part)]

"""What a rank reads is a function of the plan: prefetching and the number of ranks change neither content nor order."""

import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from gigamil import keyed
from gigamil.data.decode import decode_tiles
from gigamil.data.images import ChunkFeed
from gigamil.data.pipeline import DrawKeys, StepLoader, StepTiles
from gigamil.data.source import ShardSource
from gigamil.errors import ShardError
from gigamil.memory.geometry import geometry_of
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs

TILE_PX = 16
SIZES = {"a": 5, "b": 1, "c": 9, "d": 3, "e": 2}
IDS = tuple(SIZES)
ORDER = (3, 0, 4, 2, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for seed, (slide_id, size) in enumerate(SIZES.items()):
        make_shards(folder, slide_id, noise_jpegs(size, TILE_PX, seed), tile_px=TILE_PX, tiles_per_tar=4)
    return folder


def make_plans(num_groups: int = 1, group_size: int = 1) -> list[StepPlan]:
    return plan_steps(ORDER, list(SIZES.values()), 2, num_groups, group_size)


def read(root: Path, topology: Topology, prefetch: int, workers: int = 1) -> list[tuple[StepPlan, StepTiles]]:
    loader = StepLoader(ShardSet(root), IDS, TILE_PX, topology, prefetch, decode_workers=workers)
    plans = make_plans(topology.num_groups, topology.group_size)
    found = list(loader.iterate(plans))
    assert [plan for plan, _ in found] == plans
    assert not any(isinstance(tiles, Exception) for _, tiles in found)
    return found  # type: ignore[return-value]


def named(plan: StepPlan, tiles: StepTiles, group: int) -> list[tuple[int, int, bytes, tuple[float, float]]]:
    """(slide, tile, pixels, position) of each tile."""
    return [
        (plan.slides[plan.groups[group][slide]], number, image.tobytes(), (x, y))
        for slide, number, image, (x, y) in zip(
            tiles.slide_index_n.tolist(),
            tiles.number_n.tolist(),
            tiles.images.read(0, tiles.num_tiles).numpy(),
            tiles.position_n2.tolist(),
            strict=True,
        )
    ]


def test_one_rank_reads_what_was_stored(root: Path) -> None:
    shards = ShardSet(root)
    for plan, tiles in read(root, Topology(), 0):
        assert (tiles.images.read(0, 1).dtype, tiles.position_n2.dtype) == (torch.uint8, torch.float64)
        wanted = []
        for slide in plan.slides:
            slide_id = IDS[slide]
            pixels = decode_tiles(shards.read_span(slide_id, 0, SIZES[slide_id]), TILE_PX)
            for number, (image, xy) in enumerate(zip(pixels, shards.positions_um(slide_id), strict=True)):
                wanted.append((slide, number, image.tobytes(), tuple(xy.tolist())))
        assert named(plan, tiles, 0) == wanted
        assert tiles.num_tiles == sum(plan.sizes)


@pytest.mark.parametrize(("prefetch", "workers"), [(2, 1), (5, 1), (2, 0), (0, 2), (2, 2), (2, 8), (0, 8)])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 1), (4, 3)])
def test_threads_change_nothing(root: Path, prefetch: int, workers: int, world: int, rank: int) -> None:
    topology = Topology(world, rank, group_size=world)
    for (_, a), (_, b) in zip(read(root, topology, 0, 0), read(root, topology, prefetch, workers), strict=True):
        assert torch.equal(a.images.read(0, a.num_tiles), b.images.read(0, b.num_tiles))
        for name in ("slide_index_n", "number_n", "position_n2"):
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize(("world", "group_size"), [(2, 2), (3, 3), (4, 4), (2, 1), (4, 2), (64, 64)])
def test_ranks_together_read_what_one_reads(root: Path, world: int, group_size: int) -> None:
    alone = [sorted(named(plan, tiles, 0)) for plan, tiles in read(root, Topology(), 0)]
    together: list[list] = [[] for _ in alone]
    for rank in range(world):
        topology = Topology(world, rank, group_size=group_size)
        for step, (plan, tiles) in enumerate(read(root, topology, 0)):
            own = named(plan, tiles, topology.group)
            assert group_size > 1 or len(own) in (0, *(plan.sizes), sum(plan.sizes))
            together[step] += own
            if not own:
                assert tiles.images.read(0, 0).shape == (0, TILE_PX, TILE_PX, 3)
    assert [sorted(tiles) for tiles in together] == alone


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_is_delivered_in_its_place_and_the_rest_goes_on(root: Path, prefetch: int) -> None:
    class Damaged(ShardSet):
        def read_span(self, slide_id: str, start: int, stop: int, verify: bool = True) -> list[bytes]:
            jpegs = super().read_span(slide_id, start, stop, verify)
            return [b"not a jpeg", *jpegs[1:]] if slide_id == "c" else jpegs

    loader = StepLoader(Damaged(root), IDS, TILE_PX, Topology(), prefetch)
    good, bad, last = [tiles for _, tiles in loader.iterate(make_plans())]
    assert isinstance(good, StepTiles)
    assert isinstance(last, StepTiles)
    assert isinstance(bad, ShardError)
    assert "slide 'c', tile 0: the JPEG (10 bytes) cannot be decoded: it is not a JPEG" in str(bad)
    assert "gigamil tile" in str(bad)


class Slow(ShardSource):
    """Remembers what was asked for and by which threads, and takes its time for some tiles."""

    def __init__(self, root: Path, seconds: float = 0.0, bad: Sequence[int] = (), workers: int = 1) -> None:
        super().__init__(ShardSet(root), TILE_PX, decode_workers=workers)
        self.block = 2
        self.asked: list[tuple[str, int, int]] = []
        self.threads: set[str] = set()
        self.at_once = self.most_at_once = 0
        self._seconds, self._bad = seconds, bad
        self._lock = threading.Lock()

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        with self._lock:
            self.asked.append((slide_id, start, stop))
            self.threads.add(threading.current_thread().name)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self._seconds)
            for number in range(start, stop):
                if number in self._bad:
                    time.sleep(0.05 * (len(SIZES) - number))  # the first bad tile is noticed last
                    raise ShardError(f"tile {number} is bad")
            return super().read_tiles(slide_id, start, stop, out)
        finally:
            with self._lock:
                self.at_once -= 1


@pytest.mark.parametrize(("workers", "at_once"), [(0, 1), (1, 1), (3, 3)])
def test_blocks_are_shared_out_over_so_many_threads(root: Path, workers: int, at_once: int) -> None:
    source = Slow(root, seconds=0.02)
    loader = StepLoader(source, IDS, TILE_PX, Topology(), 1, decode_workers=workers)
    list(loader.iterate(make_plans()))
    assert source.most_at_once == at_once
    assert all(stop - start <= 2 for _, start, stop in source.asked)
    assert sum(stop - start for _, start, stop in source.asked) == sum(SIZES.values())
    assert ("MainThread" in source.threads) == (workers == 0)
    assert len(source.threads - {"gigamil-prefetch"}) <= max(1, workers)  # which reads a step of one block itself


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_of_several_errors_the_first_in_order_is_raised(root: Path, workers: int) -> None:
    loader = StepLoader(Slow(root, bad=(1, 2, 4)), ["c"], TILE_PX, Topology(), 0, decode_workers=workers)
    plan = plan_steps([0], [SIZES["c"]], 1, 1, 1)[0]
    with pytest.raises(ShardError, match="tile 1 is bad"):
        loader.load(plan)


@pytest.mark.parametrize(("workers", "at_once"), [(0, 1), (1, 1), (3, 3)])
def test_the_tiles_of_a_block_are_shared_out_over_so_many_threads(root: Path, workers: int, at_once: int) -> None:
    source = Slow(root, seconds=0.02, workers=workers)
    box = 3, 5, 40, 41
    wanted = ShardSource(ShardSet(root), TILE_PX).read_block("c", *box)
    np.testing.assert_array_equal(source.read_block("c", *box), wanted)
    assert source.most_at_once == at_once
    assert sum(stop - start for _, start, stop in source.asked) == SIZES["c"]
    assert ("MainThread" in source.threads) == (at_once == 1)


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
def test_of_several_errors_in_a_block_the_first_in_order_is_raised(root: Path, workers: int) -> None:
    source = Slow(root, bad=(1, 2, 4), workers=workers)
    with pytest.raises(ShardError, match="tile 1 is bad"):
        source.read_block("c", 0, 0, 48, 48)
    assert source.at_once == 0


@pytest.mark.parametrize("images", ["tiles", "blocks", "rows"])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_without_threads_the_thread_that_asks_reads(root: Path, images: str, workers: int) -> None:
    """Else the next chunk, block or slide is read while one is computed."""
    source = Slow(root, workers=workers)
    geometry = None if images == "tiles" else geometry_of(nn.Conv2d(3, 4, TILE_PX, TILE_PX))
    loader = StepLoader(source, ["c", "a"], TILE_PX, Topology(), 2, 0, workers, geometry, images == "rows")
    tiles = loader.load(plan_steps([0, 1], [SIZES["c"], SIZES["a"]], 2, 1, 1)[0])
    chunks = [(0, 1), (1, 2)] if images == "rows" else [(0, 9), (9, 14)]
    found = []
    with ChunkFeed(tiles.images, torch.device("cpu"), 0) as feed:
        for rows, upcoming in itertools.zip_longest(chunks, chunks[1:]):
            found.append(feed.get(*rows, upcoming))
    assert all(torch.equal(a, tiles.images.read(*rows)) for a, rows in zip(found, chunks, strict=True))
    assert (source.threads == {"MainThread"}) == (workers == 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_steps_that_are_kept_stay_what_they_are(root: Path, workers: int) -> None:
    """Memory of steps that are gone is used again; here some are kept, and each second one goes."""
    plans = make_plans() * 6
    loader = StepLoader(ShardSet(root), IDS, TILE_PX, Topology(), 2, decode_workers=workers)
    kept = [(plan, tiles) for number, (plan, tiles) in enumerate(loader.iterate(plans)) if number % 2]
    expected = {plan.slides: named(plan, tiles, 0) for plan, tiles in read(root, Topology(), 0)}
    for plan, tiles in kept:
        assert isinstance(tiles, StepTiles)
        assert named(plan, tiles, 0) == expected[plan.slides]


def test_a_failed_step_is_left_by_all_threads_before_the_next(root: Path) -> None:
    source = Slow(root, bad=(0,), seconds=0.02)
    loader = StepLoader(source, ["c"], TILE_PX, Topology(), 0, decode_workers=3)
    with pytest.raises(ShardError, match="tile 0 is bad"):
        loader.load(plan_steps([0], [SIZES["c"]], 1, 1, 1)[0])
    assert source.at_once == 0


def test_a_chunk_of_tiles_that_are_not_held_is_shared_out_evenly(root: Path) -> None:
    source = Slow(root)
    loader = StepLoader(source, ["c"], TILE_PX, Topology(), 0, hold_bytes=0, decode_workers=4)
    tiles = loader.load(plan_steps([0], [SIZES["c"]], 1, 1, 1)[0])
    assert source.asked == []
    tiles.images.read(1, 5)
    assert sorted(source.asked) == [("c", 1, 2), ("c", 2, 3), ("c", 3, 4), ("c", 4, 5)]


def test_continuing_in_the_middle_reads_nothing_of_what_was_before(root: Path) -> None:
    plans, whole, rest = make_plans(), Slow(root), Slow(root)
    loader = StepLoader(whole, IDS, TILE_PX, Topology(), 2, decode_workers=2)
    expected = [tiles for _, tiles in loader.iterate(plans)][2:]
    found = [tiles for _, tiles in StepLoader(rest, IDS, TILE_PX, Topology(), 2).iterate(plans[2:])]
    assert {slide_id for slide_id, _, _ in rest.asked} == {IDS[slide] for plan in plans[2:] for slide in plan.slides}
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a.images.read(0, a.num_tiles), b.images.read(0, b.num_tiles))


def test_remote_shards_are_loaded_as_local_ones_are(root: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in root.rglob("*.*"):
        if path.is_file():
            files.pipe(f"/loader/{path.relative_to(root)}", path.read_bytes())
    there = StepLoader(ShardSet("memory://loader"), IDS, TILE_PX, Topology(), 2, decode_workers=2)
    for (_, a), (_, b) in zip(read(root, Topology(), 0), there.iterate(make_plans()), strict=True):
        assert isinstance(b, StepTiles)
        assert torch.equal(a.images.read(0, a.num_tiles), b.images.read(0, b.num_tiles))
        assert torch.equal(a.position_n2, b.position_n2)
    files.rm("/loader", recursive=True)


def test_an_error_of_any_kind_is_delivered(root: Path) -> None:
    class Broken(ShardSet):
        def read_span(self, slide_id: str, start: int, stop: int, verify: bool = True) -> list[bytes]:
            raise MemoryError("no room")

    loader = StepLoader(Broken(root), IDS, TILE_PX, Topology(), 2)
    assert [type(tiles) for _, tiles in loader.iterate(make_plans())] == [MemoryError] * 3


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_closed_iterator_leaves_no_thread(root: Path, taken: int) -> None:
    steps = StepLoader(ShardSet(root), IDS, TILE_PX, Topology(), 1).iterate(make_plans() * 20)
    for _ in range(taken):
        next(steps)
    if taken:
        assert "gigamil-prefetch" in [thread.name for thread in threading.enumerate()]
    steps.close()
    assert "gigamil-prefetch" not in [thread.name for thread in threading.enumerate()]


def test_no_more_is_read_ahead_than_was_asked_for(root: Path) -> None:
    seen: list[str] = []
    asked = threading.Semaphore(0)

    class Counting(ShardSet):
        def read_span(self, slide_id: str, start: int, stop: int, verify: bool = True) -> list[bytes]:
            seen.append(slide_id)
            asked.release()
            return super().read_span(slide_id, start, stop, verify)

    plans = plan_steps([0] * 20, list(SIZES.values()), 1, 1, 1)
    steps = StepLoader(Counting(root), IDS, TILE_PX, Topology(), 2).iterate(plans)
    next(steps)
    for _ in range(4):  # the one taken, two that wait, and one in the reader's hand
        assert asked.acquire(timeout=10)
    assert not asked.acquire(timeout=0.3)
    assert len(seen) == 4
    steps.close()


@pytest.mark.parametrize(("prefetch", "steps_at_once"), [(0, 1), (2, 4)])
def test_tiles_are_held_where_the_steps_that_are_there_at_once_fit(
    root: Path, prefetch: int, steps_at_once: int
) -> None:
    plan = make_plans()[0]
    needed = sum(plan.sizes) * TILE_PX**2 * 3 * steps_at_once
    loaders = [
        StepLoader(ShardSet(root), IDS, TILE_PX, Topology(), prefetch, hold_bytes=hold)
        for hold in (None, needed, needed - 1)
    ]
    steps = [loader.load(plan) for loader in loaders]
    assert [step.images.held for step in steps] == [True, True, False]
    assert named(plan, steps[0], 0) == named(plan, steps[2], 0)


def test_tiles_that_are_not_held_are_read_when_asked_for_and_their_errors_come_then(root: Path) -> None:
    asked: list[tuple[str, int, int]] = []

    class Damaged(ShardSet):
        def read_span(self, slide_id: str, start: int, stop: int, verify: bool = True) -> list[bytes]:
            asked.append((slide_id, start, stop))
            jpegs = super().read_span(slide_id, start, stop, verify)
            return [b"not a jpeg"] * len(jpegs) if slide_id == "c" else jpegs

    plan = make_plans()[1]
    assert [(IDS[slide], SIZES[IDS[slide]]) for slide in plan.slides] == [("e", 2), ("c", 9)]
    tiles = StepLoader(Damaged(root), IDS, TILE_PX, Topology(), 0, hold_bytes=0).load(plan)
    assert asked == []
    assert tiles.images.read(0, 2).shape == (2, TILE_PX, TILE_PX, 3)
    with pytest.raises(ShardError, match=r"slide 'c', tile 0: the JPEG"):
        tiles.images.read(1, 5)
    assert asked == [("e", 0, 2), ("e", 1, 2), ("c", 0, 3)]


@pytest.mark.parametrize("hold_bytes", [None, 0])
@pytest.mark.parametrize(("prefetch", "workers"), [(0, 0), (2, 1), (2, 3)])
def test_a_slow_source_is_waited_for_and_a_fast_one_is_not(
    root: Path, prefetch: int, workers: int, hold_bytes: int | None
) -> None:
    """Also where tiles are not held, and the step waits for its chunks."""

    def share_waited(source_s: float, step_s: float) -> float:
        loader = StepLoader(
            Slow(root, seconds=source_s), IDS, TILE_PX, Topology(), prefetch, hold_bytes, decode_workers=workers
        )
        assert loader.wait_s == 0
        start = time.perf_counter()
        for _, tiles in loader.iterate(make_plans() * 2):
            assert isinstance(tiles, StepTiles)
            with ChunkFeed(tiles.images, torch.device("cpu"), 0) as feed:
                chunks = [(first, min(first + 4, tiles.num_tiles)) for first in range(0, tiles.num_tiles, 4)]
                for rows, upcoming in itertools.zip_longest(chunks, chunks[1:]):
                    feed.get(*rows, upcoming)
                    time.sleep(step_s / len(chunks))
        return loader.wait_s / (time.perf_counter() - start)

    assert share_waited(0.03, 0.0) > 0.8
    if workers:
        assert share_waited(0.0, 0.1) < 0.3


def test_keys_depend_on_names_not_on_places() -> None:
    keys = DrawKeys(7, ["a", "b", "c"])
    assert keys.slides(3, [2, 0]).tolist() == DrawKeys(7, ["c", "a"]).slides(3, [0, 1]).tolist()
    distinct = {
        tuple(DrawKeys(seed, ["a", "b"]).slides(step, [0, 1]).tolist()) for seed in (7, 8) for step in (0, 1, 2)
    }
    assert len(distinct) == 6
    assert keys.slides(3, []).shape == (0,)


def test_tile_keys_are_those_of_slide_and_number() -> None:
    slide_key_B = DrawKeys(7, ["a", "b"]).slides(3, [0, 1])
    slide_index_n, number_n = torch.tensor([0, 1, 1]), torch.tensor([4, 4, 5])
    found = DrawKeys.tiles(slide_key_B, slide_index_n, number_n)
    assert found.tolist() == [int(keyed.fold(slide_key_B[s], n)) for s, n in ((0, 4), (1, 4), (1, 5))]
    assert len(set(found.tolist())) == 3
    assert np.dtype("int64") == found.numpy().dtype

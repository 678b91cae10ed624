"""What a rank reads is a function of the plan: prefetching and the number of ranks change neither content nor order."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from gigamil import keyed
from gigamil.data.decode import decode_tiles
from gigamil.data.pipeline import DrawKeys, StepLoader, StepTiles
from gigamil.errors import ShardError
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


def read(root: Path, topology: Topology, prefetch: int) -> list[tuple[StepPlan, StepTiles]]:
    loader = StepLoader(ShardSet(root), IDS, TILE_PX, topology, prefetch)
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


@pytest.mark.parametrize("prefetch", [2, 5])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 1)])
def test_prefetching_changes_nothing(root: Path, prefetch: int, world: int, rank: int) -> None:
    topology = Topology(world, rank, group_size=world)
    for (_, a), (_, b) in zip(read(root, topology, 0), read(root, topology, prefetch), strict=True):
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
    assert "slide 'c', tiles 0..8: the JPEG at position 0 of 9" in str(bad)
    assert "gigamil tile" in str(bad)


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
    with pytest.raises(ShardError, match=r"slide 'c', tiles 0..2: the JPEG at position 0 of 3"):
        tiles.images.read(1, 5)
    assert asked == [("e", 0, 2), ("e", 1, 2), ("c", 0, 3)]


def test_the_time_spent_waiting_is_counted(root: Path) -> None:
    loader = StepLoader(ShardSet(root), IDS, TILE_PX, Topology(), 0)
    assert loader.wait_s == 0
    list(loader.iterate(make_plans()))
    assert 0 < loader.wait_s < 60


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

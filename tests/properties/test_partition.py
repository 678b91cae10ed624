"""For any slides, ranks, groups and chunks: each tile has one owner, loads differ by one, plans ignore the world."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from gigamil.partition.schedule import epoch_order, plan_steps
from gigamil.partition.spans import chunk_ranges, owned_range, owned_spans, shared_bounds

SIZES = st.lists(st.integers(0, 60), max_size=8)
RANKS = st.integers(1, 70)
QUICK = settings(max_examples=80, deadline=None)


@QUICK
@given(SIZES, RANKS)
def test_each_tile_has_one_owner_and_loads_differ_by_one(sizes: list[int], num_ranks: int) -> None:
    owners = [owned_spans(sizes, rank, num_ranks) for rank in range(num_ranks)]
    tiles = [(span.slide, tile) for spans in owners for span in spans for tile in range(span.start, span.stop)]
    assert tiles == [(slide, tile) for slide, size in enumerate(sizes) for tile in range(size)]
    loads = [sum(span.num_tiles for span in spans) for spans in owners]
    assert max(loads) - min(loads) <= 1
    assert all(span.num_tiles > 0 for spans in owners for span in spans)


@QUICK
@given(SIZES, st.lists(st.integers(0, 300), min_size=1, max_size=70).filter(any))
def test_each_tile_has_one_owner_whatever_the_shares(sizes: list[int], shares: list[int]) -> None:
    owners = [owned_spans(sizes, rank, len(shares), shares) for rank in range(len(shares))]
    tiles = [(span.slide, tile) for spans in owners for span in spans for tile in range(span.start, span.stop)]
    assert tiles == [(slide, tile) for slide, size in enumerate(sizes) for tile in range(size)]
    for share, spans in zip(shares, owners, strict=True):
        owned = sum(span.num_tiles for span in spans)
        assert abs(owned * sum(shares) - sum(sizes) * share) < sum(shares)  # less than a tile from the exact share
        assert owned == 0 or share > 0


@QUICK
@given(st.integers(0, 10**12), st.integers(1, 2000), st.integers(1, 10**6))
def test_equal_shares_are_even_runs(num_items: int, num_ranks: int, share: int) -> None:
    bounds = shared_bounds(num_items, [share] * num_ranks)
    even = [owned_range(num_items, rank, num_ranks) for rank in range(num_ranks)]
    assert list(itertools.pairwise(bounds)) == even


@QUICK
@given(st.integers(0, 10**12), st.integers(1, 10**5), st.data())
def test_neighbours_of_a_huge_world_touch(num_items: int, num_ranks: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, num_ranks - 1))
    begin, end = owned_range(num_items, rank, num_ranks)
    assert begin == (0 if rank == 0 else owned_range(num_items, rank - 1, num_ranks)[1])
    assert end == (num_items if rank == num_ranks - 1 else owned_range(num_items, rank + 1, num_ranks)[0])
    assert end - begin in (num_items // num_ranks, -(-num_items // num_ranks))


@QUICK
@given(st.integers(0, 500), st.integers(1, 70))
def test_chunks_cover_each_tile_once(num_tiles: int, chunk: int) -> None:
    ranges = chunk_ranges(num_tiles, chunk)
    assert [tile for start, stop in ranges for tile in range(start, stop)] == list(range(num_tiles))
    assert all(0 < stop - start <= chunk for start, stop in ranges)


@QUICK
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    slides_per_step=st.integers(1, 6),
    num_groups=st.integers(1, 5),
    group_size=st.integers(1, 9),
    chunk=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_plans(
    sizes: list[int], slides_per_step: int, num_groups: int, group_size: int, chunk: int, seed: int, epoch: int
) -> None:
    order = epoch_order(len(sizes), seed, epoch)
    plans = plan_steps(order, sizes, slides_per_step, num_groups, group_size)
    # Every slide once per epoch, in the epoch's order, whatever the world.
    assert sorted(slide for plan in plans for slide in plan.slides) == list(range(len(sizes)))
    alone = plan_steps(order, sizes, slides_per_step, 1, 1)
    assert [plan.slides for plan in plans] == [plan.slides for plan in alone]
    for plan in plans:
        owned = []
        most = 0
        for group in range(num_groups):
            for rank in range(group_size):
                spans = plan.spans(group, rank)
                most = max(most, len(chunk_ranges(sum(span.num_tiles for span in spans), chunk)))
                for span in spans:
                    slide = plan.slides[plan.groups[group][span.slide]]
                    owned += [(slide, tile) for tile in range(span.start, span.stop)]
        assert sorted(owned) == sorted((slide, tile) for slide in plan.slides for tile in range(sizes[slide]))
        assert plan.max_calls(chunk) == most  # the true maximum, not a bound
        # Largest-first: no group is above another by more than its own smallest slide.
        loads = [[plan.sizes[position] for position in group] for group in plan.groups]
        lowest = min(sum(load) for load in loads)
        assert all(sum(load) - min(load) <= lowest for load in loads if load)

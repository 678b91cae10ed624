"""Which tiles a scan chooses: those with most attention, of equal ones the lowest numbers, whatever the ranks."""

import pytest
import torch

from gigamil.config.schema import Regime
from gigamil.data.pipeline import DrawKeys
from gigamil.partition.schedule import plan_steps
from gigamil.testing import exactness
from gigamil.testing.exactness import World, own_tiles
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.select import selected_plan

SIZES, TILES = (9, 2, 6), 4
ATTENTION = ([0.1, 0.3, 0.0, 0.3, 0.05, 0.3, 0.02, 0.3, 0.03], [0.5, 0.5], [0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
TOP = ((1, 3, 5, 7), (0, 1), (0, 1, 2, 3))


def _chosen(rank: int, num_ranks: int, how: str) -> list[dict[int, tuple[int, ...]]]:
    world, found = World(rank, num_ranks), []
    images = [torch.zeros((size, 2, 2, 3), dtype=torch.uint8) for size in SIZES]
    for group_size in exactness.group_sizes(num_ranks):
        ranks = world.ranks(group_size)
        plan = plan_steps([2, 0, 1], SIZES, 3, ranks.topology.num_groups, group_size)[0]
        tiles, group = own_tiles(images, plan, ranks.topology), plan.groups[ranks.topology.group]
        rows = zip(tiles.slide_index_n.tolist(), tiles.number_n.tolist(), strict=True)
        own = [ATTENTION[plan.slides[group[slide]]][number] for slide, number in rows]
        regime = Regime(name="select", tiles=TILES, how=how)  # type: ignore[arg-type]
        keys = DrawKeys(3, ["a", "b", "c"])
        attention_n = torch.tensor(own, dtype=torch.float64)
        chosen = selected_plan(plan, tiles, attention_n, regime, ranks, keys, 5)
        assert chosen.sizes == tuple(min(SIZES[slide], TILES) for slide in plan.slides)
        assert chosen.tiles is not None
        found.append({plan.slides[position]: chosen.tiles[position] or () for position in group})
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_top_is_a_sort(num_ranks: int) -> None:
    for of_rank in run_on_ranks(_chosen, num_ranks, num_ranks, "top"):
        for of_group in of_rank:
            assert all(numbers == TOP[slide] for slide, numbers in of_group.items())


def test_draws_are_those_of_one_process_and_never_of_no_attention_while_there_is_some() -> None:
    ((alone, *_),) = [run_on_ranks(_chosen, 1, 1, "weighted")]
    wanted = alone[0]
    for of_rank in run_on_ranks(_chosen, 3, 3, "weighted"):
        for of_group in of_rank:
            assert all(numbers == wanted[slide] for slide, numbers in of_group.items())
    assert 2 not in wanted[0]
    assert 2 in wanted[2]
    assert all(list(numbers) == sorted(set(numbers)) for numbers in wanted.values())

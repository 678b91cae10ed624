"""Ranks that share slides agree on how attention is spread, and find what one process finds."""

import pytest
import torch

from gigamil.partition.schedule import plan_steps
from gigamil.testing import exactness
from gigamil.testing.exactness import World, own_tiles
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.monitor import AttentionMonitor

SIZES = (7, 1, 3, 2)


def _values(rank: int, num_ranks: int) -> list[list[list[float]]]:
    generator = torch.Generator().manual_seed(0)
    attention = [torch.rand(size, generator=generator, dtype=torch.float64).softmax(0) for size in SIZES]
    images = [torch.zeros((size, 2, 2, 3), dtype=torch.uint8) for size in SIZES]
    world, found = World(rank, num_ranks), []
    for group_size in exactness.group_sizes(num_ranks):
        ranks, monitor = world.ranks(group_size), AttentionMonitor()
        for plan in plan_steps([2, 0, 3, 1], SIZES, 3, ranks.topology.num_groups, group_size):
            tiles, group = own_tiles(images, plan, ranks.topology), plan.groups[ranks.topology.group]
            rows = zip(tiles.slide_index_n.tolist(), tiles.number_n.tolist(), strict=True)
            own = [attention[plan.slides[group[slide]]][number] for slide, number in rows]
            monitor.note(plan, tiles, torch.tensor(own, dtype=torch.float64)[:, None], ranks)
        found.append([monitor.entropy, monitor.max_n, monitor.tiles])
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_ranks_find_what_one_finds(num_ranks: int) -> None:
    (wanted,) = _values(0, 1)
    for of_rank in run_on_ranks(_values, num_ranks, num_ranks):
        for found in of_rank:
            for name, values in enumerate(wanted):
                assert found[name] == pytest.approx(values, rel=1e-12, nan_ok=True)

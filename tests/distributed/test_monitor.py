"""Ranks that share slides agree on how attention is spread, and find what one process finds."""

import pytest
import torch

from gigamil.partition.schedule import plan_steps
from gigamil.testing import exactness
from gigamil.testing.exactness import Case, World, make_case_tiles, make_plan, own_tiles, predicted
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


BLANK = [Case((3,), 1, name, chunk=2, keep="none") for name in ("gated_attention", "lse", "topk_mean")]


def _noted(rank: int, num_ranks: int) -> list[tuple[int, list[float]]]:
    """Rows of attention on this rank, and what is found of the slide, where some groups have none."""
    world, found = World(rank, num_ranks), []
    for case in BLANK:
        ranks = world.ranks(case.group_size)
        plan, monitor = make_plan(case, ranks.topology.num_groups), AttentionMonitor()
        tiles, (_, attention_nA) = own_tiles(make_case_tiles(case)[0], plan, ranks.topology), predicted(case, world)
        monitor.note(plan, tiles, attention_nA, ranks)
        found.append((len(attention_nA) - tiles.num_tiles, monitor.max_n))
    return found


def test_groups_without_a_slide_show_nothing() -> None:
    ((wanted,), *_) = [run_on_ranks(_noted, 1, 1)]
    for of_rank in run_on_ranks(_noted, 3, 3):
        for (surplus, max_n), (_, alone) in zip(of_rank, wanted, strict=True):
            assert surplus == 0
            assert max_n == pytest.approx(alone, rel=1e-12)

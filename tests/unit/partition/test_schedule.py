"""Which slides make which step is a function of (seed, epoch, sizes); the world only shares them out."""

from dataclasses import replace

import numpy as np
import pytest

from gigamil.partition.schedule import StepPlan, balance, epoch_order, plan_steps


def test_the_order_is_frozen() -> None:
    # Frozen: another order is another run.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]


def test_seeds_and_epochs_give_orders_of_their_own() -> None:
    seeds = [0, 1, -1, 2**62, 2**63, 2**63 + 1, 2**64 - 2]  # neighbours above 2**53 must not meet in a float
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in seeds for epoch in range(3)}
    assert len(orders) == len(seeds) * 3
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()
    epoch_order(10, 0, 0)
    assert (np.random.get_state()[1] == before).all()


def test_every_slide_is_in_one_step_and_the_last_step_may_be_smaller() -> None:
    order, sizes = epoch_order(11, 3, 2), list(range(10, 21))
    plans = plan_steps(order, sizes, 4, num_groups=2, group_size=1)
    assert [len(plan.slides) for plan in plans] == [4, 4, 3]
    assert [slide for plan in plans for slide in plan.slides] == order.tolist()
    for plan in plans:
        assert plan.sizes == tuple(sizes[slide] for slide in plan.slides)
        assert sorted(position for group in plan.groups for position in group) == list(range(len(plan.slides)))


def test_steps_do_not_depend_on_the_world() -> None:
    order, sizes = epoch_order(9, 0, 0), [5, 1, 8, 2, 2, 9, 4, 4, 7]
    steps = {
        tuple(p.slides for p in plan_steps(order, sizes, 4, groups, size)) for groups in (1, 2, 3) for size in (1, 2)
    }
    assert len(steps) == 1


def test_groups_are_balanced_by_tiles() -> None:
    assert balance([9, 1, 5, 4], 2) == ((0, 1), (2, 3))
    assert balance([3, 3, 3], 2) == ((0, 2), (1,))  # ties go to the lowest group
    assert balance([7], 3) == ((0,), (), ())


def test_a_group_without_slides_owns_nothing() -> None:
    plan = plan_steps([0], [7], 4, num_groups=2, group_size=2)[0]
    assert [plan.spans(1, rank) for rank in range(2)] == [(), ()]
    assert sum(span.num_tiles for rank in range(2) for span in plan.spans(0, rank)) == 7


@pytest.mark.parametrize(("chunk", "calls"), [(1, 5), (2, 3), (5, 1), (64, 1)])
def test_max_calls_counts_the_busiest_rank(chunk: int, calls: int) -> None:
    plan = StepPlan((0, 1, 2), (9, 1, 5), ((0,), (1, 2)), group_size=2)  # 9 tiles over two ranks: 4 and 5
    assert plan.max_calls(chunk) == calls


@pytest.mark.parametrize(("chunk", "calls"), [(1, 8), (3, 3), (8, 1)])
def test_shares_are_those_of_the_ranks_of_a_group(chunk: int, calls: int) -> None:
    plan = StepPlan((0, 1, 2), (9, 1, 5), ((0,), (1, 2)), group_size=2, shares=(8, 1, 0, 2))
    assert [plan.counts(group) for group in (0, 1)] == [(8, 1), (0, 6)]
    assert [[span.num_tiles for span in plan.spans(1, rank)] for rank in (0, 1)] == [[], [1, 5]]
    assert plan.max_calls(chunk) == calls


def test_equal_shares_change_no_plan() -> None:
    order, sizes = epoch_order(9, 0, 0), [5, 1, 8, 2, 2, 9, 4, 4, 7]
    for plan in plan_steps(order, sizes, 4, num_groups=2, group_size=3):
        same = replace(plan, shares=(50,) * 6)
        for group in range(2):
            assert same.counts(group) == plan.counts(group)
            assert [same.spans(group, rank) for rank in range(3)] == [plan.spans(group, rank) for rank in range(3)]
        assert same.max_calls(2) == plan.max_calls(2)

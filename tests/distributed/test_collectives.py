"""Collectives inside the step on 1, 2 and 3 ranks: the backward is the adjoint, the maximum has none, empty ranks join.

Rank functions return plain data; the asserts are in the tests. One start of processes serves all of a world's tests.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.errors import ShardError, TrainingError
from gigamil.models.bag import Bag, LocalPool, Pool, Ranges, softmax_pool
from gigamil.parallel.collectives import (
    fetch_rows,
    heads_apart,
    heads_together,
    max_over_ranks,
    stack_ranks,
    sum_over_ranks,
)
from gigamil.parallel.pooling import GroupPool
from gigamil.parallel.topology import Topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.agree import agree
from gigamil.train.step import Ranks

SIZES = (5, 1, 4)  # tiles of three slides
COUNTS = {1: (10,), 2: (7, 3), 3: (6, 0, 4)}  # who owns how many: uneven, and rank 1 of 3 owns nothing
EVERYTHING: Ranges = [(0, 10)]
# What each rank asks for: all; parts of several ranks, twice and out of order; nothing at all, and empty ranges.
WANTED: dict[str, list[Ranges]] = {
    "all": [EVERYTHING, EVERYTHING, EVERYTHING],
    "overlapping": [[(6, 9), (2, 7), (2, 3)], [(0, 10), (9, 10)], [(5, 8)]],
    "little": [[], [(4, 4), (8, 9)], [(0, 1), (3, 3)]],
    "none": [[], [], []],
}
HEADS = 6  # divided by 1, 2 and 3 ranks


@pytest.fixture(scope="module", params=[2, 3])
def worlds(request: pytest.FixtureRequest) -> list[dict]:
    """What each rank found."""
    return run_on_ranks(measure, request.param, request.param)


def measure(rank: int, num_ranks: int) -> dict:
    return {
        "sum": measure_sum(rank),
        "adjoint": measure_adjoints(rank, num_ranks),
        "moved": measure_moves(rank, num_ranks),
        "bag": bag_values(GroupPool(dist.group.WORLD, COUNTS[num_ranks], rank)),
        "numeric": measure_numeric_gradient(rank, num_ranks),
        "top": measure_top(rank, num_ranks),
        "agreed": measure_agreement(rank, num_ranks),
    }


# --- the sum and the maximum ---


def test_the_sum_is_equal_on_all_ranks_and_its_input_is_left_alone(worlds: list[dict]) -> None:
    wanted = sum(found["sum"]["x"] for found in worlds)
    for found in worlds:
        torch.testing.assert_close(found["sum"]["sum"], wanted, rtol=1e-14, atol=1e-14)
        assert torch.equal(found["sum"]["sum"], worlds[0]["sum"]["sum"])
        assert found["sum"]["input_untouched"]


def test_the_backward_of_the_sum_is_the_sum_of_the_cotangents(worlds: list[dict]) -> None:
    wanted = sum(found["sum"]["y"] for found in worlds)
    for found in worlds:
        torch.testing.assert_close(found["sum"]["x_grad"], wanted, rtol=1e-14, atol=1e-14)


def test_the_maximum_is_elementwise_and_detached(worlds: list[dict]) -> None:
    wanted = torch.stack([found["sum"]["x"] for found in worlds]).amax(0)
    for found in worlds:
        assert torch.equal(found["sum"]["max"], wanted)
        assert not found["sum"]["max_requires_grad"]


def test_the_stack_is_in_the_order_of_ranks_and_detached(worlds: list[dict]) -> None:
    wanted = torch.stack([found["sum"]["x"] for found in worlds])
    for found in worlds:
        assert torch.equal(found["sum"]["stack"], wanted)
        assert not found["sum"]["stack_requires_grad"]


def measure_sum(rank: int) -> dict:
    world = dist.group.WORLD
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    leaf = x.clone().requires_grad_()
    total = sum_over_ranks(leaf.mT.mT, world)
    total.backward(y)
    biggest, stack = max_over_ranks(leaf, world), stack_ranks(leaf, world)
    return {
        "x": x,
        "y": y,
        "sum": total.detach(),
        "x_grad": leaf.grad,
        "input_untouched": torch.equal(leaf.detach(), x),
        "max": biggest,
        "max_requires_grad": biggest.requires_grad,
        "stack": stack,
        "stack_requires_grad": stack.requires_grad,
    }


# --- adjoints: <F x, y> = <x, F' y> over all ranks together, each holding its own x and its own cotangent y ---


def linear_maps(rank: int, num_ranks: int) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Name -> collective, shape of this rank's input."""
    world, counts = dist.group.WORLD, COUNTS[num_ranks]
    share = HEADS // num_ranks

    def fetch(wanted: list[Ranges]) -> Callable[[Tensor], Tensor]:
        return lambda x: fetch_rows(x, counts, wanted[:num_ranks], rank, world)

    return {
        "sum": (lambda x: sum_over_ranks(x, world), (3, 4)),
        **{f"fetch {name}": (fetch(wanted), (counts[rank], 2, 3)) for name, wanted in WANTED.items()},
        "heads apart": (lambda x: heads_apart(x, counts, rank, world), (counts[rank], HEADS, 5)),
        "heads together": (lambda x: heads_together(x, counts, rank, world), (sum(counts), share, 5)),
    }


def measure_adjoints(rank: int, num_ranks: int) -> dict[str, tuple[float, float]]:
    generator = torch.Generator().manual_seed(rank)
    found = {}
    for name, (function, shape) in linear_maps(rank, num_ranks).items():
        x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        result = function(x)
        y = torch.randn(result.shape, dtype=torch.float64, generator=generator)
        result.backward(y)
        found[name] = (float((result.detach() * y).sum()), float((x.detach() * x.grad).sum()))
    return found


def test_each_backward_is_the_adjoint_of_its_forward(worlds: list[dict]) -> None:
    for name in worlds[0]["adjoint"]:
        left, right = (math.fsum(found["adjoint"][name][side] for found in worlds) for side in (0, 1))
        assert left == pytest.approx(right, rel=1e-12, abs=1e-13), name
        assert name == "fetch none" or abs(left) > 1e-3, name  # 0 = 0 would prove nothing


def test_gradcheck_of_each_collective() -> None:
    assert run_on_ranks(check_gradients, 1) == [dict.fromkeys(linear_maps(0, 1), True)]


def check_gradients(rank: int) -> dict[str, bool]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.autograd.gradcheck(
            function, torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        )
        for name, (function, shape) in linear_maps(rank, 1).items()
    }


# --- rows and heads that move ---


def test_rows_arrive_as_they_were_asked_for(worlds: list[dict]) -> None:
    rows_NX = row_values()
    for rank, found in enumerate(worlds):
        for name, wanted in WANTED.items():
            expected = torch.cat([rows_NX[:0], *(rows_NX[start:stop] for start, stop in wanted[rank])])
            assert torch.equal(found["moved"][name], expected), name


def test_heads_part_and_come_together(worlds: list[dict]) -> None:
    values_NHX, share = head_values(), HEADS // len(worlds)
    for rank, found in enumerate(worlds):
        assert torch.equal(found["moved"]["apart"], values_NHX[:, rank * share : (rank + 1) * share])
        assert torch.equal(found["moved"]["together"], values_NHX[own_rows(rank, len(worlds))])


def row_values() -> Tensor:
    return torch.arange(60, dtype=torch.float64).view(10, 2, 3)


def head_values() -> Tensor:
    return torch.arange(10 * HEADS * 2, dtype=torch.float64).view(10, HEADS, 2)


def own_rows(rank: int, num_ranks: int) -> slice:
    first = sum(COUNTS[num_ranks][:rank])
    return slice(first, first + COUNTS[num_ranks][rank])


def measure_moves(rank: int, num_ranks: int) -> dict[str, Tensor]:
    own = own_rows(rank, num_ranks)
    pool = GroupPool(dist.group.WORLD, COUNTS[num_ranks], rank)
    apart = pool.heads_apart(head_values()[own])
    fetched = {name: pool.fetch(row_values()[own], wanted[:num_ranks]) for name, wanted in WANTED.items()}
    return {**fetched, "apart": apart, "together": pool.heads_together(apart)}


# --- the bag: many ranks are one ---


def make_bag(pool: Pool) -> Bag:
    first = sum(pool.counts[: pool.rank])
    embedding_ND = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(42))
    embedding_nD = embedding_ND[first : first + pool.counts[pool.rank]].clone().requires_grad_()
    return Bag(embedding_nD, torch.zeros(len(embedding_nD), 2, dtype=torch.float64), SIZES, pool)


def bag_methods(bag: Bag) -> dict[str, Tensor]:
    """Every way to look at more than one tile, and their mixtures; those of `OWN_ROWS` give rows of this rank."""
    x_nD = bag.embedding_nD
    part_n = (torch.arange(len(x_nD)) + bag.first) % 4  # segments other than slides; no tile is in the fifth
    best_BkD = bag.top(x_nD, 2)
    pooled_BAD, attention_nA = softmax_pool(3 * x_nD[:, :2], x_nD, bag)
    heads_nHX = torch.stack([x_nD, x_nD.sin()] * 3, dim=1)
    return {
        "segment_max": bag.segment_max(x_nD),
        "segment_max of parts": bag.segment_max(x_nD, part_n, 5),
        "segment_sum": bag.segment_sum(x_nD),
        "segment_sum of parts": bag.segment_sum(x_nD, part_n, 5),
        "segment_mean": bag.segment_mean(x_nD),
        "segment_softmax": bag.segment_softmax(3 * x_nD),
        "top": best_BkD,
        "pick": bag.pick(x_nD, best_BkD.flatten()),
        "gather": bag.gather(x_nD),
        "softmax_pool": pooled_BAD,
        "attention": attention_nA,
        "mixed heads": bag.pool.heads_together(bag.pool.heads_apart(heads_nHX).cumsum(0)),
        "repartitioned": bag.pool.repartitioned([10] + [0] * (len(bag.pool.counts) - 1)).sum(bag.segment_sum(x_nD)),
    }


OWN_ROWS = {"segment_softmax", "attention", "mixed heads"}
DETACHED = {"segment_max", "segment_max of parts", "top"}


def bag_values(pool: Pool) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Value of each, and the gradient at this rank's embeddings of a loss that all ranks compute alike."""
    found = {}
    for name in bag_methods(make_bag(pool)):
        bag = make_bag(pool)
        value = bag_methods(bag)[name]
        if name in DETACHED:
            assert not value.requires_grad
            found[name] = (value, None)
            continue
        # Rows of this rank enter through their sum over ranks, so that the loss is the group's on every rank.
        weighted = value * value.cos()
        loss = bag.pool.sum(weighted.sum()) if name in OWN_ROWS else weighted.sum()
        loss.backward()
        found[name] = (value.detach(), bag.embedding_nD.grad)
    return found


@pytest.mark.parametrize("name", list(bag_methods(make_bag(LocalPool(10)))))
def test_group_pool_is_local_pool(worlds: list[dict], name: str) -> None:
    value, gradient = bag_values(LocalPool(10))[name]
    if name == "repartitioned":  # on each rank the sum over ranks of what is a sum already
        value = value * len(worlds)
    for rank, found in enumerate(worlds):
        found_value, found_gradient = found["bag"][name]
        own = own_rows(rank, len(worlds))
        torch.testing.assert_close(found_value, value[own] if name in OWN_ROWS else value, rtol=1e-13, atol=1e-14)
        if name not in OWN_ROWS:
            assert torch.equal(found_value, worlds[0]["bag"][name][0])  # bit for bit on all ranks
        if gradient is not None and name != "repartitioned":
            # Every rank computes the same replicated loss, so each holds the world's number times its own part.
            torch.testing.assert_close(found_gradient / len(worlds), gradient[own], rtol=1e-12, atol=1e-13)


# --- the mean over ranks of what each rank has is the gradient ---


def measure_numeric_gradient(rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Mean over ranks of the gradient of a parameter in front of all collectives, and central differences."""
    pool = GroupPool(dist.group.WORLD, COUNTS[num_ranks], rank)

    def loss(weight_DD: Tensor) -> Tensor:
        bag = make_bag(pool)
        bag.embedding_nD = torch.tanh(bag.embedding_nD.detach() @ weight_DD)
        values = bag_methods(bag)
        own = sum(pool.sum((values[name] ** 2).sum()) for name in sorted(OWN_ROWS))
        shared = sum((values[name].sin() * weight_DD.sum()).sum() for name in values.keys() - OWN_ROWS - DETACHED)
        return own + shared

    weight_DD = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss(weight_DD).backward()
    mean_DD = weight_DD.grad.clone()
    dist.all_reduce(mean_DD)
    numeric_DD, step = torch.zeros(3, 3, dtype=torch.float64), 1e-5
    with torch.no_grad():
        for i in range(9):
            change_DD = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor(i), step).view(3, 3)
            numeric_DD.view(-1)[i] = (loss(weight_DD + change_DD) - loss(weight_DD - change_DD)) / (2 * step)
    return mean_DD / num_ranks, numeric_DD


def test_the_mean_over_ranks_is_the_gradient(worlds: list[dict]) -> None:
    for found in worlds:
        mean_DD, numeric_DD = found["numeric"]
        torch.testing.assert_close(mean_DD, numeric_DD, rtol=1e-7, atol=1e-7)  # of differences with a step of 1e-5


# --- the best tiles ---


def top_scores() -> Tensor:
    """Columns: all equal; rising; a tie across ranks; not finite."""
    tie = torch.tensor([1.0, 2, 0, 2, 0, 7, 3, 5, 5, 3], dtype=torch.float64)
    odd = torch.tensor([0.0, -math.inf, 1, 1, -math.inf, -math.inf, 2, 2, math.inf, 2], dtype=torch.float64)
    return torch.stack([torch.zeros(10, dtype=torch.float64), torch.arange(10.0, dtype=torch.float64), tie, odd], dim=1)


def measure_top(rank: int, num_ranks: int) -> list[list[list[int]]]:
    bag = make_bag(GroupPool(dist.group.WORLD, COUNTS[num_ranks], rank))
    return bag.top(top_scores()[own_rows(rank, num_ranks)], 3).tolist()


def test_equal_scores_resolve_to_the_lowest_tile_number(worlds: list[dict]) -> None:
    columns_BXk = [
        [[0, 1, 2], [4, 3, 2], [1, 3, 0], [2, 3, 0]],  # slide 0: tiles 0 to 4
        [[5, -1, -1]] * 4,  # slide 1: tile 5 alone, with a score of -inf too
        [[6, 7, 8], [9, 8, 7], [7, 8, 6], [8, 6, 7]],  # slide 2: tiles 6 to 9
    ]
    for found in worlds:
        assert torch.tensor(found["top"]).mT.tolist() == columns_BXk


# --- agreement on what to do next ---


def test_an_error_of_one_rank_is_raised_on_all_of_them(worlds: list[dict]) -> None:
    last = len(worlds) - 1
    agreed = [found["agreed"] for found in worlds]
    assert {found["refusal"] for found in agreed} == {f"rank {last}: ShardError: slide 'x' is damaged"}
    assert [found["has_cause"] for found in agreed] == [rank == last for rank in range(len(worlds))]


def test_the_wishes_of_any_rank_count(worlds: list[dict]) -> None:
    assert {found["agreed"]["wishes"] for found in worlds} == {((False, False), (True, False), (True, True))}


def measure_agreement(rank: int, num_ranks: int) -> dict:
    ranks = Ranks(Topology(num_ranks, rank, group_size=num_ranks), dist.group.WORLD, dist.group.WORLD)
    cpu, last = torch.device("cpu"), rank == num_ranks - 1
    wishes = []
    for stop, save in ((False, False), (last, False), (last, rank == 0)):
        decision = agree(ranks, cpu, error=None, stop=stop, save=save)
        wishes.append((decision.stop, decision.save))
    try:
        agree(ranks, cpu, error=ShardError("slide 'x' is damaged") if last else None, stop=False, save=False)
    except TrainingError as refusal:
        return {"wishes": tuple(wishes), "refusal": str(refusal), "has_cause": refusal.__cause__ is not None}
    return {"wishes": tuple(wishes), "refusal": "none", "has_cause": False}

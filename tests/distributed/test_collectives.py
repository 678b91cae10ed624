"""Collectives inside the step on 2 and 3 ranks: the backward is the adjoint, the maximum has none, empty ranks join.

Rank functions return plain data; the asserts are in the tests. One start of processes serves all of a world's tests.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.errors import ShardError, TrainingError
from gigamil.models.bag import Bag, LocalPool, Pool, softmax_pool
from gigamil.parallel.collectives import max_over_ranks, sum_over_ranks
from gigamil.parallel.pooling import GroupPool
from gigamil.parallel.topology import Topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.agree import agree
from gigamil.train.step import Ranks

SIZES = (5, 1, 4)  # tiles of three slides
CUTS = {2: (0, 7, 10), 3: (0, 6, 6, 10)}  # which rank owns which: uneven, and rank 1 of 3 owns nothing


@pytest.fixture(scope="module", params=[2, 3])
def worlds(request: pytest.FixtureRequest) -> list[dict]:
    """What each rank found."""
    return run_on_ranks(measure, request.param, request.param)


def test_the_sum_is_equal_on_all_ranks_and_its_input_is_left_alone(worlds: list[dict]) -> None:
    wanted = sum(found["x"] for found in worlds)
    for found in worlds:
        torch.testing.assert_close(found["sum"], wanted, rtol=1e-14, atol=1e-14)
        assert torch.equal(found["sum"], worlds[0]["sum"])
        assert found["input_untouched"]


def test_the_backward_is_the_adjoint_of_the_forward(worlds: list[dict]) -> None:
    # <S x, y> = <x, S' y> over all ranks together, each holding its own x and its own cotangent y.
    left = sum(float((found["sum"] * found["y"]).sum()) for found in worlds)
    right = sum(float((found["x"] * found["x_grad"]).sum()) for found in worlds)
    assert left == pytest.approx(right, rel=1e-13)
    wanted = sum(found["y"] for found in worlds)
    for found in worlds:
        torch.testing.assert_close(found["x_grad"], wanted, rtol=1e-14, atol=1e-14)


def test_the_gradient_agrees_with_finite_differences(worlds: list[dict]) -> None:
    assert [found["gradcheck"] for found in worlds] == [True] * len(worlds)


def test_the_maximum_is_elementwise_and_detached(worlds: list[dict]) -> None:
    wanted = torch.stack([found["x"] for found in worlds]).amax(0)
    for found in worlds:
        assert torch.equal(found["max"], wanted)
        assert not found["max_requires_grad"]


def test_group_pool_is_local_pool(worlds: list[dict]) -> None:
    whole = pool_reference()
    cuts = CUTS[len(worlds)]
    for rank, found in enumerate(worlds):
        own = slice(cuts[rank], cuts[rank + 1])
        assert torch.equal(found["segment_max"], whole["segment_max"])
        for name in ("segment_sum", "pooled"):
            torch.testing.assert_close(found[name], whole[name], rtol=1e-13, atol=1e-14)
            assert torch.equal(found[name], worlds[0][name])  # bit for bit on all ranks
        torch.testing.assert_close(found["attention"], whole["attention"][own], rtol=1e-13, atol=1e-15)
        # All ranks compute the same replicated loss, so each holds the world's number times its own part.
        for name in ("logit_grad", "value_grad"):
            torch.testing.assert_close(found[name] / len(worlds), whole[name][own], rtol=1e-12, atol=1e-14)


def test_an_error_of_one_rank_is_raised_on_all_of_them(worlds: list[dict]) -> None:
    last = len(worlds) - 1
    assert {found["refusal"] for found in worlds} == {f"rank {last}: ShardError: slide 'x' is damaged"}
    assert [found["has_cause"] for found in worlds] == [rank == last for rank in range(len(worlds))]


def test_the_wishes_of_any_rank_count(worlds: list[dict]) -> None:
    assert {found["wishes"] for found in worlds} == {((False, False), (True, False), (True, True))}


def measure(rank: int, num_ranks: int) -> dict:
    world = dist.group.WORLD
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    leaf = x.clone().requires_grad_()
    total = sum_over_ranks(leaf.mT.mT, world)
    total.backward(y)
    biggest = max_over_ranks(leaf, world)
    found = {
        "x": x,
        "y": y,
        "sum": total.detach(),
        "x_grad": leaf.grad,
        "input_untouched": torch.equal(leaf.detach(), x),
        "gradcheck": check_gradient(),
        "max": biggest,
        "max_requires_grad": biggest.requires_grad,
    }
    return found | pool_on_rank(rank, num_ranks) | agree_on_rank(rank, num_ranks)


def check_gradient() -> bool:
    # All ranks move their inputs alike, so the sum is R equal terms, and R times the cotangent is what comes back.
    shared = torch.arange(4, dtype=torch.float64).requires_grad_()
    return torch.autograd.gradcheck(lambda values: sum_over_ranks(values * 2, dist.group.WORLD), (shared,))


def pool_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(42)
    index_n = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    logit_nA = 3 * torch.randn(len(index_n), 2, dtype=torch.float64, generator=generator)
    value_nD = torch.randn(len(index_n), 3, dtype=torch.float64, generator=generator)
    return logit_nA, value_nD, index_n


def pool_with(pool: Pool, own: slice) -> dict:
    logit_nA, value_nD, index_n = (values[own] for values in pool_inputs())
    logit_nA, value_nD = logit_nA.clone().requires_grad_(), value_nD.clone().requires_grad_()
    bag = Bag(value_nD, index_n, torch.zeros(len(index_n), 2, dtype=torch.float64), len(SIZES), None, None, pool)
    pooled_BAD, attention_nA = softmax_pool(logit_nA, value_nD, bag)
    pooled_BAD.sin().sum().backward()
    return {
        "segment_max": pool.segment_max(logit_nA, index_n, len(SIZES)),
        "segment_sum": pool.segment_sum(value_nD, index_n, len(SIZES)).detach(),
        "pooled": pooled_BAD.detach(),
        "attention": attention_nA.detach(),
        "logit_grad": logit_nA.grad,
        "value_grad": value_nD.grad,
    }


def pool_reference() -> dict:
    return pool_with(LocalPool(), slice(None))


def pool_on_rank(rank: int, num_ranks: int) -> dict:
    cuts = CUTS[num_ranks]
    return pool_with(GroupPool(dist.group.WORLD), slice(cuts[rank], cuts[rank + 1]))


def agree_on_rank(rank: int, num_ranks: int) -> dict:
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
    return {"refusal": "none"}

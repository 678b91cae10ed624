"""DTFD's tiers are the formulas of the paper over pseudo-bags that are even, never empty and drawn by key."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gigamil import keyed
from gigamil.models.aggregators.dtfd import DoubleTier, pseudo_bags
from gigamil.models.bag import Bag, LocalPool, Pooled
from gigamil.train.loss import cross_entropy, slide_losses

MakeBag = Callable[..., Bag]
SIZES, DIM, CLASSES, GROUPS = (11, 1, 2, 6), 6, 3, 3


class RunOfPool(LocalPool):
    """A rank among others, for what does not communicate."""

    def __init__(self, counts: tuple[int, ...], rank: int) -> None:
        super().__init__(sum(counts))
        self.counts, self.rank = counts, rank


def slide_of_bags(sizes: tuple[int, ...], groups: int) -> list[range]:
    """Numbers of each slide's pseudo-bags."""
    starts = [sum(min(groups, size) for size in sizes[:slide]) for slide in range(len(sizes))]
    return [range(start, start + min(groups, size)) for start, size in zip(starts, sizes, strict=True)]


def tier(h: Tensor, score: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Gated attention pooling: attention and embedding."""
    gate = torch.sigmoid(h @ score.gate.weight.T + score.gate.bias)
    logit = (torch.tanh(h @ score.value.weight.T + score.value.bias) * gate) @ score.logit.weight[0]
    a = torch.softmax(logit, dim=0)
    return a, a @ h


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("distil", ["afs", "maxs", "maxmins"])
def test_both_tiers_are_the_formula(distil: str, draws: bool, make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model = DoubleTier(DIM, CLASSES, groups=GROUPS, distil=distil, width=8, hidden=5).double()
    embedding_nD = torch.randn(sum(SIZES), DIM, dtype=torch.float64).requires_grad_()
    bag, label_B = make_bag(embedding_nD, SIZES, draws), torch.tensor([1, 2, 0, 1])
    pooled: Pooled = model(bag)
    segment_n, h_n = pseudo_bags(bag, GROUPS), torch.relu(model.project(embedding_nD))
    head = torch.nn.Linear(8, CLASSES).double()
    losses = []
    for slide, bags in enumerate(slide_of_bags(SIZES, GROUPS)):
        features, owners, attentions, first_tier = [], [], {}, 0.0
        for number in bags:
            rows = torch.nonzero(segment_n == number).flatten()
            h = h_n[rows]
            a, embedding = tier(h, model.score1)
            attentions[number] = (rows, a)
            logits = model.classify1(embedding)[None]
            first_tier = first_tier + cross_entropy(logits, label_B[slide : slide + 1]) / len(bags)
            p = torch.softmax(model.classify1(a[:, None] * h), dim=1)[:, 1:].sum(1)
            chosen = {
                "afs": [embedding],
                "maxs": [h[p.argmax()]],
                "maxmins": [h[p.argmax()], h[p.argmin()]],
            }[distil]
            features += chosen
            owners += [number] * len(chosen)
        b, z = tier(torch.stack(features), model.score2)
        torch.testing.assert_close(pooled.slide_BX[slide], z, rtol=1e-12, atol=1e-14)
        losses.append(cross_entropy(head(z)[None], label_B[slide : slide + 1]) + first_tier)
        for number, (rows, a) in attentions.items():
            weight = b[torch.tensor(owners) == number].sum()
            torch.testing.assert_close(pooled.attention_nA[rows, 0], weight * a, rtol=1e-12, atol=1e-14)
    found_B, wanted_B = slide_losses(cross_entropy, head(pooled.slide_BX), pooled, label_B), torch.cat(losses)
    torch.testing.assert_close(found_B, wanted_B, rtol=1e-12, atol=1e-14)
    inputs = [embedding_nD, *model.parameters()]
    found, wanted = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (found_B, wanted_B))
    for found_X, wanted_X in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_X, wanted_X, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("distil", "learns"), [("maxs", [0]), ("maxmins", [0, 2])])
def test_of_equal_tiles_the_lowest_number_is_taken(distil: str, learns: list[int], make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model = DoubleTier(DIM, 2, groups=1, distil=distil, width=8).double()
    good, bad = torch.rand(2, DIM, dtype=torch.float64)
    probability = [model.classify1(torch.relu(model.project(tile)))[1].item() for tile in (good, bad)]
    order = torch.stack([good, bad] if probability[0] > probability[1] else [bad, good])
    # Attention scales the tiles' evidence: make it even, so that only the tile counts.
    torch.nn.init.zeros_(model.score1.logit.weight)
    torch.nn.init.zeros_(model.classify1.bias)
    embedding_nD = order[torch.tensor([0, 0, 1, 1])].clone().requires_grad_()
    with torch.no_grad():
        margin = model.classify1(torch.relu(model.project(order))) @ torch.tensor([-1.0, 1.0]).double()
    first, last = (0, 2) if margin[0] > margin[1] else (2, 0)
    pooled: Pooled = model(make_bag(embedding_nD, (4,)))
    (grad_nD,) = torch.autograd.grad(pooled.slide_BX.sum(), embedding_nD)
    wanted = sorted({"maxs": [first], "maxmins": [first, last]}[distil])
    assert len(wanted) == len(learns)
    assert torch.nonzero(grad_nD.abs().sum(1)).flatten().tolist() == wanted


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=4).map(tuple),
    groups=st.integers(1, 6),
    draws=st.booleans(),
)
def test_pseudo_bags_are_even_and_none_is_empty(
    sizes: tuple[int, ...], groups: int, draws: bool, make_bag: MakeBag
) -> None:
    bag = make_bag(torch.zeros(sum(sizes), 1), sizes, draws)
    segment_n = pseudo_bags(bag, groups)
    for bags, tiles_N in zip(slide_of_bags(sizes, groups), segment_n.split(sizes), strict=True):
        counts = [int((tiles_N == number).sum()) for number in bags]
        assert sum(counts) == len(tiles_N)
        assert 1 <= min(counts) <= max(counts) <= min(counts) + 1


def test_pseudo_bags_do_not_depend_on_ranks(make_bag: MakeBag) -> None:
    bag = make_bag(torch.zeros(sum(SIZES), 1), SIZES, draws=True)
    whole_n, counts, start = pseudo_bags(bag, GROUPS), (8, 0, 12), 0
    for rank, count in enumerate(counts):
        rows = slice(start, start + count)
        part = dataclasses.replace(
            bag, embedding_nD=bag.embedding_nD[rows], position_n2=bag.position_n2[rows], pool=RunOfPool(counts, rank)
        )
        assert torch.equal(pseudo_bags(part, GROUPS), whole_n[rows])
        start += count


def test_draws_differ_between_slides_steps_and_blocks(make_bag: MakeBag) -> None:
    bag = make_bag(torch.zeros(40, 1), (20, 20), draws=True)
    first_n, second_n = pseudo_bags(bag, 5).view(2, 4, 5)
    assert not torch.equal(first_n, second_n - 5)
    assert not torch.equal(first_n[0], first_n[1])
    later = dataclasses.replace(bag, slide_key_B=keyed.fold(bag.slide_key_B, 1))
    assert not torch.equal(pseudo_bags(later, 5), pseudo_bags(bag, 5))
    quiet = dataclasses.replace(bag, slide_key_B=None, tile_key_n=None)
    assert pseudo_bags(quiet, 5).tolist() == [*range(5)] * 4 + [*range(5, 10)] * 4


def test_every_order_of_a_block_is_drawn_equally_often(make_bag: MakeBag) -> None:
    # 6 orders of 3 tiles, 20,000 blocks: 3,333 each with a standard deviation of 53; 6 of them are allowed.
    bag = make_bag(torch.zeros(60_000, 1), (60_000,), draws=True)
    blocks_X3 = pseudo_bags(bag, 3).view(-1, 3)
    counts = torch.bincount(blocks_X3[:, 0] * 9 + blocks_X3[:, 1] * 3 + blocks_X3[:, 2], minlength=27)
    orders = counts[counts > 0]
    assert len(orders) == 6
    assert ((orders - 20_000 / 6).abs() < 6 * 53).all()

"""Poolings without attention are their formulas, stay finite where logarithms do not, and let the right tile learn."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gigamil.errors import ConfigError
from gigamil.models.aggregators.instance import (
    InstancePooling,
    LogSumExpPooling,
    MaxInstancePooling,
    MaxPooling,
    MeanMLP,
    MeanPooling,
    NoisyOrPooling,
    TopMeanPooling,
)
from gigamil.models.bag import Bag, Pooled

MakeBag = Callable[..., Bag]
SIZES, DIM, CLASSES = (4, 2, 6), 6, 3


def embeddings() -> Tensor:
    return torch.randn(sum(SIZES), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noisy_or(f: Tensor) -> Tensor:
    p = 1 - torch.prod(1 - torch.sigmoid(f), dim=0)
    return torch.log(p) - torch.log(1 - p)


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize(
    ("kind", "options", "formula"),
    [
        (MeanPooling, {}, lambda f: f.sum(0) / len(f)),
        (LogSumExpPooling, {"r": 2.5}, lambda f: torch.log(torch.exp(2.5 * f).mean(0)) / 2.5),
        (NoisyOrPooling, {"bias": -1.0}, noisy_or),
        (MaxInstancePooling, {}, lambda f: f.amax(0)),
        (TopMeanPooling, {"k": 2}, lambda f: f.sort(0, descending=True)[0][:2].mean(0)),
    ],
)
def test_instance_pooling_is_the_formula(
    kind: type[InstancePooling],
    options: dict[str, float],
    formula: Callable[[Tensor], Tensor],
    hidden: int,
    make_bag: MakeBag,
) -> None:
    torch.manual_seed(0)
    model, embedding_nD = kind(DIM, CLASSES, hidden=hidden, **options).double(), embeddings().requires_grad_()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    logit_nK = model.classify(embedding_nD)
    assert len(model.classify) == (3 if hidden else 1)
    wanted_BK = torch.stack([formula(part) for part in logit_nK.split(SIZES)])
    torch.testing.assert_close(pooled.slide_BX, wanted_BK, rtol=1e-11, atol=1e-13)
    assert pooled.per_class
    assert torch.equal(pooled.score_nA, logit_nK)
    found, wanted = (torch.autograd.grad(x.sin().sum(), embedding_nD)[0] for x in (pooled.slide_BX, wanted_BK))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [NoisyOrPooling, MaxInstancePooling, TopMeanPooling])
def test_one_sided_a_further_tile_never_lowers_the_second_class(kind: type[InstancePooling], make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    options = {"k": 2} if kind is TopMeanPooling else {}
    model, embedding_nD = kind(DIM, 2, hidden=5, one_sided=True, **options).double(), embeddings()
    plain = kind(DIM, 1, hidden=5, **options).double()
    plain.load_state_dict(model.state_dict())
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    wanted: Pooled = plain(make_bag(embedding_nD, SIZES))
    torch.testing.assert_close(
        pooled.slide_BX, torch.cat([torch.zeros(3, 1), wanted.slide_BX], dim=1), check_dtype=False
    )
    assert pooled.score_nA.shape == (sum(SIZES), 2)
    assert not pooled.score_nA[:, 0].any()
    logits = [model(make_bag(embedding_nD[:size], (size,))).slide_BX[0, 1].item() for size in range(2, sum(SIZES))]
    assert logits == sorted(logits)
    assert logits[0] < logits[-1]


def test_one_sided_is_for_two_classes() -> None:
    with pytest.raises(ConfigError, match="one_sided takes two classes.*here are 3"):
        NoisyOrPooling(DIM, CLASSES, one_sided=True)


@pytest.mark.parametrize("logit", [-200.0, -80.0, -20.0, -7.0, 0.0, 20.0, 200.0])
def test_noisy_or_of_thousands_of_tiles_is_right_in_float32(logit: float, make_bag: MakeBag) -> None:
    num_tiles = 4096
    model = NoisyOrPooling(1, 1)
    logit_nK = torch.full((num_tiles, 1), logit, requires_grad=True)
    found = model.pooled(logit_nK, make_bag(torch.zeros(num_tiles, 1), (num_tiles,)))
    none = -num_tiles * (max(logit, 0.0) + math.log1p(math.exp(-abs(logit))))  # log of the chance of no tile
    wanted = math.log(-math.expm1(none)) - none if logit > -200 else math.log(torch.finfo(torch.float32).tiny)
    # A float32 sum of 4096 terms, one after the other, may be off by 4096 x 6e-8.
    assert found.item() == pytest.approx(wanted, rel=2.5e-4)
    (grad_nK,) = torch.autograd.grad(found.sum(), logit_nK)
    if logit > -200:
        share = -1 / math.expm1(none)  # d logit(p) / d logit(p_i) = p_i / p
        assert grad_nK[0].item() == pytest.approx(share / (1 + math.exp(-logit)), rel=2.5e-4)
    assert torch.isfinite(grad_nK).all()


def test_the_bias_of_noisy_or_starts_where_it_is_told() -> None:
    assert NoisyOrPooling(DIM, CLASSES).classify[-1].bias.tolist() == [-7.0] * CLASSES
    assert NoisyOrPooling(DIM, CLASSES, bias=-2.0, hidden=4).classify[-1].bias.tolist() == [-2.0] * CLASSES


def test_lse_does_not_overflow(make_bag: MakeBag) -> None:
    logit_nK = torch.tensor([[1e4], [1e4], [-1e4]])
    found = LogSumExpPooling(1, 1).pooled(logit_nK, make_bag(torch.zeros(3, 1), (2, 1)))
    assert found.flatten().tolist() == [1e4, -1e4]


@pytest.mark.parametrize(("k", "learns"), [(1, [0, 1, 0, 0]), (2, [0, 0.5, 0, 0.5])])
def test_of_equal_instances_the_lowest_number_learns(k: int, learns: list[float], make_bag: MakeBag) -> None:
    logit_nK = torch.tensor([[1.0], [2.0], [1.5], [2.0]], requires_grad=True)
    model = TopMeanPooling(1, 1, k=k)
    (grad_nK,) = torch.autograd.grad(model.pooled(logit_nK, make_bag(torch.zeros(4, 1), (4,))).sum(), logit_nK)
    assert grad_nK.flatten().tolist() == learns


def test_maximum_of_embeddings_and_who_wins_it(make_bag: MakeBag) -> None:
    embedding_nD = torch.tensor(
        [[1.0, 5.0, 0.0], [3.0, 5.0, 0.0], [2.0, 4.0, 0.0], [-1.0, -2.0, -3.0]]
    ).requires_grad_()
    model = MaxPooling(3)
    pooled: Pooled = model(make_bag(embedding_nD, (3, 1)))
    assert pooled.slide_BX.tolist() == [[3.0, 5.0, 0.0], [-1.0, -2.0, -3.0]]
    torch.testing.assert_close(pooled.attention_nA, torch.tensor([[2 / 3], [1 / 3], [0.0], [1.0]]))
    (grad_nD,) = torch.autograd.grad(pooled.slide_BX.sum(), embedding_nD)
    assert grad_nD.tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_mean_mlp_is_the_mlp_of_the_mean_and_scores_tiles_outside_training(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = MeanMLP(DIM, CLASSES, hidden=7).double(), embeddings()

    def mlp(x: Tensor) -> Tensor:
        return torch.relu(x @ model.first.weight.T + model.first.bias) @ model.last.weight.T + model.last.bias

    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    wanted_BK = torch.stack([mlp(part.mean(0)) for part in embedding_nD.split(SIZES)])
    torch.testing.assert_close(pooled.slide_BX, wanted_BK, rtol=1e-12, atol=1e-14)
    assert pooled.score_nA is None
    with torch.no_grad():
        torch.testing.assert_close(model(make_bag(embedding_nD, SIZES)).score_nA, mlp(embedding_nD))

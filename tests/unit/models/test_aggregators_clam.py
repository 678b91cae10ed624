"""CLAM's losses are those of the paper, slide by slide and class by class, and slides of any size have one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigamil.models.aggregators.clam import ClamMultiBranch, ClamSingleBranch
from gigamil.models.bag import Bag, Pooled
from gigamil.train.loss import cross_entropy, slide_losses

MakeBag = Callable[..., Bag]
SIZES, DIM, CLASSES, K = (9, 1, 5, 2), 6, 3, 3
LABEL_B = torch.tensor([2, 0, 1, 2])


def embeddings() -> Tensor:
    return torch.randn(sum(SIZES), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def instance_loss(model: ClamSingleBranch, embedding_ND: Tensor, label: int) -> Tensor:
    """Of one slide, as Lu et al. describe it."""
    k = min(K, len(embedding_ND) // 2)
    if k == 0:
        return torch.zeros((), dtype=torch.float64)
    h = torch.relu(model.project(embedding_ND))
    score = model.score(h)
    total = torch.zeros((), dtype=torch.float64)
    for c in range(CLASSES):
        column = score[:, c] if score.shape[1] > 1 else score[:, 0]
        order = torch.argsort(column, descending=True)
        logits = h @ model.instance.weight[2 * c : 2 * c + 2].T + model.instance.bias[2 * c : 2 * c + 2]
        if c == label:
            targets = torch.tensor([1] * k + [0] * k)
            total = total + F.cross_entropy(logits[torch.cat([order[:k], order[-k:]])], targets)
        elif model.subtyping:
            total = total + F.cross_entropy(logits[order[:k]], torch.zeros(k, dtype=torch.int64))
    return total / CLASSES if model.subtyping else total


@pytest.mark.parametrize("subtyping", [False, True])
@pytest.mark.parametrize("kind", [ClamSingleBranch, ClamMultiBranch])
def test_loss_and_gradient_are_the_formula(kind: type[ClamSingleBranch], subtyping: bool, make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model = kind(DIM, CLASSES, width=8, hidden=5, k=K, subtyping=subtyping, bag_weight=0.6).double()
    embedding_nD = embeddings().requires_grad_()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES, label_B=LABEL_B))
    assert pooled.weight == 0.6
    parts = embedding_nD.split(SIZES)
    wanted_B = torch.stack([instance_loss(model, part, int(y)) for part, y in zip(parts, LABEL_B, strict=True)])
    torch.testing.assert_close(pooled.loss_B, 0.4 * wanted_B, rtol=1e-12, atol=1e-14)
    assert pooled.loss_B[1] == 0  # one tile: none is higher than another
    assert (pooled.loss_B[[0, 2, 3]] > 0).all()
    inputs = [embedding_nD, *model.instance.parameters(), *model.project.parameters()]
    found, wanted = (
        torch.autograd.grad(x.sin().sum(), inputs, retain_graph=True) for x in (pooled.loss_B, 0.4 * wanted_B)
    )
    for found_X, wanted_X in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_X, wanted_X, rtol=1e-11, atol=1e-13)


def test_what_is_given_of_the_slides(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    single, multi = (kind(DIM, CLASSES, width=8, hidden=5).double() for kind in (ClamSingleBranch, ClamMultiBranch))
    assert (single.out_dim, multi.out_dim) == (8, None)
    embedding_nD = embeddings()
    for model in (single, multi):
        pooled: Pooled = model(make_bag(embedding_nD, SIZES))
        start = 0
        for slide, size in enumerate(SIZES):
            h = torch.relu(model.project(embedding_nD[start : start + size]))
            a = torch.softmax(model.score(h), dim=0)
            torch.testing.assert_close(pooled.attention_nA[start : start + size], a, rtol=1e-12, atol=1e-14)
            wanted = (a.T @ h)[0]
            if model is multi:
                wanted = ((a.T @ h) * multi.classify.weight_AFE[:, 0]).sum(1) + multi.classify.bias_AF[:, 0]
            torch.testing.assert_close(pooled.slide_BX[slide], wanted, rtol=1e-12, atol=1e-14)
            start += size
        assert pooled.per_class == (model is multi)


def test_without_labels_there_is_no_loss_of_instances(make_bag: MakeBag) -> None:
    model = ClamMultiBranch(DIM, CLASSES, width=8).double()
    pooled: Pooled = model(make_bag(embeddings(), SIZES))
    assert (pooled.weight, pooled.loss_B) == (1.0, None)
    labelled: Pooled = model(make_bag(embeddings(), SIZES, label_B=LABEL_B))
    assert torch.equal(labelled.slide_BX, pooled.slide_BX)


def test_a_step_of_one_tile_slides_has_a_finite_gradient(make_bag: MakeBag) -> None:
    model = ClamSingleBranch(DIM, CLASSES, width=CLASSES, subtyping=True).double()
    pooled: Pooled = model(make_bag(embeddings()[:2], (1, 1), label_B=LABEL_B[:2]))
    slide_losses(cross_entropy, pooled.slide_BX, pooled, LABEL_B[:2]).mean().backward()
    assert pooled.loss_B.tolist() == [0.0, 0.0]
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert model.instance.weight.grad.abs().sum() == 0

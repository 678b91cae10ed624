"""DSMIL's two streams are the formulas of the paper, and its loss is the mean of theirs."""

from collections.abc import Callable

import torch

from gigamil.models.aggregators.dsmil import DualStream
from gigamil.models.bag import Bag, Pooled
from gigamil.train.loss import cross_entropy, slide_losses

MakeBag = Callable[..., Bag]
SIZES, DIM, CLASSES = (4, 1, 6), 6, 3


def test_both_streams_are_the_formula(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model = DualStream(DIM, CLASSES, hidden=5, width=7).double()
    embedding_nD = torch.randn(sum(SIZES), DIM, dtype=torch.float64).requires_grad_()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    logits, losses, label_B = [], [], torch.tensor([1, 2, 0])
    start = 0
    for slide, size in enumerate(SIZES):
        h = embedding_nD[start : start + size]
        f, q, v = model.instance(h), model.query(h), model.value(h)
        highest, critical = f.max(0)
        a = torch.softmax(q @ q[critical].T / 5**0.5, dim=0)
        z = a.T @ v
        # The paper's convolution over classes: one kernel of K x V for each class.
        kernels = model.classify.weight.view(CLASSES, CLASSES, 7)
        bag = torch.einsum("cv,kcv->k", z, kernels) + model.classify.bias
        torch.testing.assert_close(pooled.attention_nA[start : start + size], a, rtol=1e-12, atol=1e-14)
        logits.append((highest + bag) / 2)
        label = label_B[slide : slide + 1]
        losses.append(0.5 * cross_entropy(highest[None], label) + 0.5 * cross_entropy(bag[None], label))
        start += size
    torch.testing.assert_close(pooled.slide_BX, torch.stack(logits), rtol=1e-12, atol=1e-14)
    found_B, wanted_B = slide_losses(cross_entropy, pooled.slide_BX, pooled, label_B), torch.cat(losses)
    torch.testing.assert_close(found_B, wanted_B, rtol=1e-12, atol=1e-14)
    inputs = [embedding_nD, *model.parameters()]
    found, wanted = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (found_B, wanted_B))
    for found_X, wanted_X in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_X, wanted_X, rtol=1e-11, atol=1e-13)


def test_the_logits_of_a_slide_are_the_same_with_labels_and_without(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = DualStream(DIM, CLASSES).double(), torch.randn(sum(SIZES), DIM, dtype=torch.float64)
    labelled: Pooled = model(make_bag(embedding_nD, SIZES, label_B=torch.tensor([1, 2, 0])))
    with torch.no_grad():
        assert torch.equal(model(make_bag(embedding_nD, SIZES)).slide_BX, labelled.slide_BX)
    assert labelled.per_class

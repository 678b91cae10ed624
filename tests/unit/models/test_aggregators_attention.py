"""Attention aggregators are the formulas of their papers, written down again slide by slide."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gigamil.models.aggregators.abmilx import ABMILX
from gigamil.models.aggregators.attention import (
    AdditiveAttention,
    Attention,
    GatedAttention,
    MultiBranchAttention,
    MultiHeadAttention,
)
from gigamil.models.bag import Bag, Pooled

MakeBag = Callable[..., Bag]
SIZES, DIM, CLASSES = (4, 1, 6), 6, 3


def slides(embedding_nD: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """(slide, its rows, its embeddings)."""
    start = 0
    for slide, size in enumerate(SIZES):
        yield slide, slice(start, start + size), embedding_nD[start : start + size]
        start += size


def embeddings() -> Tensor:
    return torch.randn(sum(SIZES), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def gate_logits(h: Tensor, score: torch.nn.Module) -> Tensor:
    gate = torch.sigmoid(h @ score.gate.weight.T + score.gate.bias)
    return (torch.tanh(h @ score.value.weight.T + score.value.bias) * gate) @ score.logit.weight.T


@pytest.mark.parametrize("kind", [Attention, GatedAttention])
def test_attention_is_the_formula(kind: type[Attention], make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = kind(DIM, hidden=5, heads=2).double(), embeddings()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    assert (model.out_dim, pooled.slide_BX.shape, pooled.attention_nA.shape) == (2 * DIM, (3, 2 * DIM), (11, 2))
    for slide, rows, h in slides(embedding_nD):
        if kind is Attention:
            value = model.score.value
            score = torch.tanh(h @ value.weight.T + value.bias) @ model.score.logit.weight.T
        else:
            score = gate_logits(h, model.score)
        a = torch.softmax(score, dim=0)
        check(pooled.attention_nA[rows], a)
        check(pooled.slide_BX[slide], (a.T @ h).flatten())


def test_multi_head_pools_each_part_of_the_embedding_by_itself(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = MultiHeadAttention(DIM, hidden=5, heads=2).double(), embeddings()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    assert (model.out_dim, pooled.attention_nA.shape) == (DIM, (11, 2))
    for slide, rows, h in slides(embedding_nD):
        parts = []
        for head, part in enumerate(h.split(DIM // 2, dim=1)):
            value = torch.tanh(part @ model.value.weight_AFE[head].T + model.value.bias_AF[head])
            gate = torch.sigmoid(part @ model.gate.weight_AFE[head].T + model.gate.bias_AF[head])
            a = torch.softmax((value * gate) @ model.logit.weight_AFE[head, 0], dim=0)
            check(pooled.attention_nA[rows, head], a)
            parts.append(a @ part)
        check(pooled.slide_BX[slide], torch.cat(parts))


def test_multi_branch_has_a_branch_and_a_score_per_class(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = MultiBranchAttention(DIM, CLASSES, hidden=5).double(), embeddings()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    assert pooled.per_class
    assert model.out_dim is None
    for slide, rows, h in slides(embedding_nD):
        a = torch.softmax(gate_logits(h, model.score), dim=0)
        check(pooled.attention_nA[rows], a)
        for k in range(CLASSES):
            wanted = (a[:, k] @ h) @ model.classify.weight_AFE[k, 0] + model.classify.bias_AF[k, 0]
            check(pooled.slide_BX[slide, k], wanted)


def test_additive_logits_are_the_sum_of_what_tiles_add(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = AdditiveAttention(DIM, CLASSES, hidden=5, mlp=7).double(), embeddings()
    torch.nn.init.normal_(model.bias_K)
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    assert pooled.per_class
    for slide, rows, h in slides(embedding_nD):
        a = torch.softmax(gate_logits(h, model.score), dim=0)
        added = model.contribution(a * h)  # f of a_i h_i, as the paper has it
        check(pooled.score_nA[rows], len(h) * added)
        check(pooled.slide_BX[slide], added.sum(0) + model.bias_K)


def test_abmilx_spreads_scores_over_the_likeness_of_tiles(make_bag: MakeBag) -> None:
    torch.manual_seed(0)
    model, embedding_nD = ABMILX(DIM, width=8, hidden=5, heads=2, alpha=0.75).double(), embeddings()
    pooled: Pooled = model(make_bag(embedding_nD, SIZES))
    assert not any("bias" in name for name, _ in model.named_parameters())
    for slide, rows, h in slides(embedding_nD):
        normed = (h - h.mean(1, keepdim=True)) / torch.sqrt(h.var(1, unbiased=False, keepdim=True) + 1e-5)
        x = torch.relu((normed * model.norm.weight) @ model.project.weight.T)
        parts = []
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            part, query, key = x[:, columns], x @ model.query.weight.T[:, columns], x @ model.key.weight.T[:, columns]
            s = torch.tanh(part @ model.hidden.weight_AFE[head].T) @ model.logit.weight_AFE[head, 0]
            spread = torch.softmax(query @ key.T / 4**0.5, dim=1) @ s
            a = torch.softmax(s + 0.75 * spread, dim=0)
            check(pooled.attention_nA[rows, head], a)
            parts.append(a @ part)
        check(pooled.slide_BX[slide], torch.cat(parts))


def test_abmilx_stores_no_matrix_of_all_pairs(make_bag: MakeBag) -> None:
    model, num_tiles, biggest = ABMILX(DIM, width=16, heads=2), 600, 0

    def remember(saved: Tensor) -> Tensor:
        nonlocal biggest
        biggest = max(biggest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda saved: saved):
        model(make_bag(torch.randn(num_tiles, DIM, requires_grad=True), (num_tiles,)))
    assert 0 < biggest < num_tiles**2 / 2

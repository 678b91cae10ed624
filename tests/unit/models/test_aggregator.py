"""Gated attention is the formula of its paper, per slide, and own aggregators fit in by name."""

import pytest
import torch
from torch import nn

from gigamil import keyed
from gigamil.errors import ConfigError
from gigamil.models.aggregator import GatedAttention, aggregators, build_aggregator
from gigamil.models.bag import Bag, LocalPool


def make_bag(embedding_nD: torch.Tensor, sizes: list[int], draws: bool = False) -> Bag:
    slide_key_B = keyed.fold(keyed.root_key(0), torch.arange(len(sizes)))
    index_n = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    tile_key_n = keyed.fold(slide_key_B[index_n], torch.arange(len(index_n)))
    return Bag(
        embedding_nD=embedding_nD,
        slide_index_n=index_n,
        position_n2=torch.zeros(len(index_n), 2, dtype=torch.float64),
        num_slides=len(sizes),
        tile_key_n=tile_key_n if draws else None,
        slide_key_B=slide_key_B if draws else None,
        pool=LocalPool(),
    )


def test_gated_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    model = GatedAttention(6, hidden=5, heads=2).double()
    embedding_nD = torch.randn(7, 6, dtype=torch.float64)
    slide_BX, attention_nA = model(make_bag(embedding_nD, [4, 3]))
    assert (model.out_dim, slide_BX.shape, attention_nA.shape) == (12, (2, 12), (7, 2))
    for slide, rows in enumerate((slice(0, 4), slice(4, 7))):
        h = embedding_nD[rows]
        gate = torch.sigmoid(h @ model.gate.weight.T + model.gate.bias)
        score = (torch.tanh(h @ model.value.weight.T + model.value.bias) * gate) @ model.logit.weight.T
        a = torch.softmax(score, dim=0)
        torch.testing.assert_close(attention_nA[rows], a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(slide_BX[slide], (a.T @ h).flatten(), rtol=1e-12, atol=1e-14)


def test_dropout_is_keyed_by_tile_and_off_without_keys() -> None:
    torch.manual_seed(0)
    model, embedding_nD = GatedAttention(6, dropout=0.5), torch.rand(5, 6) + 1
    plain = model(make_bag(embedding_nD, [5]))[0]
    dropped = model(make_bag(embedding_nD, [5], draws=True))[0]
    assert not torch.allclose(plain, dropped)
    assert torch.equal(model(make_bag(embedding_nD, [5], draws=True))[0], dropped)
    assert torch.equal(model.train()(make_bag(embedding_nD, [5]))[0], plain)


def test_names_and_options() -> None:
    assert isinstance(build_aggregator("gated_attention", 8, {"heads": 3}), GatedAttention)
    with pytest.raises(ConfigError, match="no aggregator 'gated_atention'; did you mean 'gated_attention'"):
        build_aggregator("gated_atention", 8, {})
    with pytest.raises(ConfigError, match="science.aggregator.options do not fit aggregator 'gated_attention': .*deep"):
        build_aggregator("gated_attention", 8, {"deep": 3})


def test_an_aggregator_without_a_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aggregators._factories, "odd", lambda dim: nn.Linear(dim, 2))
    with pytest.raises(ConfigError, match="aggregator 'odd' must have an integer attribute `out_dim`"):
        build_aggregator("odd", 8, {})

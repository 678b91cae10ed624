"""Every aggregator keeps the contract of its page, options that do not fit are refused, and own ones fit in by name."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators, build_aggregator, min_tiles
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, Pooled

MakeBag = Callable[..., Bag]
PAGE = (Path(__file__).resolve().parents[3] / "docs" / "aggregators.md").read_text()
DIM, CLASSES, SIZES = 24, 3, (5, 9, 2)
NAMES = sorted(aggregators.names())
SMALL: dict[str, dict[str, Any]] = {
    "topk_mean": {"k": 2},
    "clam_sb": {"width": 16, "k": 2},
    "clam_mb": {"width": 16, "k": 2},
    "dsmil": {"width": 16},
    "dtfd": {"width": 16, "groups": 3},
    "abmilx": {"width": 16, "heads": 2},
    "transmil": {"width": 16, "heads": 2, "landmarks": 4},
    "transformer": {"width": 16, "heads": 2},
}


def built(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    options = SMALL.get(name, {}) | {"dropout": dropout}
    return build_aggregator(name, DIM, CLASSES, options).to(dtype)


def embeddings(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(sum(sizes), DIM, dtype=dtype, generator=torch.Generator().manual_seed(1))


def of_slide(pooled: Pooled, slide: int, rows: slice) -> list[Tensor]:
    """What an aggregator says of one slide."""
    parts = [pooled.slide_BX[slide], torch.tensor(float(pooled.weight), dtype=torch.float64)]
    parts += [x[rows] for x in (pooled.attention_nA, pooled.score_nA) if x is not None]
    if pooled.extra_slide_M is not None:
        own = pooled.extra_slide_M == slide
        parts += [pooled.extra_logits_MK[own], pooled.extra_weight_M[own]]
    return parts if pooled.loss_B is None else [*parts, pooled.loss_B[slide]]


def test_there_are_eighteen_and_more() -> None:
    assert len(NAMES) >= 18


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_every_aggregator_with_its_options(name: str) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("|")]
    ours = [row for row in rows if f"`{name}`" in row[0]]
    assert len([row for row in ours if len(row) == 2]) == 1  # its source
    assert [row for row in ours if len(row) == 4]  # what crosses ranks
    (about,) = [row for row in ours if len(row) == 5]
    parameters = inspect.signature(aggregators[name]).parameters.values()
    wanted = {p.name: str(p.default) for p in parameters if p.default is not p.empty}
    assert dict(re.findall(r"`(\w+)=([^`]+)`", about[1])) == wanted
    assert about[4] == ("own" if built(name).out_dim is None else "linear head")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_given_has_the_shapes_of_the_contract(name: str, make_bag: MakeBag) -> None:
    model = built(name)
    with torch.no_grad():
        pooled = model(make_bag(embeddings(), SIZES))
    assert pooled.slide_BX.shape == (len(SIZES), CLASSES if model.out_dim is None else model.out_dim)
    shown_nA = pooled.score_nA if pooled.attention_nA is None else pooled.attention_nA
    assert (pooled.score_nA is None) != (pooled.attention_nA is None)
    assert shown_nA.shape[0] == sum(SIZES)
    assert not pooled.per_class or shown_nA.shape[1] == CLASSES
    if pooled.attention_nA is not None:
        assert (shown_nA >= 0).all()
        for part_XA in shown_nA.split(SIZES):
            torch.testing.assert_close(part_XA.sum(0), torch.ones_like(part_XA[0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_slide_does_not_change_with_its_neighbours_in_the_step(name: str, random: bool, make_bag: MakeBag) -> None:
    model, embedding_nD, label_B = built(name, 0.25 if random else 0.0), embeddings(), torch.tensor([2, 0, 1])
    together = model(make_bag(embedding_nD, SIZES, random, label_B))
    start = 0
    for slide, size in enumerate(SIZES):
        rows = slice(start, start + size)
        alone = model(make_bag(embedding_nD[rows], (size,), random, label_B[slide : slide + 1], first_slide=slide))
        pairs = zip(of_slide(together, slide, rows), of_slide(alone, 0, slice(None)), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        start += size


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_every_slide_learns(name: str, make_bag: MakeBag) -> None:
    model, embedding_nD = built(name, 0.25, torch.float32), embeddings(dtype=torch.float32).requires_grad_()
    pooled = model(make_bag(embedding_nD, SIZES, True, torch.tensor([2, 0, 1])))
    total = pooled.slide_BX.sin().sum()
    for extra in (pooled.extra_logits_MK, pooled.loss_B):
        total = total if extra is None else total + extra.sin().sum()
    total.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    assert torch.isfinite(embedding_nD.grad).all()
    assert all(part_XD.abs().sum() > 0 for part_XD in embedding_nD.grad.split(SIZES))


@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_that_is_not_finite_is_seen_in_its_slide_and_no_other(name: str, make_bag: MakeBag) -> None:
    model, embedding_nD, label_B = built(name), embeddings(), torch.tensor([2, 0, 1])
    embedding_nD[7] = torch.nan
    pooled = model(make_bag(embedding_nD, SIZES, True, label_B))
    assert torch.isfinite(pooled.slide_BX).all(1).tolist() == [True, False, True]
    if pooled.loss_B is not None:
        assert torch.isfinite(pooled.loss_B[[0, 2]]).all()


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_drawn_by_key_and_off_without(name: str, make_bag: MakeBag) -> None:
    model, embedding_nD = built(name, 0.5), embeddings()
    plain = model(make_bag(embedding_nD, SIZES)).slide_BX
    dropped = model(make_bag(embedding_nD, SIZES, draws=True)).slide_BX
    assert not torch.allclose(plain, dropped)
    assert torch.equal(model(make_bag(embedding_nD, SIZES, draws=True)).slide_BX, dropped)
    assert torch.equal(model.train()(make_bag(embedding_nD, SIZES)).slide_BX, plain)


def test_names_and_options() -> None:
    assert isinstance(build_aggregator("gated_attention", 8, 2, {"heads": 3}), GatedAttention)
    with pytest.raises(ConfigError, match="no aggregator 'gated_atention'; did you mean 'gated_attention'"):
        build_aggregator("gated_atention", 8, 2, {})
    with pytest.raises(ConfigError, match="science.aggregator.options do not fit aggregator 'gated_attention': .*deep"):
        build_aggregator("gated_attention", 8, 2, {"deep": 3})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"hidden": 0}, "hidden=0 must be a whole number of 1 or more"),
        ("gated_attention", {"heads": 1.5}, "heads=1.5 must be a whole number of 1 or more"),
        ("gated_attention", {"dropout": 1.0}, "dropout p=1.0 of layer 'aggregator.embedding'"),
        ("multi_head", {"heads": 3}, r"heads=3 does not divide dim=64; use one of \[1, 2, 4, 8, 16, 32\]"),
        ("multi_head", {"hidden": -1}, "hidden=-1 must be a whole number of 1 or more"),
        ("additive", {"mlp": 0}, "mlp=0 must be a whole number of 1 or more"),
        ("mean", {"hidden": -4}, "hidden=-4 must be a whole number of 1 or more"),
        ("lse", {"r": 0}, "r=0 must be a number above 0"),
        ("lse", {"r": float("inf")}, "r=inf must be a number above 0"),
        ("topk_mean", {"k": 0}, "k=0 must be a whole number of 1 or more"),
        ("mean_mlp", {"hidden": 0}, "hidden=0 must be a whole number of 1 or more"),
        ("clam_sb", {"k": 0}, "k=0 must be a whole number of 1 or more"),
        ("clam_mb", {"bag_weight": 1.5}, "bag_weight=1.5 must be from 0 to 1"),
        ("dsmil", {"width": 0}, "width=0 must be a whole number of 1 or more"),
        ("dtfd", {"groups": 0}, "groups=0 must be a whole number of 1 or more"),
        ("dtfd", {"distil": "max"}, "distil='max' must be one of afs, maxs, maxmins"),
        ("abmilx", {"width": 48, "heads": 5}, r"heads=5 does not divide width=48; use one of \[1, 2, 3, 4, 6, 8, 12"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"science.aggregator.options of aggregator '{name}': {message}"):
        build_aggregator(name, 64, 2, options)


def test_only_the_mean_of_k_asks_for_more_than_one_tile() -> None:
    asked = {name: min_tiles(build_aggregator(name, 64, 2, {})) for name in NAMES}
    assert {name: tiles for name, tiles in asked.items() if tiles != 1} == {"topk_mean": 8}
    assert min_tiles(build_aggregator("topk_mean", 64, 2, {"k": 3})) == 3


def test_an_aggregator_without_a_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aggregators._factories, "odd", lambda dim: nn.Linear(dim, 2))
    with pytest.raises(ConfigError, match="aggregator 'odd' must have an attribute `out_dim`"):
        build_aggregator("odd", 8, 2, {})

"""The transformer is the textbook's, slide by slide: positions, pre-norm layers, a softmax over the slide's tiles only.

Equality over ranks: distributed/test_sequences.py and the equality matrix.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigamil.errors import ConfigError
from gigamil.models.aggregator import build_aggregator
from gigamil.models.aggregators.transformer import SlideTransformer, position_code
from gigamil.models.bag import Bag, LocalPool

SIZES = (5, 1, 3)
DIM = 6
OPTIONS = {"width": 16, "heads": 4, "layers": 2, "hidden": 8}


def make_case(**options: object) -> tuple[SlideTransformer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = SlideTransformer(DIM, **(OPTIONS | options)).double()
    embedding_ND = torch.randn(sum(SIZES), DIM, dtype=torch.float64)
    return model, embedding_ND, 2e4 * torch.rand(sum(SIZES), 2, dtype=torch.float64)


def make_bag(embedding_ND: Tensor, position_N2: Tensor, sizes: tuple[int, ...] = SIZES, key: bool = False) -> Bag:
    keys = torch.arange(len(embedding_ND)) if key else None
    return Bag(embedding_ND, position_N2, sizes, LocalPool(len(embedding_ND)), tile_key_n=keys)


def plain(model: SlideTransformer, h_ND: Tensor, position_N2: Tensor) -> tuple[Tensor, Tensor]:
    """One slide, heads and frequencies one by one."""
    columns = []
    low, high = (math.log(wavelength) for wavelength in model.wavelengths_um)
    for function in (torch.sin, torch.cos):
        for axis in (0, 1):
            for step in range(4):
                wavelength = math.exp(low + (high - low) * step / 3)
                columns.append(function(2 * math.pi * position_N2[:, axis] / wavelength))
    x = model.project(h_ND) + torch.stack(columns, dim=1)
    for layer in model.layers:
        qkv = layer.attention.qkv(layer.norm1(x))
        heads = []
        for head in range(4):
            q, k, v = qkv[:, 12 * head : 12 * head + 12].split(4, dim=1)
            heads.append(torch.softmax(q @ k.T / 2, dim=1) @ v)
        x = x + layer.attention.out(torch.cat(heads, dim=1))
        x = x + layer.mlp[2](F.gelu(layer.mlp[0](layer.norm2(x))))
    x = model.norm(x)
    attention = torch.softmax(model.pooling.score(x), dim=0)
    return attention.T @ x, attention


def test_it_is_the_formula_written_down_plainly() -> None:
    model, embedding_ND, position_N2 = make_case()
    pooled = model(make_bag(embedding_ND, position_N2))
    wanted = [plain(model, *one) for one in zip(embedding_ND.split(SIZES), position_N2.split(SIZES), strict=True)]
    torch.testing.assert_close(pooled.slide_BX, torch.cat([z for z, _ in wanted]), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(pooled.attention_nA, torch.cat([a for _, a in wanted]), rtol=1e-12, atol=1e-13)


def test_slides_do_not_see_each_other() -> None:
    model, embedding_ND, position_N2 = make_case()
    together = model(make_bag(embedding_ND, position_N2)).slide_BX
    alone = model(make_bag(embedding_ND[:5], position_N2[:5], (5,))).slide_BX
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-13)


def test_the_order_of_tiles_means_nothing_and_their_place_does() -> None:
    model, embedding_ND, position_N2 = make_case()
    size = (len(embedding_ND),)
    shuffled = torch.randperm(size[0])
    here = model(make_bag(embedding_ND, position_N2, size)).slide_BX
    other = model(make_bag(embedding_ND[shuffled], position_N2[shuffled], size)).slide_BX
    moved = model(make_bag(embedding_ND, position_N2[shuffled], size)).slide_BX
    torch.testing.assert_close(other, here, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(moved, here, rtol=1e-3)


def test_positions_are_told_apart_over_a_whole_slide_and_lie_on_a_circle() -> None:
    corner_N2 = torch.cartesian_prod(*[torch.arange(0, 50_000, 2_500, dtype=torch.float64)] * 2)
    code_ND = position_code(corner_N2, 32, 1e3, 1e5)
    distance_NN = torch.cdist(code_ND, code_ND) + 10 * torch.eye(len(code_ND))
    assert float(distance_NN.min()) > 0.1
    torch.testing.assert_close(code_ND.norm(dim=1), torch.full((len(code_ND),), 4.0, dtype=torch.float64))


def test_dropout_is_keyed() -> None:
    model, embedding_ND, position_N2 = make_case(dropout=0.5)
    first, again = (model(make_bag(embedding_ND, position_N2, key=True)).slide_BX for _ in range(2))
    without = model(make_bag(embedding_ND, position_N2)).slide_BX
    assert torch.equal(first, again)
    assert not torch.allclose(first, without, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads=3 does not divide width=256; use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"heads": 0}, "heads=0 must be a whole number"),
        ({"width": 6, "heads": 2}, "width=6 must be a multiple of 4"),
        ({"layers": 0}, "layers=0 must be a whole number of 1 or more"),
        ({"min_wavelength_um": 2e5}, "are no range in micron"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_aggregator("transformer", DIM, 2, options)


def test_it_runs_in_float32() -> None:
    model, embedding_ND, position_N2 = make_case()
    pooled = model.float()(make_bag(embedding_ND.float(), position_N2))
    assert pooled.slide_BX.dtype == pooled.attention_nA.dtype == torch.float32

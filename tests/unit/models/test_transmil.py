"""TransMIL is the paper's formulas, written down again here for one slide in one process.

Equality over ranks: distributed/test_sequences.py and the equality matrix.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gigamil.errors import ConfigError
from gigamil.models.aggregator import build_aggregator
from gigamil.models.aggregators import transmil
from gigamil.models.aggregators.transmil import (
    NystromAttention,
    SquareConvolution,
    TransMIL,
    iterative_pinv,
    make_tokens,
)
from gigamil.models.bag import Bag, LocalPool

SIZES = (13, 1, 6, 40)
DIM, WIDTH, HEADS, LANDMARKS = 6, 16, 2, 7


def make_case(landmarks: int = LANDMARKS) -> tuple[TransMIL, Tensor]:
    torch.manual_seed(0)
    model = TransMIL(DIM, width=WIDTH, heads=HEADS, landmarks=landmarks).double()
    with torch.no_grad():  # weights at which attention is not flat, and biases that are not zero
        for block in (model.attention1, model.attention2):
            block.qkv.weight *= 4
        model.square.bias_D.normal_()
        model.class_token_1D.normal_()
    return model, torch.randn(sum(SIZES), DIM, dtype=torch.float64)


def make_bag(embedding_ND: Tensor, sizes: tuple[int, ...] = SIZES) -> Bag:
    position_N2 = torch.zeros(len(embedding_ND), 2, dtype=torch.float64)
    return Bag(embedding_ND, position_N2, sizes, LocalPool(len(embedding_ND)))


def plain_attention(block: NystromAttention, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Change of x, and the class token's row of the approximated matrix."""
    num_tokens, d = len(x_TD), WIDTH // HEADS
    m = min(block.landmarks, num_tokens)
    segments = [[t for t in range(num_tokens) if t * m // num_tokens == i] for i in range(m)]
    q_TD, k_TD, v_TD = block.qkv(x_TD).chunk(3, dim=1)
    parts, rows = [], []
    for head in range(HEADS):
        q, k, v = (values[:, head * d : head * d + d] for values in (q_TD, k_TD, v_TD))
        q_l = torch.stack([q[segment].mean(0) for segment in segments])
        k_l = torch.stack([k[segment].mean(0) for segment in segments])
        first, second, third = (
            torch.softmax(left @ right.T / math.sqrt(d), dim=1) for left, right in ((q, k_l), (q_l, k_l), (q_l, k))
        )
        z = second.T / (second.abs().sum(0).max() * second.abs().sum(1).max())
        one = torch.eye(m, dtype=z.dtype)
        for _ in range(6):
            z = z @ (13 * one - second @ z @ (15 * one - second @ z @ (7 * one - second @ z))) / 4
        matrix = first @ z @ third
        kernel = block.kernel_H1k[head, 0]
        along = torch.stack(
            [
                sum(kernel[j] * v[t + j - 16] for j in range(33) if 0 <= t + j - 16 < num_tokens)
                for t in range(num_tokens)
            ]
        )
        parts.append(matrix @ v + along)
        rows.append(matrix[0])
    return block.out(torch.cat(parts, dim=1)), torch.stack(rows).mean(0)


def plain_square(block: SquareConvolution, x_TD: Tensor) -> Tensor:
    side = math.isqrt(len(x_TD) - 1)
    image = x_TD[1:].T.reshape(1, WIDTH, side, side)
    found = image + block.bias_D[:, None, None]
    for kernel in (block.kernel7_D1kk, block.kernel5_D1kk, block.kernel3_D1kk):
        found = found + F.conv2d(image, kernel, padding=kernel.shape[-1] // 2, groups=WIDTH)
    return torch.cat([x_TD[:1], found[0].reshape(WIDTH, -1).T])


def plain(model: TransMIL, h_ND: Tensor) -> tuple[Tensor, Tensor]:
    x_ND = F.relu(model.project(h_ND))
    num_tiles, side = len(x_ND), math.ceil(math.sqrt(len(x_ND)))
    x_TD = torch.cat([model.class_token_1D, x_ND, x_ND[: side**2 - num_tiles]])
    x_TD = x_TD + plain_attention(model.attention1, model.norm1(x_TD))[0]
    x_TD = plain_square(model.square, x_TD)
    change_TD, row_T = plain_attention(model.attention2, model.norm2(x_TD))
    weight_N = row_T[1 : 1 + num_tiles].clamp(min=2**-26 / num_tiles)
    return model.norm(x_TD + change_TD)[:1], (weight_N / weight_N.sum())[:, None]


@pytest.mark.parametrize("landmarks", [1, LANDMARKS, 100])
def test_it_is_the_formula_written_down_plainly(landmarks: int) -> None:
    model, embedding_ND = make_case(landmarks)
    embedding_ND.requires_grad_()
    found = model(make_bag(embedding_ND)).slide_BX
    wanted = torch.cat([plain(model, h_ND)[0] for h_ND in embedding_ND.split(SIZES)])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    leaves = [embedding_ND, *model.parameters()]
    weights = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((slide_BX * weights).sum(), leaves) for slide_BX in (found, wanted)]
    for found_X, wanted_X in zip(*gradients, strict=True):
        torch.testing.assert_close(found_X, wanted_X, rtol=1e-9, atol=1e-10 * float(wanted_X.abs().max()))


def test_attention_is_the_row_of_the_class_token() -> None:
    model, embedding_ND = make_case()
    assert model(make_bag(embedding_ND)).attention_nA is None
    with torch.no_grad():
        found = model(make_bag(embedding_ND)).attention_nA
        wanted = torch.cat([plain(model, h_ND)[1] for h_ND in embedding_ND.split(SIZES)])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    sums = [float(part.sum()) for part in found.split(SIZES)]
    assert sums == pytest.approx([1.0] * len(SIZES), rel=1e-12)


def test_one_slide_does_not_change_another() -> None:
    # The authors' code starts the pseudo-inverse from a maximum over the batch.
    model, embedding_ND = make_case()
    together = model(make_bag(embedding_ND)).slide_BX[:1]
    alone = model(make_bag(embedding_ND[: SIZES[0]], SIZES[:1])).slide_BX
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 4, 5, 9, 10, 50])
def test_a_sequence_is_a_class_token_and_a_square(num_tiles: int) -> None:
    tile_ND = torch.arange(1, num_tiles + 1)[:, None].double()
    tokens = make_tokens(tile_ND, torch.zeros(1, 1, dtype=torch.float64), make_bag(tile_ND, (num_tiles,)))
    side = math.ceil(math.sqrt(num_tiles))
    numbers = list(range(1, num_tiles + 1))
    assert tokens.embedding_nD.flatten().tolist() == [0, *numbers, *numbers[: side**2 - num_tiles]]
    assert tokens.sizes == (side**2 + 1,)


def test_the_pseudo_inverse_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transmil, "PINV_ITERATIONS", 30)
    generator = torch.Generator().manual_seed(1)
    matrix_Xmm = torch.softmax(4 * torch.randn(3, 5, 5, dtype=torch.float64, generator=generator), dim=2)
    found = iterative_pinv(matrix_Xmm)
    torch.testing.assert_close(found, torch.linalg.pinv(matrix_Xmm), rtol=1e-8, atol=1e-8)


def test_dropout_is_keyed_by_tile() -> None:
    torch.manual_seed(0)
    model = TransMIL(DIM, width=WIDTH, heads=HEADS, landmarks=LANDMARKS, dropout=0.5).double()
    bag = make_bag(torch.randn(sum(SIZES), DIM, dtype=torch.float64))
    without = model(bag).slide_BX
    bag.tile_key_n = torch.arange(sum(SIZES))
    assert torch.equal(model(bag).slide_BX, model(bag).slide_BX)
    assert not torch.allclose(model(bag).slide_BX, without, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"heads=3 does not divide width=512; use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"landmarks": 0}, "landmarks=0 must be a whole number of 1 or more"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_aggregator("transmil", DIM, 2, options)


def test_it_runs_in_float32() -> None:
    model, embedding_ND = make_case()
    with torch.no_grad():
        pooled = model.float()(make_bag(embedding_ND.float()))
    assert pooled.slide_BX.dtype == pooled.attention_nA.dtype == torch.float32

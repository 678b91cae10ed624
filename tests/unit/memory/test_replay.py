"""A replayed chunk gives the gradient of a kept one, bit for bit, layers that draw from torch's generator included."""

import pytest
import torch
from torch import Tensor, nn

from gigamil.memory.replay import backward_chunk, encode_chunk


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 5)).train()


def gradients(keeps: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """Embeddings and gradients of three chunks, of which some are kept."""
    encoder = make_encoder()
    image_nX = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    cotangent_nD = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    calls = [lambda part=part: encoder(part) for part in image_nX.split(3)]
    chunks = [encode_chunk(call, keep) for call, keep in zip(calls, keeps, strict=True)]
    for chunk, call, cotangent_cD in zip(chunks, calls, cotangent_nD.split(3), strict=True):
        backward_chunk(chunk, call, cotangent_cD, lambda scalar: scalar.backward())
    return torch.cat([chunk.embedding_cD for chunk in chunks]), [p.grad for p in encoder.parameters()]


@pytest.mark.parametrize("keeps", [[False] * 3, [True, False, False], [False, True, False]])
def test_replayed_is_kept_bit_for_bit_with_torch_dropout(keeps: list[bool]) -> None:
    embedding_nD, kept = gradients([True] * 3)
    again_nD, found = gradients(keeps)
    assert torch.equal(again_nD, embedding_nD)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_the_gradient_is_that_of_the_whole() -> None:
    encoder = make_encoder().eval().double()
    image_nX = torch.randn(9, 6, dtype=torch.float64)
    encoder(image_nX).square().sum().backward()
    wanted = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    calls = [lambda part=part: encoder(part) for part in image_nX.split(4)]
    chunks = [encode_chunk(call, keep=number == 1) for number, call in enumerate(calls)]
    for chunk, call in zip(chunks, calls, strict=True):
        backward_chunk(chunk, call, 2 * chunk.embedding_cD, lambda scalar: scalar.backward())
    for parameter, gradient in zip(encoder.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-13)


def test_what_comes_after_a_replay_draws_as_if_there_had_been_none() -> None:
    encoder = make_encoder()
    chunk = encode_chunk(lambda: encoder(torch.ones(2, 6)), keep=False)
    before = torch.get_rng_state()
    backward_chunk(chunk, lambda: encoder(torch.ones(2, 6)), torch.ones(2, 5), lambda scalar: scalar.backward())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_put_back_when_the_replay_fails() -> None:
    chunk = encode_chunk(lambda: torch.rand(2, 2), keep=False)
    before = torch.get_rng_state()

    def broken() -> Tensor:
        torch.rand(1)
        raise ValueError("no tiles")

    with pytest.raises(ValueError, match="no tiles"):
        backward_chunk(chunk, broken, torch.ones(2, 2), lambda scalar: None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_chunk_holds_its_graph_only_while_it_is_needed(keep: bool) -> None:
    encoder, calls = make_encoder(), 0

    def encode() -> Tensor:
        nonlocal calls
        calls += 1
        return encoder(torch.ones(2, 6))

    chunk = encode_chunk(encode, keep)
    assert not chunk.embedding_cD.requires_grad
    assert (chunk.graph_cD is not None) == keep
    backward_chunk(chunk, encode, torch.ones(2, 5), lambda scalar: scalar.backward())
    assert chunk.graph_cD is None
    assert calls == (1 if keep else 2)


def test_a_narrow_embedding_takes_a_wide_cotangent() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    chunk = encode_chunk(lambda: weight[None] * 2, keep=True)
    cotangent = torch.tensor([[1.0, 0.5, 0.25]])
    seen: list[torch.dtype] = []

    def backward(scalar: Tensor) -> None:
        seen.append(scalar.dtype)
        scalar.backward()

    backward_chunk(chunk, lambda: weight[None] * 2, cotangent, backward)
    assert seen == [torch.float32]
    assert weight.grad.tolist() == [2.0, 1.0, 0.5]

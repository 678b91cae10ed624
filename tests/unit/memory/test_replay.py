"""A replayed chunk gives the gradient of a kept one, bit for bit, layers that draw from torch's generator included."""

import pytest
import torch
from torch import Tensor, nn

from gigamil.memory.replay import EncodedChunk, chunk_with_graph, cotangent_product, encode_chunk

ROWS = ((0, 3), (3, 6), (6, 9))


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 5)).train()


class Calls:
    """Encoder calls on rows of some images, counted."""

    def __init__(self, encoder: nn.Module, image_nX: Tensor) -> None:
        self.encoder = encoder
        self.image_nX = image_nX
        self.count = 0

    def __call__(self, start: int, stop: int) -> Tensor:
        self.count += 1
        return self.encoder(self.image_nX[start:stop])

    def backward(self, chunk: EncodedChunk, cotangent_cD: Tensor) -> None:
        cotangent_product(chunk_with_graph(chunk, self), cotangent_cD).backward()


def gradients(keeps: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """Embeddings and gradients of three chunks, of which some are kept."""
    encoder = make_encoder()
    calls = Calls(encoder, torch.randn(9, 6, generator=torch.Generator().manual_seed(1)))
    cotangent_nD = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    chunks, parts = zip(
        *(encode_chunk(calls, *rows, keep) for rows, keep in zip(ROWS, keeps, strict=True)), strict=True
    )
    for chunk in chunks:
        calls.backward(chunk, cotangent_nD[chunk.start : chunk.stop])
    return torch.cat(parts), [p.grad for p in encoder.parameters()]


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
    calls = Calls(encoder, image_nX)
    for start, stop in ((0, 4), (4, 8), (8, 9)):
        chunk, embedding_cD = encode_chunk(calls, start, stop, keep=start == 4)
        calls.backward(chunk, 2 * embedding_cD)
    for parameter, gradient in zip(encoder.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-13)


def test_what_comes_after_a_replay_draws_as_if_there_had_been_none() -> None:
    calls = Calls(make_encoder(), torch.ones(2, 6))
    chunk, _ = encode_chunk(calls, 0, 2, keep=False)
    before = torch.get_rng_state()
    calls.backward(chunk, torch.ones(2, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_put_back_when_the_replay_fails() -> None:
    chunk, _ = encode_chunk(lambda start, stop: torch.rand(stop - start, 2), 0, 2, keep=False)
    before = torch.get_rng_state()

    def broken(start: int, stop: int) -> Tensor:
        torch.rand(1)
        raise ValueError("no tiles")

    with pytest.raises(ValueError, match="no tiles"):
        chunk_with_graph(chunk, broken)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_chunk_holds_its_graph_only_while_it_is_needed(keep: bool) -> None:
    calls = Calls(make_encoder(), torch.ones(2, 6))
    chunk, embedding_cD = encode_chunk(calls, 0, 2, keep)
    assert not embedding_cD.requires_grad
    assert (chunk.graph_cD is not None) == keep
    calls.backward(chunk, torch.ones(2, 5))
    assert chunk.graph_cD is None
    assert calls.count == (1 if keep else 2)


def test_a_narrow_embedding_takes_a_wide_cotangent() -> None:
    weight = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    chunk, _ = encode_chunk(lambda start, stop: weight[None] * 2, 0, 1, keep=True)
    product = cotangent_product(
        chunk_with_graph(chunk, lambda start, stop: weight[None]), torch.tensor([[1.0, 0.5, 0.25]])
    )
    assert product.dtype == torch.float32
    product.backward()
    assert weight.grad.tolist() == [2.0, 1.0, 0.5]

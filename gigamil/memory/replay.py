"""Encode chunks once, back-propagate each when its cotangent is known: graphs are kept, or made again.

A slide loss needs a tile only through its embedding h_i. So after one backward through the head, dL/dh_i is all that
the encoder needs: a kept chunk back-propagates at once (3 forwards' worth of work), another is encoded again with a
graph first (4). The gradients add up in chunk order whichever it is, so the sum has the same bits.
Source: Andersson et al. 2022, arXiv:2203.03981; Gao et al. 2021 (GradCache), arXiv:2101.06983.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_RandomState = tuple[Tensor, Tensor | None]


@dataclass
class EncodedChunk:
    """A chunk after the first pass.

    Attributes:
        embedding_cD: detached embeddings of the chunk.
        graph_cD: the same with its graph, if it was kept.
        random_state: of torch's global generators before the first pass, for layers of others that draw from them.
    """

    embedding_cD: Tensor
    graph_cD: Tensor | None
    random_state: _RandomState | None


def encode_chunk(encode: Callable[[], Tensor], keep: bool) -> EncodedChunk:
    """First pass over a chunk: with its graph if `keep`, else without."""
    if keep:
        graph = encode()
        return EncodedChunk(graph.detach(), graph, None)
    state = _random_state()
    with torch.no_grad():
        return EncodedChunk(encode(), None, state)


def backward_chunk(
    chunk: EncodedChunk, encode: Callable[[], Tensor], cotangent_cD: Tensor, backward: Callable[[Tensor], None]
) -> None:
    """Back-propagate dL/dh of a chunk into the encoder, encoding it again if its graph was not kept.

    Args:
        chunk: result of `encode_chunk`; its graph is released.
        encode: the same callable as in the first pass.
        cotangent_cD: dL/dh, float32 or wider.
        backward: back-propagates a scalar (the engine's own).
    """
    graph, chunk.graph_cD = chunk.graph_cD, None
    if graph is None:
        graph = _encode_again(encode, chunk.random_state)
    # d/dh of sum(h g) is g itself, exactly: the scalar is only what engines know how to back-propagate.
    backward((graph.to(cotangent_cD.dtype) * cotangent_cD).sum())


def _encode_again(encode: Callable[[], Tensor], state: _RandomState | None) -> Tensor:
    if state is None:
        return encode()
    now = _random_state()
    _set_random_state(state)
    try:
        return encode()
    finally:
        _set_random_state(now)


def _random_state() -> _RandomState:
    # is_initialized, not is_available: asking for the state would start CUDA in a CPU run.
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: _RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])

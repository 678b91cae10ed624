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
        start, stop: rows of this rank's tiles; equal for a blank chunk.
        graph_cD: embeddings with their graph, if it was kept.
        random_state: of torch's global generators before the first pass, if layers of others drew from them; rows of
            the chunk can then not be encoded again apart from each other. None (it takes 5 KB) if nothing did.
        slide: of the group, where its ranks encode one slide together; None if the rows say all.
    """

    start: int
    stop: int
    graph_cD: Tensor | None
    random_state: _RandomState | None = None
    slide: int | None = None


def encode_chunk(
    encode: Callable[[int, int], Tensor], start: int, stop: int, keep: bool
) -> tuple[EncodedChunk, Tensor]:
    """First pass over rows start..stop - 1: with its graph if `keep`, else without.

    Returns:
        What the second pass needs, and the embeddings, detached.
    """
    state = _random_state()
    with torch.set_grad_enabled(keep):
        embedding_cD = encode(start, stop)
    drawn_from = None if _is_equal(state, _random_state()) else state
    return EncodedChunk(start, stop, embedding_cD if keep else None, drawn_from), embedding_cD.detach()


def chunk_with_graph(chunk: EncodedChunk, encode: Callable[[int, int], Tensor]) -> Tensor:
    """The embeddings with their graph, for backward: the kept ones, which are given up, or encoded again."""
    graph_cD, chunk.graph_cD = chunk.graph_cD, None
    if graph_cD is not None:
        return graph_cD
    if chunk.random_state is None:
        return encode(chunk.start, chunk.stop)
    now = _random_state()
    _set_random_state(chunk.random_state)
    try:
        return encode(chunk.start, chunk.stop)
    finally:
        _set_random_state(now)


def cotangent_product(graph_cD: Tensor, cotangent_cD: Tensor) -> Tensor:
    """The scalar whose gradient by h is the cotangent g, exactly: sum(h g), which is all that engines can take."""
    return (graph_cD.to(cotangent_cD.dtype) * cotangent_cD).sum()


def _random_state() -> _RandomState:
    # is_initialized, not is_available: asking for the state would start CUDA in a CPU run.
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _is_equal(state: _RandomState, other: _RandomState) -> bool:
    return all(a is None or b is None or torch.equal(a, b) for a, b in zip(state, other, strict=True))


def _set_random_state(state: _RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])

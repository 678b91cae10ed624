"""Attention pooling in blocks of rows: memory per tile is the embedding and its gradient, whatever the head's width.

Shapes: n tiles on this rank, b rows of a block, B slides, D embedding, V pooled values, A attention heads, X = V + 1.
A head looks at tiles one by one until it sums over them. So blocks of rows go through it one after the other, forward
and again backward, and neither (n, hidden) activations nor a second (n, D) gradient ever exist.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigamil.models.bag import Bag

BLOCK = 4096  # rows; 4 MB for each (b, 256) float32 intermediate

Rows = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def rowwise_softmax_pool(
    rows: Rows, parameters: Sequence[Tensor], bag: Bag, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Pool each slide's values with a softmax over all its tiles; the same as `softmax_pool`, with less memory.

    Args:
        rows: (embedding_bD, tile_key_b) -> unnormalised attention (b, A) and values (b, V) of these rows, float32 or
            wider; looks at each row alone and draws by key only, because it runs again in backward.
        parameters: all that `rows` uses and that want a gradient.
        bag: embeddings, and which tile belongs to which slide.
        block: rows at once.
    Returns:
        Pooled values (B, A, V), equal on all ranks, and attention (n, A), detached.
    Cost: `rows` forward twice and backward once; one max all-reduce of B A numbers, one sum of B A (V + 1), one sum of
        that size in backward. Saved for backward: nothing but the embeddings. Not differentiable twice.
    Source: Ilse et al. 2018, arXiv:1802.04712; running max, Milakov & Gimelshein 2018, arXiv:1805.02867; recomputation
        in blocks, Rabe & Staats 2021, arXiv:2112.05682. Test: unit/models/test_rowwise.py.
    """
    blocks = list(_blocks(bag, block))
    with torch.no_grad():
        logit_nA, max_BA, sums_BAX = _sweep(rows, bag, blocks)
        # softmax(l) v = sum(e v) / sum(e) with e = exp(l - m) for any m, here the maximum over all ranks.
        shift_BA = bag.pool.max(max_BA)
        sums_BAX *= torch.exp(max_BA - shift_BA)[:, :, None]
    own_BAX: Tensor = _Sums.apply(bag.embedding_nD, sums_BAX, shift_BA, rows, bag.tile_key_n, blocks, *parameters)
    total_BAX = bag.pool.sum(own_BAX)
    norm_BA = total_BAX[:, :, -1]
    attention_nA = logit_nA.sub_(shift_BA[bag.slide_index_n]).exp_().div_(norm_BA.detach()[bag.slide_index_n])
    return total_BAX[:, :, :-1] / norm_BA[:, :, None], attention_nA


class _Sums(torch.autograd.Function):
    """sum over a slide's own rows of exp(logit - shift) x (value, 1); forward is given, backward runs `rows` again."""

    @staticmethod
    def forward(
        ctx: Any, embedding_nD: Tensor, sums_BAX: Tensor, shift_BA: Tensor, rows: Rows, tile_key_n: Tensor | None,
        blocks: list[tuple[int, int, int]], *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        """The sums that the sweep found."""
        ctx.save_for_backward(embedding_nD, shift_BA, *parameters)
        ctx.rows, ctx.tile_key_n, ctx.blocks = rows, tile_key_n, blocks
        return sums_BAX.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Block by block into one buffer for the embeddings' gradient."""
        embedding_nD, shift_BA, *parameters = ctx.saved_tensors
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        grad_nD = torch.empty_like(embedding_nD)
        found = {id(parameter): torch.zeros_like(parameter) for parameter in wanted}
        for slide, start, stop in ctx.blocks:
            embedding_bD = embedding_nD[start:stop].detach().requires_grad_()
            with torch.enable_grad():
                logit_bA, value_bV = ctx.rows(
                    embedding_bD, None if ctx.tile_key_n is None else ctx.tile_key_n[start:stop]
                )
                sums_AX = _weighted(torch.exp(logit_bA - shift_BA[slide]), value_bV)
            grad_bD, *of_parameters = torch.autograd.grad(sums_AX, [embedding_bD, *wanted], grads[0][slide])
            grad_nD[start:stop] = grad_bD
            for parameter, gradient in zip(wanted, of_parameters, strict=True):
                found[id(parameter)] += gradient
        return grad_nD, None, None, None, None, None, *(found.get(id(parameter)) for parameter in parameters)


def _sweep(rows: Rows, bag: Bag, blocks: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, A), their maximum per slide on this rank (B, A), and the sums relative to it (B, A, X)."""
    # No rows at all tell the widths, and are all that a rank without tiles has.
    logit_0A, value_0V = rows(bag.embedding_nD[:0], None if bag.tile_key_n is None else bag.tile_key_n[:0])
    heads, width = logit_0A.shape[1], value_0V.shape[1]
    logit_nA = logit_0A.new_empty((len(bag.embedding_nD), heads))
    max_BA = logit_0A.new_full((bag.num_slides, heads), -torch.inf)
    sums_BAX = value_0V.new_zeros((bag.num_slides, heads, width + 1))
    for slide, start, stop in blocks:
        key_b = None if bag.tile_key_n is None else bag.tile_key_n[start:stop]
        logit_bA, value_bV = rows(bag.embedding_nD[start:stop], key_b)
        higher_A = torch.maximum(max_BA[slide], logit_bA.amax(0))
        sums_BAX[slide] *= torch.exp(max_BA[slide] - higher_A)[:, None]
        sums_BAX[slide] += _weighted(torch.exp(logit_bA - higher_A), value_bV)
        max_BA[slide] = higher_A
        logit_nA[start:stop] = logit_bA
    return logit_nA, max_BA, sums_BAX


def _weighted(weight_bA: Tensor, value_bV: Tensor) -> Tensor:
    """Weighted sum of values and sum of weights, (A, X)."""
    return torch.cat([weight_bA.T @ value_bV, weight_bA.sum(0)[:, None]], dim=1)


def _blocks(bag: Bag, block: int) -> Iterator[tuple[int, int, int]]:
    """(slide, first row, one past the last) of at most `block` rows of one slide."""
    for slide, (first, last) in enumerate(bag.runs()):
        for start in range(first, last, block):
            yield slide, start, min(start + block, last)

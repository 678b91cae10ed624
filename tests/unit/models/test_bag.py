"""Pooling by segments is a softmax per slide, as torch computes it."""

import pytest
import torch
from torch import Tensor

from gigamil.models.bag import Bag, LocalPool, softmax_pool

SIZES = (5, 1, 3)


def make_bag(num_slides: int, slide_index_n: Tensor) -> Bag:
    return Bag(
        embedding_nD=torch.zeros(len(slide_index_n), 1),
        slide_index_n=slide_index_n,
        position_n2=torch.zeros(len(slide_index_n), 2, dtype=torch.float64),
        num_slides=num_slides,
        tile_key_n=None,
        slide_key_B=None,
        pool=LocalPool(),
    )


def case(heads: int = 2, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    index_n = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    logit_nA = torch.randn(len(index_n), heads, dtype=torch.float64, generator=generator).mul_(3).requires_grad_()
    value_nD = torch.randn(len(index_n), dim, dtype=torch.float64, generator=generator).requires_grad_()
    return logit_nA, value_nD, index_n


def reference(logit_nA: Tensor, value_nD: Tensor, index_n: Tensor) -> tuple[Tensor, Tensor]:
    pooled, attention = [], []
    for slide in range(len(SIZES)):
        own = index_n == slide
        attention.append(torch.softmax(logit_nA[own], dim=0))
        pooled.append(attention[-1].T @ value_nD[own])
    return torch.stack(pooled), torch.cat(attention)


def test_softmax_pool_is_torch_softmax_per_slide() -> None:
    logit_nA, value_nD, index_n = case()
    pooled_BAD, attention_nA = softmax_pool(logit_nA, value_nD, make_bag(len(SIZES), index_n))
    wanted_BAD, wanted_nA = reference(logit_nA, value_nD, index_n)
    torch.testing.assert_close(pooled_BAD, wanted_BAD, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(attention_nA, wanted_nA, rtol=1e-13, atol=1e-15)
    found = torch.autograd.grad(pooled_BAD.sin().sum(), [logit_nA, value_nD])
    wanted = torch.autograd.grad(wanted_BAD.sin().sum(), [logit_nA, value_nD])
    for found_nX, wanted_nX in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_nX, wanted_nX, rtol=1e-12, atol=1e-14)


def test_tiles_of_slides_may_be_interleaved() -> None:
    logit_nA, value_nD, index_n = case()
    shuffled = torch.randperm(len(index_n), generator=torch.Generator().manual_seed(1))
    pooled_BAD, attention_nA = softmax_pool(logit_nA, value_nD, make_bag(len(SIZES), index_n))
    other_BAD, other_nA = softmax_pool(logit_nA[shuffled], value_nD[shuffled], make_bag(len(SIZES), index_n[shuffled]))
    torch.testing.assert_close(other_BAD, pooled_BAD, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(other_nA, attention_nA[shuffled], rtol=1e-13, atol=1e-15)


def test_gradcheck() -> None:
    logit_nA, value_nD, index_n = case(dim=2)
    bag = make_bag(len(SIZES), index_n)
    assert torch.autograd.gradcheck(lambda logit, value: softmax_pool(logit, value, bag), (logit_nA, value_nD))


def test_large_logits_do_not_overflow() -> None:
    index_n = torch.tensor([0, 0, 1])
    logit_nA = torch.tensor([[1e4], [1e4], [-1e4]])
    pooled_BAD, attention_nA = softmax_pool(logit_nA, torch.tensor([[1.0], [3.0], [7.0]]), make_bag(2, index_n))
    assert pooled_BAD.flatten().tolist() == [2.0, 7.0]
    assert attention_nA.flatten().tolist() == [0.5, 0.5, 1.0]


def test_narrow_inputs_are_summed_in_float32() -> None:
    index_n = torch.zeros(3000, dtype=torch.int64)
    ones = torch.ones(3000, 1, dtype=torch.bfloat16)
    pooled_BAD, attention_nA = softmax_pool(ones, ones, make_bag(1, index_n))  # bfloat16 would stop at 256
    assert pooled_BAD.dtype == attention_nA.dtype == torch.float32
    assert float(pooled_BAD) == 1.0


def test_segments_without_a_tile_are_the_identities() -> None:
    pool, values_nX, index_n = LocalPool(), torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([2, 2])
    assert pool.segment_max(values_nX, index_n, 4).tolist() == [[-torch.inf] * 2] * 2 + [[3.0, -2.0], [-torch.inf] * 2]
    assert pool.segment_sum(values_nX, index_n, 4).tolist() == [[0.0, 0.0], [0.0, 0.0], [4.0, -6.0], [0.0, 0.0]]
    nothing, nowhere = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    assert pool.segment_max(nothing, nowhere, 1).tolist() == [[-torch.inf] * 2]
    assert pool.segment_sum(nothing, nowhere, 1).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_maximum_is_detached_and_the_sum_is_not(dtype: torch.dtype) -> None:
    values_nX = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    index_n = torch.tensor([0, 1])
    assert not LocalPool().segment_max(values_nX, index_n, 2).requires_grad
    assert LocalPool().segment_sum(values_nX, index_n, 2).requires_grad

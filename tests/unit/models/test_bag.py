"""What a bag says of all tiles of a slide is what torch says of the slide's rows, and ties go to the lowest number."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gigamil.models.bag import Bag, LocalPool, softmax_pool

MakeBag = Callable[..., Bag]
SIZES = (5, 1, 3)


class PartOfPool(LocalPool):
    """What the second of three ranks knows of its place; only for what does not communicate."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__(sum(counts))
        self.counts, self.rank = counts, 1


def part_of_bag(sizes: tuple[int, ...], counts: tuple[int, ...]) -> Bag:
    return Bag(torch.zeros(counts[1], 2), torch.zeros(counts[1], 2), sizes, PartOfPool(counts))


def bag_of(make_bag: MakeBag, values_nX: Tensor, sizes: tuple[int, ...] = SIZES) -> Bag:
    return make_bag(torch.zeros(len(values_nX), 1), sizes)


def case(heads: int = 2, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logit_nA = torch.randn(sum(SIZES), heads, dtype=torch.float64, generator=generator).mul_(3).requires_grad_()
    value_nD = torch.randn(sum(SIZES), dim, dtype=torch.float64, generator=generator).requires_grad_()
    return logit_nA, value_nD


def test_softmax_pool_is_torch_softmax_per_slide(make_bag: MakeBag) -> None:
    logit_nA, value_nD = case()
    pooled_BAD, attention_nA = softmax_pool(logit_nA, value_nD, bag_of(make_bag, value_nD))
    parts = [torch.softmax(part, dim=0) for part in logit_nA.split(SIZES)]
    wanted_BAD = torch.stack([a.T @ v for a, v in zip(parts, value_nD.split(SIZES), strict=True)])
    torch.testing.assert_close(pooled_BAD, wanted_BAD, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(attention_nA, torch.cat(parts), rtol=1e-13, atol=1e-15)
    found = torch.autograd.grad(pooled_BAD.sin().sum(), [logit_nA, value_nD])
    wanted = torch.autograd.grad(wanted_BAD.sin().sum(), [logit_nA, value_nD])
    for found_nX, wanted_nX in zip(found, wanted, strict=True):
        torch.testing.assert_close(found_nX, wanted_nX, rtol=1e-12, atol=1e-14)


def test_gradcheck(make_bag: MakeBag) -> None:
    logit_nA, value_nD = case(dim=2)
    bag = bag_of(make_bag, value_nD)
    assert torch.autograd.gradcheck(lambda logit, value: softmax_pool(logit, value, bag), (logit_nA, value_nD))


def test_large_logits_do_not_overflow(make_bag: MakeBag) -> None:
    logit_nA, value_nD = torch.tensor([[1e4], [1e4], [-1e4]]), torch.tensor([[1.0], [3.0], [7.0]])
    pooled_BAD, attention_nA = softmax_pool(logit_nA, value_nD, bag_of(make_bag, value_nD, (2, 1)))
    assert pooled_BAD.flatten().tolist() == [2.0, 7.0]
    assert attention_nA.flatten().tolist() == [0.5, 0.5, 1.0]


def test_narrow_inputs_are_summed_in_float32(make_bag: MakeBag) -> None:
    ones = torch.ones(3000, 1, dtype=torch.bfloat16)
    pooled_BAD, attention_nA = softmax_pool(ones, ones, bag_of(make_bag, ones, (3000,)))  # bfloat16 would stop at 256
    assert pooled_BAD.dtype == attention_nA.dtype == torch.float32
    assert float(pooled_BAD) == 1.0


def test_the_reductions_of_slides(make_bag: MakeBag) -> None:
    values_nX, _ = case()
    bag, parts = bag_of(make_bag, values_nX), values_nX.split(SIZES)
    torch.testing.assert_close(bag.segment_sum(values_nX), torch.stack([part.sum(0) for part in parts]))
    torch.testing.assert_close(bag.segment_mean(values_nX), torch.stack([part.mean(0) for part in parts]))
    assert torch.equal(bag.segment_max(values_nX), torch.stack([part.amax(0) for part in parts]))
    torch.testing.assert_close(bag.segment_softmax(values_nX), torch.cat([part.softmax(0) for part in parts]))


def test_segments_of_ones_own_and_those_without_a_tile(make_bag: MakeBag) -> None:
    values_nX, segment_n = torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([2, 2])
    bag = bag_of(make_bag, values_nX, (2,))
    nothing = [-torch.inf, -torch.inf]
    assert bag.segment_max(values_nX, segment_n, 4).tolist() == [nothing, nothing, [3.0, -2.0], nothing]
    assert bag.segment_sum(values_nX, segment_n, 4).tolist() == [[0.0, 0.0], [0.0, 0.0], [4.0, -6.0], [0.0, 0.0]]
    deep_nXY = values_nX[:, :, None].expand(-1, -1, 3)
    assert bag.segment_max(deep_nXY, segment_n, 3)[2].tolist() == [[3.0] * 3, [-2.0] * 3]
    assert bag.segment_sum(deep_nXY, segment_n, 3)[2].tolist() == [[4.0] * 3, [-6.0] * 3]


@pytest.mark.parametrize(
    "half", [{"segment_n": torch.tensor([1, 0])}, {"num_segments": 2}], ids=["segment_n", "num_segments"]
)
def test_segments_without_their_number_are_refused(half: dict[str, object], make_bag: MakeBag) -> None:
    bag = bag_of(make_bag, torch.ones(2, 1), (2,))
    for reduction in (bag.segment_max, bag.segment_sum):
        with pytest.raises(ValueError, match="segment_n and num_segments"):
            reduction(torch.ones(2, 1), **half)


def test_own_rows_are_those_of_this_rank() -> None:
    bag = part_of_bag((5, 1, 3, 2), (4, 4, 3))  # tiles 4 to 7
    assert bag.own_rows(torch.tensor([[3, 4], [7, 8], [-1, 5]])).tolist() == [[4, 0], [3, 4], [4, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_maximum_is_detached_and_the_sum_is_not(dtype: torch.dtype, make_bag: MakeBag) -> None:
    values_nX = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    bag = bag_of(make_bag, values_nX, (1, 1))
    assert not bag.segment_max(values_nX).requires_grad
    assert bag.segment_sum(values_nX).requires_grad


def test_the_best_tiles_highest_first_and_equal_ones_by_number(make_bag: MakeBag) -> None:
    score_nX = torch.tensor([[1.0, 0.0], [5.0, 0.0], [5.0, 2.0], [9.0, 0.0], [1.0, 0.0], [4.0, 4.0]])
    found_BkX = bag_of(make_bag, score_nX, (5, 1)).top(score_nX, 3)
    assert found_BkX[0, :, 0].tolist() == [3, 1, 2]
    assert found_BkX[0, :, 1].tolist() == [2, 0, 1]
    assert found_BkX[1].tolist() == [[5, 5], [-1, -1], [-1, -1]]  # a slide of one tile has no second best


def test_rows_are_picked_by_number_and_minus_one_is_zero(make_bag: MakeBag) -> None:
    _, values_nX = case()
    bag = bag_of(make_bag, values_nX)
    picked_MX = bag.pick(values_nX, torch.tensor([8, -1, 0, 8]))
    assert torch.equal(picked_MX, torch.stack([values_nX[8], 0 * values_nX[0], values_nX[0], values_nX[8]]))
    (grad_nX,) = torch.autograd.grad(picked_MX.sum(), values_nX)
    assert grad_nX.sum(1).tolist() == [4.0, 0, 0, 0, 0, 0, 0, 0, 8.0]
    assert torch.equal(bag.gather(values_nX), values_nX)


def test_where_a_rank_stands_in_the_run_of_all_tiles() -> None:
    bag = part_of_bag((5, 1, 3, 2), (4, 4, 3))  # tiles 4 to 7: the last of slide 0, slide 1, the first two of slide 2
    assert (bag.first, bag.offsets, bag.num_slides) == (4, (0, 5, 6, 9), 4)
    assert bag.runs() == [(0, 1), (1, 2), (2, 4), (4, 4)]
    assert bag.slide_index_n.tolist() == [0, 1, 2, 2]
    assert part_of_bag((5, 1), (6, 0, 0)).runs() == [(0, 0), (0, 0)]


@pytest.mark.parametrize(("sizes", "rows"), [((5, 1), 5), ((5, 2), 6)])
def test_sizes_that_do_not_add_up_are_refused(sizes: tuple[int, ...], rows: int) -> None:
    with pytest.raises(ValueError, match=rf"{rows} of {sum(sizes)} tiles do not fit a pool of \(6,\) tiles per rank"):
        Bag(torch.zeros(rows, 2), torch.zeros(rows, 2), sizes, LocalPool(6))

"""Pooling in blocks of rows is pooling: values, attention and every gradient, for any block, bag and rank."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigamil.models.bag import Bag, LocalPool, Pool, softmax_pool
from gigamil.models.dropout import KeyedDropout
from gigamil.models.rowwise import rowwise_softmax_pool
from gigamil.parallel.pooling import GroupPool
from gigamil.testing.compare import gradient_error
from gigamil.testing.exactness import Case, Errors, check_cases
from gigamil.testing.ranks import run_on_ranks

DIM, HEADS, WIDTH = 5, 2, 7
SIZES = (4, 1, 6)


class Head(nn.Module):
    """Attention and values of rows, with dropout that is drawn by key."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_AD = nn.Parameter(torch.randn(HEADS, DIM))
        self.value_VD = nn.Parameter(torch.randn(WIDTH, DIM))
        self.dropout = KeyedDropout(0.3, "test.rows")

    def forward(self, embedding_bD: Tensor, tile_key_b: Tensor | None) -> tuple[Tensor, Tensor]:
        embedding_bD = self.dropout(embedding_bD, tile_key_b)
        return torch.tanh(embedding_bD @ self.weight_AD.T) * 3, torch.relu(embedding_bD @ self.value_VD.T)


def make_bag(first: int, last: int, pool: Pool) -> Bag:
    generator = torch.Generator().manual_seed(1)
    embedding_ND = torch.randn(sum(SIZES), DIM, dtype=torch.float64, generator=generator)
    embedding_nD = embedding_ND[first:last].clone().requires_grad_()
    position_n2 = torch.zeros(last - first, 2, dtype=torch.float64)
    return Bag(embedding_nD, position_n2, SIZES, pool, tile_key_n=torch.arange(first, last))


def make_head() -> Head:
    torch.manual_seed(2)
    return Head().double()


def pooled(bag: Bag, head: Head, block: int | None) -> tuple[Tensor, Tensor]:
    if block is None:
        return softmax_pool(*head(bag.embedding_nD, bag.tile_key_n), bag)
    return rowwise_softmax_pool(head, list(head.parameters()), bag, block)


def outcome(bag: Bag, block: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What comes out, and gradients of a loss that looks at every pooled value."""
    head = make_head()
    pooled_BAV, attention_nA = pooled(bag, head, block)
    (
        pooled_BAV * torch.arange(1.0, pooled_BAV.numel() + 1, dtype=torch.float64).view_as(pooled_BAV)
    ).sin().sum().backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    return (
        {"pooled": pooled_BAV.detach(), "attention": attention_nA.detach()},
        gradients | {"embedding": bag.embedding_nD.grad},
    )


@pytest.mark.parametrize("block", [1, 2, 4, 100])
def test_blocks_give_what_the_whole_gives(block: int) -> None:
    num = sum(SIZES)
    values, gradients = outcome(make_bag(0, num, LocalPool(num)), block)
    wanted_values, wanted_gradients = outcome(make_bag(0, num, LocalPool(num)), None)
    assert gradient_error(values, wanted_values) < 1e-14
    assert gradient_error(gradients, wanted_gradients) < 1e-14


def test_gradcheck() -> None:
    bag, head = make_bag(0, sum(SIZES), LocalPool(sum(SIZES))), make_head()
    parameters = list(head.parameters())

    def function(embedding_nD: Tensor, *_: Tensor) -> Tensor:
        bag.embedding_nD = embedding_nD
        return rowwise_softmax_pool(head, parameters, bag, block=3)[0]

    assert torch.autograd.gradcheck(function, (bag.embedding_nD, *parameters))


def test_large_logits_do_not_overflow() -> None:
    """The shift is the maximum over all blocks, wherever it is."""
    embedding_nD = torch.tensor([[-2000.0], [2000.0], [1000.0]], dtype=torch.float64, requires_grad=True)
    bag = Bag(embedding_nD, torch.zeros(3, 2), (3,), LocalPool(3))
    pooled_BAV, attention_nA = rowwise_softmax_pool(lambda rows, _: (rows, rows), [], bag, block=1)
    assert pooled_BAV.item() == 2000
    assert attention_nA.flatten().tolist() == [0, 1, 0]


def test_nothing_but_embeddings_is_saved() -> None:
    saved: list[int] = []
    num = sum(SIZES)
    bag, head = make_bag(0, num, LocalPool(num)), make_head()

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() if tensor.shape[:1] == (num,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        rowwise_softmax_pool(head, list(head.parameters()), bag, block=2)
    assert sum(saved) == num * DIM


def test_without_a_graph() -> None:
    num = sum(SIZES)
    bag = make_bag(0, num, LocalPool(num))
    with torch.no_grad():
        found, _ = rowwise_softmax_pool(make_head(), list(make_head().parameters()), bag, block=2)
    assert not found.requires_grad


def on_rank(rank: int, counts: tuple[int, ...], block: int) -> list[float]:
    """Errors against one process; each rank's gradients are R times its part."""
    first = sum(counts[:rank])
    last = first + counts[rank]
    values, gradients = outcome(make_bag(first, last, GroupPool(dist.group.WORLD, counts, rank)), block)
    num = sum(SIZES)
    wanted_values, wanted_gradients = outcome(make_bag(0, num, LocalPool(num)), None)
    wanted_values["attention"] = wanted_values["attention"][first:last]
    wanted_gradients["embedding"] = wanted_gradients["embedding"][first:last]
    for name, gradient in gradients.items():
        gradient /= len(counts)
        if name != "embedding":
            dist.all_reduce(gradient)
    return [gradient_error(values, wanted_values), gradient_error(gradients, wanted_gradients)]


def test_ranks_give_what_one_process_gives() -> None:
    for errors in run_on_ranks(on_rank, 3, (3, 0, 8), 2):
        assert max(errors) < 1e-14


def through_the_engine(rank: int, num_ranks: int, cases: list[Case]) -> tuple[list[Errors], int]:
    """Errors of cases with blocks of two rows, and the most rows that were looked at together."""
    from gigamil.models.aggregators.attention import GatedAttention

    look, most = GatedAttention._rows, 0

    def counted(self: GatedAttention, embedding_bD: Tensor, tile_key_b: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal most
        most = max(most, len(embedding_bD))
        return look(self, embedding_bD, tile_key_b)

    GatedAttention._rows = counted  # type: ignore[method-assign]
    rowwise_softmax_pool.__defaults__ = (2,)
    return check_cases(rank, num_ranks, cases), most


@pytest.mark.parametrize("stage", [1, 3])
def test_through_the_engine_ranks_have_as_many_blocks_as_they_have_rows_for(stage: int) -> None:
    # 8 and 7 rows on the two ranks, and 1 and none.
    cases = [Case(sizes, 2, zero_stage=stage) for sizes in ((9, 4, 2), (1,))]
    for errors, most in run_on_ranks(through_the_engine, 2, 2, cases):
        assert most == 2
        assert [error for error in errors if not error.within(1e-5)] == []

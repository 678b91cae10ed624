"""Nothing in a step makes the CPU wait for a GPU: what it asks of one is listed, without having one.

Tensors are fake: they say that they lie on "cuda", have a shape, and no content, so what needs the content fails too.
Backward cannot run on them without a GPU; it runs on the device "meta", which has no content either.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigamil import keyed
from gigamil.config.schema import Augment
from gigamil.data import augment
from gigamil.models.aggregator import aggregators, build_aggregator, min_tiles
from gigamil.models.bag import Bag, LocalPool, softmax_pool
from gigamil.models.dropout import KeyedDropout
from gigamil.train.loss import cross_entropy, group_loss, slide_losses

SIZES, DIM, CLASSES = (9, 30, 8), 16, 3
# What a GPU answers, or whose length it decides, or whose success it reports.
ANSWERS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "linalg_inv_ex", "linalg_solve_ex"),
    *("_linalg_solve_ex", "_linalg_check_errors", "linalg_cholesky_ex", "linalg_lu_factor_ex", "_linalg_svd"),
}


class Waits(TorchDispatchMode):
    """Lists the operations that make the CPU wait.

    Attributes:
        found: their names.
        num_seen: of all operations with a tensor on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor.device.type != "cpu" for tensor in tensors]
        self.num_seen += any(on_gpu)
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            waits = target != tensors[0].device.type and not kwargs.get("non_blocking")
        elif name == "copy_":
            waits = on_gpu[0] != on_gpu[1] and not (args[2:] or [kwargs.get("non_blocking")])[0]
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            index = [tensor for tensor in args[1] if tensor is not None]
            waits = any(on_gpu) and any(i.device.type == "cpu" or i.dtype in (torch.bool, torch.uint8) for i in index)
        else:
            waits = any(on_gpu) and (name in ANSWERS or any(t.device.type == "cpu" and t.dim() for t in tensors))
        if waits:
            self.found.append(name)
        return func(*args, **kwargs)


@pytest.fixture(params=["cuda", "meta"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device without content; all tensors are made within the test."""
    caches = augment._constant, augment._stains
    for cached in caches:
        cached.cache_clear()
    fake: AbstractContextManager[Any] = FakeTensorMode() if request.param == "cuda" else nullcontext()
    with fake:
        yield request.param
    for cached in caches:  # no other test must see a tensor without content
        cached.cache_clear()


def bag_on(device: str) -> Bag:
    num = sum(SIZES)
    return Bag(
        embedding_nD=torch.rand(num, DIM, device=device, requires_grad=True),
        position_n2=torch.rand(num, 2, device=device, dtype=torch.float64),
        sizes=SIZES,
        pool=LocalPool(num),
        tile_key_n=torch.zeros(num, dtype=torch.int64, device=device),
        slide_key_B=torch.zeros(len(SIZES), dtype=torch.int64, device=device),
        label_B=torch.zeros(len(SIZES), dtype=torch.int64, device=device),
    )


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.as_tensor(3, device=x.device),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x[0].copy_(torch.ones(3)),
        lambda x: x.cpu(),
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x[x[:, 0] > 0],
        lambda x: x[0, 0].item(),
        lambda x: torch.nonzero(x),
        lambda x: torch.repeat_interleave(x, x[0].long(), dim=0),
        lambda x: torch.linalg.inv(x),
    ],
)
def test_a_wait_is_found(wait: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode():
        x = torch.rand(3, 3, device="cuda")
        with Waits() as waits:
            try:
                wait(x)
            except (DataDependentOutputException, DynamicOutputShapeException):
                pass  # found already: that is what the answer would be for
    assert waits.found


def test_what_does_not_wait_is_not_found() -> None:
    with FakeTensorMode():
        x = torch.rand(3, 3, device="cuda")
        with Waits() as waits:
            torch.ones(3).to("cuda", non_blocking=True)
            x[0].copy_(torch.ones(3), non_blocking=True)
            x[:, 0] = 1.0
            x * torch.tensor(2.0)  # one number is an argument of the kernel
            x[x[0].long()]
            x.double()
    assert (waits.found, waits.num_seen > 5) == ([], True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_augmentation_waits_in_the_first_step_only(device: str, dtype: torch.dtype) -> None:
    settings = Augment()
    assert all(settings.model_dump().values()), "a setting that is off is not tried"
    image_nCHW = torch.rand(5, 3, 8, 8, device=device, dtype=dtype)
    key_n = torch.zeros(5, dtype=torch.int64, device=device)
    augment.augment_tiles(image_nCHW, key_n, settings)  # constants are copied once
    with Waits() as waits:
        augment.augment_tiles(image_nCHW, key_n, settings)
    assert (waits.found, waits.num_seen > 30) == ([], True)


def test_keyed_draws_do_not_wait(device: str) -> None:
    key_n = torch.zeros(5, dtype=torch.int64, device=device)
    values_nX = torch.rand(5, 4, 3, device=device, requires_grad=True)
    layer = KeyedDropout(0.5, "layer")
    with Waits() as waits:
        keyed.fold(keyed.fold(keyed.root_key(7, device), 3), key_n)
        dropped_nX = layer(values_nX, key_n)
        if device == "meta":
            dropped_nX.sum().backward()
    assert (waits.found, waits.num_seen > 15) == ([], True)


def test_the_bag_does_not_wait(device: str) -> None:
    with Waits() as waits:
        bag = bag_on(device)
        values_nD = bag.embedding_nD
        number_BkD = bag.top(values_nD, 4)
        segment_n = torch.zeros(len(values_nD), dtype=torch.int64, device=device)
        outputs = [
            bag.segment_max(values_nD, segment_n, 2),
            bag.segment_sum(values_nD),
            bag.segment_sum(values_nD, segment_n, 2),
            bag.segment_mean(values_nD),
            bag.segment_softmax(values_nD),
            bag.pick(values_nD, number_BkD[:, :, 0].flatten()),
            bag.gather(values_nD),
            *softmax_pool(values_nD[:, :2], values_nD, bag),
        ]
        if device == "meta":
            torch.stack([output.sum() for output in outputs]).sum().backward()
    assert (waits.found, waits.num_seen > 60) == ([], True)


@pytest.mark.parametrize("name", aggregators.names())
def test_no_aggregator_waits(name: str, device: str) -> None:
    with torch.device(device):
        aggregator = build_aggregator(name, DIM, CLASSES, {})
        assert min_tiles(aggregator) <= min(SIZES)
        classify = torch.nn.Linear(aggregator.out_dim, CLASSES) if aggregator.out_dim else torch.nn.Identity()
        weight_B = torch.ones(len(SIZES))
    with Waits() as waits:
        bag = bag_on(device)
        pooled = aggregator(bag)
        loss_B = slide_losses(cross_entropy, classify(pooled.slide_BX), pooled, bag.label_B)
        loss = group_loss(loss_B, weight_B, 3.0, 2)
        if device == "meta":
            loss.backward()
    assert (waits.found, waits.num_seen > 10) == ([], True)

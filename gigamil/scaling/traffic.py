"""Which collectives a training step calls, with how many bytes: a list per rank, exactly as torch.distributed sees them.

What DeepSpeed does is of version 0.19, and was counted there (tests/unit/scaling/test_traffic.py, benchmarks/simulator.py):
at ZeRO 1 and 2 gradients are all-reduced, and each rank takes its part of the sum.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import nn

from gigamil.config.schema import RunConfig
from gigamil.models.slide_model import SlideModel
from gigamil.train.engine import deepspeed_config, make_optimizer
from gigamil.train.plan import pool_calls

Purpose = Literal["agreement", "pooling", "gradients", "norm", "parameters", "losses"]
_WHOLE_BUCKET = 500_000_000  # of the engine without ZeRO, in numbers


class Collective(NamedTuple):
    """One call of a rank.

    Attributes:
        name: as in torch.distributed.
        operation: "sum" or "max" of those that reduce, else empty.
        bytes: of the tensor that this rank gives.
        ranks: that take part.
        purpose: what for.
    """

    name: str
    operation: str
    bytes: int
    ranks: int
    purpose: Purpose


def step_collectives(
    config: RunConfig, model: SlideModel, group_sizes: Sequence[int], num_slides: int, ranks: int
) -> tuple[Collective, ...]:
    """The calls of one training step, the agreement before it included.

    Args:
        config: of the run; its ZeRO stage, clipping and groups count.
        model: from `gigamil.train.plan.build_planned_model`.
        group_sizes: tiles of the slides of one group.
        num_slides: of the step, over all groups.
        ranks: of the world.
    Cost: `pool_calls`.
    """
    group_size = config.execution.group_size or ranks
    found = [Collective("all_reduce", "max", 3 * 4, ranks, "agreement")]
    if group_size > 1:
        found += [
            Collective(call.name, call.operation, call.bytes, group_size, "pooling")
            for call in pool_calls(model, group_sizes, group_size)
        ]
    found += _engine_collectives(config, model, ranks)
    return *found, Collective("all_reduce", "sum", 8 * num_slides, ranks, "losses")


def _engine_collectives(config: RunConfig, model: nn.Module, ranks: int) -> Iterator[Collective]:
    stage = config.execution.zero_stage
    groups = [
        [parameter.numel() for parameter in group["params"] if parameter.requires_grad]
        for group in make_optimizer(model, config).param_groups
    ]
    groups = [group for group in groups if group]
    numbers = [number for group in groups for number in group]
    bucket = int(deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"])
    if stage == 0:
        for size in _filled_up(numbers, _WHOLE_BUCKET):
            yield Collective("all_reduce", "sum", 4 * size, ranks, "gradients")
        if config.science.optim.clip_norm is not None:
            yield Collective("all_reduce", "sum", 4, ranks, "norm")
        return
    if stage == 3:
        for parameter in model.parameters():
            yield Collective("all_gather_into_tensor", "", 4 * _share(parameter.numel(), ranks), ranks, "parameters")
        for sizes in _buckets([_share(number, ranks) * ranks for number in numbers], numbers, bucket):
            yield Collective("reduce_scatter_tensor", "sum", 4 * sizes, ranks, "gradients")
        for _ in groups:
            yield Collective("all_reduce", "sum", 8, ranks, "norm")
        return
    for size in _buckets(numbers, numbers, bucket):
        yield Collective("all_reduce", "sum", 4 * size, ranks, "gradients")
    for _ in groups:
        yield Collective("all_reduce", "sum", 4, ranks, "norm")
    if ranks > 1:
        for group in groups:  # each rank's part is padded to a multiple of 2 numbers
            yield Collective("all_gather_into_tensor", "", 8 * _share(sum(group), 2 * ranks), ranks, "parameters")


def _share(number: int, parts: int) -> int:
    return -(-number // parts)


def _buckets(weights: Sequence[int], numbers: Sequence[int], most: int) -> Iterator[int]:
    """Sums of `weights`: parameters go into a bucket while it holds at most so many of `numbers`; a larger one goes alone."""
    total, held = 0, 0
    for weight, number in zip(weights, numbers, strict=True):
        if held and held + number > most:
            yield total
            total, held = 0, 0
        total, held = total + weight, held + number
    if held:
        yield total


def _filled_up(numbers: Sequence[int], least: int) -> Iterator[int]:
    """Sums of parameters that follow each other, each just beyond `least`."""
    total = 0
    for number in numbers:
        total += number
        if total > least:
            yield total
            total = 0
    if total:
        yield total

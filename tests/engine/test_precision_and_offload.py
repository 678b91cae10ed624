"""The real engine at every ZeRO stage with every aggregator: float32, bfloat16 autocast, optimiser state offloaded.

Bounds. float32: 1e-5, or eight times the error of one float32 process where this is more (gigamil.testing.exactness).
bfloat16: numbers have
8 bits, so one rounding is up to 2^-8 = 4e-3 of a number. One process under autocast rounds the same embeddings the same
way, the head is float32 in both, and what differs is the encoder's gradient: rounded once for the whole bag there, once
per chunk here (and then added up in float32). Such roundings are independent, so sums of them differ by less than one:
bound 2^-8 to one process under autocast (found: 3.2e-3). The distance to float64 is that of bfloat16 itself, in one
process as here: up to 0.7 for a bias whose gradient nearly cancels. It is only asserted to be there, and not to grow.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest

from gigamil.config.schema import RunConfig
from gigamil.testing.exactness import (
    KEEPS,
    SHAPES,
    Case,
    Errors,
    World,
    built_in_aggregators,
    check_cases,
    compare,
    distributed,
    large_enough,
    reference,
    within_float32,
)
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.engine import deepspeed_config, skip_kernel_build

STAGES = (0, 1, 2, 3)
BFLOAT16_BOUND = 2.0**-8
NAMES = built_in_aggregators()


def engine_case(number: int, name: str, stage: int) -> Case:
    """A case with the shapes, groups and kept shares of that number: ragged, empty ranks, groups without slides."""
    sizes, group_size = list(itertools.product(SHAPES, (2, 1)))[number % 8]
    return large_enough(Case(sizes, group_size, name, keep=KEEPS[number % 3], zero_stage=stage))


def quick_cases() -> list[Case]:
    """Every aggregator at ZeRO 3, and offload; test_zero_stages.py has the other stages."""
    every = [engine_case(number, name, 3) for number, name in enumerate(NAMES)]
    return every + [replace(engine_case(0, "gated_attention", stage), offload=True) for stage in (1, 2)]


def bfloat16_cases(names: list[str]) -> list[Case]:
    return [
        replace(engine_case(number, name, stage), bfloat16=True)
        for number, name in enumerate(names)
        for stage in STAGES
    ]


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(measure, 2, 2, timeout_s=280)


def test_every_aggregator_trains_exactly_through_the_engine(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert_exact(quick_cases(), found["float32"])


def test_bfloat16_is_that_of_one_process(two_ranks: list[dict[str, Any]]) -> None:
    wanted = bfloat16_cases(["gated_attention"])
    for found in two_ranks:
        assert_within(wanted, found["bfloat16"], BFLOAT16_BOUND)
        for errors, alone in zip(found["bfloat16 to float64"], found["one process to float64"], strict=True):
            assert alone.parameters > 10 * BFLOAT16_BOUND  # autocast was on: another result than float32's
            assert errors.parameters == pytest.approx(alone.parameters, abs=2 * BFLOAT16_BOUND)
            assert errors.loss == pytest.approx(alone.loss, abs=BFLOAT16_BOUND)


@pytest.mark.parametrize("stage", [1, 2])
def test_offload_reaches_the_deepspeed_config(stage: int) -> None:
    config = RunConfig.model_validate({"execution": {"zero_stage": stage, "offload": True}})
    assert deepspeed_config(config)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_aggregator_at_every_stage(num_ranks: int, stage: int) -> None:
    wanted = [
        replace(case, group_size=num_ranks if case.group_size == 2 else 1)
        for number, name in enumerate(NAMES)
        for case in (engine_case(number, name, stage), engine_case(number + 3, name, stage))
    ]
    offloaded = [replace(case, offload=True) for case in wanted if stage in (1, 2)]
    narrow = [replace(case, bfloat16=True) for case in (wanted + offloaded)[::2]]
    for errors in run_on_ranks(check_cases, num_ranks, num_ranks, wanted + offloaded + narrow, timeout_s=800):
        num_wide = len(wanted + offloaded)
        assert_exact(wanted + offloaded, errors[:num_wide])
        assert_within(narrow, errors[num_wide:], BFLOAT16_BOUND)


def assert_exact(wanted: list[Case], found: list[Errors]) -> None:
    assert [(case, e) for case, e in zip(wanted, found, strict=True) if not within_float32(case, e)] == []


def assert_within(wanted: list[Case], found: list[Errors], bound: float) -> None:
    assert [(case, e) for case, e in zip(wanted, found, strict=True) if not e.within(bound)] == []


def measure(rank: int, num_ranks: int) -> dict[str, Any]:
    skip_kernel_build()
    world = World(rank, num_ranks)
    narrow = bfloat16_cases(["gated_attention"])
    found = [distributed(case, world) for case in narrow]
    pairs = list(zip(found, narrow, strict=True))
    return {
        "float32": check_cases(rank, num_ranks, quick_cases()),
        "bfloat16": [compare(outcome, reference(case)) for outcome, case in pairs],
        "bfloat16 to float64": [compare(outcome, reference(replace(case, bfloat16=False))) for outcome, case in pairs],
        "one process to float64": [compare(reference(c), reference(replace(c, bfloat16=False))) for c in narrow],
    }

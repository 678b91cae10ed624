"""Every aggregator, on 1 to 4 ranks, is one-process full-bag autograd: loss, parameter and tile gradients in float64.

A world is started once and runs many cases. In the quick tests hypothesis draws the cases on rank 0, which hands each
to the other ranks, so that a failure shrinks to the smallest case; the slow ones run the whole matrix.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gigamil.models.aggregators as package
from gigamil.models.aggregator import aggregators
from gigamil.partition.spans import owned_range
from gigamil.testing.compare import relative_error
from gigamil.testing.exactness import (
    KEEPS,
    OPTIONS,
    SHAPES,
    Case,
    Errors,
    World,
    built_in_aggregators,
    cases,
    check_cases,
    compare,
    distributed,
    group_sizes,
    large_enough,
    make_case_tiles,
    num_variants,
    predicted,
    reference,
    reference_prediction,
)
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import cross_entropy

BOUND = 1e-12  # float64: the same sums in another order
# TransMIL iterates a pseudo-inverse, which enlarges the rounding of the sums that it starts from (its docstring).
PINV_BOUND = 1e-9
NAMES = built_in_aggregators()
DRAWS = 40  # cases that hypothesis draws in each world


def bound_of(aggregator: str) -> float:
    return PINV_BOUND if aggregator == "transmil" else BOUND


@st.composite
def any_case(draw: st.DrawFn, num_ranks: int) -> Case:
    """Any shapes, with more ranks than tiles too, in any order of slides."""
    aggregator = draw(st.sampled_from(NAMES))
    case = Case(
        sizes=tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))),
        group_size=draw(st.sampled_from(group_sizes(num_ranks))),
        aggregator=aggregator,
        variant=draw(st.integers(0, num_variants(aggregator) - 1)),
        chunk=draw(st.integers(1, 5)),
        keep=draw(st.sampled_from(KEEPS)),
        random=draw(st.booleans()),
    )
    return large_enough(case)


def quick_cases(num_ranks: int) -> list[Case]:
    """Every aggregator and variant once, with an option of the others each: what hypothesis might not draw."""
    wanted = []
    for name in NAMES:
        for variant in range(num_variants(name)):
            number = len(wanted)
            sizes = group_sizes(num_ranks)
            case = Case(SHAPES[number % 4], sizes[-1 - number % len(sizes)], name, variant, keep=KEEPS[number % 3])
            wanted.append(large_enough(case))
    return wanted


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def world(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank of a world found."""
    num_ranks = request.param
    return [measure(0, 1)] if num_ranks == 1 else run_on_ranks(measure, num_ranks, num_ranks, timeout_s=240)


def test_every_aggregator_is_exact(world: list[dict[str, Any]]) -> None:
    wanted = quick_cases(len(world))
    assert {case.aggregator for case in wanted} == set(NAMES)
    for found in world:
        assert_exact(wanted, found["quick"])


def test_every_drawn_case_is_exact(world: list[dict[str, Any]]) -> None:
    assert world[0]["counterexample"] == ""
    assert world[0]["drawn"] >= DRAWS


def test_prediction_is_that_of_one_process(world: list[dict[str, Any]]) -> None:
    for found in world:
        over = {name: e for name, e in found["predicted"].items() if not e <= bound_of(name)}
        assert over == {}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_the_whole_matrix(num_ranks: int) -> None:
    wanted = [case for name in NAMES for case in cases(num_ranks, aggregator=name)]
    assert {(case.keep, case.random) for case in wanted} == {(keep, draws) for keep in KEEPS for draws in (True, False)}
    assert {case.group_size for case in wanted} == set(group_sizes(num_ranks))
    for errors in run_on_ranks(check_cases, num_ranks, num_ranks, wanted, timeout_s=800):
        assert_exact(wanted, errors)


def test_every_built_in_aggregator_is_in_the_matrix() -> None:
    ours = [name for name in aggregators.names() if aggregators[name].__module__.split(".")[0] == "gigamil"]
    assert ours == NAMES
    assert len(NAMES) >= 14
    assert set(OPTIONS) <= set(NAMES)
    imported = {aggregators[name].__module__.rpartition(".")[2] for name in NAMES}
    written = {
        path.stem for path in Path(package.__path__[0]).glob("*.py") if "aggregators.register" in path.read_text()
    }
    assert written == imported  # a module that nobody imports registers nothing


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_a_gradient_that_a_comparison_can_see(name: str) -> None:
    # Errors are relative with a floor: a parameter that no gradient reaches would pass unseen.
    truth = reference(large_enough(Case(SHAPES[0], 1, name)))
    norms = {parameter: float(gradient.norm()) for parameter, gradient in truth.gradients.items()}
    assert min(norms.values()) > 1e-7 * max(norms.values()), norms
    assert float(truth.tile_gradient_ND.norm(dim=1).max()) > 0


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb", "dsmil", "dtfd"])
def test_the_reference_has_the_losses_of_instances(name: str) -> None:
    case = large_enough(Case(SHAPES[0], 1, name, random=False))
    logits_SK, _ = reference_prediction(case)
    _, label_S, weight_S = make_case_tiles(case)
    alone = float((cross_entropy(logits_SK, label_S) * weight_S).sum() / weight_S.sum())
    assert relative_error(alone, reference(case).loss) > 1e-3


def assert_exact(wanted: list[Case], found: list[Errors]) -> None:
    over = [
        (case, errors)
        for case, errors in zip(wanted, found, strict=True)
        if not errors.within(bound_of(case.aggregator))
    ]
    assert over == []


def measure(rank: int, num_ranks: int) -> dict[str, Any]:
    world = World(rank, num_ranks)
    quick = check_cases(rank, num_ranks, quick_cases(num_ranks))
    drawn, counterexample = draw_cases(world)
    return {
        "quick": quick,
        "drawn": drawn,
        "counterexample": counterexample,
        "predicted": {name: prediction_error(name, world) for name in NAMES},
    }


def draw_cases(world: World) -> tuple[int, str]:
    """How many cases were drawn, and the smallest that is not exact on some rank; equal on all ranks."""
    if world.rank:
        while (case := handed_out(world, None)) is not None:
            errors_on_all(world, case)
        return 0, ""
    count, counterexample = 0, ""

    @settings(
        max_examples=DRAWS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(any_case(world.num_ranks))
    def every_case_is_exact(case: Case) -> None:
        nonlocal count, counterexample
        count += 1
        errors = errors_on_all(world, handed_out(world, case))
        if not all(of_rank.within(bound_of(case.aggregator)) for of_rank in errors):
            counterexample = f"{case}: {errors}"  # hypothesis ends with the smallest
            raise AssertionError(counterexample)

    try:
        every_case_is_exact()
    except AssertionError:
        assert counterexample
    handed_out(world, None)
    return count, counterexample


def handed_out(world: World, case: Case | None) -> Case | None:
    """The case of rank 0, on all ranks."""
    box = [case]
    if world.num_ranks > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def errors_on_all(world: World, case: Case) -> list[Errors]:
    found = [compare(distributed(case, world), reference(case))]
    if world.num_ranks == 1:
        return found
    everywhere: list[Any] = [None] * world.num_ranks
    dist.all_gather_object(everywhere, found[0])
    return everywhere


def prediction_error(name: str, world: World) -> float:
    """Largest relative error of logits and of this rank's attention."""
    case = large_enough(Case(SHAPES[1], world.num_ranks, name))
    logits_SK, attention_nA = predicted(case, world)
    wanted_SK, pooled = reference_prediction(case)
    wanted_NA = pooled.attention_nA
    if wanted_NA is None:
        wanted_NA = torch.cat([scores.softmax(0) for scores in pooled.score_nA.split(case.sizes)])
    if pooled.per_class:
        predicted_N = torch.repeat_interleave(wanted_SK.argmax(1), torch.tensor(case.sizes))
        wanted_NA = wanted_NA.gather(1, predicted_N[:, None])
    start, stop = owned_range(sum(case.sizes), world.rank, world.num_ranks)
    pairs = [(logits_SK, wanted_SK), (attention_nA, wanted_NA[start:stop])]
    return max(float((found - wanted).norm() / wanted.norm()) if wanted.numel() else 0.0 for found, wanted in pairs)

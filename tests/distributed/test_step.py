"""The chunked, distributed step is one-process full-bag autograd, in float64, on 1 to 4 ranks; wrong ones are caught.

One aggregator here, all of them in test_equality_matrix.py. Mistakes are put in on purpose (draws and scales here, sums
over ranks in test_wrong_combinations.py): the comparison that finds the step exact has to see them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from gigamil.testing import exactness
from gigamil.testing.compare import gradient_error
from gigamil.testing.exactness import SHAPES, Case, Errors, World, cases, check_cases, compare, distributed, reference
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-12  # float64, the same sums in another order
VARIANT = Case((13, 1, 6), group_size=2)


def some_cases(num_ranks: int) -> list[Case]:
    """Ragged slides, and a single tile, which leaves ranks and groups empty; the matrix has more shapes."""
    return [case for case in cases(num_ranks) if case.sizes in (SHAPES[0], SHAPES[3])]


@pytest.mark.parametrize("case", some_cases(1), ids=str)
def test_one_process_is_exact(case: Case) -> None:
    errors = compare(distributed(case, World(0, 1)), reference(case))
    assert errors.within(BOUND), errors


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_more_ranks_are_exact(num_ranks: int) -> None:
    wanted = some_cases(num_ranks)
    assert_exact(wanted, run_on_ranks(check_cases, num_ranks, num_ranks, wanted))


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """What each of two ranks found: one start of processes for all tests below."""
    return run_on_ranks(measure, 2, 2)


def test_two_ranks_are_exact(two_ranks: list[dict[str, Any]]) -> None:
    assert_exact(some_cases(2), [found["errors"] for found in two_ranks])


def test_all_ranks_hold_the_same_gradient_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (found["gradients"] for found in two_ranks)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_kept_and_replayed_chunks_sum_to_the_same_bits(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert [name for name, g in found["kept"].items() if not torch.equal(g, found["replayed"][name])] == []


def test_the_bias_of_the_softmax_shift_is_the_only_zero(two_ranks: list[dict[str, Any]]) -> None:
    # Errors are relative with a floor: a parameter that no gradient reaches would pass unseen.
    norms = {name: float(gradient.norm()) for name, gradient in two_ranks[0]["gradients"].items()}
    assert min(norms.values()) > 1e-5 * max(norms.values()), norms


@pytest.mark.parametrize(
    ("mistake", "least"),
    [
        ("sum of gradients instead of their mean", 0.1),
        ("draws of another step", 1e-3),
        ("draws that restart on every rank", 1e-3),
    ],
)
def test_a_wrong_step_is_caught(two_ranks: list[dict[str, Any]], mistake: str, least: float) -> None:
    for found in two_ranks:
        assert found["mistakes"][mistake] > least
        assert found["right"] <= BOUND  # the same comparison, without the mistake


def assert_exact(wanted: list[Case], errors_by_rank: list[list[Errors]]) -> None:
    assert {case.keep for case in wanted} == {"all", "half", "none"}
    for rank, errors in enumerate(errors_by_rank):
        over = [(case, error) for case, error in zip(wanted, errors, strict=True) if not error.within(BOUND)]
        assert over == [], f"on rank {rank}"


def measure(rank: int, num_ranks: int) -> dict[str, Any]:
    world = World(rank, num_ranks)
    gradients = distributed(VARIANT, world).gradients
    return {
        "errors": check_cases(rank, num_ranks, some_cases(num_ranks)),
        "gradients": gradients,
        "right": gradient_error(gradients, reference(VARIANT).gradients),
        "kept": distributed(Case(VARIANT.sizes, 2, keep="all"), world).gradients,
        "replayed": distributed(Case(VARIANT.sizes, 2, keep="none"), world).gradients,
        "mistakes": measure_mistakes(world),
    }


def measure_mistakes(world: World) -> dict[str, float]:
    """Gradient error of the step with one thing done wrong."""
    truth = reference(VARIANT).gradients

    def error(target: Any, name: str, value: object) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            return gradient_error(distributed(VARIANT, world).gradients, truth)

    def own_numbers(slide_key_B: Tensor, slide_index_n: Tensor, number_n: Tensor) -> Tensor:
        return keyed_tiles(slide_key_B, slide_index_n, torch.arange(len(number_n)))

    keyed_tiles = exactness.DrawKeys.tiles
    return {
        "sum of gradients instead of their mean": error(torch.distributed, "get_world_size", lambda group=None: 1),
        "draws of another step": error(exactness, "STEP", exactness.STEP - 1),
        "draws that restart on every rank": error(exactness.DrawKeys, "tiles", staticmethod(own_numbers)),
    }

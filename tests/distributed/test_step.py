"""The chunked, distributed step is one-process full-bag autograd, in float64, on 1 to 4 ranks; wrong ones are caught.

The classic mistakes are put in on purpose, an identity backward of the sum over ranks among them: the comparison that
finds the step exact has to see them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from gigamil.parallel.collectives import SumOverRanks
from gigamil.testing import exactness
from gigamil.testing.compare import gradient_error, relative_error
from gigamil.testing.exactness import Case, cases, check_cases, distributed, reference
from gigamil.testing.ranks import run_on_ranks
from gigamil.train import step

BOUND = 1e-12  # float64, the same sums in another order
VARIANT = Case((13, 1, 6), group_size=2)


@pytest.mark.parametrize("case", list(cases(1)), ids=str)
def test_one_process_is_exact(case: Case) -> None:
    found, truth = distributed(case, 0, 1), reference(case)
    assert relative_error(found.loss, truth.loss) <= BOUND
    assert gradient_error(found.gradients, truth.gradients) <= BOUND


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_more_ranks_are_exact(num_ranks: int) -> None:
    wanted = list(cases(num_ranks))
    assert_exact(wanted, run_on_ranks(check_cases, num_ranks, num_ranks, wanted))


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """What each of two ranks found: one start of processes for all tests below."""
    return run_on_ranks(measure, 2, 2)


def test_two_ranks_are_exact(two_ranks: list[dict[str, Any]]) -> None:
    assert_exact(list(cases(2)), [found["errors"] for found in two_ranks])


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
        ("identity backward", 0.1),  # the encoder's gradient is half of what it should be
        ("sum of gradients instead of their mean", 0.1),
        ("draws of another step", 1e-3),
        ("draws that restart on every rank", 1e-3),
        ("loss of a group without its factor", 0.1),
    ],
)
def test_a_wrong_step_is_caught(two_ranks: list[dict[str, Any]], mistake: str, least: float) -> None:
    for found in two_ranks:
        assert found["mistakes"][mistake] > least
        assert found["right"] <= BOUND  # the same comparison, without the mistake


def assert_exact(wanted: list[Case], errors_by_rank: list[list[tuple[float, float]]]) -> None:
    assert {case.keep for case in wanted} == {"all", "half", "none"}
    for rank, errors in enumerate(errors_by_rank):
        over = [(case, error) for case, error in zip(wanted, errors, strict=True) if not max(error) <= BOUND]
        assert over == [], f"on rank {rank}"


def measure(rank: int, num_ranks: int) -> dict[str, Any]:
    gradients = distributed(VARIANT, rank, num_ranks).gradients
    return {
        "errors": check_cases(rank, num_ranks, list(cases(num_ranks))),
        "gradients": gradients,
        "right": gradient_error(gradients, reference(VARIANT).gradients),
        "kept": distributed(Case(VARIANT.sizes, 2, keep="all"), rank, num_ranks).gradients,
        "replayed": distributed(Case(VARIANT.sizes, 2, keep="none"), rank, num_ranks).gradients,
        "mistakes": measure_mistakes(rank, num_ranks),
    }


def measure_mistakes(rank: int, num_ranks: int) -> dict[str, float]:
    """Gradient error of the step with one thing done wrong."""
    apart = Case(VARIANT.sizes, group_size=1)
    truths = {case: reference(case).gradients for case in (VARIANT, apart)}

    def error(target: Any, name: str, value: object, case: Case = VARIANT) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            return gradient_error(distributed(case, rank, num_ranks).gradients, truths[case])

    def identity(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    def unscaled(loss_B: Tensor, weight_B: Tensor, world_weight: float, num_groups: int) -> Tensor:
        return (loss_B * weight_B).sum() / world_weight

    def own_numbers(slide_key_B: Tensor, slide_index_n: Tensor, number_n: Tensor) -> Tensor:
        return keyed_tiles(slide_key_B, slide_index_n, torch.arange(len(number_n)))

    keyed_tiles = exactness.DrawKeys.tiles
    return {
        "identity backward": error(SumOverRanks, "backward", staticmethod(identity)),
        "sum of gradients instead of their mean": error(torch.distributed, "get_world_size", lambda group=None: 1),
        "draws of another step": error(exactness, "STEP", exactness.STEP - 1),
        "draws that restart on every rank": error(exactness.DrawKeys, "tiles", staticmethod(own_numbers)),
        "loss of a group without its factor": error(step, "group_loss", unscaled, apart),
    }

"""How errors are measured: a factor and a sign are seen, rounding of a parameter that hardly matters is not blown up."""

import math

import pytest
import torch

from gigamil.testing.compare import gradient_error, relative_error

TRUTH = {"large": torch.tensor([3.0, 4.0]), "small": torch.tensor([1e-9])}


def test_equal_gradients_have_no_error() -> None:
    assert gradient_error(TRUTH, TRUTH) == 0.0


@pytest.mark.parametrize(("factor", "error"), [(0.5, 0.5), (-1.0, 2.0), (2.0, 1.0), (0.0, 1.0)])
def test_a_wrong_factor_is_its_size(factor: float, error: float) -> None:
    assert gradient_error(TRUTH | {"large": factor * TRUTH["large"]}, TRUTH) == pytest.approx(error)


def test_a_tiny_gradient_is_measured_against_a_share_of_all() -> None:
    assert gradient_error(TRUTH | {"small": torch.tensor([0.0])}, TRUTH) == pytest.approx(1e-9 / 5e-3)
    assert gradient_error(TRUTH | {"small": torch.tensor([0.0])}, TRUTH, floor=1e-2) == pytest.approx(1e-9 / 5e-2)


def test_other_parameters_and_nan_do_not_pass() -> None:
    with pytest.raises(KeyError, match="other parameters.*small"):
        gradient_error({"large": TRUTH["large"]}, TRUTH)
    error = gradient_error(TRUTH | {"large": torch.tensor([math.nan, 0.0])}, TRUTH)
    assert not error <= 1e9
    assert (
        not gradient_error(
            {"a": torch.tensor([math.nan]), "b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}
        )
        <= 1e9
    )


def test_relative_error() -> None:
    assert relative_error(1.1, 1.0) == pytest.approx(0.1)
    assert relative_error(0.0, 0.0) == 0.0
    assert relative_error(1.0, -1.0) == 2.0

"""Numbers, in units of their spread over the training slides."""

import math

import pytest
import torch

from gigamil.tasks.regression import Regression

NAN = math.nan


def test_a_prediction_of_the_target_costs_nothing_in_its_own_units() -> None:
    task = Regression(("age", "size"), (60.0, 3.0), (10.0, 0.5))
    target_SX = torch.tensor([[70.0, 2.0], [60.0, 3.5]], dtype=torch.float64)
    output_SK = torch.tensor([[1.0, -2.0], [0.0, 1.0]], dtype=torch.float64)
    assert task.losses(output_SK, target_SX).tolist() == [0.0, 0.0]
    assert torch.equal(task.predict(output_SK), target_SX)
    assert task.predicted_names == ("value_age", "value_size")


@pytest.mark.parametrize(("loss", "wanted"), [("mae", [0.5, 3.0]), ("mse", [0.125, 4.5]), ("huber", [0.125, 2.5])])
def test_losses_by_hand(loss: str, wanted: list[float]) -> None:
    task = Regression(("x",), (0.0,), (2.0,), loss)  # type: ignore[arg-type]
    output_SK = torch.tensor([[1.5], [4.0]], dtype=torch.float64)
    assert task.losses(output_SK, torch.tensor([[2.0], [2.0]], dtype=torch.float64)).tolist() == wanted


def test_what_is_not_known_counts_for_nothing() -> None:
    task = Regression(("x", "y"), (0.0, 0.0), (1.0, 1.0), "mse")
    target_SX = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 2.0]], dtype=torch.float64)
    output_SK = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    loss_S, weight_S = task.losses(output_SK, target_SX), task.weights(target_SX)
    assert loss_S.tolist() == [0.5, 0.0, 1.25]
    assert weight_S.tolist() == [1.0, 0.0, 2.0]
    (loss_S * weight_S).sum().backward()
    assert output_SK.grad is not None
    assert ((output_SK.grad != 0) == torch.isfinite(target_SX)).all()

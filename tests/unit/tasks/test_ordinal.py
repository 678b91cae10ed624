"""Ordered classes: the loss is that of the probabilities that are predicted."""

import math

import torch

from gigamil.tasks.ordinal import Ordinal

GRADES = Ordinal(("0", "1", "2", "3"))


def test_the_loss_is_minus_the_logarithm_of_what_is_predicted() -> None:
    output_SK = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prob_SC = GRADES.predict(output_SK)
    assert (prob_SC >= 0).all()
    torch.testing.assert_close(prob_SC.sum(1), torch.ones(20, dtype=torch.float64))
    for grade in range(4):
        found_S = GRADES.losses(output_SK, torch.full((20, 1), float(grade), dtype=torch.float64))
        torch.testing.assert_close(found_S, -prob_SC[:, grade].log(), rtol=1e-9, atol=1e-12)


def test_a_threshold_beyond_the_class_is_not_asked() -> None:
    output_SK = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    GRADES.losses(output_SK, torch.tensor([[0.0], [1.0]], dtype=torch.float64)).sum().backward()
    assert output_SK.grad is not None
    assert (output_SK.grad != 0).tolist() == [[True, False, False], [True, True, False]]


def test_weights_and_unknown_grades() -> None:
    task = Ordinal(("0", "1", "2"), (1.0, 3.0, 2.0))
    target_SX = torch.tensor([[2.0], [math.nan], [1.0]])
    assert task.weights(target_SX).tolist() == [2.0, 0.0, 3.0]
    assert task.losses(torch.ones(3, 2), target_SX)[1] == 0
    assert task.class_numbers(target_SX).tolist() == [2, 0, 1]
    assert task.predicted_names == ("prob_0", "prob_1", "prob_2")

"""Losses are scaled in one place: the mean of the ranks' gradients is the gradient of the weighted mean loss."""

import pytest
import torch

from gigamil.train.loss import cross_entropy, group_loss, losses


def test_cross_entropy_is_per_slide() -> None:
    logits_BK = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    loss_B = cross_entropy(logits_BK, torch.tensor([1, 0]))
    torch.testing.assert_close(loss_B, -torch.log_softmax(logits_BK, 1)[[0, 1], [1, 0]])
    assert losses["cross_entropy"] is cross_entropy


@pytest.mark.parametrize(
    "shares", [[[0, 1, 2, 3, 4]], [[0, 3], [1, 2, 4]], [[0, 1, 2, 3, 4], []], [[4], [0, 1], [2, 3]]]
)
def test_the_mean_over_groups_is_the_weighted_mean_over_slides(shares: list[list[int]]) -> None:
    loss_S = torch.tensor([0.3, 1.2, 0.7, 2.0, 0.1], dtype=torch.float64)
    weight_S = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    parts = [group_loss(loss_S[own], weight_S[own], float(weight_S.sum()), len(shares)) for own in shares]
    wanted = float((loss_S * weight_S).sum() / weight_S.sum())
    assert float(torch.stack(parts).mean()) == pytest.approx(wanted, rel=1e-14)


def test_a_group_without_slides_still_has_a_loss_to_back_propagate() -> None:
    loss_B = torch.zeros(0, requires_grad=True)
    scalar = group_loss(loss_B * 1, torch.zeros(0), 3.0, 2)
    scalar.backward()
    assert (scalar.item(), loss_B.grad.shape) == (0.0, (0,))

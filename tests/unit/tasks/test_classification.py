"""Classes and labels: losses against their definitions, what is not known counts for nothing."""

import math

import pytest
import torch

from gigamil.tasks.classification import Multiclass, Multilabel, balanced_weights

NAN = math.nan
CLASSES = ("a", "b", "c")


def outputs(rows: int, columns: int = 3) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def mean_loss(task: Multiclass | Multilabel, output_SK: torch.Tensor, target_SX: torch.Tensor) -> torch.Tensor:
    weight_S = task.weights(target_SX)
    return (task.losses(output_SK, target_SX) * weight_S).sum() / weight_S.sum()


class TestMulticlass:
    def test_is_cross_entropy(self) -> None:
        output_SK, class_S = outputs(5), torch.tensor([0, 2, 1, 1, 0])
        loss_S = Multiclass(CLASSES).losses(output_SK, class_S[:, None].double())
        assert torch.equal(loss_S, torch.nn.functional.cross_entropy(output_SK, class_S, reduction="none"))

    def test_smoothing_and_weights_are_those_of_torch(self) -> None:
        output_SK, class_S, weights = outputs(5), torch.tensor([0, 2, 1, 1, 0]), (1.0, 2.0, 0.5)
        smooth = Multiclass(CLASSES, smoothing=0.2)
        wanted_S = torch.nn.functional.cross_entropy(output_SK, class_S, reduction="none", label_smoothing=0.2)
        torch.testing.assert_close(smooth.losses(output_SK, class_S[:, None].double()), wanted_S, rtol=1e-12, atol=0)
        weighted = Multiclass(CLASSES, weights)
        wanted = torch.nn.functional.cross_entropy(output_SK, class_S, torch.tensor(weights, dtype=torch.float64))
        found = mean_loss(weighted, output_SK, class_S[:, None].double())
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("focus", [0.5, 2.0])
    def test_focal_loss_mutes_what_is_easy(self, focus: float) -> None:
        output_SK = outputs(4).requires_grad_()
        target_SX = torch.tensor([[0.0], [1.0], [2.0], [0.0]], dtype=torch.float64)
        prob_S = output_SK.softmax(1).gather(1, target_SX.long()).squeeze(1)
        found_S = Multiclass(CLASSES, focus=focus).losses(output_SK, target_SX)
        torch.testing.assert_close(found_S, -((1 - prob_S) ** focus) * prob_S.log(), rtol=1e-9, atol=0)
        certain = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        Multiclass(CLASSES, focus=focus).losses(certain, target_SX[:1]).sum().backward()
        assert certain.grad is not None
        assert torch.isfinite(certain.grad).all()

    def test_a_slide_without_a_class_counts_for_nothing(self) -> None:
        output_SK = outputs(3).requires_grad_()
        target_SX = torch.tensor([[0.0], [NAN], [2.0]], dtype=torch.float64)
        task = Multiclass(CLASSES, (1.0, 5.0, 2.0), focus=2.0)
        assert task.weights(target_SX).tolist() == [1.0, 0.0, 2.0]
        mean_loss(task, output_SK, target_SX).backward()
        assert output_SK.grad is not None
        assert torch.isfinite(output_SK.grad).all()
        assert output_SK.grad[1].tolist() == [0.0] * 3

    def test_predicts_probabilities_of_its_classes(self) -> None:
        task = Multiclass(CLASSES)
        assert task.predicted_names == ("prob_a", "prob_b", "prob_c")
        torch.testing.assert_close(task.predict(outputs(4).float()).sum(1), torch.ones(4, dtype=torch.float64))

    def test_balanced_weights_have_mean_1_over_slides(self) -> None:
        weights = balanced_weights([0, 0, 0, 1], 3)
        assert weights == pytest.approx((4 / 9, 4 / 3, 4 / 3))
        assert (3 * weights[0] + weights[1]) / 4 == pytest.approx(2 / 3)  # two of three classes occur


class TestMultilabel:
    target_SX = torch.tensor([[1.0, 0.0, NAN], [NAN, NAN, NAN], [0.0, 1.0, 1.0]], dtype=torch.float64)

    def test_a_step_is_the_mean_over_known_pairs(self) -> None:
        output_SK = outputs(3)
        is_known_SK = torch.isfinite(self.target_SX)
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(
            output_SK[is_known_SK], self.target_SX[is_known_SK]
        )
        found = mean_loss(Multilabel(CLASSES), output_SK, self.target_SX)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("focus", [0.0, 1.5])
    def test_what_is_not_known_has_no_gradient(self, focus: float) -> None:
        output_SK = outputs(3).requires_grad_()
        mean_loss(Multilabel(CLASSES, focus=focus), output_SK, self.target_SX).backward()
        assert output_SK.grad is not None
        assert ((output_SK.grad != 0) == torch.isfinite(self.target_SX)).all()

    def test_positive_weights_and_focus(self) -> None:
        output_SK, target_SX = outputs(2), torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        prob_SK = output_SK.sigmoid()
        true_SK = torch.where(target_SX > 0, prob_SK, 1 - prob_SK)
        weight_K = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
        wanted_SK = -((1 - true_SK) ** 2) * true_SK.log() * torch.where(target_SX > 0, weight_K, 1.0)
        found_S = Multilabel(CLASSES, (2.0, 1.0, 3.0), focus=2.0).losses(output_SK, target_SX)
        torch.testing.assert_close(found_S, wanted_SK.mean(1), rtol=1e-9, atol=0)

"""The task of a run is made of its configuration and of what the training slides say, and of nothing else."""

import math
from typing import Any

import pytest
import torch

from gigamil.config.schema import Science
from gigamil.errors import CohortError, ConfigError
from gigamil.models.slide_model import build_model
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.train.loss import losses
from gigamil.train.task import chosen_metric, make_task, num_outputs, refuse_classless, validation_values

NAN = math.nan


def science(task: dict[str, Any] | None = None, **keys: Any) -> Science:
    return Science.model_validate({"task": task or {}} | keys)


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


class TestMaking:
    def test_classes_are_weighted_by_the_training_slides(self) -> None:
        task = make_task(science(), [("a", "b")], column(0, 0, 0, 1))
        assert task == Multiclass(("a", "b"), (4 / 6, 2.0))
        assert make_task(science(class_weights="none"), [("a", "b")], column(0, 1)) == Multiclass(("a", "b"))
        assert make_task(science({"name": "ordinal"}, class_weights=(1, 2, 3)), ["abc"], column(0)) == Ordinal(
            ("a", "b", "c"), (1.0, 2.0, 3.0)
        )

    def test_settings_reach_the_loss(self) -> None:
        settings = {"label_smoothing": 0.2, "focal_gamma": 1.5}
        assert make_task(science(settings, class_weights="none"), ["ab"], column(0)) == Multiclass(
            ("a", "b"), None, 0.2, 1.5
        )
        own = make_task(science({"loss": "cross_entropy"}, class_weights="none"), ["ab"], column(0))
        assert own == Multiclass(("a", "b"))

    def test_a_registered_loss_is_taken(self) -> None:
        name = "test_task_squared"
        losses.register(name)(lambda logits_BK, label_B: logits_BK[:, 0] ** 2)
        task = make_task(science({"loss": name}), ["ab"], column(0, 1))
        assert task.losses(torch.tensor([[3.0, 0.0]]), column(1)).tolist() == [9.0]

    def test_labels_that_are_rare_weigh_more_where_they_are_there(self) -> None:
        target_TX = torch.tensor([[1, 0], [0, 0], [0, 1], [0, NAN]], dtype=torch.float64)
        task = make_task(science({"name": "multilabel", "columns": ["x", "y"]}), [()], target_TX)
        assert task == Multilabel(("x", "y"), (3.0, 2.0))

    def test_numbers_are_in_units_of_their_spread(self) -> None:
        settings = {"name": "regression", "columns": ["age"], "loss": "mae"}
        task = make_task(science(settings, class_weights="none"), [()], column(1, 2, 3, NAN))
        assert task == Regression(("age",), (2.0,), (1.0,), "mae")

    def test_bins_are_those_of_the_training_events(self) -> None:
        target_TX = torch.tensor([[t, 1.0] for t in range(1, 9)] + [[99.0, 0.0]], dtype=torch.float64)
        settings = {"name": "survival", "bins": 2}
        assert make_task(science(settings, class_weights="none"), [()], target_TX) == DiscreteSurvival((4.5,))
        assert make_task(science(settings | {"loss": "cox"}, class_weights="none"), [()], target_TX) == Cox()

    @pytest.mark.parametrize(
        ("settings", "keys", "message"),
        [
            ({"name": "regression", "columns": ["x"], "loss": "cox"}, {}, "regression has huber, mae, mse"),
            ({"name": "ordinal", "loss": "cross_entropy"}, {}, "ordinal has one loss; set it to null"),
            ({"name": "survival", "label_smoothing": 0.1}, {}, "label_smoothing is of classes, and .* is survival"),
            ({"name": "ordinal", "focal_gamma": 1.0}, {}, "focal_gamma is of classes and labels"),
            ({"focal_gamma": 1.0, "loss": "mine"}, {}, "change cross_entropy, and science.task.loss is mine"),
            ({"name": "survival"}, {"class_weights": (1.0, 2.0)}, "class_weights are of classes, .* set it to none"),
            ({}, {"class_weights": (1.0, 2.0, 3.0)}, "has 3 numbers for 2 classes"),
            ({"name": "multilabel", "columns": ["x"]}, {"class_weights": (1.0, 2.0)}, "has 2 numbers for 1 labels"),
        ],
    )
    def test_settings_of_another_task_are_refused(
        self, settings: dict[str, Any], keys: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            make_task(science(settings, **keys), [("a", "b")], column(0, 1))

    def test_a_number_that_never_changes_and_bins_that_cannot_be_made_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="'age' is the same of all training slides"):
            make_task(science({"name": "regression", "columns": ["age"]}), [()], column(3, 3))
        with pytest.raises(CohortError, match="do not make 4 bins"):
            make_task(science({"name": "survival"}), [()], torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, 3),
        ({"name": "ordinal"}, 2),
        ({"name": "multilabel", "columns": ["x", "y"]}, 2),
        ({"name": "regression", "columns": ["x"]}, 1),
        ({"name": "survival", "bins": 5}, 4),
        ({"name": "survival", "loss": "cox"}, 1),
    ],
)
def test_outputs_are_known_before_any_slide(settings: dict[str, Any], number: int) -> None:
    assert num_outputs(science(settings), 3) == number


class TestSeveral:
    also = ({"name": "multiclass", "columns": ["site"], "weight": 3.0}, {"name": "survival", "loss": "cox"})
    settings = science(also=also, class_weights="none")
    target_TX = torch.tensor([[0, 1, 3, 1], [1, NAN, 2, 0], [0, 0, NAN, NAN], [1, 2, 1, 1]], dtype=torch.float64)

    def made(self) -> Several:
        task = make_task(self.settings, [("a", "b"), ("x", "y", "z"), ()], self.target_TX)
        assert isinstance(task, Several)
        return task

    def test_each_is_made_of_its_own_columns(self) -> None:
        task = self.made()
        assert task.names == ("multiclass", "site", "survival")
        assert task.tasks == (Multiclass(("a", "b")), Multiclass(("x", "y", "z")), Cox())
        assert (task.num_outputs, task.num_targets, task.couples_slides) == (6, 4, True)
        assert task.predicted_names[:3] == ("multiclass_prob_a", "multiclass_prob_b", "site_prob_x")
        assert num_outputs(self.settings, 2) == 5  # classes of further tasks are not known yet

    def test_the_loss_is_the_mean_of_theirs_by_weight(self) -> None:
        task = self.made()
        output_SK = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weight_ST = task.weights(self.target_TX)
        assert weight_ST.sum(dim=0).tolist() == pytest.approx([1.0, 3.0, 1.0])
        loss = (task.losses(output_SK, self.target_TX) * weight_ST).sum() / weight_ST.sum()
        own = []
        for part in task.parts():
            target_SX, own_SK = self.target_TX[:, part.targets], output_SK[:, part.outputs]
            weight_S = part.task.weights(target_SX)
            own.append((part.task.losses(own_SK, target_SX) * weight_S).sum() / weight_S.sum())
        assert float(loss) == pytest.approx(float((own[0] + 3 * own[1] + own[2]) / 5))
        nothing = torch.full((2, 4), NAN, dtype=torch.float64)
        assert task.weights(nothing).tolist() == [[0.0] * 3] * 2

    def test_metrics_of_the_others_have_their_name_in_front(self) -> None:
        found = validation_values(self.made(), self.target_TX, torch.randn(4, 6, dtype=torch.float64))
        assert {"loss", "auc", "site_auc", "survival_c_index"} <= set(found)
        assert chosen_metric(self.settings, self.made()) == "auc"
        assert found["site_auc"] is not None

    def test_tasks_of_one_column_are_refused(self) -> None:
        twice = science(task={"columns": ["x"]}, also=({"name": "regression", "columns": ["x"]},))
        with pytest.raises(ConfigError, match="x, x must differ"):
            make_task(twice, [("a", "b"), ()], torch.zeros(2, 2, dtype=torch.float64))


class TestChoosing:
    def test_each_task_has_its_metric(self) -> None:
        for task, name in (
            (Multiclass(("a", "b")), "auc"),
            (Multilabel(("a", "b")), "auc"),
            (Ordinal(("a", "b", "c")), "kappa"),
            (Regression(("x",), (0.0,), (1.0,)), "loss"),
            (DiscreteSurvival((1.0,)), "c_index"),
            (Cox(), "c_index"),
        ):
            assert chosen_metric(science(), task) == name
            assert chosen_metric(science(select="loss"), task) == "loss"

    def test_a_metric_of_another_task_is_refused(self) -> None:
        assert chosen_metric(science(select="balanced_accuracy"), Multiclass(("a", "b"))) == "balanced_accuracy"
        with pytest.raises(ConfigError, match="science.select=c_index: multiclass has loss, auc, auprc"):
            chosen_metric(science(select="c_index"), Multiclass(("a", "b")))


class TestValidation:
    def test_the_loss_is_without_class_weights(self) -> None:
        output_SK = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        class_S = torch.tensor([0, 1, 1, 0, 1, 1])
        found = validation_values(Multiclass(("a", "b"), (5.0, 1.0)), class_S[:, None].double(), output_SK)
        assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(output_SK, class_S)))
        assert found["auc"] is not None

    def test_what_is_undefined_is_none(self) -> None:
        found = validation_values(Multiclass(("a", "b")), column(0, 0), torch.zeros(2, 2, dtype=torch.float64))
        assert found["auc"] is None
        assert found["loss"] == pytest.approx(math.log(2))
        censored = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
        assert validation_values(Cox(), censored, column(0, 1)) == {"loss": None, "c_index": None}


def test_an_aggregator_that_learns_from_classes_is_refused_for_other_tasks() -> None:
    clam = build_model(science(aggregator={"name": "clam_sb"}, encoder={"name": "small_cnn"}), 2)
    refuse_classless(clam, Multiclass(("a", "b")))
    for task in (Ordinal(("a", "b", "c")), Cox()):
        with pytest.raises(
            ConfigError, match=f"ClamSingleBranch learns from the class of a slide, and {type(task).__name__}"
        ):
            refuse_classless(clam, task)
    with pytest.raises(ConfigError, match="and Several has not an output per class and no others"):
        refuse_classless(clam, TestSeveral().made())


def test_one_sided_is_for_two_classes_alone() -> None:
    options = {"name": "noisy_or", "options": {"one_sided": True}}
    model = build_model(science(aggregator=options, encoder={"name": "small_cnn"}), 2)
    refuse_classless(model, Multiclass(("a", "b")))
    for task in (Ordinal(("a", "b", "c")), Multilabel(("x", "y")), DiscreteSurvival((1.0, 2.0))):
        with pytest.raises(
            ConfigError, match=f"one_sided is for two classes, and this is {type(task).__name__} with 2"
        ):
            refuse_classless(model, task)


def test_training_slides_of_which_nothing_is_known() -> None:
    with pytest.raises(CohortError, match="task multiclass: the class of no training slide is known"):
        make_task(science({}), [("a", "b")], column(NAN, NAN))
    censored_TX = torch.tensor([[3, 0], [4, 0]], dtype=torch.float64)
    for loss in ("cox", "discrete"):
        with pytest.raises(CohortError, match="task survival: all training slides are censored"):
            make_task(science({"name": "survival", "loss": loss}, class_weights="none"), [()], censored_TX)


def test_attention_is_shown_of_the_first_task() -> None:
    assert TestSeveral().made().num_shown == 2
    assert Multiclass(("a", "b", "c")).num_shown == 3

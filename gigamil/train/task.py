"""The task of a run: its configuration, and what the training slides say (weights of classes, bins of time, units)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gigamil.config.schema import RunConfig, Science
from gigamil.config.schema import Task as TaskSettings
from gigamil.data.targets import column_classes, has_classes, target_columns
from gigamil.errors import CohortError, ConfigError
from gigamil.metrics.task import chosen_by, measure_of, metric_names
from gigamil.models.slide_model import SlideModel
from gigamil.tasks.classification import Multiclass, Multilabel, balanced_weights
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.survival import Cox, DiscreteSurvival, quantile_edges
from gigamil.tasks.task import Task
from gigamil.train.cohort import TrainingData
from gigamil.train.loss import losses

Weights = str | tuple[float, ...]
_LOSSES = {"regression": ("huber", "mae", "mse"), "survival": ("discrete", "cox")}


def make_task(science: Science, classes: Sequence[Sequence[str]], target_TX: Tensor) -> Task:
    """The task that a configuration describes, or all of them.

    Args:
        science: of the configuration.
        classes: names of the classes of each task, in their order; empty of one without.
        target_TX: of the training slides, and of no others.
    Raises:
        ConfigError: a loss that the task does not have, another number of class weights than of classes, settings that another
            task has, or two tasks of one column.
        CohortError: bins of time cannot be made; of no training slide a class is known, or all are censored.
    """
    settings = science.task, *science.also
    first_weights: Weights = science.class_weights
    if science.sampling == "balanced" and first_weights == "balanced":
        first_weights = "none"  # all classes come equally often already
    if not science.also:
        return _make_one(science.task, first_weights, classes[0], target_TX)
    names = [task.columns[0] if task.columns else task.name for task in settings]
    if len(set(names)) < len(names):
        raise ConfigError(f"science.also: {', '.join(names)} must differ: tasks are told apart by their first column")
    widths = [1 if has_classes(task) else len(target_columns(task)) for task in settings]
    tasks = []
    for number, (task, own, target_TX_own) in enumerate(
        zip(settings, classes, target_TX.split(widths, dim=1), strict=True)
    ):
        # Numbers per class are of the first task.
        further = science.class_weights if isinstance(science.class_weights, str) else "balanced"
        weights = further if number else first_weights
        tasks.append(_make_one(task, weights, own, target_TX_own))
    return Several(tuple(names), tuple(tasks), tuple(task.weight for task in settings))


def _make_one(settings: TaskSettings, weights: Weights, classes: Sequence[str], target_TX: Tensor) -> Task:
    _refuse_foreign(settings, weights)
    if has_classes(settings):
        known_T = target_TX[torch.isfinite(target_TX[:, 0]), 0]
        if not len(known_T):
            raise CohortError(
                f"{_called(settings)}: the class of no training slide is known, so nothing can be learned"
            )
        class_weights = _class_weights(weights, [int(number) for number in known_T.tolist()], len(classes))
        if settings.name == "ordinal":
            return Ordinal(tuple(classes), class_weights)
        own = None if settings.loss in (None, "cross_entropy") else losses[settings.loss]
        return Multiclass(tuple(classes), class_weights, settings.label_smoothing, settings.focal_gamma, own)
    columns = target_columns(settings)
    if settings.name == "multilabel":
        return Multilabel(columns, _positive_weights(weights, target_TX), settings.focal_gamma)
    if settings.name == "regression":
        return _regression(settings, columns, target_TX)
    times, events = target_TX.T.tolist()
    if 1 not in events:
        raise CohortError(f"{_called(settings)}: all training slides are censored, so nothing can be learned")
    if settings.loss == "cox":
        return Cox()
    return DiscreteSurvival(quantile_edges(times, events, settings.bins))


def _called(settings: TaskSettings) -> str:
    return f"task {settings.name}" + (f" ({', '.join(settings.columns)})" if settings.columns else "")


def task_of_run(config: RunConfig, data: TrainingData) -> Task:
    """The task that a run was, or is to be, trained for; errors as `make_task`."""
    further = [column_classes(task, data.table) if has_classes(task) else () for task in config.science.also]
    return make_task(config.science, [data.splits.classes, *further], data.slides("train").target_SX)


def chosen_metric(science: Science, task: Task) -> str:
    """The validation metric that chooses the best epoch.

    Raises:
        ConfigError: `science.select` is none of the task's.
    """
    names = metric_names(task)
    if science.select is None:
        return chosen_by(task)
    if science.select not in names:
        raise ConfigError(f"science.select={science.select}: {science.task.name} has {', '.join(names)}")
    return science.select


def refuse_classless(model: SlideModel, task: Task) -> None:
    """Refuse an aggregator that learns from the class of a slide, or has two classes built in, for another task.

    Raises:
        ConfigError: names both.
    """
    if getattr(model.aggregator, "needs_classes", False) and not isinstance(task, Multiclass):
        raise ConfigError(
            f"{type(model.aggregator).__name__} learns from the class of a slide, and {type(task).__name__} has not an output per class "
            "and no others. Choose another science.aggregator, or science.task.name: multiclass without science.also."
        )
    has_two = isinstance(task, Multiclass) and len(task.classes) == 2
    if getattr(model.aggregator, "one_sided", False) and not has_two:
        raise ConfigError(
            f"science.aggregator.options.one_sided is for two classes, and this is {type(task).__name__} with {task.num_outputs} outputs: "
            "set it to false"
        )


def validation_values(task: Task, target_SX: Tensor, output_SK: Tensor) -> dict[str, float | None]:
    """Loss and metrics of slides; None where undefined.

    The loss is the mean over slides of which something is known, without class weights; of several numbers or labels, and of Cox's
    comparisons, with the weights of `Task.weights`.
    """
    known_S = torch.isfinite(target_SX).any(dim=1)
    measure = measure_of(task, target_SX[known_S].numpy(), task.predict(output_SK[known_S]).numpy())
    found = measure(np.arange(int(known_S.sum())))
    values = {name: None if isinstance(value, str) else value for name, value in found.items()}
    return {"loss": _mean_loss(task, target_SX, output_SK)} | values


def _mean_loss(task: Task, target_SX: Tensor, output_SK: Tensor) -> float | None:
    if isinstance(task, Several):
        parts = zip(task.parts(), task.shares, strict=True)
        found = [(_mean_loss(p.task, target_SX[:, p.targets], output_SK[:, p.outputs]), share) for p, share in parts]
        known = [(loss, share) for loss, share in found if loss is not None]
        total = sum(share for _, share in known)
        return sum(loss * share for loss, share in known) / total if total else None
    weight_S = task.weights(target_SX)
    if task.class_numbers(target_SX) is not None:
        weight_S = torch.isfinite(target_SX[:, 0]).double()
    total = float(weight_S.sum())
    return float((task.losses(output_SK, target_SX) * weight_S).sum()) / total if total else None


def num_outputs(science: Science, num_classes: int) -> int:
    """K, before any slide is known: what the head gives per slide. Classes of further tasks are taken to be two."""
    return _num_outputs(science.task, num_classes) + sum(_num_outputs(task, 2) for task in science.also)


def _num_outputs(settings: TaskSettings, num_classes: int) -> int:
    if has_classes(settings):
        return num_classes - (settings.name == "ordinal")
    if settings.name == "survival":
        return 1 if settings.loss == "cox" else settings.bins - 1
    return len(target_columns(settings))


def _refuse_foreign(settings: TaskSettings, weights: Weights) -> None:
    name, own = settings.name, _LOSSES.get(settings.name)
    if own is not None and settings.loss not in (None, *own):
        raise ConfigError(f"science.task.loss={settings.loss}: {name} has {', '.join(own)}")
    if name in ("ordinal", "multilabel") and settings.loss is not None:
        raise ConfigError(f"science.task.loss={settings.loss}: {name} has one loss; set it to null")
    if settings.label_smoothing and name not in ("binary", "multiclass"):
        raise ConfigError(f"science.task.label_smoothing is of classes, and science.task.name is {name}: set it to 0")
    if settings.focal_gamma and name not in ("binary", "multiclass", "multilabel"):
        raise ConfigError(
            f"science.task.focal_gamma is of classes and labels, and science.task.name is {name}: set it to 0"
        )
    if (settings.label_smoothing or settings.focal_gamma) and settings.loss not in (None, "cross_entropy"):
        raise ConfigError(
            f"science.task.label_smoothing and focal_gamma change cross_entropy, and science.task.loss is {settings.loss}: set them to 0"
        )
    if isinstance(weights, tuple) and name in ("regression", "survival"):
        raise ConfigError(f"science.class_weights are of classes, and science.task.name is {name}: set it to none")


def _class_weights(setting: Weights, numbers: Sequence[int], num_classes: int) -> tuple[float, ...] | None:
    if setting == "none":
        return None
    if setting == "balanced":
        return balanced_weights(numbers, num_classes)
    if len(setting) != num_classes:
        raise ConfigError(f"science.class_weights has {len(setting)} numbers for {num_classes} classes")
    return tuple(float(number) for number in setting)


def _positive_weights(setting: Weights, target_TX: Tensor) -> tuple[float, ...] | None:
    """Of a label that is there: as often as it is not, of those that are known (balanced)."""
    num_labels = target_TX.shape[1]
    if setting == "none":
        return None
    if setting == "balanced":
        positive_X, negative_X = (target_TX == 1).sum(dim=0), (target_TX == 0).sum(dim=0)
        return tuple((negative_X.double() / positive_X.clamp(min=1)).clamp(min=1e-3).tolist())
    if len(setting) != num_labels:
        raise ConfigError(f"science.class_weights has {len(setting)} numbers for {num_labels} labels")
    return tuple(float(number) for number in setting)


def _regression(settings: TaskSettings, columns: Sequence[str], target_TX: Tensor) -> Regression:
    means, deviations = [], []
    for column, values_T in zip(columns, target_TX.T, strict=True):
        known_T = values_T[torch.isfinite(values_T)]
        if len(known_T.unique()) < 2:
            raise ConfigError(
                f"'{column}' is {'not known' if not len(known_T) else 'the same'} of all training slides: nothing can be learned of it"
            )
        means.append(float(known_T.mean()))
        deviations.append(float(known_T.std()))
    kind = "huber" if settings.loss is None else settings.loss
    return Regression(tuple(columns), tuple(means), tuple(deviations), kind)  # type: ignore[arg-type]

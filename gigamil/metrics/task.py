"""Which metrics a task has, and which of them chooses the best epoch.

Shape letters: N slides, X numbers of a target, P numbers that are predicted.
"""

import numpy as np
from numpy.typing import NDArray

from gigamil.metrics.bootstrap import Floats, Ints, Measure, Value
from gigamil.metrics.classification import checked_classes, class_values, label_values
from gigamil.metrics.regression import number_values
from gigamil.metrics.survival import survival_values
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.survival import DiscreteSurvival
from gigamil.tasks.task import Task

# All others are better the larger they are.
_SMALLER_IS_BETTER = ("loss", "brier", "ece", "mae", "rmse", "integrated_brier")


def measure_of(task: Task, target_NX: Floats, predicted_NP: Floats, threshold: float | None = None) -> Measure:
    """The metrics of predictions, as a function of rows.

    Args:
        task: whose predictions they are.
        target_NX: NaN where not known; slides of whom nothing is known have to be left out before.
        predicted_NP: by `Task.predict`.
        threshold: of a binary task, see `class_values`.
    Raises:
        CohortError: a label is no class, or a probability is not finite.
    """
    if isinstance(task, Several):
        return _measure_of_all(task, target_NX, predicted_NP, threshold)
    if isinstance(task, Multiclass | Ordinal):
        labels_N, probs_NK = checked_classes(target_NX[:, 0], predicted_NP)
        is_ordered = isinstance(task, Ordinal)
        return lambda row_N: class_values(
            labels_N[row_N], probs_NK[row_N], task.classes, is_ordered=is_ordered, threshold=threshold
        )
    if isinstance(task, Multilabel):
        return lambda row_N: label_values(target_NX[row_N], predicted_NP[row_N], task.labels)
    if isinstance(task, Regression):
        return lambda row_N: _numbers(task, target_NX[row_N], predicted_NP[row_N])
    edges = task.edges if isinstance(task, DiscreteSurvival) else None

    def survival(row_N: Ints) -> dict[str, Value]:
        (time_N, event_N), risk_N = target_NX[row_N].T, predicted_NP[row_N, 0]
        if edges is None:
            return survival_values(time_N, event_N, risk_N)
        return survival_values(time_N, event_N, risk_N, predicted_NP[row_N, 1:], edges)

    return survival


def metric_names(task: Task) -> tuple[str, ...]:
    """Names of the metrics that can choose the best epoch: the loss, and those of the task, of several those of the first."""
    if isinstance(task, Several):
        return metric_names(task.tasks[0])
    nothing = np.zeros((0, task.num_targets)), np.zeros((0, len(task.predicted_names)))
    return ("loss", *measure_of(task, *nothing)(np.zeros(0, dtype=np.int64)))


def chosen_by(task: Task) -> str:
    """The metric that chooses the best epoch, if the configuration does not say another; of several tasks that of the first."""
    if isinstance(task, Several):
        return chosen_by(task.tasks[0])
    if isinstance(task, Regression):
        return "loss"
    if isinstance(task, Ordinal):
        return "kappa"
    return "auc" if isinstance(task, Multiclass | Multilabel) else "c_index"


def headline(task: Task) -> str:
    """The metric that a run is reported by; of several tasks or numbers that of the first."""
    if isinstance(task, Several):
        return headline(task.tasks[0])
    if isinstance(task, Regression):
        return "pearson" if len(task.names) == 1 else f"pearson_{task.names[0]}"
    return chosen_by(task)


def is_better(name: str, value: float, before: float) -> bool:
    """Whether a value of a metric is better than one before; of one of several numbers by what stands in front of its name."""
    smaller = name in _SMALLER_IS_BETTER or name.startswith(("mae_", "rmse_"))
    return value < before if smaller else value > before


def _measure_of_all(task: Several, target_NX: Floats, predicted_NP: Floats, threshold: float | None) -> Measure:
    """Metrics of the first task by their names, those of the others with the task's name in front; each over slides that it knows."""
    measures: list[tuple[str, NDArray[np.bool_], Measure]] = []
    for number, part in enumerate(task.parts()):
        own_NX, value_NP = target_NX[:, part.targets], predicted_NP[:, part.values]
        known_N = np.asarray(np.isfinite(own_NX).any(axis=1))
        measure = measure_of(part.task, np.where(known_N[:, None], own_NX, 0), value_NP, None if number else threshold)
        measures.append((f"{part.name}_" if number else "", known_N, measure))

    def all_values(row_N: Ints) -> dict[str, Value]:
        found: dict[str, Value] = {}
        for prefix, known_N, measure in measures:
            found |= {prefix + name: value for name, value in measure(row_N[known_N[row_N]]).items()}
        return found

    return all_values


def _numbers(task: Regression, target_NX: Floats, value_NX: Floats) -> dict[str, Value]:
    """Of one number its metrics, of several those of each with its name behind."""
    found = [number_values(target_NX[:, i], value_NX[:, i]) for i in range(len(task.names))]
    if len(found) == 1:
        return found[0]
    return {
        f"{key}_{name}": value for name, values in zip(task.names, found, strict=True) for key, value in values.items()
    }

"""evaluation.json of a run: the metrics of every split, and the figures that go with them."""

import json
from collections import Counter
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from gigamil.data.table import folded
from gigamil.errors import CohortError
from gigamil.evaluate.figures import draw_confusion, draw_losses, draw_roc
from gigamil.evaluate.history import FILE_NAME as HISTORY_FILE
from gigamil.evaluate.history import read_history
from gigamil.evaluate.patients import by_patient
from gigamil.evaluate.predictions import FILE_NAME, Predictions
from gigamil.evaluate.task_figures import (
    draw_label_rocs,
    draw_reliability,
    draw_scatter,
    draw_survival,
    risk_groups,
)
from gigamil.evaluate.values import Values, read_run
from gigamil.files import parse_object, replace_file
from gigamil.metrics.bootstrap import Estimate, Floats, Scores, scores
from gigamil.metrics.classification import best_threshold
from gigamil.metrics.survival import log_rank
from gigamil.metrics.task import headline, measure_of
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.store import load_task
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

EVALUATION_FILE = "evaluation.json"
FIGURES = "figures"
ROC, CONFUSION, LOSSES = "roc.png", "confusion.png", "losses.png"


class Evaluation(TypedDict):
    """What evaluation.json holds. `splits[headline_split]["metrics"][headline_metric]` is the result of the run.

    `unit` is what is scored: slides, or patients where all slides of one are a bag (`science.bag`). `patients` has the scores of the
    mean over slides, of splits in which a patient has several. `threshold` is the probability from which on a slide is called
    positive, chosen on validation (binary tasks); `p_log_rank` compares patients of higher and lower risk, by the median of the
    headline split (survival); `figures` are files and captions.
    """

    headline_split: str
    headline_metric: str
    task: str
    unit: str
    classes: list[str]
    num_bootstrap: int
    seed: int
    threshold: float | None
    p_log_rank: float | None
    splits: dict[str, Scores]
    patients: dict[str, Scores]
    slides_per_class: dict[str, dict[str, int]]
    num_unlabelled: dict[str, int]
    figures: dict[str, str]


def summarise(run: Path, *, num_bootstrap: int, seed: int, unit: str = "slide") -> Evaluation:
    """Compute the metrics of each split, write evaluation.json, and draw figures/.

    Slides of which nothing is known cannot be scored; `num_unlabelled` counts them. The figures are of the headline split. The
    losses are drawn where the run has metrics.jsonl (predictions of a foreign cohort come without).

    Args:
        run, num_bootstrap, seed: as `evaluate_run`.
        unit: slide or patient; what is predicted of the slides of a patient is the same then, and counts once.
    Raises:
        CohortError: predictions.csv is missing or wrong, or no slide has a target.
    """
    predictions = read_run(run)
    known = [i for i in range(len(predictions)) if _is_known(predictions, i)]
    if not known:
        raise CohortError(
            f"'{run / FILE_NAME}': no slide has a label, so nothing can be scored. Add labels to the slide table, or "
            "use the predictions as they are."
        )
    task = load_task(run) or Multiclass(predictions.classes if isinstance(predictions, Predictions) else ())
    evaluation = _evaluate(predictions, task, predictions.take(known).headline_split, num_bootstrap, seed, unit)
    evaluation["figures"] = _draw(run, predictions, task, evaluation)
    text = json.dumps(evaluation, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(run / EVALUATION_FILE, text.encode())
    return evaluation


def read_evaluation(run: Path) -> Evaluation:
    """Read evaluation.json.

    Raises:
        CohortError: the run was not evaluated, or by another version.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        raise CohortError(f"'{path}' does not exist; run `gigamil evaluate` first")
    found = parse_object(path.read_text(encoding="utf-8"), f"'{path}'", "run `gigamil evaluate` again")
    missing = [key for key in Evaluation.__annotations__ if key not in found]
    if missing:
        raise CohortError(
            f"'{path}' lacks {', '.join(missing)}: another version wrote it. Run `gigamil evaluate` again."
        )
    return cast(Evaluation, found)


def targets_and_values(part: Predictions | Values) -> tuple[Floats, Floats]:
    """Targets and predictions of labelled slides, as `measure_of` takes them."""
    if isinstance(part, Values):
        return part.target_NX, part.value_NP
    return part.label_numbers[:, None].astype(np.float64), part.probs_NK


def _evaluate(
    predictions: Predictions | Values, task: Task, split: str, num_bootstrap: int, seed: int, unit: str
) -> Evaluation:
    """Splits in the order of their first row; one of which nothing is known has no metrics."""
    parts = {name: predictions.labelled(name) for name in dict.fromkeys(predictions.splits)}
    means = {name: by_patient(part) for name, part in parts.items() if len(part)}
    scored = {name: part for name, part in parts.items() if len(part)}
    if unit == "patient":
        scored = {name: means[name] or part for name, part in scored.items()}
    threshold = _threshold(task, scored)

    def scores_of(name: str, part: Predictions | Values) -> Scores:
        own = threshold if name != "val" else None  # where it was chosen it flatters
        patients = [folded(patient_id) for patient_id in part.patient_ids]  # one patient, as splits have it
        measure = measure_of(task, *targets_and_values(part), own)
        return scores(measure, patients, num_bootstrap=num_bootstrap, seed=seed)

    found = {name: scores_of(name, part) for name, part in scored.items()}
    patients = {name: scores_of(name, own) for name, own in means.items() if own and len(own) < len(scored[name])}
    classes = _classes(task)
    return Evaluation(
        headline_split=split,
        headline_metric=headline(task),
        task=type(task).__name__,
        unit=unit,
        classes=list(classes),
        num_bootstrap=num_bootstrap,
        seed=seed,
        threshold=threshold,
        p_log_rank=_p_log_rank(task, means[split] or scored[split]),
        splits=found,
        patients=patients,
        slides_per_class={
            name: {label: Counter(part.labels)[label] for label in classes}
            for name, part in scored.items()
            if isinstance(part, Predictions)
        },
        num_unlabelled={name: predictions.splits.count(name) - len(part) for name, part in parts.items()},
        figures={},
    )


def _threshold(task: Task, scored: "dict[str, Predictions | Values]") -> float | None:
    """Chosen on validation, for a binary task (the first of several) that has other slides to use it on."""
    val, first = scored.get("val"), task.tasks[0] if isinstance(task, Several) else task
    if not isinstance(first, Multiclass) or len(first.classes) != 2 or val is None or len(scored) < 2:
        return None
    target_NX, value_NP = targets_and_values(val)
    known_N = np.isfinite(target_NX[:, 0])
    return best_threshold(target_NX[known_N, 0].astype(np.int64), value_NP[known_N, 1])


def _p_log_rank(task: Task, part: Predictions | Values) -> float | None:
    if not isinstance(task, Cox | DiscreteSurvival):
        return None
    target_NX, value_NP = targets_and_values(part)
    time_N, event_N = target_NX.T
    p = log_rank(time_N, event_N, risk_groups(value_NP[:, 0]))
    return None if isinstance(p, str) else p


def _is_known(predictions: Predictions | Values, row: int) -> bool:
    if isinstance(predictions, Values):
        return bool(predictions.is_known_N[row])
    return predictions.labels[row] is not None


def _classes(task: Task) -> tuple[str, ...]:
    """Classes of a task, of several those of the first; none of one without."""
    first = task.tasks[0] if isinstance(task, Several) else task
    return first.classes if isinstance(first, Multiclass | Ordinal) else ()


def _draw(run: Path, predictions: Predictions | Values, task: Task, evaluation: Evaluation) -> dict[str, str]:
    """Draw what the tasks have to show; captions by file."""
    split = evaluation["headline_split"]
    scored, folder = predictions.labelled(split), run / FIGURES
    if evaluation["unit"] == "patient":
        scored = by_patient(scored) or scored
    found: dict[str, str] = {}
    metrics = evaluation["splits"][split]["metrics"]
    if isinstance(task, Several):
        for number, part in enumerate(task.parts()):
            target_NX, value_NP = targets_and_values(_rows_of(part.task, scored))
            target_NX, value_NP = target_NX[:, part.targets], value_NP[:, part.values]
            known_N = np.isfinite(target_NX).any(axis=1)
            if known_N.any():
                prefix = folder / "".join(c if c.isalnum() else "_" for c in part.name)
                area = metrics.get(f"{part.name}_auc" if number else "auc")
                drawn = _draw_task(part.task, target_NX[known_N], value_NP[known_N], area, f"{prefix}_")
                found |= {Path(name).name: f"{part.name}: {caption}" for name, caption in drawn.items()}
    else:
        drawn = _draw_task(task, *targets_and_values(_rows_of(task, scored)), metrics.get("auc"), f"{folder}/")
        found = {Path(name).name: caption for name, caption in drawn.items()}
    found = {name: f"{caption}, {split} split" for name, caption in found.items()}
    if (run / HISTORY_FILE).is_file():
        draw_losses(read_history(run / HISTORY_FILE), folder / LOSSES)
        found[LOSSES] = "Training"
    return found


def _rows_of(task: Task, part: Predictions | Values) -> Predictions | Values:
    """What is drawn: slides; of survival patients, whose slides do not die one by one."""
    return (by_patient(part) or part) if isinstance(task, Cox | DiscreteSurvival) else part


def _draw_task(task: Task, target_NX: Floats, value_NP: Floats, area: Estimate | None, prefix: str) -> dict[str, str]:
    """Draw what a task has to show into files that begin with `prefix`; captions by file.

    Args:
        area: the AUC of classes.
    """
    if isinstance(task, Multiclass | Ordinal):
        assert area is not None, "classes have an AUC"
        labels_N = target_NX[:, 0].astype(np.int64)
        draw_roc(labels_N, value_NP, task.classes, area, Path(f"{prefix}{ROC}"))
        draw_confusion(labels_N, value_NP.argmax(axis=1), task.classes, Path(f"{prefix}{CONFUSION}"))
        draw_reliability(labels_N, value_NP, task.classes, Path(f"{prefix}calibration.png"))
        return {
            f"{prefix}{ROC}": "ROC curve",
            f"{prefix}{CONFUSION}": "Confusion matrix",
            f"{prefix}calibration.png": "Calibration",
        }
    if isinstance(task, Multilabel):
        draw_label_rocs(target_NX, value_NP, task.labels, Path(f"{prefix}{ROC}"))
        return {f"{prefix}{ROC}": "ROC curves of the labels"}
    if isinstance(task, Regression):
        draw_scatter(target_NX, value_NP, task.names, Path(f"{prefix}scatter.png"))
        return {f"{prefix}scatter.png": "Known and predicted"}
    time_N, event_N = target_NX.T
    p = log_rank(time_N, event_N, risk_groups(value_NP[:, 0]))
    draw_survival(time_N, event_N, value_NP[:, 0], None if isinstance(p, str) else p, Path(f"{prefix}survival.png"))
    return {f"{prefix}survival.png": "Survival by predicted risk"}

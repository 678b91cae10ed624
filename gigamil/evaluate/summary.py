"""evaluation.json of a run: the metrics of every split, and the figures that go with them."""

import json
from collections import Counter
from pathlib import Path
from typing import TypedDict, cast

from gigamil.data.table import folded
from gigamil.errors import CohortError
from gigamil.evaluate.figures import draw_confusion, draw_losses, draw_roc
from gigamil.evaluate.history import FILE_NAME as HISTORY_FILE
from gigamil.evaluate.history import read_history
from gigamil.evaluate.predictions import FILE_NAME, Predictions, read_predictions
from gigamil.files import parse_object, replace_file
from gigamil.metrics import Metrics, classification_metrics

EVALUATION_FILE = "evaluation.json"
FIGURES = "figures"
ROC, CONFUSION, LOSSES = "roc.png", "confusion.png", "losses.png"


class Evaluation(TypedDict):
    """What evaluation.json holds. `splits[headline_split]` is the result of the run."""

    headline_split: str
    classes: list[str]
    num_bootstrap: int
    seed: int
    splits: dict[str, Metrics]
    slides_per_class: dict[str, dict[str, int]]
    num_unlabelled: dict[str, int]


def summarise(run: Path, *, num_bootstrap: int, seed: int) -> Evaluation:
    """Compute the metrics of each split, write evaluation.json, and draw figures/roc, confusion and losses.

    Slides without a label cannot be scored; `num_unlabelled` counts them. The figures are of the headline split. The
    losses are drawn where the run has metrics.jsonl (predictions of a foreign cohort come without).

    Raises:
        CohortError: predictions.csv is missing or wrong, or no slide has a label.
    """
    predictions = read_predictions(run / FILE_NAME)
    if not any(predictions.labels):
        raise CohortError(
            f"'{run / FILE_NAME}': no slide has a label, so nothing can be scored. Add labels to the slide table, or "
            "use the predictions as they are."
        )
    evaluation = _evaluate(predictions, num_bootstrap, seed)
    text = json.dumps(evaluation, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    replace_file(run / EVALUATION_FILE, text.encode())
    _draw(run, predictions, evaluation)
    return evaluation


def read_evaluation(run: Path) -> Evaluation:
    """Read evaluation.json.

    Raises:
        CohortError: the run was not evaluated.
    """
    path = run / EVALUATION_FILE
    if not path.is_file():
        raise CohortError(f"'{path}' does not exist; run `gigamil evaluate` first")
    return cast(Evaluation, parse_object(path.read_text(encoding="utf-8"), f"'{path}'", "run `gigamil evaluate` again"))


def _evaluate(predictions: Predictions, num_bootstrap: int, seed: int) -> Evaluation:
    """Splits in the order of their first row; one without any labelled slide has no metrics."""
    parts = {split: predictions.labelled(split) for split in dict.fromkeys(predictions.splits)}
    scored = {split: part for split, part in parts.items() if len(part)}
    return Evaluation(
        headline_split=predictions.take([i for i in range(len(predictions)) if predictions.labels[i]]).headline_split,
        classes=list(predictions.classes),
        num_bootstrap=num_bootstrap,
        seed=seed,
        splits={
            split: classification_metrics(
                part.label_numbers,
                part.probs_NK,
                [folded(patient_id) for patient_id in part.patient_ids],  # one patient, as splits have it
                num_bootstrap=num_bootstrap,
                seed=seed,
            )
            for split, part in scored.items()
        },
        slides_per_class={
            split: {name: Counter(part.labels)[name] for name in predictions.classes} for split, part in scored.items()
        },
        num_unlabelled={split: predictions.splits.count(split) - len(part) for split, part in parts.items()},
    )


def _draw(run: Path, predictions: Predictions, evaluation: Evaluation) -> None:
    split = evaluation["headline_split"]
    scored = predictions.labelled(split)
    labels_N, folder = scored.label_numbers, run / FIGURES
    draw_roc(labels_N, scored.probs_NK, scored.classes, evaluation["splits"][split]["auc"], folder / ROC)
    draw_confusion(labels_N, scored.probs_NK.argmax(axis=1), scored.classes, folder / CONFUSION)
    if (run / HISTORY_FILE).is_file():
        draw_losses(read_history(run / HISTORY_FILE), folder / LOSSES)

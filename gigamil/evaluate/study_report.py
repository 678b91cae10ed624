"""The report of a study: all folds and seeds of one configuration, out-of-fold predictions, pooled and per-fold metrics.

Shape letters: N slides, K classes, S seeds, F points of a grid.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from gigamil.evaluate.figures import draw_confusion
from gigamil.evaluate.heatmap import FOLDER as HEATMAPS
from gigamil.evaluate.html import Html, image, join, page, table, tag
from gigamil.evaluate.pooled import Member, Pooled, read_pooled, read_study
from gigamil.evaluate.report import CONFIG_FILE, REPORT_FILE, metric_words
from gigamil.evaluate.study_figures import draw_folds, draw_roc_band
from gigamil.evaluate.summary import FIGURES, read_evaluation
from gigamil.evaluate.task_figures import (
    draw_label_rocs,
    draw_reliability,
    draw_scatter,
    draw_survival,
    risk_groups,
)
from gigamil.evaluate.values import target_names
from gigamil.files import replace_file
from gigamil.metrics.bootstrap import Estimate, Scores, scores
from gigamil.metrics.survival import log_rank
from gigamil.metrics.task import headline
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task

SUMMARY_FILE, PREDICTIONS_FILE = "study_evaluation.json", "predictions_out_of_fold.csv"
_PER_KIND = 2  # pictures of each kind of hit and miss


class StudyEvaluation(TypedDict):
    """What study_evaluation.json holds: `pooled` over all slides, of each seed by itself and their mean; and each run's own.

    `patients` is that of the mean over slides, where a patient has several. `per_run` has, for each finished run, fold, seed and the
    metrics of its held-out slides.
    """

    metric: str
    num_seeds: int
    num_bootstrap: int
    seed: int
    pooled: Scores
    patients: Scores | None
    per_run: list[dict[str, Any]]
    left_out: list[str]
    failed: list[dict[str, Any]]


class Shown(NamedTuple):
    """A slide of the gallery: why it is there, and whose attention is drawn."""

    kind: str
    slide_id: str
    member: Member
    words: str


def evaluate_study(folder: Path, *, num_bootstrap: int, seed: int) -> StudyEvaluation:
    """Pool what the finished runs of a study predict; writes study_evaluation.json, predictions_out_of_fold.csv and figures/.

    Raises:
        CohortError: no run is finished, or their predictions do not go together.
    """
    members, pooled = read_study(folder), read_pooled(folder)
    metric = headline(pooled.task)
    per_run = []
    for member in members:
        if member.is_finished:
            found = read_evaluation(folder / member.folder)
            own = found["splits"][found["headline_split"]]
            per_run.append({"fold": member.fold, "seed": member.seed, "folder": member.folder, "scores": own})
    means = pooled.by_patient()
    several = means if means is not None and len(means) < len(pooled) else None
    evaluation = StudyEvaluation(
        metric=metric,
        num_seeds=pooled.num_seeds,
        num_bootstrap=num_bootstrap,
        seed=seed,
        pooled=_scores(pooled, num_bootstrap, seed),
        patients=None if several is None else _scores(several, num_bootstrap, seed),
        per_run=per_run,
        left_out=list(pooled.left_out),
        failed=[vars(member) for member in members if member.error and not member.is_finished],
    )
    replace_file(folder / SUMMARY_FILE, (json.dumps(evaluation, indent=1, allow_nan=False) + "\n").encode())
    replace_file(folder / PREDICTIONS_FILE, _predictions(pooled).encode())
    _draw(folder / FIGURES, pooled, evaluation)
    return evaluation


def _scores(pooled: Pooled, num_bootstrap: int, seed: int) -> Scores:
    return scores(pooled.measure(), pooled.patients, num_bootstrap=num_bootstrap, seed=seed)


def gallery(folder: Path) -> list[Shown]:
    """The slides that tell most: of two classes the surest hits and misses of each kind, with the run that predicted them.

    Of the first seed. Empty for other tasks.
    """
    pooled = read_pooled(folder, of_units=False)
    if not isinstance(pooled.task, Multiclass) or len(pooled.task.classes) != 2:
        return []
    done = [member for member in read_study(folder) if member.is_finished]
    first = min(member.seed for member in done)
    of_fold = {member.fold: member for member in done if member.seed == first}
    negative, positive = pooled.task.classes
    is_positive_N, p_N = pooled.target_NX[:, 0] == 1, pooled.value_SNP[0, :, 1]
    kinds = {
        f"true {positive}": is_positive_N & (p_N >= 0.5),
        f"{positive} missed": is_positive_N & (p_N < 0.5),
        f"called {positive}, is {negative}": ~is_positive_N & (p_N >= 0.5),
        f"true {negative}": ~is_positive_N & (p_N < 0.5),
    }
    shown = []
    for kind, rows_N in kinds.items():
        rows = sorted(np.nonzero(rows_N)[0], key=lambda row: (-abs(p_N[row] - 0.5), pooled.slide_ids[row]))[:_PER_KIND]
        for row in rows:
            member, slide_id = of_fold.get(pooled.folds[row]), pooled.slide_ids[row].partition(" (fold ")[0]
            if member is not None:
                shown.append(Shown(kind, slide_id, member, f"P({positive}) {p_N[row]:.3f}, fold {member.fold}"))
    return shown


def write_study_report(folder: Path) -> Path:
    """Write report.html of a study from its files: tables, figures, gallery, the configuration."""
    evaluation: StudyEvaluation = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    members = read_study(folder)
    name = folder.resolve().parent.name
    html = page(
        f"{name} - gigamil",
        tag("h1", f"{name}: cross-validation"),
        _lead(evaluation, members),
        _failed_section(evaluation),
        _metrics_section(evaluation),
        _runs_section(evaluation),
        _figures_section(folder),
        _gallery_section(folder),
        _config_section(folder, members),
        tag("footer", tag("p", "Written by gigamil. For research; not a medical device.", class_="note")),
    )
    replace_file(folder / REPORT_FILE, html.encode())
    return folder / REPORT_FILE


def _predictions(pooled: Pooled) -> str:
    """A row per slide and seed; numbers keep every digit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    known = [f"true_{name}" for name in target_names(pooled.task)]
    writer.writerow(["slide_id", "patient_id", "fold", "seed", *known, *pooled.task.predicted_names])
    for seed, value_NP in zip(pooled.seeds, pooled.value_SNP, strict=True):
        for row, slide_id in enumerate(pooled.slide_ids):
            targets = [_target(pooled.task, value) for value in pooled.target_NX[row]]
            said = [repr(float(value)) for value in value_NP[row]]
            writer.writerow([slide_id, pooled.patient_ids[row], pooled.folds[row], seed, *targets, *said])
    return text.getvalue()


def _target(task: Task, value: float) -> str:
    """What is known, as predictions.csv has it: a class by its name."""
    if np.isnan(value):
        return ""
    return task.classes[int(value)] if isinstance(task, Multiclass | Ordinal) else repr(float(value))


def _draw(folder: Path, pooled: Pooled, evaluation: StudyEvaluation) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    metric = evaluation["metric"]
    draw_folds(evaluation["per_run"], metric, metric_words(metric), evaluation["pooled"], folder / "folds.png")
    task: Task = pooled.task
    value_NP = pooled.value_SNP.mean(axis=0)
    if isinstance(task, Multiclass | Ordinal):
        labels_N = pooled.target_NX[:, 0].astype(np.int64)
        if len(task.classes) == 2:
            draw_roc_band(labels_N == 1, pooled.value_SNP[:, :, 1], pooled.patients, folder / "roc.png")
        draw_reliability(labels_N, value_NP, task.classes, folder / "calibration.png")
        draw_confusion(labels_N, value_NP.argmax(axis=1), task.classes, folder / "confusion.png")
    elif isinstance(task, Multilabel):
        draw_label_rocs(pooled.target_NX, value_NP, task.labels, folder / "labels.png")
    elif isinstance(task, Regression):
        draw_scatter(pooled.target_NX, value_NP, task.names, folder / "scatter.png")
    elif isinstance(task, Cox | DiscreteSurvival):
        patients = pooled.by_patient() or pooled
        (time_N, event_N), value_NP = patients.target_NX.T, patients.value_SNP.mean(axis=0)
        p = log_rank(time_N, event_N, risk_groups(value_NP[:, 0]))
        draw_survival(time_N, event_N, value_NP[:, 0], None if isinstance(p, str) else p, folder / "survival.png")


_CAPTIONS = {
    "folds.png": "Each run on the slides that it held out; pooled: all of them together",
    "roc.png": "ROC of out-of-fold predictions: a curve per seed, their mean, 95 % band over patients",
    "labels.png": "ROC curves of the labels, out of fold, mean over seeds",
    "calibration.png": "Calibration of the mean over seeds",
    "confusion.png": "Confusion matrix of the mean over seeds",
    "scatter.png": "Known and predicted, mean over seeds",
    "survival.png": "Survival by predicted risk, mean over seeds",
}


def _lead(evaluation: StudyEvaluation, members: Sequence[Member]) -> Html:
    pooled, metric, left_out = evaluation["pooled"], evaluation["metric"], evaluation["left_out"]
    done = len(evaluation["per_run"])
    value = tag("strong", f"{metric_words(metric)} {_words(pooled['metrics'][metric])}")
    return tag(
        "p",
        value,
        f" on {pooled['num_slides']} slides of {pooled['num_patients']} patients, each predicted by a model that has not seen its "
        f"patient. {done} of {len(members)} runs are finished; the mean over {evaluation['num_seeds']} seeds.",
        *(
            [" Not in these figures, for other folds of their seed are not finished: " + ", ".join(left_out) + "."]
            if left_out
            else []
        ),
        class_="lead",
    )


def _failed_section(evaluation: StudyEvaluation) -> Html:
    if not evaluation["failed"]:
        return Html()
    lines = [tag("li", f"fold {m['fold']}, seed {m['seed']}: {m['error']}") for m in evaluation["failed"]]
    return join(tag("p", f"{len(lines)} runs failed and are in no figure:", class_="warn"), tag("ul", *lines))


def _metrics_section(evaluation: StudyEvaluation) -> Html:
    rows = []
    for name, estimate in evaluation["pooled"]["metrics"].items():
        own = [run["scores"]["metrics"].get(name, {}).get("value") for run in evaluation["per_run"]]
        values = [value for value in own if value is not None]
        spread = f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        if len(values) < len(own):
            spread += f" (undefined in {len(own) - len(values)} of {len(own)} runs)"
        rows.append(("", [metric_words(name), *_pooled_cells(estimate), spread]))
    if evaluation["patients"] is not None:
        for name, estimate in evaluation["patients"]["metrics"].items():
            rows.append(("", [f"{metric_words(name)}, by patient", *_pooled_cells(estimate), ""]))
    note = (
        f"Pooled: all out-of-fold predictions together, the mean over seeds; intervals from {evaluation['num_bootstrap']} bootstrap "
        "resamples of patients. Models of different folds need not mean the same by a probability, which pooling takes for granted; "
        "the last column, mean and standard deviation of runs by themselves, does not."
    )
    if evaluation["patients"] is not None:
        note += " By patient: the mean of what is predicted of the slides of each."
    head = ["Metric", "Pooled", "95 % interval", "Of runs by themselves"]
    return join(tag("h2", "Metrics"), table(head, rows), tag("p", note, class_="note"))


def _pooled_cells(estimate: Estimate) -> list[str]:
    interval = "none" if estimate["ci"] is None else f"{estimate['ci'][0]:.3f} to {estimate['ci'][1]:.3f}"
    return [tag("strong", "undefined" if estimate["value"] is None else f"{estimate['value']:.3f}"), interval]


def _runs_section(evaluation: StudyEvaluation) -> Html:
    metric, rows, reasons = evaluation["metric"], [], []
    for run in evaluation["per_run"]:
        estimate: Estimate = run["scores"]["metrics"].get(metric, Estimate(value=None, ci=None, num_usable=0))
        link = tag("a", run["folder"], href=f"{run['folder']}/{REPORT_FILE}")
        slides = f"{run['scores']['num_slides']} of {run['scores']['num_patients']} patients"
        rows.append(("", [link, str(run["fold"]), str(run["seed"]), slides, _words(estimate)]))
        if estimate["value"] is None:
            reasons.append(tag("p", f"{run['folder']}: {estimate.get('reason', 'undefined')}.", class_="note"))
    head = ["Run", "Fold", "Seed", "Slides", metric_words(metric)]
    return join(tag("h2", "Runs"), table(head, rows), *reasons)


def _figures_section(folder: Path) -> Html:
    there = [
        (folder / FIGURES / name, words) for name, words in _CAPTIONS.items() if (folder / FIGURES / name).is_file()
    ]
    drawn = [tag("figure", image(path, words), tag("figcaption", words)) for path, words in there]
    return join(tag("h2", "Figures"), tag("div", *drawn, class_="pair"))


def _gallery_section(folder: Path) -> Html:
    drawn = []
    for shown in gallery(folder):
        path = folder / shown.member.folder / HEATMAPS / f"{shown.slide_id}.png"
        if path.is_file():
            caption = f"{shown.kind}: {shown.slide_id}, {shown.words}"
            drawn.append(tag("figure", image(path, caption, photo=True), tag("figcaption", caption)))
    if not drawn:
        return Html()
    words = "The surest of each kind, of the first seed. Attention says where the model looked to decide, not what the tissue is."
    return join(tag("h2", "Right and wrong"), tag("p", words, class_="note"), tag("div", *drawn, class_="gallery"))


def _config_section(folder: Path, members: Sequence[Member]) -> Html:
    for member in members:
        path = folder / member.folder / CONFIG_FILE
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            summary = f"{CONFIG_FILE} of {member.folder}; the others differ in fold, seed, name and folder"
            return join(tag("h2", "Configuration"), tag("details", tag("summary", summary), tag("pre", text)))
    return Html()


def _words(estimate: Estimate) -> str:
    if estimate["value"] is None:
        return "undefined"
    interval = "" if estimate["ci"] is None else f" ({estimate['ci'][0]:.3f} to {estimate['ci'][1]:.3f})"
    return f"{estimate['value']:.3f}{interval}"

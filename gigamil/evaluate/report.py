"""report.html of a run: one file to mail or to archive, that says what was done and what came out.

It is built from files of the run folder only; what is optional and missing is named at the end of the report.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gigamil.evaluate.figures import SHARES
from gigamil.evaluate.heatmap import FOLDER as HEATMAPS
from gigamil.evaluate.html import Html, image, join, page, table, tag
from gigamil.evaluate.predictions import HEADLINE_ORDER, Predictions
from gigamil.evaluate.summary import FIGURES, LOSSES, Evaluation, read_evaluation, summarise
from gigamil.evaluate.values import Values, read_run
from gigamil.files import parse_object, replace_file
from gigamil.metrics.bootstrap import Estimate, Scores

REPORT_FILE = "report.html"
FACTS_FILE = "run.json"
CONFIG_FILE = "config.resolved.yaml"
MOST_HEATMAPS = 24  # about 0.4 MB each
MOST_PROBABILITIES = 4  # with more classes only the predicted one has its probability in the table
LONG_FACT = 36

METRIC_WORDS = {
    "auc": "AUC",
    "auprc": "Average precision",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1",
    "f1_at_threshold": "F1 at threshold",
    "brier": "Brier score",
    "ece": "Calibration error",
    "kappa": "Quadratic kappa",
    "mae": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "R2",
    "pearson": "Pearson's correlation",
    "spearman": "Spearman's correlation",
    "c_index": "C-index",
    "integrated_brier": "Integrated Brier score",
}
_OF_CLASSES = ("auc", "auprc", "f1", "f1_at_threshold")
SPLIT_WORDS = {"test": "Held-out (test)", "val": "Validation", "train": "Training"}


def evaluate_run(run: Path, *, num_bootstrap: int, seed: int, unit: str = "slide") -> Evaluation:
    """Score the predictions of a run and write evaluation.json, figures/ and report.html.

    Args:
        run: folder with predictions.csv; metrics.jsonl, run.json, config.resolved.yaml and heatmaps/ are used if there.
        num_bootstrap: resamples of patients for the intervals.
        seed: of the resampling.
        unit: what is scored, slide or patient.
    Returns:
        The content of evaluation.json: metrics per split, and which of them is the headline.
    Raises:
        CohortError: predictions.csv is missing or wrong, or no slide has a label.
    """
    evaluation = summarise(run, num_bootstrap=num_bootstrap, seed=seed, unit=unit)
    write_report(run)
    return evaluation


def write_report(run: Path) -> Path:
    """Write report.html anew from the files of an evaluated run, for example after heatmaps were drawn.

    Equal files give equal bytes.

    Raises:
        CohortError: the run was not evaluated.
    """
    evaluation, predictions = read_evaluation(run), read_run(run)
    facts = _read_facts(run)
    name = str(facts.get("name") or run.resolve().name)
    html = page(
        f"{name} - gigamil",
        tag("h1", name),
        _lead(evaluation),
        _facts_section(facts),
        _metrics_section(evaluation),
        _figures_section(run, evaluation),
        _heatmaps_section(run, predictions),
        _predictions_section(predictions, evaluation["headline_split"]),
        _config_section(run),
        _missing_section(run),
        tag("footer", tag("p", "Written by gigamil. For research; not a medical device.", class_="note")),
    )
    replace_file(run / REPORT_FILE, html.encode())
    return run / REPORT_FILE


def _lead(evaluation: Evaluation) -> Html:
    split = evaluation["headline_split"]
    found = evaluation["splits"][split]
    counts = evaluation["slides_per_class"].get(split, {})
    per_class = f" ({', '.join(f'{count} {name}' for name, count in counts.items())})" if counts else ""
    slides, patients = _counted(found["num_slides"], "slide"), _counted(found["num_patients"], "patient")
    name = evaluation["headline_metric"]
    value = tag("strong", f"{metric_words(name)} {_value_words(found['metrics'][name])}")
    what = patients if evaluation["unit"] == "patient" else f"{slides} of {patients}"
    lead = tag("p", value, f" on {what}{per_class}. Split: {_split_words(split)}.", class_="lead")
    if split == "test":
        return lead
    warning = "No test split was predicted: these slides were seen in training or in choosing the model, so the figures flatter."
    return join(lead, tag("p", warning, class_="warn"))


def _facts_section(facts: dict[str, Any]) -> Html:
    if not facts:
        return Html()
    cells = []
    for key, value in facts.items():
        if value is None:  # no error, no commit: nothing to tell
            continue
        words = _fact_words(value)
        kind = "long" if len(words) > LONG_FACT else "short"
        cells.append(tag("div", tag("dt", key.replace("_", " ")), tag("dd", words), class_=kind))
    return tag("dl", *cells, class_="facts")


def _metrics_section(evaluation: Evaluation) -> Html:
    classes = evaluation["classes"]
    of = "" if not classes else f" ({classes[-1]})" if len(classes) == 2 else " (mean over classes)"
    rows = []
    for split in _in_order(evaluation["splits"], evaluation["headline_split"]):
        rows += _metric_rows(_split_words(split), evaluation["splits"][split], of)
        if split in evaluation["patients"]:
            rows += _metric_rows(f"{_split_words(split)}, by patient", evaluation["patients"][split], of)
    method = (
        f"Intervals: 2.5th to 97.5th percentile of {evaluation['num_bootstrap']} bootstrap resamples of patients (seed "
        f"{evaluation['seed']}); all slides of a patient are drawn together."
    )
    if evaluation["patients"]:
        method += " By patient: the mean of what is predicted of the slides of each."
    if evaluation["unit"] == "patient":
        method += " All slides of a patient are one bag, and count once."
    if classes:
        method += " A slide counts as its most probable class."
    notes = [method]
    if evaluation["threshold"] is not None:
        notes.append(
            f"F1 at threshold: a slide is {classes[-1]} from {evaluation['threshold']:.3f} on, chosen on validation."
        )
    return join(
        tag("h2", "Metrics"),
        table(["Split", "Metric", "Value", "95 % interval", "0 to 1"], rows),
        *(tag("p", words, class_="note") for words in [*notes, *_metric_notes(evaluation)]),
    )


def _metric_rows(split: str, found: Scores, of: str) -> list[tuple[str, list[str]]]:
    rows = []
    for key, estimate in found["metrics"].items():
        name = metric_words(key) + (of if key in _OF_CLASSES else "")
        rows.append(("", [split, name, *_estimate_cells(estimate, is_share=key in SHARES)]))
    return rows


def _estimate_cells(estimate: Estimate, *, is_share: bool) -> list[str]:
    value, interval = estimate["value"], estimate["ci"]
    if value is None:
        return ["undefined", "none", ""]
    if not is_share:
        return [
            tag("strong", f"{value:.3g}"),
            "none" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}",
            "",
        ]
    marker = tag("b", style=f"left:{value:.1%}")
    if interval is None:
        return [tag("strong", f"{value:.3f}"), "none", tag("span", marker, class_="range")]
    low, high = interval
    band = tag("i", style=f"left:{low:.1%};width:{high - low:.1%}")
    return [tag("strong", f"{value:.3f}"), f"{low:.3f} to {high:.3f}", tag("span", band, marker, class_="range")]


def _metric_notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the numbers has to know, each once, with the splits that it holds for."""
    holds_for: dict[str, list[str]] = {}
    for split in _in_order(evaluation["num_unlabelled"], evaluation["headline_split"]):
        for note in _split_notes(evaluation["splits"].get(split), evaluation["num_unlabelled"][split]):
            holds_for.setdefault(note, []).append(_split_words(split))
    return [f"{', '.join(splits)}: {note}." for note, splits in holds_for.items()]


def _split_notes(found: Scores | None, num_unlabelled: int) -> list[str]:
    notes = [f"{_counted(num_unlabelled, 'slide')} without a label, predicted but not scored"] if num_unlabelled else []
    if found is None:
        return notes
    by_reason: dict[str, list[str]] = {}
    for name, estimate in found["metrics"].items():
        lost = found["num_bootstrap"] - estimate["num_usable"]
        reason = estimate.get("reason", "")
        if not reason and lost:
            reason = f"{lost} resamples were left out, because it was not defined in them"
        if reason:
            by_reason.setdefault(reason, []).append(metric_words(name))
    return [*notes, *(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())]


def _figures_section(run: Path, evaluation: Evaluation) -> Html:
    folder = run / FIGURES
    there = {name: caption for name, caption in evaluation["figures"].items() if (folder / name).is_file()}
    pair = [_figure(folder / name, caption) for name, caption in there.items() if name != LOSSES]
    losses = _figure(folder / LOSSES, there[LOSSES]) if LOSSES in there else Html()
    return join(tag("h2", "Figures"), tag("div", *pair, class_="pair"), losses)


def _figure(path: Path, caption: str) -> Html:
    return tag("figure", image(path, caption), tag("figcaption", caption))


def _heatmaps_section(run: Path, predictions: Predictions | Values) -> Html:
    """Pictures of slides in predictions.csv; others in the folder belong to an earlier evaluation."""
    drawn = [slide_id for slide_id in predictions.slide_ids if (run / HEATMAPS / f"{slide_id}.png").is_file()]
    if not drawn:
        return Html()
    shown = drawn[:MOST_HEATMAPS]
    more = f" The first {len(shown)} of {len(drawn)} are shown." if len(shown) < len(drawn) else ""
    words = (
        "Attention says where the model looked to decide, not what the tissue is. 1× is the share of a tile if all were "
        "equal. Beside each picture in heatmaps/ lie a GeoJSON of the most attended tiles, for QuPath (File > Import "
        "objects from file), and the attention of the whole slide as a TIFF that opens as a slide." + more
    )
    pictures = [
        tag("figure", image(run / HEATMAPS / f"{slide_id}.png", f"Attention of slide {slide_id}", photo=True))
        for slide_id in shown
    ]
    return join(tag("h2", "Heatmaps"), tag("p", words, class_="note"), tag("div", *pictures, class_="gallery"))


def _predictions_section(predictions: Predictions | Values, headline: str) -> Html:
    if isinstance(predictions, Values):
        return _values_section(predictions, headline)
    sections: list[Html] = [tag("h2", "Predictions")]
    for split in _in_order(set(predictions.splits), headline):
        part = predictions.take([i for i in range(len(predictions)) if predictions.splits[i] == split])
        wrong = sum(_is_wrong(part, i) for i in range(len(part)))
        words = f"{_split_words(split)}: {_counted(len(part), 'slide')}, {wrong} wrong"
        listing = tag("div", _predictions_table(part), class_="scroll")
        if split == headline:
            sections += [tag("p", words + "; wrong ones first."), listing]
        else:
            sections.append(tag("details", tag("summary", words), listing))
    return join(*sections)


def _values_section(values: Values, headline: str) -> Html:
    sections: list[Html] = [tag("h2", "Predictions")]
    heads = [*(f"Known {name}" for name in values.target_names), *values.task.predicted_names]
    for split in _in_order(set(values.splits), headline):
        rows = sorted((i for i in range(len(values)) if values.splits[i] == split), key=lambda i: values.slide_ids[i])
        cells = []
        for i in rows:
            known = ["" if math.isnan(number) else f"{number:g}" for number in values.target_NX[i].tolist()]
            said = [f"{number:.4g}" for number in values.value_NP[i].tolist()]
            cells.append(("", [values.slide_ids[i], values.patient_ids[i], *known, *said]))
        listing = tag("div", table(["Slide", "Patient", *heads], cells), class_="scroll")
        words = f"{_split_words(split)}: {_counted(len(rows), 'slide')}"
        if split == headline:
            sections += [tag("p", words + "."), listing]
        else:
            sections.append(tag("details", tag("summary", words), listing))
    return join(*sections)


def _predictions_table(part: Predictions) -> Html:
    many = len(part.classes) > MOST_PROBABILITIES
    probability_heads = ["Probability"] if many else [f"P({name})" for name in part.classes]
    order = sorted(range(len(part)), key=lambda i: (not _is_wrong(part, i), part.slide_ids[i]))
    rows = []
    for i in order:
        wrong = _is_wrong(part, i)
        verdict: str = tag("strong", "✗ wrong") if wrong else "correct" if part.labels[i] is not None else "no label"
        shown = [part.probs_NK[i].max()] if many else part.probs_NK[i]
        probabilities = [_probability_cell(float(p)) for p in shown]
        cells = [part.slide_ids[i], part.patient_ids[i], part.labels[i] or "", part.predicted[i], verdict]
        rows.append(("wrong" if wrong else "", [*cells, *probabilities]))
    return table(["Slide", "Patient", "Label", "Predicted", "Verdict", *probability_heads], rows)


def _probability_cell(probability: float) -> Html:
    meter = tag("span", tag("i", style=f"width:{probability:.1%}"), class_="meter")
    return tag("span", tag("span", f"{probability:.3f}", class_="number"), meter, class_="probability")


def _is_wrong(part: Predictions, row: int) -> bool:
    return part.labels[row] is not None and part.labels[row] != part.predicted[row]


def _config_section(run: Path) -> Html:
    path = run / CONFIG_FILE
    if not path.is_file():
        return Html()
    text = path.read_text(encoding="utf-8")
    return join(
        tag("h2", "Configuration"), tag("details", tag("summary", f"{CONFIG_FILE}, complete"), tag("pre", text))
    )


def _missing_section(run: Path) -> Html:
    """Say what is not shown and why, so that a gap is not taken for a result."""
    optional = {
        FACTS_FILE: "versions, ranks and time of the run are not shown",
        CONFIG_FILE: "the configuration is not shown",
        f"{FIGURES}/{LOSSES}": "there was no metrics.jsonl, so training curves are not shown",
        HEATMAPS: "no heatmap was drawn; `gigamil heatmap` does it",
    }
    missing = [tag("li", f"{name}: {words}.") for name, words in optional.items() if not (run / name).exists()]
    return join(tag("h2", "Not in this report"), tag("ul", *missing)) if missing else Html()


def _read_facts(run: Path) -> dict[str, Any]:
    path = run / FACTS_FILE
    if not path.is_file():
        return {}
    return parse_object(path.read_text(encoding="utf-8"), f"'{path}'", "delete it, and the report goes without")


def _fact_words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_fact_words, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _value_words(estimate: Estimate) -> str:
    if estimate["value"] is None:
        return "undefined"
    if estimate["ci"] is None:
        return f"{estimate['value']:.3f} (no interval)"
    return f"{estimate['value']:.3f} (95 % interval {estimate['ci'][0]:.3f} to {estimate['ci'][1]:.3f})"


def _in_order(splits: Iterable[str], headline: str) -> list[str]:
    """The headline first, then the usual splits in their usual order, then others by name."""
    usual = [headline, *HEADLINE_ORDER]
    return sorted(splits, key=lambda split: (usual.index(split) if split in usual else len(usual), split))


def _split_words(split: str) -> str:
    return SPLIT_WORDS.get(split, split or "unnamed")


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def metric_words(name: str) -> str:
    """A metric for people; of a number or label among several with its name behind."""
    if name in METRIC_WORDS:
        return METRIC_WORDS[name]
    kind, _, whose = name.partition("_")
    return f"{METRIC_WORDS.get(kind, kind)} of {whose}" if whose else name

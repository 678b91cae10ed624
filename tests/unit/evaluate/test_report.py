"""The report stands alone, escapes what people typed, and says what it lacks."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import CohortError
from gigamil.evaluate import evaluate_run, heatmap_run, write_report
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.metrics.bootstrap import scores
from gigamil.metrics.task import measure_of
from gigamil.shards.read import ShardSet
from gigamil.tasks.classification import Multiclass

HOSTILE = "<script>alert('x')</script>&\"$"


class Page(HTMLParser):
    """Tags with attributes, visible text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report_of(run: Path) -> Page:
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    return page


def add_everything(run: Path) -> None:
    (run / "run.json").write_text(
        json.dumps({"name": "demo <b>", "ranks": 2, "versions": {"torch": "2.15.0"}, "gpu": None})
    )
    (run / "config.resolved.yaml").write_text("science:\n  seed: 0 # <b>\n")
    (run / "metrics.jsonl").write_text(
        '{"kind":"step","step":1,"loss":0.7}\n{"kind":"epoch","epoch":1,"step":1,"val_auc":0.8}\n'
    )


def test_evaluation_is_that_of_each_split(run: Path, predictions: Predictions) -> None:
    found = evaluate_run(run, num_bootstrap=100, seed=3)
    assert found == json.loads((run / "evaluation.json").read_text())
    assert (found["headline_split"], list(found["splits"])) == ("test", ["train", "val", "test"])
    test = predictions.labelled("test")
    measure = measure_of(Multiclass(test.classes), test.label_numbers[:, None], test.probs_NK, found["threshold"])
    assert found["splits"]["test"] == scores(measure, test.patient_ids, num_bootstrap=100, seed=3)
    assert (found["headline_metric"], found["task"]) == ("auc", "Multiclass")
    assert found["slides_per_class"]["test"] == {"normal": 2, "tumour": 2}
    assert sorted(path.name for path in (run / "figures").iterdir()) == ["calibration.png", "confusion.png", "roc.png"]


def test_a_patient_spelled_in_two_ways_is_drawn_as_one(run: Path, predictions: Predictions) -> None:
    one = replace(predictions, splits=("test",) * len(predictions))
    ids = [f" {name.upper()}" if number % 2 else name for number, name in enumerate(one.patient_ids)]
    assert len(set(ids)) == 2 * len(set(one.patient_ids))
    found = []
    for part in (one, replace(one, patient_ids=tuple(ids))):
        write_predictions(run / FILE_NAME, part)
        found.append(evaluate_run(run, num_bootstrap=100, seed=3)["splits"])
    assert found[0] == found[1]


def test_report_shows_facts_metrics_figures_heatmaps_and_predictions(run: Path, shards: ShardSet) -> None:
    add_everything(run)
    heatmap_run(run, shards, ["s11", "s02"])
    found = evaluate_run(run, num_bootstrap=200, seed=0)
    page = report_of(run)
    pictures = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert pictures == [
        "ROC curve, test split",
        "Confusion matrix, test split",
        "Calibration, test split",
        "Training",
        "Attention of slide s02",
        "Attention of slide s11",
    ]
    balanced = found["splits"]["test"]["metrics"]["balanced_accuracy"]
    assert balanced["value"] == 0.75
    assert balanced["ci"] is not None
    assert f"{balanced['ci'][0]:.3f} to {balanced['ci'][1]:.3f}" in page.text
    for words in ("demo <b>", "torch 2.15.0", "seed: 0 # <b>", "4 slides of 4 patients", "4 slides, 1 wrong"):
        assert words in page.text
    assert "Not in this report" not in page.text


def test_report_loads_nothing_and_runs_nothing(run: Path, shards: ShardSet) -> None:
    add_everything(run)
    heatmap_run(run, shards, n=1)
    evaluate_run(run, num_bootstrap=100, seed=0)
    html = (run / "report.html").read_text(encoding="utf-8")
    page = report_of(run)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in {"href", "srcset"}]
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?://", html)
    assert "default-src 'none'" in html


def test_only_wrong_slides_are_marked_and_they_come_first(run: Path) -> None:
    evaluate_run(run, num_bootstrap=100, seed=0)
    page = report_of(run)
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "tr"].count("wrong") == 1
    text = page.text
    assert text.index("s05") < text.index("✗ wrong") < text.index("s02") < text.index("s08") < text.index("s11")


def test_names_are_escaped(run: Path, predictions: Predictions) -> None:
    hostile = replace(
        predictions,
        patient_ids=tuple(HOSTILE + patient for patient in predictions.patient_ids),
        labels=tuple(HOSTILE if label == "tumour" else label for label in predictions.labels),
        classes=("normal", HOSTILE),
    )
    write_predictions(run / FILE_NAME, hostile)
    evaluate_run(run, num_bootstrap=100, seed=0)
    page = report_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert HOSTILE + "p2" in page.text
    assert f"2 {HOSTILE}" in page.text


def test_a_bare_run_says_what_is_missing(run: Path) -> None:
    evaluate_run(run, num_bootstrap=100, seed=0)
    text = report_of(run).text
    for name in ("run.json:", "config.resolved.yaml:", "figures/losses.png:", "heatmaps:"):
        assert name in text[text.index("Not in this report") :]


def test_results_without_a_test_split_carry_a_warning(run: Path, predictions: Predictions) -> None:
    evaluate_run(run, num_bootstrap=100, seed=0)
    assert "No test split was predicted" not in report_of(run).text
    write_predictions(run / FILE_NAME, predictions.take([i for i in range(12) if predictions.splits[i] != "test"]))
    assert evaluate_run(run, num_bootstrap=100, seed=0)["headline_split"] == "val"
    assert "No test split was predicted" in report_of(run).text


def test_slides_without_a_label_are_counted_not_scored(run: Path, predictions: Predictions) -> None:
    labels = [
        None if name == "s02" else label for name, label in zip(predictions.slide_ids, predictions.labels, strict=True)
    ]
    write_predictions(run / FILE_NAME, replace(predictions, labels=tuple(labels)))
    found = evaluate_run(run, num_bootstrap=100, seed=0)
    assert found["num_unlabelled"] == {"train": 0, "val": 0, "test": 1}
    assert found["splits"]["test"]["num_slides"] == 3
    text = report_of(run).text
    assert "Held-out (test): 1 slide without a label, predicted but not scored." in text
    assert "no label" in text


def test_a_test_split_without_labels_is_listed_but_not_the_headline(run: Path, predictions: Predictions) -> None:
    labels = [
        None if split == "test" else label for split, label in zip(predictions.splits, predictions.labels, strict=True)
    ]
    write_predictions(run / FILE_NAME, replace(predictions, labels=tuple(labels)))
    found = evaluate_run(run, num_bootstrap=100, seed=0)
    assert (found["headline_split"], list(found["splits"])) == ("val", ["train", "val"])
    assert "Held-out (test): 4 slides without a label" in report_of(run).text


def test_no_label_at_all_is_an_error(run: Path, predictions: Predictions) -> None:
    write_predictions(run / FILE_NAME, replace(predictions, labels=(None,) * 12))
    with pytest.raises(CohortError, match="no slide has a label"):
        evaluate_run(run, num_bootstrap=100, seed=0)


def test_an_undefined_metric_is_reported_as_such(run: Path, predictions: Predictions) -> None:
    write_predictions(run / FILE_NAME, predictions.take([2, 8]))
    found = evaluate_run(run, num_bootstrap=100, seed=0)
    assert found["splits"]["test"]["metrics"]["auc"]["value"] is None
    text = report_of(run).text
    assert "AUC undefined" in text
    assert "no slide of class 'tumour'" in text


def test_many_classes_show_one_probability(run: Path) -> None:
    classes = tuple(f"class {k}" for k in range(6))
    ids = tuple(f"m{k}" for k in range(12))
    probs = np.tile(np.eye(6) * 0.9 + 0.1 / 6, (2, 1))
    write_predictions(run / FILE_NAME, Predictions(ids, ids, classes * 2, ("test",) * 12, classes, probs))
    evaluate_run(run, num_bootstrap=100, seed=0)
    text = report_of(run).text
    assert "AUC (mean over classes)" in text
    assert "Probability" in text
    assert "P(class 0)" not in text


def test_same_files_same_bytes(run: Path, shards: ShardSet) -> None:
    add_everything(run)
    evaluate_run(run, num_bootstrap=100, seed=0)
    first = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == first
    heatmap_run(run, shards, n=1)
    assert len(write_report(run).read_bytes()) > len(first) + 1000


def test_report_before_evaluation_and_broken_facts_are_named(run: Path) -> None:
    with pytest.raises(CohortError, match=r"evaluation\.json' does not exist; run `gigamil evaluate` first"):
        write_report(run)
    (run / "run.json").write_text("{")
    with pytest.raises(CohortError, match=r"run\.json' is not JSON"):
        evaluate_run(run, num_bootstrap=100, seed=0)

"""Predictions of several folds and seeds together, and runs compared on the slides that all predict."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import CohortError
from gigamil.evaluate.comparison import compare_runs, comparison_text
from gigamil.evaluate.pooled import Member, read_pooled, read_study, write_study
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.report import evaluate_run
from gigamil.evaluate.study_report import evaluate_study, gallery, write_study_report
from gigamil.metrics.classification import auc

CLASSES = ("normal", "tumour")
NUM = 24


def write_run(run: Path, slides: Sequence[int], scores: Sequence[float], *, fold_val: bool = True) -> Path:
    """An evaluated run: slide i is tumour if i is odd; two slides of a patient."""
    run.mkdir(parents=True)
    probs_NK = np.stack([1 - np.asarray(scores), np.asarray(scores)], axis=1)
    predictions = Predictions(
        tuple(f"s{i:02d}" for i in slides),
        tuple(f"P{i // 2}" for i in slides),
        tuple(CLASSES[i % 2] for i in slides),
        ("test",) * len(slides),
        CLASSES,
        probs_NK,
    )
    write_predictions(run / FILE_NAME, predictions)
    evaluate_run(run, num_bootstrap=100, seed=0)
    facts = {
        "status": "finished",
        "spent": {"tiles_seen": 10, "tile_forwards": 20, "seconds": 1.5, "rank_seconds": 3.0},
    }
    (run / "run.json").write_text(json.dumps(facts))
    return run


def scores_of(slides: Sequence[int], seed: int, strength: float) -> list[float]:
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=NUM)
    return [float(1 / (1 + np.exp(-(strength * (1 if i % 2 else -1) + noise[i])))) for i in slides]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two folds, two seeds."""
    folder = tmp_path / "study"
    members = []
    for seed in range(2):
        for fold in range(2):
            slides = [i for i in range(NUM) if (i // 2) % 2 == fold]
            name = f"fold{fold}_seed{seed}"
            write_run(folder / name, slides, scores_of(slides, seed, 1.0))
            members.append(Member(fold, seed, name))
    write_study(folder, members)
    return folder


def test_pooled_metric_is_the_mean_over_seeds_of_all_folds_together(study: Path) -> None:
    pooled = read_pooled(study)
    assert len(pooled) == NUM
    assert pooled.num_seeds == 2
    assert set(pooled.folds) == {0, 1}
    wanted = []
    for seed in range(2):
        probs = np.asarray(scores_of(range(NUM), seed, 1.0))
        wanted.append(auc(np.arange(NUM) % 2, np.stack([1 - probs, probs], axis=1)))
    found = pooled.measure()(np.arange(NUM))["auc"]
    assert found == pytest.approx(np.mean(wanted))  # type: ignore[arg-type]
    assert wanted[0] != wanted[1]


def test_study_report_names_every_run_and_what_failed(study: Path) -> None:
    members = [
        Member(0, 0, "fold0_seed0"),
        Member(1, 0, "fold1_seed0"),
        Member(2, 0, "fold2_seed0", error="no <tumour> slide"),
    ]
    write_study(study, members)
    evaluation = evaluate_study(study, num_bootstrap=100, seed=0)
    assert [run["fold"] for run in evaluation["per_run"]] == [0, 1]
    assert [run["fold"] for run in evaluation["failed"]] == [2]
    assert evaluation["pooled"]["num_patients"] == NUM // 2
    report = write_study_report(study).read_text()
    assert "no &lt;tumour&gt; slide" in report
    assert 'href="fold1_seed0/report.html"' in report
    assert report.count("<img") == 4  # folds, ROC, calibration, confusion
    lines = (study / "predictions_out_of_fold.csv").read_text().splitlines()
    assert lines[0] == "slide_id,patient_id,fold,seed,true_label,prob_normal,prob_tumour"
    assert len(lines) == 1 + NUM
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert (first["slide_id"], first["patient_id"], first["true_label"]) == ("s00", "P0", "normal")


def test_seeds_without_all_folds_are_left_out_by_name(study: Path) -> None:
    """While a study runs: seed 0 has lost fold 1, which failed when it was tried again; seed 1 has both."""
    folders = ["fold0_seed0", "fold1_seed0", "fold0_seed1", "fold1_seed1"]
    failed = Member(1, 0, "fold1_seed0", error="was split otherwise")
    write_study(study, [Member(0, 0, folders[0]), failed, Member(0, 1, folders[2]), Member(1, 1, folders[3])])
    assert [member.is_finished for member in read_study(study)] == [True, False, True, True]
    pooled = read_pooled(study)
    assert (len(pooled), pooled.seeds, pooled.left_out) == (NUM, (1,), ("fold0_seed0",))
    evaluation = evaluate_study(study, num_bootstrap=100, seed=0)
    assert evaluation["left_out"] == ["fold0_seed0"]
    assert [member["folder"] for member in evaluation["failed"]] == ["fold1_seed0"]
    assert "for other folds of their seed are not finished: fold0_seed0." in write_study_report(study).read_text()
    lines = (study / "predictions_out_of_fold.csv").read_text().splitlines()[1:]
    assert {line.split(",")[3] for line in lines} == {"1"}


def test_gallery_has_the_surest_of_each_kind(study: Path) -> None:
    shown = gallery(study)
    assert {one.kind for one in shown} == {"true tumour", "tumour missed", "called tumour, is normal", "true normal"}
    probs = dict(zip([f"s{i:02d}" for i in range(NUM)], scores_of(range(NUM), 0, 1.0), strict=True))
    surest = max((i for i in range(1, NUM, 2)), key=lambda i: probs[f"s{i:02d}"])
    assert next(one.slide_id for one in shown if one.kind == "true tumour") == f"s{surest:02d}"
    assert all(one.member.seed == 0 for one in shown)


def test_study_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    write_study(tmp_path, [Member(0, 0, "fold0_seed0")])
    with pytest.raises(CohortError, match="no run of the study"):
        read_pooled(tmp_path)


def test_better_scores_have_a_difference_above_zero(tmp_path: Path) -> None:
    slides = list(range(NUM))
    weak = write_run(tmp_path / "weak", slides, scores_of(slides, 0, 0.0))
    strong = write_run(tmp_path / "strong", slides, scores_of(slides, 1, 3.0))
    found = compare_runs([weak, strong], tmp_path / "both", num_bootstrap=200)
    first, second = found["runs"]
    assert first["minus_first"] is None
    gap = second["minus_first"]["metrics"]["auc"]  # type: ignore[index]
    own = second["scores"]["metrics"]["auc"]["value"], first["scores"]["metrics"]["auc"]["value"]
    assert gap["value"] == pytest.approx(own[0] - own[1])  # type: ignore[operator]
    assert gap["ci"][0] > 0  # type: ignore[index]
    assert second["p_delong"] is not None
    assert second["p_delong"] < 0.01
    assert second["spent"]["tile_forwards"] == 20
    assert "24 slides that all predict" in comparison_text(found)
    assert json.loads((tmp_path / "both" / "comparison.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / "both" / "comparison.html").read_text().count("<img") == 1  # no curves without metrics.jsonl


def test_only_common_slides_count_and_the_others_are_told(tmp_path: Path) -> None:
    left = write_run(tmp_path / "left", range(20), scores_of(range(20), 0, 1.0))
    right = write_run(tmp_path / "right", range(4, NUM), scores_of(range(4, NUM), 1, 1.0))
    found = compare_runs([left, right], tmp_path / "both", num_bootstrap=100)
    assert found["num_slides"] == 16
    assert found["num_left_out"] == {"left": 4, "right": 4}


def test_studies_are_compared_with_runs(study: Path, tmp_path: Path) -> None:
    slides = list(range(NUM))
    run = write_run(tmp_path / "single", slides, scores_of(slides, 5, 2.0))
    found = compare_runs([study, run], tmp_path / "both", num_bootstrap=100)
    assert [one["num_runs"] for one in found["runs"]] == [4, 1]
    assert found["runs"][1]["p_delong"] is None  # several seeds


def test_what_cannot_be_compared_is_refused_by_name(tmp_path: Path) -> None:
    left = write_run(tmp_path / "left", range(12), scores_of(range(12), 0, 1.0))
    right = write_run(tmp_path / "right", range(12, NUM), scores_of(range(12, NUM), 0, 1.0))
    with pytest.raises(CohortError, match="no held-out slide is in all of left, right"):
        compare_runs([left, right], tmp_path / "both")
    with pytest.raises(CohortError, match="named twice"):
        compare_runs([left, left], tmp_path / "both")
    with pytest.raises(CohortError, match="needs two runs"):
        compare_runs([left], tmp_path / "both")
    with pytest.raises(CohortError, match="--metric nonsense: there are auc"):
        compare_runs(
            [left, write_run(tmp_path / "same", range(12), scores_of(range(12), 1, 1.0))],
            tmp_path / "both",
            metric="nonsense",
        )
    other = tmp_path / "other"
    write_run(other, range(12), scores_of(range(12), 0, 1.0))
    text = (other / FILE_NAME).read_text().replace("s00,P0,normal", "s00,P0,tumour")
    (other / FILE_NAME).write_text(text)
    with pytest.raises(CohortError, match=r"know other labels of 1 slides, for example 's00'"):
        compare_runs([left, other], tmp_path / "both")


def test_a_slide_that_several_draws_predict_has_no_delong(tmp_path: Path) -> None:
    """The same slides in two folds, as Monte-Carlo draws have them: twice the slides would be half of p."""
    for name, strength in (("a", 0.5), ("b", 2.0)):
        for fold in range(2):
            write_run(tmp_path / name / f"fold{fold}_seed0", range(NUM), scores_of(range(NUM), fold, strength))
        write_study(tmp_path / name, [Member(fold, 0, f"fold{fold}_seed0") for fold in range(2)])
    studies = [tmp_path / "a", tmp_path / "b"]
    assert compare_runs(studies, tmp_path / "both", num_bootstrap=100)["runs"][1]["p_delong"] is None
    alone = [folder / "fold0_seed0" for folder in studies]
    assert compare_runs(alone, tmp_path / "one", num_bootstrap=100)["runs"][1]["p_delong"] is not None


def test_training_slides_and_other_units_are_not_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, range(NUM), scores_of(range(NUM), 0, 1.0)) for name in "ab"]
    path = runs[1] / FILE_NAME
    text = path.read_text()
    path.write_text(text.replace(",test,", ",train,"))
    with pytest.raises(CohortError, match="'b' predicts training slides only"):
        compare_runs(runs, tmp_path / "out", num_bootstrap=100)
    path.write_text(text.replace(",test,", ",val,"))
    found = compare_runs(runs, tmp_path / "out", num_bootstrap=100)
    assert found["of_validation"] == ["b"]
    assert "which chose the epoch" in (tmp_path / "out" / "comparison.html").read_text()
    path.write_text(text)
    evaluation = json.loads((runs[1] / "evaluation.json").read_text())
    (runs[1] / "evaluation.json").write_text(json.dumps(evaluation | {"unit": "patient"}))
    with pytest.raises(CohortError, match="predictions of slides and of patients .* 'a' of slides, 'b' of patients"):
        compare_runs(runs, tmp_path / "out", num_bootstrap=100)


def test_a_run_folder_stands_for_its_study(study: Path, tmp_path: Path) -> None:
    found = compare_runs([study.parent, study / "fold0_seed0"], tmp_path / "out", num_bootstrap=100)
    assert found["runs"][0]["num_runs"] == 4

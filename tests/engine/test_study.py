"""A study: every fold and seed is trained on the same shards, what is done stays, what fails is named."""

import json
import sqlite3
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import save_file

from gigamil import study
from gigamil.config.schema import RunConfig
from gigamil.data.tile import tile_cohort
from gigamil.errors import CohortError, ConfigError, TrainingError
from gigamil.evaluate.comparison import compare_runs
from gigamil.models.encoder import build_encoder
from gigamil.study import run_study, study_folder
from gigamil.testing.runs import tiny_run
from gigamil.train.launch import RanksFailed


def study_config(folder: Path, **cohort: Any) -> RunConfig:
    config = tiny_run(
        folder,
        cohort={"folds": 2, "val_fraction": 0.2, "split_method": "kfold", **cohort},
        science={"epochs": 1, "bootstrap": 100},
        bookkeeping={"mlflow": True, "heatmaps": 0},
    )
    return config


@pytest.fixture(autouse=True)
def _no_slide_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny cohort has shards and no slide files: there is nothing to tile, and nothing to draw heatmaps on."""
    for module in ("pipeline", "study"):
        monkeypatch.setattr(f"gigamil.{module}.tile_cohort", lambda config, progress: None)
        monkeypatch.setattr(f"gigamil.{module}.refuse_failures", lambda report, most: None)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_fold_and_seed_once(tmp_path: Path) -> None:
    # Its own split column would say which slides are for what.
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    result = run_study(config, seeds=2)
    out = study_folder(config)
    assert result["runs"] == 4
    assert result["failed"] == []
    assert result["slides"] == 12
    names = ["fold0_seed0", "fold0_seed1", "fold1_seed0", "fold1_seed1"]
    assert sorted(path.name for path in out.glob("fold*")) == names
    tested = [set(json.loads((out / name / "splits.json").read_text())["test"]) for name in names[::2]]
    assert tested[0].isdisjoint(tested[1])
    assert len(tested[0] | tested[1]) == 12
    with sqlite3.connect(out / "mlflow.db") as store:
        parents = dict(store.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall())
        runs = dict(store.execute("select run_uuid, name from runs").fetchall())
    assert sorted(runs[child] for child in parents) == names
    assert len(set(parents.values())) == 1
    assert runs[next(iter(parents.values()))] == config.bookkeeping.name

    (out / "report.html").unlink()
    with patch.object(study, "run_pipeline", side_effect=AssertionError("done again")):
        assert run_study(config, seeds=2)["auc"] == result["auc"]
    assert (out / "report.html").is_file()

    compared = compare_runs([out / "fold0_seed0", out / "fold0_seed1"], tmp_path / "both", num_bootstrap=100)
    assert compared["num_slides"] == len(tested[0])
    assert (tmp_path / "both" / "curves.png").is_file()
    assert compared["runs"][0]["spent"]["tile_forwards"] > 0  # type: ignore[operator]


def test_a_fold_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    run = study.run_pipeline

    def some(config: RunConfig, **named: Any) -> dict[str, Any]:
        if config.cohort.fold == 0:
            raise RanksFailed("rank 1: no slide of class 'light' in test", 6)  # as training fails
        return run(config, **named)

    with patch.object(study, "run_pipeline", some):
        result = run_study(config)
    assert result["failed"] == ["fold0_seed0"]
    assert result["runs"] == 1
    report = (study_folder(config) / "report.html").read_text()
    assert "fold 0, seed 0: rank 1: no slide of class &#x27;light&#x27; in test" in report
    again = run_study(config)  # goes on with what has failed
    assert again["failed"] == []
    assert again["runs"] == 2


def test_a_signal_ends_a_study_and_folds_that_are_not_asked_for_are_left_alone(tmp_path: Path) -> None:
    config, begun = study_config(tmp_path, columns={"split": "no_such_column"}), []

    def stopped(config: RunConfig, **_: Any) -> dict[str, Any]:
        begun.append(config.bookkeeping.name)
        raise RanksFailed("stopped by a signal after step 3", 5)

    with patch.object(study, "run_pipeline", stopped):
        for folds, wanted in ((None, "fold0_seed0"), ([1], "fold1_seed0")):
            with pytest.raises(RanksFailed, match="stopped by a signal"):
                run_study(config, folds=folds, seeds=2)
            assert begun.pop() == wanted
    assert not begun


def test_all_fail(tmp_path: Path) -> None:
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    with (
        patch.object(study, "run_pipeline", side_effect=TrainingError("loss not finite")),
        pytest.raises(TrainingError, match=r"no run of the study .* is finished:\n  loss not finite"),
    ):
        run_study(config)


def test_wrong_folds_and_seeds_are_refused_before_anything_runs(tmp_path: Path) -> None:
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    with pytest.raises(ConfigError, match="--folds 2: there are 2 folds, 0 to 1, or all"):
        run_study(config, folds=[2])
    with pytest.raises(ConfigError, match="--seeds 0"):
        run_study(config, seeds=0)
    assert not study_folder(config).exists()


def test_more_folds_than_patients(tmp_path: Path) -> None:
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    many = config.model_copy(update={"cohort": config.cohort.model_copy(update={"folds": 20})})
    with pytest.raises(CohortError, match="20 folds"):
        run_study(many)
    assert not study_folder(many).exists()


def test_without_slide_files_no_run_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "tile_cohort", tile_cohort)
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    book = config.bookkeeping.model_copy(update={"shards": tmp_path / "no_shards"})
    config = config.model_copy(update={"bookkeeping": book})
    with pytest.raises(CohortError, match="none of the 12 slide paths exists"):
        run_study(config)
    assert not study_folder(config).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_features_are_made_once_unless_the_seed_makes_others(tmp_path: Path) -> None:
    config = study_config(tmp_path, columns={"split": "no_such_column"})
    encoder = build_encoder(config.science.encoder)
    save_file(encoder.backbone.state_dict(), tmp_path / "weights.safetensors")
    part = config.science.encoder.model_copy(update={"weights": tmp_path / "weights.safetensors"})
    data = config.data.model_copy(update={"source": "features"})
    for name, weights, folders in (("given", part, 1), ("random", config.science.encoder, 2)):
        book = config.bookkeeping.model_copy(update={"out": tmp_path / name, "mlflow": False})
        science = config.science.model_copy(update={"encoder": weights})
        result = run_study(
            config.model_copy(update={"bookkeeping": book, "science": science, "data": data}), folds=[0], seeds=2
        )
        assert result["runs"] == 2
        found = [tmp_path / name / "study" / f"fold0_seed{seed}" / "features" for seed in range(2)]
        assert len({folder.resolve() for folder in found}) == folders
        assert all(len(list(folder.glob("*.h5"))) == 12 for folder in found)

"""MLflow gets what the loop hands over; a store that is broken or silent costs a warning, never the run."""

import logging
import threading
import time
from pathlib import Path

import mlflow
import pytest

from gigamil.train import tracking
from gigamil.train.tracking import Tracker


def client(out: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")


def metric(out: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(out).get_metric_history(run_id, name)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a finished run: making the tables takes seconds, so the tests share one."""
    folder = tmp_path_factory.mktemp("run")
    tracker = Tracker(folder, "cohort", "first")
    assert tracker.run_id is not None
    (folder / "run-id").write_text(tracker.run_id)
    params = {f"science.key{n}": n for n in range(250)} | {"science.long": "x" * 9000}
    tracker.describe(params, {"world_size": 2, "versions.torch": "2.15"})
    tracker.log({"train/loss": 0.5, "train/lr": 1e-3}, step=1)
    tracker.log({"train/loss": 0.25}, step=2)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "roc.png").write_bytes(b"png")
    tracker.artefact(folder / "metrics.jsonl")
    tracker.artefact(folder / "figures", "figures")
    tracker.finish("FINISHED")
    return folder


def test_everything_lands_in_the_run_folder(out: Path) -> None:
    run_id = (out / "run-id").read_text()
    run = client(out).get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert client(out).get_experiment(run.info.experiment_id).name == "cohort"
    assert len(run.data.params) == 251
    assert run.data.params["science.key249"] == "249"
    assert run.data.params["science.long"] == "x" * 500
    assert (run.data.tags["world_size"], run.data.tags["versions.torch"]) == ("2", "2.15")
    assert metric(out, run_id, "train/loss") == [(1, 0.5), (2, 0.25)]
    stored = {path.relative_to(out / "artifacts") for path in (out / "artifacts").rglob("*") if path.is_file()}
    base = Path(run_id) / "artifacts"
    assert stored == {base / "metrics.jsonl", base / "figures" / "roc.png"}


def test_a_run_is_continued_and_its_parameters_may_not_raise(out: Path) -> None:
    first = Tracker(out, "cohort", "second")
    first.describe({"science.seed": 0}, {"world_size": 2})
    first.log({"train/loss": 1.0}, step=1)
    first.finish("KILLED")
    assert client(out).get_run(first.run_id).info.status == "KILLED"
    again = Tracker(out, "cohort", "second", first.run_id)
    assert again.run_id == first.run_id
    assert client(out).get_run(first.run_id).info.status == "RUNNING"
    again.describe({"science.seed": 99, "science.epochs": 3}, {"world_size": 4})
    again.log({"train/loss": 0.5}, step=2)
    again.finish("FINISHED")
    run = client(out).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"science.seed": "0", "science.epochs": "3"}
    assert run.data.tags["world_size"] == "4"
    assert metric(out, first.run_id, "train/loss") == [(1, 1.0), (2, 0.5)]


def test_the_environment_says_where(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out / 'mlflow.db'}")
    tracker = Tracker(tmp_path, "elsewhere", "third")
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []
    run = client(out).get_run(tracker.run_id)
    assert client(out).get_experiment(run.info.experiment_id).name == "elsewhere"


def test_a_broken_store_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
    with caplog.at_level(logging.WARNING, "gigamil.train.tracking"):
        tracker = Tracker(tmp_path, "cohort", "run")
        assert tracker.run_id is None
        tracker.describe({"a": 1}, {"b": 2})
        tracker.log({"loss": 0.1}, step=1)
        tracker.artefact(tmp_path / "file")
        tracker.finish("FINISHED")
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["MLflow is not reachable"]
    assert "training goes on, metrics.jsonl has everything" in caplog.text


def test_a_store_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # A database that cannot be opened is tried for 100 seconds by MLflow, in which the other ranks would time out.
    answer = threading.Event()
    monkeypatch.setattr(tracking, "_client", lambda out: answer.wait(60))
    start = time.monotonic()
    tracker = Tracker(tmp_path, "cohort", "run", open_s=0.3)
    tracker.log({"loss": 0.1}, step=1)
    tracker.finish("FINISHED")
    assert time.monotonic() - start < 10
    assert tracker.run_id is None
    assert "no answer within 0.3 s" in caplog.text
    answer.set()


def test_a_store_that_fails_on_the_way_is_a_warning(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(out, "cohort", "fourth")
    monkeypatch.setattr(tracker._client, "log_batch", lambda *args, **kwargs: 1 / 0)
    for step in range(3):
        tracker.log({"loss": 0.1}, step=step)
    tracker.finish("FINISHED", wait_s=10)
    assert caplog.text.count("MLflow is not reachable (division by zero)") == 1


def test_logging_does_not_wait_for_the_store(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker(out, "cohort", "fifth")
    gate = threading.Event()
    monkeypatch.setattr(tracker._client, "log_batch", lambda *args, **kwargs: gate.wait(30))
    start = time.monotonic()
    for step in range(100):
        tracker.log({"loss": 0.1}, step=step)
    assert time.monotonic() - start < 5
    gate.set()
    tracker.finish("FINISHED")

"""A run folder goes to an MLflow store as a whole, once, whatever the store has of it already."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from gigamil.cli import main
from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.errors import EnvironmentFault
from gigamil.lock import folder_lock
from gigamil.train.follow import METRICS, Metric, read_batches, read_sent
from gigamil.train.records import json_line
from gigamil.train.sync import sync_run
from gigamil.train.tracking import Tracker

Folder = Callable[..., Path]


def client(store: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def uri(store: Path) -> str:
    return f"sqlite:///{store / 'mlflow.db'}"


def numbers(store: Path, run_id: str) -> list[Metric]:
    """Everything that a store has of a run."""
    names = client(store).get_run(run_id).data.metrics
    entities = [entity for name in names for entity in client(store).get_metric_history(run_id, name)]
    return sorted(Metric(one.key, one.value, one.step, one.timestamp) for one in entities)


def lines(out: Path) -> list[Metric]:
    """Everything that a run folder has in its followed files."""
    files = [out / METRICS, out / "logs" / "system_node1.jsonl"]
    return sorted(metric for path in files for batch, _ in read_batches(path, 0) for metric in batch)


def train(out: Path, status: str = "finished", steps: int = 300) -> None:
    """Write what a training of `steps` steps leaves in its folder."""
    config = RunConfig.model_validate({"bookkeeping": {"out": out, "experiment": "cohort", "name": "offline"}})
    (out / "config.resolved.yaml").write_text(to_yaml(config))
    facts = {"status": status, "steps": steps, "updated": "2026-01-02T03:04:05+0000", "world": {"size": 2}}
    (out / "run.json").write_text(json.dumps(facts))
    with (out / METRICS).open("w") as stream:
        stream.writelines(json_line("step", step=n, loss=1 / n, tiles_per_s=9.5) for n in range(1, steps + 1))
        stream.write(json_line("epoch", epoch=1, step=steps, better=True, val_auc=0.75, val_loss=None))
    for folder in ("logs", "heatmaps", "checkpoints/000001-step-00000300"):
        (out / folder).mkdir(parents=True)
    (out / "logs" / "system_node1.jsonl").write_text(json_line("system", host="node1", step=1, cpu_percent=50.0))
    (out / "heatmaps" / "s1.png").write_bytes(b"png")
    (out / "checkpoints" / "best").write_text("000001-step-00000300\n")
    (out / "checkpoints" / "000001-step-00000300" / "manifest.json").write_text("{}")
    (out / "report.html").write_text("<p>")
    values = {"auc": {"value": 0.9}, "balanced_accuracy": {"value": 0.8}, "f1": {"value": None}}
    parts = {"metrics": values, "num_slides": 4}
    (out / "evaluation.json").write_text(json.dumps({"splits": {"test": parts}, "headline_split": "test"}))


def test_an_offline_run_is_sent_as_a_whole_and_once(run_folder: Folder) -> None:
    server, out = run_folder("server"), run_folder(has_store=False)
    train(out)
    report = sync_run(out, uri(server))
    run = client(server).get_run(report.run_id)
    assert (run.info.run_name, run.info.status, run.info.end_time) == ("offline", "FINISHED", 1767323045000)
    assert run.info.start_time == json.loads((out / METRICS).read_text().partition("\n")[0])["time"]
    assert run.data.params["science.seed"] == "0"
    assert run.data.tags["world.size"] == "2"
    time_ms = int((out / "evaluation.json").stat().st_mtime * 1000)
    scores = [Metric("test/auc", 0.9, 300, time_ms), Metric("test/balanced_accuracy", 0.8, 300, time_ms)]
    everything = sorted([*lines(out), *scores])
    assert numbers(server, report.run_id) == everything
    names = {path.path for path in client(server).list_artifacts(report.run_id)}
    assert (server / "artifacts" / report.run_id).is_dir()
    assert names == {"config.resolved.yaml", METRICS, "evaluation.json", "report.html", "heatmaps", "checkpoint"}

    again = sync_run(out, uri(server))
    assert (again.run_id, again.line_bytes, again.files) == (report.run_id, 0, 0)
    assert again.text() == f"MLflow run {report.run_id} at {uri(server)} has everything already"

    (out / "mlflow.json").unlink()  # a copy of the folder that was made before: a run of its own, as it cannot be known
    with (out / METRICS).open("a") as stream:
        stream.write(json_line("step", step=301, loss=0.5))
    other = sync_run(out, uri(server))
    assert other.run_id != report.run_id
    assert len(numbers(server, other.run_id)) == len(everything) + 1


def test_what_is_new_is_sent_and_nothing_else(run_folder: Folder) -> None:
    out = run_folder()
    train(out, "interrupted")
    first = sync_run(out)
    assert client(out).get_run(first.run_id).info.status == "KILLED"
    assert not any(path.path == "checkpoint" for path in client(out).list_artifacts(first.run_id))
    line = json_line("step", step=301, loss=0.5)
    with (out / METRICS).open("a") as stream:
        stream.write(line)
    (out / "report.html").write_text("<p>new")
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(facts | {"status": "finished"}))
    second = sync_run(out)
    # The checkpoint's file, the report, and metrics.jsonl as an artefact.
    assert (second.run_id, second.line_bytes, second.files) == (first.run_id, len(line), 3)
    assert client(out).get_run(first.run_id).info.status == "FINISHED"
    assert {one.step for one in numbers(out, first.run_id) if one.name == "train/loss"} == set(range(1, 302))


def test_the_rest_of_a_training_goes_to_its_run(run_folder: Folder) -> None:
    out = run_folder()
    train(out, "running", steps=5)  # killed: nobody has the folder
    tracker = Tracker(out, "cohort", "offline")
    assert tracker.wait_open(20)
    tracker._over.set()
    tracker._thread.join()
    report = sync_run(out)
    assert report.run_id == tracker.run_id
    assert client(out).get_run(report.run_id).info.status == "KILLED"
    assert set(lines(out)) <= set(numbers(out, report.run_id))
    assert list(read_sent(out)) == ["mlflow.db"]


def test_a_run_that_is_being_trained_is_refused(run_folder: Folder) -> None:
    out = run_folder()
    train(out, "running", steps=5)
    with folder_lock(out, "gigamil train"), pytest.raises(EnvironmentFault, match="in use by `gigamil train`"):
        sync_run(out)
    assert not (out / "mlflow.json").exists()


def test_a_server_that_does_not_answer_is_named_without_credentials(run_folder: Folder) -> None:
    out = run_folder(has_store=False)
    train(out, steps=5)
    with pytest.raises(EnvironmentFault) as raised:
        sync_run(out, "http://user:secret@127.0.0.1:1", tries=1)
    message = str(raised.value)
    assert message.startswith("MLflow at http://***@127.0.0.1:1 did not take everything of '")
    assert "`gigamil sync` sends the rest" in message
    assert "secret" not in message + (out / "mlflow.json").read_text()
    assert not (out / ".gigamil.lock").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty"], "'empty' holds no run ('run.json', 'config.resolved.yaml')"),
        (["run", "--to", "localhost:5000"], "--to 'localhost:5000' is no address of an MLflow store. Write http://"),
    ],
)
def test_a_wrong_call_is_code_2(
    run_folder: Folder,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(run_folder(has_store=False), steps=2)
    monkeypatch.chdir(run_folder("empty", has_store=False).parent)
    before = sorted(Path.cwd().rglob("*"))
    assert main(["sync", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == before


def test_the_command_says_what_was_sent(run_folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_folder()
    train(out, steps=2)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert main(["sync", str(out)]) == 0
    size = sum(path.stat().st_size for path in (out / METRICS, out / "logs" / "system_node1.jsonl"))
    assert f" at mlflow.db got {size} bytes of metrics and 6 files, and has everything now" in capsys.readouterr().out

"""MLflow gets every line of the run's files; a store that is broken, silent or gone for a while costs a warning, never the run."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from gigamil.errors import EnvironmentFault
from gigamil.train import tracking
from gigamil.train.follow import METRICS, cut_sent, read_sent
from gigamil.train.records import MetricsLog, json_line
from gigamil.train.tracking import PARENT_VARIABLE, RunSender, Tracker, files_in, masked, sync_command

Folder = Callable[..., Path]


def client(out: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")


def history(out: Path, run_id: str | None, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric."""
    return sorted((m.step, m.value) for m in client(out).get_metric_history(run_id, name))


class FakeClient:
    """An MLflow client in memory, for failures at chosen calls; what MLflow itself does is tested with its SQLite store.

    Attributes:
        broken: called before each call with its name; raises what the call is to raise.
        lost: names of calls that are carried out and whose answer does not come back, each once.
    """

    def __init__(self) -> None:
        self.broken: Callable[[str], object] = lambda name: None
        self.lost: set[str] = set()
        self.runs: dict[str, SimpleNamespace] = {}
        self.numbers: list[tuple[str, int, float]] = []
        self.artefacts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self, f"do_{name}")

        def call(*args: Any, **named: Any) -> Any:
            self.broken(name)
            answer = method(*args, **named)
            if name in self.lost:
                self.lost.remove(name)
                raise TimeoutError(f"no answer to {name}")
            return answer

        return call

    def do_get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1")

    def do_create_run(self, experiment: str, start: int | None, tags: dict[str, str], name: str) -> SimpleNamespace:
        info = SimpleNamespace(run_id=f"run{len(self.runs)}", lifecycle_stage="active", status="RUNNING")
        run = SimpleNamespace(info=info, data=SimpleNamespace(params={}, tags=dict(tags)))
        self.runs[info.run_id] = run
        return run

    def do_get_run(self, run_id: str) -> SimpleNamespace:
        return self.runs[run_id]

    def do_search_runs(self, experiments: list[str], words: str) -> list[SimpleNamespace]:
        return [run for run in self.runs.values() if f"'{run.data.tags.get('gigamil.token')}'" in words]

    def do_update_run(self, run_id: str, status: str) -> None:
        self.runs[run_id].info.status = status

    def do_log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self.numbers += [(metric.key, metric.step, metric.value) for metric in metrics]
        self.runs[run_id].data.params |= {param.key: param.value for param in params}

    def do_log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self.artefacts.append(Path(path).name)

    def do_set_terminated(self, run_id: str, status: str, end_time: int | None) -> None:
        self.runs[run_id].info.status = status


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    made = FakeClient()
    monkeypatch.setattr(tracking, "_client", lambda uri, timeout_s: made)
    return made


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    for name in ("_PERIOD_S", "_FIRST_PAUSE_S", "_LONGEST_PAUSE_S", "_LAST_WORD_S"):
        monkeypatch.setattr(tracking, name, 0.01)
    yield
    deadline = time.monotonic() + 10
    while any(thread.name == "gigamil-mlflow" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a tracker goes on after its test"
        time.sleep(0.01)


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestInItsStore:
    def test_everything_lands_in_the_run_folder(self, run_folder: Folder) -> None:
        out = run_folder()
        log = MetricsLog(out / METRICS)
        tracker = Tracker(out, "cohort", "first")
        params = {f"science.key{n}": n for n in range(250)} | {"science.long": "x" * 9000}
        tracker.describe(params, {"world_size": 2, "versions.torch": "2.15"})
        for step in range(1, 400):
            log.write("step", step=step, epoch=1, loss=1 / step, tiles_per_s=9.0, grad_norm=None)
        log.write("epoch", epoch=1, step=399, better=True, val_auc=0.75)
        (out / "figures" / "test").mkdir(parents=True)
        (out / "figures" / "test" / "roc.png").write_bytes(b"png")
        (out / "logs").mkdir()
        (out / "logs" / "system_node2.jsonl").write_text(json_line("system", host="node2", step=1, cpu_percent=50.0))
        tracker.artefact(out / METRICS)
        tracker.artefact(out / "figures", "figures")
        tracker.finish("FINISHED")
        log.close()

        run = client(out).get_run(tracker.run_id)
        assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
        assert client(out).get_experiment(run.info.experiment_id).name == "cohort"
        assert len(run.data.params) == 251
        assert run.data.params["science.key249"] == "249"
        assert run.data.params["science.long"] == "x" * 500
        assert (run.data.tags["world_size"], run.data.tags["versions.torch"]) == ("2", "2.15")
        assert history(out, tracker.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 400)]
        assert len(history(out, tracker.run_id, "perf/tiles_per_s")) == 399
        assert history(out, tracker.run_id, "val/auc") == [(399, 0.75)]
        assert history(out, tracker.run_id, "system/node2/cpu_percent") == [(1, 50.0)]
        assert "train/grad_norm" not in run.data.metrics
        stored = {path.relative_to(out / "artifacts") for path in (out / "artifacts").rglob("*") if path.is_file()}
        base = Path(run.info.run_id) / "artifacts"
        assert stored == {base / METRICS, base / "figures" / "test" / "roc.png"}

        [sent] = read_sent(out).values()
        assert (sent.run_id, sent.status) == (tracker.run_id, "FINISHED")
        assert sent.confirmed[METRICS] == (out / METRICS).stat().st_size

    def test_a_run_that_continues_makes_steps_again(self, run_folder: Folder) -> None:
        out = run_folder()
        log = MetricsLog(out / METRICS)
        first = Tracker(out, "cohort", "run")
        first.describe({"science.seed": 0}, {"world_size": 2})
        log.write("step", step=1, loss=1.0)
        kept = log.sync()
        log.write("step", step=2, loss=0.5)
        log.close()
        first.finish("KILLED")
        assert client(out).get_run(first.run_id).info.status == "KILLED"

        cut_sent(out, kept)
        log = MetricsLog(out / METRICS, kept)
        again = Tracker(out, "cohort", "run", first.run_id)
        again.describe({"science.seed": 99, "science.epochs": 3}, {"world_size": 4})
        assert again.wait_open(20) == first.run_id
        assert client(out).get_run(first.run_id).info.status == "RUNNING"
        log.write("step", step=2, loss=0.25)
        log.write("step", step=3, loss=0.125)
        log.close()
        again.finish("FINISHED")
        run = client(out).get_run(first.run_id)
        assert run.info.status == "FINISHED"
        assert run.data.params == {"science.seed": "0", "science.epochs": "3"}  # a changed one must not raise
        assert run.data.tags["world_size"] == "4"
        assert history(out, first.run_id, "train/loss") == [(1, 1.0), (2, 0.25), (2, 0.5), (3, 0.125)]

    def test_lines_that_are_sent_again_change_nothing(self, run_folder: Folder) -> None:
        out = run_folder()
        with (out / METRICS).open("w") as stream:
            stream.writelines(json_line("step", step=step, loss=1 / step) for step in range(1, 30))
        first = Tracker(out, "cohort", "run")
        first.finish("KILLED")
        (out / "mlflow.json").unlink()  # killed before it was written: the checkpoint has the run's id
        again = Tracker(out, "cohort", "run", first.run_id)
        again.finish("FINISHED")
        assert history(out, first.run_id, "train/loss") == [(step, 1 / step) for step in range(1, 30)]

    def test_the_environment_says_where(self, run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
        server, out = run_folder("server"), run_folder(has_store=False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{server / 'mlflow.db'}")
        tracker = Tracker(out, "elsewhere", "third")
        tracker.log({"own/number": 3.0}, step=7)
        tracker.finish("FINISHED")
        assert sorted(path.name for path in out.iterdir()) == [METRICS, "mlflow.json"]
        assert history(server, tracker.run_id, "own/number") == [(7, 3.0)]

    def test_a_run_that_another_store_knows_is_made_anew(self, run_folder: Folder) -> None:
        out = run_folder()
        (out / METRICS).write_text(json_line("step", step=1, loss=1.0))
        tracker = Tracker(out, "cohort", "run", "0123456789abcdef0123456789abcdef")
        tracker.finish("FINISHED")
        assert tracker.run_id not in (None, "0123456789abcdef0123456789abcdef")
        assert history(out, tracker.run_id, "train/loss") == [(1, 1.0)]

    def test_a_run_that_was_deleted_there_is_made_anew_with_all_of_its_lines(self, run_folder: Folder) -> None:
        out = run_folder()
        (out / METRICS).write_text(json_line("step", step=1, loss=1.0))
        first = Tracker(out, "cohort", "run")
        first.finish("KILLED")
        client(out).delete_run(first.run_id)
        again = Tracker(out, "cohort", "run", first.run_id)
        again.finish("FINISHED")
        assert again.run_id != first.run_id
        assert history(out, again.run_id, "train/loss") == [(1, 1.0)]


class TestStudies:
    def parent(self, store: Path, run_id: str | None) -> str:
        parent: str = client(store).get_run(run_id).data.tags["mlflow.parentRunId"]
        return parent

    @pytest.fixture
    def store(self, run_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = run_folder("server")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        monkeypatch.setenv(PARENT_VARIABLE, "folds of a cohort")
        return folder

    def test_runs_of_a_study_have_one_parent(self, store: Path, run_folder: Folder) -> None:
        trackers = [Tracker(run_folder(f"fold{n}", has_store=False), "cohort", f"fold{n}") for n in range(2)]
        for tracker in trackers:
            tracker.finish("FINISHED")
        [parent] = {self.parent(store, tracker.run_id) for tracker in trackers}
        run = client(store).get_run(parent)
        assert (run.info.run_name, run.info.status) == ("folds of a cohort", "FINISHED")
        runs = client(store).search_runs([run.info.experiment_id])
        assert {one.info.run_id for one in runs} == {parent, *(tracker.run_id for tracker in trackers)}

    def test_of_two_parents_the_older_stays(
        self, store: Path, run_folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[str] = []

        def other_job_is_quicker(_seconds: float) -> None:
            runs = client(store)
            experiment = runs.get_experiment_by_name("cohort").experiment_id
            tags = {"gigamil.study": "folds of a cohort"}
            made.append(runs.create_run(experiment, start_time=1000, tags=tags).info.run_id)

        monkeypatch.setattr(tracking, "time", SimpleNamespace(sleep=other_job_is_quicker, monotonic=time.monotonic))
        tracker = Tracker(run_folder(has_store=False), "cohort", "fold0")
        tracker.finish("FINISHED")
        assert [self.parent(store, tracker.run_id)] == made
        experiment = client(store).get_experiment_by_name("cohort").experiment_id
        assert len(client(store).search_runs([experiment])) == 2

    def test_a_parent_can_be_named_by_its_id(
        self, store: Path, run_folder: Folder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(PARENT_VARIABLE)
        above = Tracker(run_folder("above", has_store=False), "cohort", "above")
        child = Tracker(run_folder("child", has_store=False), "cohort", "child", parent=above.wait_open(20))
        for tracker in (child, above):
            tracker.finish("FINISHED")
        assert self.parent(store, child.run_id) == above.run_id

    def test_a_name_that_would_end_a_search_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(PARENT_VARIABLE, "it's")
        with pytest.raises(EnvironmentFault, match=f'{PARENT_VARIABLE}="it\'s" is no name of a study'):
            Tracker(tmp_path, "cohort", "run")


class TestFailures:
    def test_what_comes_while_the_store_is_away_is_sent_when_it_is_back(
        self, fake: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def away(name: str) -> None:
            raise ConnectionError("http://user:secret@host:5000/api is away\nwith details")

        tracker = Tracker(tmp_path, "cohort", "run")
        tracker.describe({"a": 1}, {"b": 2})
        tracker.log({"loss": 1.0}, step=1)
        wait_for(lambda: fake.numbers)
        fake.broken = away
        for step in range(2, 50):
            tracker.log({"loss": 1 / step}, step=step)
        tracker.artefact(tmp_path / METRICS)
        wait_for(lambda: caplog.records)
        time.sleep(0.1)  # several tries
        fake.broken = lambda name: None
        tracker.log({"loss": 0.0}, step=50)
        wait_for(lambda: len(caplog.records) == 2)
        tracker.finish("FINISHED")
        assert [step for _, step, _ in fake.numbers] == list(range(1, 51))
        assert fake.artefacts == [METRICS]
        assert fake.runs["run0"].info.status == "FINISHED"
        lost, back = (record.getMessage() for record in caplog.records)
        assert lost == (
            "MLflow at mlflow.db is not reachable (http://***@host:5000/api is away); training goes on, metrics.jsonl has "
            "everything and is sent when it is back"
        )
        assert back == "MLflow at mlflow.db is back and has everything until now"

    def test_a_run_is_made_when_the_store_answers_for_the_first_time(self, fake: FakeClient, tmp_path: Path) -> None:
        answers = threading.Event()

        def starts_late(_name: str) -> None:
            if not answers.is_set():
                raise ConnectionError("refused")

        fake.broken = starts_late
        tracker = Tracker(tmp_path, "cohort", "run")
        tracker.log({"loss": 1.0}, step=1)
        assert tracker.wait_open(0.1) is None
        answers.set()
        assert tracker.wait_open(20) == "run0"
        tracker.finish("FINISHED")
        assert fake.numbers == [("loss", 1, 1.0)]
        assert read_sent(tmp_path)["mlflow.db"].run_id == "run0"

    def test_a_run_whose_creation_was_not_answered_is_found_again(self, fake: FakeClient, tmp_path: Path) -> None:
        fake.lost = {"create_run"}
        tracker = Tracker(tmp_path, "cohort", "run")
        assert tracker.wait_open(20) == "run0"
        tracker.finish("FINISHED")
        assert list(fake.runs) == ["run0"]

    def test_a_run_whose_creation_was_not_answered_is_found_by_the_next_session(
        self, fake: FakeClient, tmp_path: Path
    ) -> None:
        fake.lost = {"create_run"}
        sender = RunSender(tmp_path, "http://host", "cohort", "run")
        with pytest.raises(TimeoutError):
            sender.open(is_running=True)
        again = RunSender(tmp_path, "http://host", "cohort", "run")
        again.open(is_running=True)
        assert (again.run_id, list(fake.runs)) == ("run0", ["run0"])

    def test_what_is_refused_is_named_once_and_holds_nothing_up(
        self, fake: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Refusal(Exception):
            error_code = "INVALID_PARAMETER_VALUE"

        def refuses_numbers(name: str) -> None:
            if name == "log_batch":
                raise Refusal("bad name of a metric")

        fake.broken = refuses_numbers
        tracker = Tracker(tmp_path, "cohort", "run")
        for step in range(3):
            tracker.log({"loss?": 1.0}, step=step)
            size = (tmp_path / METRICS).stat().st_size
            wait_for(lambda size=size: tracker._sender._sent.confirmed.get(METRICS) == size)
        tracker.finish("FINISHED")
        assert fake.runs["run0"].info.status == "FINISHED"
        assert [record.getMessage() for record in caplog.records] == [
            "MLflow at mlflow.db refuses numbers (loss?, ...): bad name of a metric"
        ]

    def test_a_silent_store_holds_up_neither_steps_nor_for_long_the_end(
        self, fake: FakeClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        gate = threading.Event()
        fake.broken = lambda name: gate.wait(30)
        start = time.monotonic()
        tracker = Tracker(tmp_path, "cohort", "run")
        for step in range(100):
            tracker.log({"loss": 0.1}, step=step)
        tracker.finish("FINISHED", wait_s=0.1)
        assert time.monotonic() - start < 5
        assert tracker.run_id is None
        gate.set()
        assert caplog.messages == [
            "MLflow at mlflow.db did not take everything within 0.1 s; `gigamil sync '" + f"{tmp_path}'` sends the rest"
        ]

    def test_a_store_that_cannot_be_opened_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
        with caplog.at_level(logging.WARNING, "gigamil.train.tracking"):
            tracker = Tracker(tmp_path, "cohort", "run")
            wait_for(lambda: caplog.records)
            tracker.finish("FINISHED", wait_s=0.05)
        assert tracker.run_id is None
        assert ["is not reachable" in caplog.messages[0], "sends the rest" in caplog.messages[-1]] == [True, True]
        assert len(caplog.messages) == 2


class TestFiles:
    def test_a_file_is_sent_again_only_if_it_has_changed(self, fake: FakeClient, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        file.write_text("first")
        sender = RunSender(tmp_path, "http://host", "cohort", "run")
        sender.open(is_running=False)
        assert [sender.send_file(file), sender.send_file(file)] == [True, False]
        file.write_text("second")
        assert not sender.has_file(file)
        sender.save(at_once=True)
        again = RunSender(tmp_path, "http://host", "cohort", "run")
        again.open(is_running=False)
        assert [again.send_file(file), again.send_file(file)] == [True, False]
        assert fake.artefacts == ["report.html"] * 2

    def test_files_of_a_folder_keep_their_places(self, tmp_path: Path) -> None:
        for name in ("a.png", "b/c.png"):
            (tmp_path / "figures" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "figures" / name).touch()
        folder = tmp_path / "figures"
        assert list(files_in(folder, "figures")) == [(folder / "a.png", "figures"), (folder / "b/c.png", "figures/b")]
        assert list(files_in(folder)) == [(folder / "a.png", None), (folder / "b/c.png", "b")]
        assert list(files_in(folder / "a.png", "x")) == [(folder / "a.png", "x")]
        assert list(files_in(folder / "gone")) == []


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("https://user:secret@host.example:5000/x", "https://***@host.example:5000/x"),
            ("postgresql+psycopg://user:p@ss@host/db failed\nat line 2", "postgresql+psycopg://***@host/db failed"),
            ("sqlite:////data/me@home/mlflow.db", "sqlite:////data/me@home/mlflow.db"),
            ("postgresql://u:pa/ss@host/db", "postgresql://***@host/db"),
            ("postgresql://host/db?user=u&password=p&x=1", "postgresql://host/db?user=***&password=***&x=1"),
            (ValueError(), "ValueError"),
        ],
    )
    def test_show_no_credentials(self, text: object, expected: str) -> None:
        assert masked(text) == expected

    def test_are_written_without_credentials(
        self, fake: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host.example:5000")
        tracker = Tracker(tmp_path, "cohort", "run")
        tracker.finish("FINISHED")
        text = (tmp_path / "mlflow.json").read_text()
        assert list(json.loads(text)) == ["https://***@host.example:5000"]
        assert "secret" not in text

    def test_the_command_that_sends_the_rest_names_the_store(self, tmp_path: Path) -> None:
        assert sync_command(tmp_path, "mlflow.db") == f"gigamil sync '{tmp_path}'"
        assert sync_command(tmp_path, "http://h:1") == f"gigamil sync '{tmp_path}' --to 'http://h:1'"

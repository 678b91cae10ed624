"""MLflow behind one door, off the step path: a thread follows the run's files and sends what is new, whenever MLflow answers.

metrics.jsonl is the truth and the queue; MLflow is a copy of it. Only rank 0 has a tracker. A server that is down, slow or
silent costs two lines in the log: nothing is lost, and what it does not get before the end `gigamil sync` sends later.
"""

import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gigamil.errors import EnvironmentFault
from gigamil.files import file_sha256
from gigamil.train.follow import METRICS, Metric, Sent, followed_files, read_batches, read_sent, write_sent
from gigamil.train.records import json_line

PARENT_VARIABLE = "GIGAMIL_MLFLOW_PARENT"
_URI = "MLFLOW_TRACKING_URI"
_MAX_PARAM = 500  # characters; longer values are in the resolved configuration, which is an artefact
_PERIOD_S = 2.0  # between looks at the files: quick steps travel together
_SYSTEM_PERIOD_S = 15.0  # likewise at those of the machines, of which there may be a thousand on a file server
_SAVE_S = 5.0  # between writings of mlflow.json: what a crash sends twice
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # between tries of a server that does not answer
_LAST_WORD_S = 2.0  # for a thread that is told to stop; in a call of a silent server it is left behind
_OWN_STORE = "mlflow.db"
_TOKEN, _STUDY = "gigamil.token", "gigamil.study"
_STUDY_NAME = re.compile(r"[\w .:/()+@=,-]{1,128}")  # nothing that ends the quotes of a search

_log = logging.getLogger(__name__)


class Tracker:
    """One MLflow run that gets what is written to a run folder, continued if its id is given. Nothing here waits for MLflow.

    Args:
        out: run folder; without MLFLOW_TRACKING_URI the store is `<out>/mlflow.db`, artefacts in `<out>/artifacts`.
        experiment, name: of MLflow.
        run_id: run to continue; None continues that of mlflow.json, or starts one.
        parent: id of the MLflow run that this one belongs to; else GIGAMIL_MLFLOW_PARENT names a study.
    Raises:
        EnvironmentFault: GIGAMIL_MLFLOW_PARENT is no name.
    """

    def __init__(
        self, out: Path, experiment: str, name: str, run_id: str | None = None, *, parent: str | None = None
    ) -> None:
        self._out = out
        self._sender = RunSender(out, tracking_uri(out), experiment, name, run_id, parent=parent)
        self._params: dict[str, Any] = {}
        self._tags: dict[str, Any] = {}
        self._files: deque[tuple[Path, str | None]] = deque()
        self._lock = threading.Lock()
        self._ending, self._over, self._opened = threading.Event(), threading.Event(), threading.Event()
        self._status: str | None = None
        self._is_lost = False
        self._looked = 0.0  # at the machines' files
        with suppress(Exception):  # here, as threads that import at once may see modules half made; the thread tells
            import_mlflow()
        self._thread = threading.Thread(target=self._work, name="gigamil-mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """Id of the run; None until MLflow has answered."""
        return self._sender.run_id if self._opened.is_set() else None

    def wait_open(self, wait_s: float) -> str | None:
        """Id of the run, for callers who cannot go on without it; None if MLflow has not answered by then."""
        self._opened.wait(wait_s)
        return self.run_id

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Log parameters (those that are new) and tags (which may change when a run continues)."""
        with self._lock:
            self._params |= params
            self._tags |= tags

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of a step: a line of `<out>/metrics.jsonl`, for what has no line of its own there."""
        with (self._out / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json_line("metrics", step=step, **metrics))

    def artefact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to the run's artefacts, once it is sent as it is then."""
        with self._lock:
            self._files.append((path, folder))

    def finish(self, status: str, wait_s: float = 60.0) -> None:
        """Send what is left and set the run's status: FINISHED, FAILED or KILLED (interrupted, resumable).

        Args:
            wait_s: longest wait for MLflow.
        """
        self._status = status
        self._ending.set()
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._over.set()
            _log.warning(
                "MLflow at %s did not take everything within %g s; `%s` sends the rest",
                self._sender.place,
                wait_s,
                sync_command(self._out, self._sender.place),
            )
            self._thread.join(_LAST_WORD_S)  # a process should not end around a thread in the middle of a call

    def _work(self) -> None:
        pause = _FIRST_PAUSE_S
        while not self._over.is_set():
            is_last = self._ending.is_set()  # before the files are read: what was written until now is in them
            try:
                self._send(is_last)
            except Exception as error:  # noqa: BLE001 - MLflow raises its own, SQLAlchemy's and requests' types; none may stop a run
                self._note_lost(error)
                if is_last:
                    self._over.wait(_FIRST_PAUSE_S)
                else:
                    self._ending.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if self._is_lost:
                self._is_lost = False
                _log.warning("MLflow at %s is back and has everything until now", self._sender.place)
            pause = _FIRST_PAUSE_S
            if is_last:
                return
            self._ending.wait(_PERIOD_S)

    def _send(self, is_last: bool) -> None:
        if not self._opened.is_set():
            self._sender.open(is_running=True)
            self._opened.set()
        with self._lock:
            params, tags = dict(self._params), dict(self._tags)
        if params or tags:
            self._sender.describe(params, tags)
            with self._lock:
                self._params = {key: value for key, value in self._params.items() if key not in params}
                self._tags = {key: value for key, value in self._tags.items() if tags.get(key) != value}
        looks = is_last or time.monotonic() - self._looked > _SYSTEM_PERIOD_S
        for _ in self._sender.send_lines(of_machines=looks):
            if self._over.is_set():
                return
        self._looked = time.monotonic() if looks else self._looked
        if is_last and self._status is not None:
            self._sender.end(self._status)  # before files, which may be large
        while self._files and not self._over.is_set():
            for file, folder in files_in(*self._files[0]):
                self._sender.send_file(file, folder)
            with self._lock:
                self._files.popleft()
        self._sender.save(at_once=is_last)

    def _note_lost(self, error: Exception) -> None:
        if not self._is_lost:
            self._is_lost = True
            _log.warning(
                "MLflow at %s is not reachable (%s); training goes on, metrics.jsonl has everything and is sent when it is back",
                self._sender.place,
                masked(error),
            )


class RunSender:
    """Sends an MLflow store what it does not have yet of a run folder. Calls raise what MLflow raises, and may be repeated.

    Args:
        out: run folder.
        uri: of the store.
        experiment, name: of the run.
        run_id: run to continue where mlflow.json names none, or one that is gone; None makes one.
        parent: as in `Tracker`.
        timeout_s: longest wait for an answer of a server.
    Attributes:
        place: the store, without credentials.
        run_id: None before `open`.
    """

    def __init__(
        self,
        out: Path,
        uri: str,
        experiment: str,
        name: str,
        run_id: str | None = None,
        *,
        parent: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._out, self._uri, self._experiment, self._name = out, uri, experiment, name
        self._wanted, self._parent, self._study = run_id, parent, _study_name()
        self._timeout_s = timeout_s
        self._client: Any = None
        self._stores = read_sent(out)
        self.place = _OWN_STORE if uri == _own_uri(out) else masked(uri)  # the folder may be moved
        self._sent = self._stores.setdefault(self.place, Sent())
        self._saved = 0.0
        self._refusals: set[str] = set()

    @property
    def run_id(self) -> str | None:
        """Id of the run."""
        return self._sent.run_id

    def open(self, *, is_running: bool) -> None:
        """Find the run, or make it.

        Args:
            is_running: training goes on, and the run's status says so.
        """
        if self._client is None:
            self._client = _client(self._uri, self._timeout_s)
        found = self._find()
        if found is None:
            if self._sent.run_id is not None or not self._sent.token:
                self._replace_sent(Sent(token=uuid.uuid4().hex))
            self.save(at_once=True)  # the token, by which the run is found if the answer is lost
            found = self._create()
        elif is_running:
            self._client.update_run(found, status="RUNNING")
        if self._sent.run_id not in (None, found):
            self._replace_sent(Sent(token=self._sent.token))
        self._sent.run_id = found
        if is_running:
            self._sent.status = None
        self.save(at_once=True)

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Log parameters that are new, and tags."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params  # a changed parameter would raise
        new = [Param(key, str(value)[:_MAX_PARAM]) for key, value in params.items() if key not in known]
        labels = [RunTag(key, str(value)) for key, value in tags.items()]
        for start in range(0, max(len(new), len(labels)), 100):  # at most 100 of each per call
            part = slice(start, start + 100)
            self._call("parameters or tags", self._client.log_batch, self.run_id, params=new[part], tags=labels[part])

    def send_lines(self, *, of_machines: bool = True) -> Iterator[int]:
        """Send the numbers of lines that are not confirmed; yields the bytes that each call has confirmed.

        Args:
            of_machines: also of logs/system_<host>.jsonl.
        """
        for path in followed_files(self._out) if of_machines else [self._out / METRICS]:
            name = path.relative_to(self._out).as_posix()
            for metrics, position in read_batches(path, self._sent.confirmed.get(name, 0)):
                self.send_metrics(metrics)
                before = self._sent.confirmed.get(name, 0)
                self._sent.confirmed[name] = position
                self.save()
                yield max(0, position - before)

    def bytes_left(self) -> int:
        """Bytes of the followed files that are not confirmed."""
        sizes = {path: path.stat().st_size for path in followed_files(self._out) if path.is_file()}
        confirmed = self._sent.confirmed
        return sum(max(0, size - confirmed.get(p.relative_to(self._out).as_posix(), 0)) for p, size in sizes.items())

    def send_metrics(self, metrics: Sequence[Metric]) -> None:
        """Send at most 1000 numbers."""
        from mlflow.entities import Metric as Entity

        if metrics:
            entities = [Entity(metric.name, metric.value, metric.time, metric.step) for metric in metrics]
            self._call(f"numbers ({metrics[0].name}, ...)", self._client.log_batch, self.run_id, entities)

    def has_file(self, path: Path, folder: str | None = None) -> bool:
        """Whether the store has a file as it is now."""
        return self._sent.files.get(_artefact_name(path, folder)) == file_sha256(path)

    def send_file(self, path: Path, folder: str | None = None) -> bool:
        """Copy a file to the artefacts, unless it is there as it is now; whether it was sent."""
        name, digest = _artefact_name(path, folder), file_sha256(path)
        if self._sent.files.get(name) == digest:
            return False
        self._call(f"'{name}'", self._client.log_artifact, self.run_id, str(path), folder)
        self._sent.files[name] = digest
        self.save()
        return True

    def end(self, status: str, end_time: int | None = None) -> None:
        """Set the status, unless it is set; the time in milliseconds since 1970, None is now."""
        if self._sent.status != status:
            self._client.set_terminated(self.run_id, status, end_time)
            self._sent.status = status

    def save(self, *, at_once: bool = False) -> None:
        """Write mlflow.json, at most every few seconds."""
        if at_once or time.monotonic() - self._saved > _SAVE_S:
            write_sent(self._out, self._stores)
            self._saved = time.monotonic()

    def _replace_sent(self, sent: Sent) -> None:
        self._sent = self._stores[self.place] = sent

    def _call(self, what: str, function: Any, *args: Any, **named: Any) -> None:
        """Call MLflow. What it understands and will never take is named in the log, and must not hold up what follows."""
        try:
            function(*args, **named)
        except Exception as error:
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if (words := masked(error)) not in self._refusals:
                self._refusals.add(words)
                _log.warning("MLflow at %s refuses %s: %s", self.place, what, words)

    def _find(self) -> str | None:
        """The run of mlflow.json, that of the checkpoint, or the one whose creation was not answered; None if there is none."""
        for run_id in (self._sent.run_id, self._wanted):
            if run_id is not None and self._is_there(run_id):
                return run_id
        experiment = self._client.get_experiment_by_name(self._experiment) if self._sent.token else None
        if experiment is None:
            return None
        runs = self._client.search_runs([experiment.experiment_id], f"tags.`{_TOKEN}` = '{self._sent.token}'")
        return runs[0].info.run_id if runs else None

    def _is_there(self, run_id: str) -> bool:
        try:
            stage: str = self._client.get_run(run_id).info.lifecycle_stage
        except Exception as error:
            if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return stage == "active"

    def _create(self) -> str:
        experiment_id = self._experiment_id()
        tags = {_TOKEN: self._sent.token}
        parent = self._parent
        if parent is None and self._study is not None:
            parent = _study_run(self._client, experiment_id, self._study)
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        first = next(read_batches(self._out / METRICS, 0), ([], 0))[0]
        start = first[0].time if first else None  # of a run that is sent later
        run: str = self._client.create_run(experiment_id, start, tags, self._name).info.run_id
        return run

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            # Of a file MLflow would put artefacts into the folder that somebody happens to be in.
            file = self._uri.partition("?")[0].removeprefix("sqlite:///")
            place = (Path(file).resolve().parent / "artifacts").as_uri() if file != self._uri else None
            try:
                made: str = self._client.create_experiment(self._experiment, artifact_location=place)
                return made
            except Exception:
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        experiment_id: str = found.experiment_id  # made by another job meanwhile
        return experiment_id


def tracking_uri(out: Path) -> str:
    """Where a run folder is tracked: MLFLOW_TRACKING_URI, else its own SQLite file."""
    return os.environ.get(_URI) or _own_uri(out)


@contextmanager
def one_store(out: Path, study: str) -> Iterator[None]:
    """Inside, runs that are started are children of one run, in a store of `out`, unless the environment says otherwise."""
    wanted = {_URI: _own_uri(out), PARENT_VARIABLE: study}
    added = {name: value for name, value in wanted.items() if not os.environ.get(name)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def masked(text: object) -> str:
    """The first line of an address or a message, without the user name and password of an address in it."""
    lines = str(text).strip().splitlines() or [type(text).__name__]
    line = re.sub(r"(?<!sqlite)://[^\s?#]*@", "://***@", lines[0])  # a password may hold slashes
    return re.sub(r"(?i)\b(user|password|passwd|pwd|token|secret)=[^&\s]+", r"\1=***", line)[:300]


def sync_command(out: Path, place: str) -> str:
    """What to type to send the rest; credentials are left to fill in."""
    return f"gigamil sync '{out}'" + ("" if place == _OWN_STORE else f" --to '{place}'")


def files_in(path: Path, folder: str | None = None) -> Iterable[tuple[Path, str | None]]:
    """A file with its folder among the artefacts; of a folder all of its files. Nothing of what is not there."""
    if not path.is_dir():
        return [(path, folder)] if path.is_file() else []
    found = []
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        inner = file.parent.relative_to(path).as_posix()
        found.append((file, folder if inner == "." else f"{folder}/{inner}" if folder else inner))
    return found


def _study_run(client: Any, experiment_id: str, study: str) -> str:
    """The run that the runs of a study belong to, made by the first of them.

    Of two that are made at once, by jobs of an array, both jobs take the older; the other is deleted by who made it.
    """

    def oldest() -> str | None:
        runs = client.search_runs([experiment_id], f"tags.`{_STUDY}` = '{study}'")
        return min(((run.info.start_time, run.info.run_id) for run in runs), default=(0, None))[1]

    found = oldest()
    if found is not None:
        return found
    made: str = client.create_run(experiment_id, tags={_STUDY: study}, run_name=study).info.run_id
    client.set_terminated(made, "FINISHED")  # it computes nothing itself
    time.sleep(1.0)  # who has looked before we made ours has made its own by now
    found = oldest() or made
    if found != made:
        client.delete_run(made)
    return found


def _study_name() -> str | None:
    name = os.environ.get(PARENT_VARIABLE)
    if name and not _STUDY_NAME.fullmatch(name):
        raise EnvironmentFault(
            f"{PARENT_VARIABLE}={name!r} is no name of a study: up to 128 letters, digits, spaces and _-.:/()+@=, "
            "without quotes. Set another one."
        )
    return name or None


def _own_uri(out: Path) -> str:
    return f"sqlite:///{(out / _OWN_STORE).resolve()}"


def _artefact_name(path: Path, folder: str | None) -> str:
    return f"{folder}/{path.name}" if folder else path.name


def _client(uri: str, timeout_s: float) -> Any:
    # A server that does not answer would hold a call for minutes by default; whoever calls tries again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{timeout_s:.0f}")
    return import_mlflow().MlflowClient(tracking_uri=uri)


def import_mlflow() -> Any:
    """MLflow, quiet and without telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it may hold a password
    import mlflow

    for name in ("alembic", "mlflow"):  # they report each table they make
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow

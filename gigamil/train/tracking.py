"""MLflow behind one door, off the step path: a thread sends what the loop hands over; its failure never stops a run.

metrics.jsonl is the truth; MLflow is a copy of it. Only rank 0 has a tracker.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_MAX_PARAM = 500  # characters; longer values are in the resolved configuration, which is an artefact


class Tracker:
    """One MLflow run, continued if its id is given.

    Args:
        out: run folder; without MLFLOW_TRACKING_URI the store is `<out>/mlflow.db`, artefacts in `<out>/artifacts`.
        experiment, name: of MLflow.
        run_id: run to continue; None starts one.
        open_s: longest wait for MLflow at the start. MLflow itself tries a database for 100 seconds, in which the other
            ranks would give up waiting.
    Attributes:
        run_id: of the run; None if MLflow could not be reached at the start.
    """

    def __init__(
        self, out: Path, experiment: str, name: str, run_id: str | None = None, *, open_s: float = 60.0
    ) -> None:
        self.run_id: str | None = None
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="gigamil-mlflow", daemon=True)
        self._client: Any = None
        self._failed = False
        opened = threading.Event()

        def start() -> None:
            self._client = _client(out)
            found = self._open(out, experiment, name, run_id)
            self.run_id = None if self._failed else found
            opened.set()

        self._queue.put(start)
        self._thread.start()
        deadline = time.monotonic() + open_s
        while not (opened.wait(0.05) or self._failed):
            if time.monotonic() > deadline:
                self._fail(TimeoutError(f"no answer within {open_s:g} s"))

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Log parameters (those that are new) and tags (which may change when a run continues)."""
        self._put(lambda: self._describe(params, tags))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers of a step; returns at once."""
        now = int(time.time() * 1000)
        self._put(lambda: self._log_batch(metrics, step, now))

    def artefact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to the run's artefacts."""

        def send() -> None:
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

        self._put(send)

    def finish(self, status: str, wait_s: float = 60.0) -> None:
        """Send what is left and set the run's status: FINISHED, FAILED or KILLED (interrupted, resumable)."""
        self._put(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.put(None)
        if self._failed:
            return
        self._thread.join(wait_s)
        if self._thread.is_alive():
            _log.warning("MLflow did not take everything within %g s; metrics.jsonl has it all", wait_s)

    def _open(self, out: Path, experiment: str, name: str, run_id: str | None) -> str:
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            experiment_id = found.experiment_id
        else:
            own = "MLFLOW_TRACKING_URI" not in os.environ
            place = (out / "artifacts").as_uri() if own else None
            experiment_id = self._client.create_experiment(experiment, artifact_location=place)
        run: str = self._client.create_run(experiment_id, run_name=name).info.run_id
        return run

    def _describe(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params  # a changed parameter would raise
        new = [Param(key, str(value)[:_MAX_PARAM]) for key, value in params.items() if key not in known]
        labels = [RunTag(key, str(value)) for key, value in tags.items()]
        for start in range(0, max(len(new), len(labels)), 100):  # at most 100 of each per call
            part = slice(start, start + 100)
            self._client.log_batch(self.run_id, params=new[part], tags=labels[part])

    def _log_batch(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(self.run_id, [Metric(k, float(v), timestamp, step) for k, v in metrics.items()])

    def _put(self, job: Callable[[], None]) -> None:
        if not self._failed:
            self._queue.put(job)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._failed:
                continue
            try:
                job()
            except Exception as error:  # noqa: BLE001 - MLflow raises its own, SQLAlchemy's and requests' types; none may stop a run
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        _log.warning("MLflow is not reachable (%s); training goes on, metrics.jsonl has everything", error)


def _client(out: Path) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A server that does not answer would hold a call for minutes by default.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    import mlflow

    for name in ("alembic", "mlflow"):  # they report each table they make
        logging.getLogger(name).setLevel(logging.WARNING)

    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(out / 'mlflow.db').resolve()}")
    return mlflow.MlflowClient(tracking_uri=uri)

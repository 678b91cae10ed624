"""A tracking server that hangs, is killed and comes back while a run trains: steps go on, and no number is lost."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.testing.runs import tiny_run
from gigamil.train.follow import METRICS, Metric, read_batches

START_S = 120  # imports of a server on a busy machine
HANG_S = 12.0  # longer than the answer of a server is waited for: a step that asked it would be seen


class Server:
    """`mlflow server` on this machine, one process group, on a port and a file that stay when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "server.db"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._folder = folder
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        self._command += ["--backend-store-uri", f"sqlite:///{self.store}", "--workers", "1"]
        self._command += ["--artifacts-destination", str(folder / "server-artifacts")]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        env = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "OMP_NUM_THREADS": "1"}
        env.pop("MLFLOW_TRACKING_URI", None)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"mlflow server did not start:\n{(self._folder / 'server.log').read_text()[-3000:]}")
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        """To all of its processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """End it at once, with what it has started."""
        if self._process is None:
            return
        everything = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(20)
        psutil.wait_procs(everything, timeout=20)
        self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def numbers(self) -> list[Metric]:
        """All metrics that it has, of whatever run."""
        if not self.store.is_file():
            return []
        with sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=20) as store:
            rows = store.execute("select key, value, step, timestamp from metrics").fetchall()
        return sorted(Metric(*row) for row in rows)

    def last_step(self) -> int:
        """Of the losses that it has."""
        return max((metric.step for metric in self.numbers() if metric.name == "train/loss"), default=0)

    def runs(self) -> list[tuple[str, str]]:
        """Id and status of its runs."""
        with sqlite3.connect(f"file:{self.store}?mode=ro", uri=True, timeout=20) as store:
            return store.execute("select run_uuid, status from runs").fetchall()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that is running."""
    made = Server(tmp_path)
    made.start()
    yield made
    made.kill()


def _lines(config: RunConfig) -> list[dict[str, float]]:
    path = config.bookkeeping.out / METRICS
    whole = path.read_text().rpartition("\n")[0] if path.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _num_steps(config: RunConfig) -> int:
    return sum(line["kind"] == "step" for line in _lines(config))


def _written(config: RunConfig) -> list[Metric]:
    out = config.bookkeeping.out
    files = [out / METRICS, *(out / "logs").glob("system_*.jsonl")]
    return sorted(metric for path in files for batch, _ in read_batches(path, 0) for metric in batch)


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of a server, and times in which it is away
def test_no_number_is_lost_whatever_the_server_does(
    tmp_path: Path, gigamil: Callable[..., object], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    # It trains until it is told to stop.
    book = {"mlflow": True, "experiment": "server", "name": "disturbed", "system_metrics_s": 0.5}
    config = tiny_run(tmp_path, science={"epochs": 100_000}, bookkeeping=book)
    yaml = tmp_path / "run.yaml"
    yaml.write_text(to_yaml(config))
    out = config.bookkeeping.out

    run = gigamil("train", yaml)
    run.wait_for(lambda: server.last_step() >= 5, "the first steps on the server")

    server.signal(signal.SIGSTOP)  # takes calls, and never answers
    stopped, before = time.time(), _num_steps(config)
    run.wait_for(lambda: time.time() > stopped + HANG_S and _num_steps(config) > before + 20, "steps while it hangs")
    hung_until = time.time()
    server.signal(signal.SIGCONT)
    times = [line["time"] / 1000 for line in _lines(config) if stopped <= line["time"] / 1000 <= hung_until]
    gaps = [after - before for before, after in zip([stopped, *times], [*times, hung_until], strict=True)]
    assert max(gaps) < 0.7 * HANG_S  # validation and checkpoints of the epochs are in them
    goal = _num_steps(config)
    run.wait_for(lambda: server.last_step() >= goal, "what was written while it hung")
    run.wait_for(lambda: run.output().count("is back and has everything") == 1, "that the server is back")

    server.kill()
    before = _num_steps(config)
    run.wait_for(lambda: _num_steps(config) > before + 20, "steps without a server")
    goal = _num_steps(config)
    server.start()
    run.wait_for(lambda: server.last_step() >= goal, "what was written without a server")
    run.wait_for(lambda: run.output().count("is back and has everything") == 2, "that the server is back")

    server.kill()
    before = _num_steps(config)
    run.wait_for(lambda: _num_steps(config) > before + 5, "steps without a server")
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 5, run.output()
    assert run.output().count("is not reachable") == 3
    assert f"gigamil sync '{out}' --to '{server.uri}'" in run.output()
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"

    away = gigamil("sync", out, "--to", server.uri)
    assert away.wait() == 4, away.output()
    server.start()
    synced = gigamil("sync", out, "--to", server.uri)
    assert synced.wait() == 0, synced.output()
    assert server.numbers() == _written(config)
    assert server.runs() == [(json.loads((out / "run.json").read_text())["mlflow_run"], "KILLED")]
    again = gigamil("sync", out)
    assert again.wait() == 0, again.output()
    assert "has everything already" in again.output()
    assert server.numbers() == _written(config)

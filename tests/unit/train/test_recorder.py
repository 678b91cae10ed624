"""What rank 0 records of a run that goes on where another session stopped."""

import json
from pathlib import Path
from typing import Any

import pytest

from gigamil.config.schema import RunConfig
from gigamil.errors import Interrupted
from gigamil.train import tracking
from gigamil.train.follow import METRICS, Sent, read_sent, write_sent
from gigamil.train.recorder import Recorder
from gigamil.train.tracking import Tracker


def config(out: Path, mlflow: bool = True, timeout_s: float = 1.0) -> RunConfig:
    sections = {"bookkeeping": {"out": out, "mlflow": mlflow}, "execution": {"timeout_s": timeout_s}}
    return RunConfig.model_validate(sections)


@pytest.mark.parametrize("mlflow", [True, False])
def test_the_mlflow_run_of_an_earlier_session_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: bool
) -> None:
    monkeypatch.setattr(tracking, "_client", lambda uri, timeout_s: 1 / 0)  # not reachable
    recorder = Recorder(config(tmp_path, mlflow), {}, {}, metrics_bytes=0, mlflow_run="0123abcd")
    with recorder.ended({}, tmp_path):
        pass
    assert recorder.mlflow_run == "0123abcd"
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] == "0123abcd"


def test_a_run_that_was_made_late_is_in_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_client", lambda uri, timeout_s: 1 / 0)
    recorder = Recorder(config(tmp_path), {}, {}, metrics_bytes=0, mlflow_run=None)
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] is None
    monkeypatch.setattr(Tracker, "run_id", "4567cdef")
    with recorder.ended({}, tmp_path):
        pass
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] == "4567cdef"


class TestWhatStoresHaveConfirmed:
    def sent(self, out: Path, **resumed: Any) -> dict[str, Sent]:
        (out / METRICS).write_text("x" * 300)
        write_sent(out, {"http://host": Sent("id", confirmed={METRICS: 300})})
        Recorder(config(out, mlflow=False), {}, {}, **resumed)._metrics.close()
        return read_sent(out)

    @pytest.mark.parametrize("mlflow_run", ["id", None])  # None: made after the checkpoint
    def test_is_cut_back_to_the_checkpoint(self, tmp_path: Path, mlflow_run: str | None) -> None:
        sent = self.sent(tmp_path, metrics_bytes=100, mlflow_run=mlflow_run)
        assert sent == {"http://host": Sent("id", confirmed={METRICS: 100})}
        assert (tmp_path / METRICS).stat().st_size == 100

    def test_is_forgotten_by_a_run_that_starts_again(self, tmp_path: Path) -> None:
        assert self.sent(tmp_path, metrics_bytes=0, mlflow_run=None) == {}


@pytest.mark.parametrize(
    ("error", "timeout_s", "expected"),
    [
        (None, 500.0, ("FINISHED", 60.0)),
        (None, 50.0, ("FINISHED", 25.0)),
        (Interrupted("asked"), 500.0, ("KILLED", 10.0)),
    ],
)
def test_the_end_waits_for_mlflow_no_longer_than_the_others_wait_for_rank_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    timeout_s: float,
    expected: tuple[str, float],
) -> None:
    ends: list[tuple[str, float]] = []
    monkeypatch.setattr(tracking, "_client", lambda uri, timeout_s: 1 / 0)
    monkeypatch.setattr(Tracker, "finish", lambda self, status, wait_s: ends.append((status, wait_s)))
    recorder = Recorder(config(tmp_path, timeout_s=timeout_s), {}, {}, metrics_bytes=0, mlflow_run=None)
    try:
        with recorder.ended({}, tmp_path):
            if error is not None:
                raise error
    except Interrupted:
        pass
    assert ends == [expected]
    assert recorder._tracker is not None
    recorder._tracker._over.set()
    recorder._tracker._ending.set()
    recorder._tracker._thread.join()

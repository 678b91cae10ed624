"""What rank 0 records of a run that goes on where another session stopped."""

import json
from pathlib import Path

import pytest

from gigamil.config.schema import RunConfig
from gigamil.train import tracking
from gigamil.train.recorder import Recorder


@pytest.mark.parametrize("mlflow", [True, False])
def test_the_mlflow_run_of_an_earlier_session_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow: bool
) -> None:
    monkeypatch.setattr(tracking, "_client", lambda out: 1 / 0)  # not reachable
    config = RunConfig.model_validate({"bookkeeping": {"out": tmp_path, "mlflow": mlflow}})
    recorder = Recorder(config, {}, {}, metrics_bytes=0, mlflow_run="0123abcd")
    with recorder.ended({}, tmp_path):
        pass
    assert recorder.mlflow_run == "0123abcd"
    assert json.loads((tmp_path / "run.json").read_text())["mlflow_run"] == "0123abcd"

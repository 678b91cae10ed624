"""What a rank prints as it ends: each message once, and by a rank that is there to print it."""

import os
from pathlib import Path

import pytest

from gigamil.errors import ConfigError, GigamilError, Interrupted, TrainingError
from gigamil.train import launch, worker
from gigamil.train.agree import FirstRankLost


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
@pytest.mark.parametrize(
    ("kind", "printing"),
    [(TrainingError, "0"), (Interrupted, "0"), (ConfigError, "01"), (FirstRankLost, "01")],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_is_printed_by_a_rank_that_is_left(
    kind: type[GigamilError],
    printing: str,
    rank: str,
    launcher: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise kind("what happened")

    for name in ("RANK", "SLURM_PROCID", launch._OUTCOME_FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launcher[0], rank)
    monkeypatch.setenv(launcher[1], "2")
    monkeypatch.setattr(worker, "run_rank", fail)
    monkeypatch.setattr(worker, "_TERMINAL", os.dup(2))  # of this test
    path = tmp_path / "run.yaml"
    path.write_text("{}")
    assert worker.main([str(path)]) == kind.exit_code
    os.close(worker._TERMINAL)
    assert ("what happened" in capfd.readouterr().err) == (rank in printing)

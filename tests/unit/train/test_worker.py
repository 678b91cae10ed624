"""What a rank prints as it ends: each message once, and by a rank that is there to print it."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gigamil.errors import ConfigError, GigamilError, Interrupted, TrainingError
from gigamil.parallel.topology import Topology
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


class Ended(Exception):
    """In place of the end of the process."""


@pytest.mark.parametrize("holds", [True, False])
def test_a_rank_that_loses_another_writes_into_its_own_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *, holds: bool
) -> None:
    class Watched:
        """A meeting of which nothing is needed but the call that comes when a rank is lost."""

        def watch(self, on_lost: Callable[[str, bool], None]) -> None:
            self.on_lost = on_lost

        def leave(self, reason: str | None = None) -> None:
            """Nobody is there."""

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.delenv(launch._OUTCOME_FOLDER, raising=False)
    monkeypatch.setattr(worker.os, "_exit", end)
    before = {"status": "running", "error": None}  # of a run that waits for nobody, if the folder is not ours yet
    (tmp_path / "run.json").write_text(json.dumps(before))
    holds_folder, watched = threading.Event(), Watched()
    if holds:
        holds_folder.set()
    topology = Topology(2, 0, 0, 2, 2)
    with (
        worker._watched(watched, topology, tmp_path, holds_folder),  # type: ignore[arg-type]
        pytest.raises(Ended, match="6"),
    ):
        watched.on_lost("rank 1 on host 'node1' is gone", False)
    found = json.loads((tmp_path / "run.json").read_text())
    if holds:
        assert found["status"] == "failed"
        assert found["error"].startswith("rank 1 on host 'node1' is gone. All ranks end; the same command continues")
    else:
        assert found == before
    assert capfd.readouterr().out == ""

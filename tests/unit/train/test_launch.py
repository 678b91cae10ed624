"""What the command that started the ranks says when they fail; tests/cli and tests/engine start them."""

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from gigamil.errors import TrainingError
from gigamil.train import launch
from gigamil.train.launch import Outcome, RanksFailed, _raise_first_error


@pytest.mark.parametrize(
    ("logs", "where"), [(Path("run/logs"), r"traceback in 'run/logs/rank1\.log'"), (None, "traceback above")]
)
def test_an_error_of_a_rank_names_where_its_traceback_is(tmp_path: Path, logs: Path | None, where: str) -> None:
    for rank, outcome in enumerate((Outcome(0, "", True, 1.0), Outcome(6, "ValueError: no", False, 2.0))):
        (tmp_path / f"{rank}.json").write_text(json.dumps(asdict(outcome)))
    with pytest.raises(RanksFailed, match=rf"^ValueError: no \(rank 1; {where}\)$"):
        _raise_first_error(tmp_path, 2, 1, False, logs, "from here")


def test_what_others_say_of_a_lost_rank_is_not_the_cause(tmp_path: Path) -> None:
    lost, own = Outcome(6, "rank 1 ended: no", True, 1.0, is_loss=True), Outcome(3, "the tar is damaged", True, 2.0)
    for rank, outcome in enumerate((lost, own)):
        (tmp_path / f"{rank}.json").write_text(json.dumps(asdict(outcome)))
    with pytest.raises(RanksFailed, match="the tar is damaged") as found:
        _raise_first_error(tmp_path, 2, 1, False, None, "from here")
    assert found.value.exit_code == 3


@pytest.mark.parametrize(("logs", "where"), [(Path("run/logs"), "See 'run/logs'"), (None, "See above")])
def test_a_rank_without_a_word_is_told_with_what_to_do(tmp_path: Path, logs: Path | None, where: str) -> None:
    with pytest.raises(
        RanksFailed, match=rf"rank 0 of 2 ended .* {where}\. The same command continues from here\.$"
    ) as f:
        _raise_first_error(tmp_path, 2, 1, False, logs, "from here")
    assert f.value.exit_code == TrainingError.exit_code


def test_a_stop_that_was_asked_for_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(RanksFailed, match=r"^interrupted; the same command continues from here$") as found:
        _raise_first_error(tmp_path, 2, 1, True, None, "from here")
    assert found.value.exit_code == 5


def test_a_launcher_that_stays_after_its_ranks_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_LAST_PATIENCE_S", 0.2)
    launcher = subprocess.Popen(["sleep", "60"], start_new_session=True)
    for rank in range(2):
        (tmp_path / f"{rank}.json").write_text(json.dumps(asdict(Outcome(0, "", True, 1.0))))
    start = time.monotonic()
    assert launch._await(launcher, tmp_path, 2) == -9
    assert time.monotonic() - start < 20
    quick = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True)
    assert launch._await(quick, tmp_path, 5) == 3

"""What a run writes about itself survives an end at any moment and is cut back to the checkpoint it goes on from."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from gigamil.train.records import MetricsLog, RunRecord, git_commit, versions


def lines(path: Path) -> list[dict]:
    """Lines without their time."""
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()]


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    before = time.time()
    log.write("step", step=1, loss=0.5, grad_norm=float("inf"))
    text = path.read_text()
    log.close()
    assert text.endswith("\n")
    assert lines(path) == [{"kind": "step", "step": 1, "loss": 0.5, "grad_norm": None}]
    assert before - 0.001 <= json.loads(text)["time"] / 1000 <= time.time()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", step=1)
    size = log.sync()
    assert size == path.stat().st_size
    log.write("step", step=2)
    log.close()
    with path.open("a") as stream:
        stream.write('{"kind": "st')  # a line that a killed process did not finish
    log = MetricsLog(path, size)
    log.write("step", step=2, again=True)
    log.close()
    assert lines(path) == [{"kind": "step", "step": 1}, {"kind": "step", "step": 2, "again": True}]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step"}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_a_log_that_is_gone_is_not_filled_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, cut_to=1000)
    log.write("step", step=9)
    log.close()
    assert lines(path) == [{"kind": "step", "step": 9}]


def test_run_record_keeps_facts_of_earlier_sessions(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    RunRecord(path).update(status="running", ranks=2)
    record = RunRecord(path)
    record.update(status="finished", best=0.9)
    found = json.loads(path.read_text())
    assert {**found, "updated": None} == {"status": "finished", "ranks": 2, "best": 0.9, "updated": None}
    assert record.facts == found
    assert list(tmp_path.iterdir()) == [path]


def test_versions_name_what_results_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = versions()
    assert {"python", "gigamil", "torch", "deepspeed", "numpy"} <= found.keys()
    monkeypatch.setattr("gigamil.train.records._PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_git_commit_tells_a_changed_tree(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    assert git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert git_commit(tmp_path) == commit + "+"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(tmp_path) is None

"""A run that is stopped, killed and continued ends with the same bits as one that is left alone."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.testing.runs import tiny_run
from gigamil.train.checkpoint import CheckpointStore

ALWAYS_SAVE = 1e-6  # minutes between checkpoints: one after each step


def _configured(folder: Path, name: str) -> tuple[RunConfig, Path]:
    book = {"out": folder / name, "checkpoint_minutes": ALWAYS_SAVE}
    # Three epochs of four steps; on two ranks, so that a stop has to be agreed on.
    config = tiny_run(folder, execution={"ranks": 2}, science={"epochs": 3}, bookkeeping=book)
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(config))
    return config, path


def _num_steps(config: RunConfig) -> int:
    path = config.bookkeeping.out / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.is_file() else 0


def _losses(config: RunConfig) -> list[tuple[object, ...]]:
    lines = map(json.loads, (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line.get("step"), line.get("loss"), line.get("val_loss")) for line in lines]


@pytest.mark.timeout(900)  # five launches of two ranks
def test_stopped_killed_and_continued_equals_undisturbed(tmp_path: Path, gigamil: Callable[..., object]) -> None:
    calm, calm_yaml = _configured(tmp_path, "calm")
    run = gigamil("train", calm_yaml)
    assert run.wait() == 0, run.output()

    config, yaml = _configured(tmp_path, "disturbed")
    status = config.bookkeeping.out / "run.json"

    stopped = gigamil("train", yaml)
    stopped.wait_for(lambda: _num_steps(config) >= 2, "two steps")
    stopped.process.send_signal(signal.SIGTERM)
    assert stopped.wait() == 5, stopped.output()
    assert json.loads(status.read_text())["status"] == "interrupted"
    done = _num_steps(config)
    assert 2 <= done < 12

    killed = gigamil("train", yaml)
    killed.wait_for(lambda: _num_steps(config) >= done + 3, "three more steps")
    ranks = killed.ranks()
    killed.process.kill()  # only the command: its ranks must notice
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert len(ranks) == 2
    assert not alive

    last = gigamil("train", yaml)
    assert last.wait() == 0, last.output()

    assert _losses(config) == _losses(calm)
    for pointer in ("latest", "best"):
        left, right = (CheckpointStore(c.bookkeeping.out / "checkpoints").load(pointer)[0] for c in (config, calm))
        assert left.optimizer_steps == right.optimizer_steps
        for name, values in (left.parameters | left.moments).items():
            assert torch.equal(values, (right.parameters | right.moments)[name]), name

    again = gigamil("train", yaml, "--science.epochs", "4")
    assert again.wait() == 2
    assert "science.epochs" in again.output()

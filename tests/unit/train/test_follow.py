"""Files that grow are read from where MLflow has them, in parts that it takes, with nothing left out and nothing twice."""

import json
import logging
from pathlib import Path

import pytest

from gigamil.train.follow import (
    MAX_METRICS,
    METRICS,
    Metric,
    Sent,
    cut_sent,
    followed_files,
    metrics_of,
    read_batches,
    read_sent,
    write_sent,
)


def write(path: Path, *lines: dict[str, object]) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)


def step(number: int, **values: object) -> dict[str, object]:
    return {"kind": "step", "time": 1000 + number, "step": number, "epoch": 1, "loss": 0.5, **values}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"kind": "step", "time": 7, "step": 3, "epoch": 1, "loss": 0.5, "grad_norm": None, "tiles_per_s": 9},
            [Metric("train/loss", 0.5, 3, 7), Metric("perf/tiles_per_s", 9.0, 3, 7)],
        ),
        (
            {"kind": "epoch", "time": 7, "epoch": 2, "step": 8, "better": True, "val_auc": 1, "val_loss": None},
            [Metric("val/auc", 1.0, 8, 7)],
        ),
        (
            {"kind": "ranks", "time": 7, "step": 20, "steps": 20, "imbalance": 1.5, "hosts": ["a"], "own_s": [0.1]},
            [Metric("perf/imbalance", 1.5, 20, 7)],
        ),
        (
            {"kind": "system", "time": 7, "host": "node2", "step": 1, "cpu_percent": 12.5},
            [Metric("system/node2/cpu_percent", 12.5, 1, 7)],
        ),
        ({"kind": "metrics", "time": 7, "step": 4, "test/auc": 0.9}, [Metric("test/auc", 0.9, 4, 7)]),
        ({"kind": "skipped", "time": 7, "step": 4, "slides": ["a"]}, []),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_numbers_of_a_line(line: dict[str, object], expected: list[Metric]) -> None:
    assert metrics_of(line) == expected


class TestReadBatches:
    def test_what_follows_a_position_and_no_line_that_is_still_written(self, tmp_path: Path) -> None:
        path = tmp_path / METRICS
        assert list(read_batches(path, 0)) == []
        write(path, step(1), step(2))
        size = path.stat().st_size
        with path.open("a") as stream:
            stream.write('{"kind": "step", "st')
        [(metrics, position)] = read_batches(path, 0)
        assert [metric.step for metric in metrics] == [1, 2]
        assert position == size
        assert list(read_batches(path, position)) == []
        with path.open("a") as stream:
            stream.write('ep": 3, "time": 5, "loss": 0.25}\n')
        assert list(read_batches(path, position)) == [([Metric("train/loss", 0.25, 3, 5)], path.stat().st_size)]

    def test_parts_are_of_a_size_that_mlflow_takes_and_together_they_are_all(self, tmp_path: Path) -> None:
        path = tmp_path / METRICS
        lines = [step(n, lr_head=0.1, grad_norm=1.0) for n in range(1, 800)]
        write(path, *lines)
        batches = list(read_batches(path, 0))
        assert max(len(metrics) for metrics, _ in batches) <= MAX_METRICS
        assert [m.step for metrics, _ in batches for m in metrics if m.name == "train/loss"] == list(range(1, 800))
        # From the position of any part the rest follows: a crash after it sends no number twice and leaves none out.
        for number, (_, position) in enumerate(batches):
            rest = [metric for metrics, _ in batches[number + 1 :] for metric in metrics]
            assert [metric for metrics, _ in read_batches(path, position) for metric in metrics] == rest

    def test_a_line_of_more_numbers_than_a_call_takes_is_confirmed_as_a_whole(self, tmp_path: Path) -> None:
        path = tmp_path / METRICS
        write(path, step(1), {"kind": "metrics", "time": 1, "step": 2, **{f"n{i}": i for i in range(2500)}}, step(3))
        after_first = len(path.read_bytes().partition(b"\n")[0]) + 1
        batches = list(read_batches(path, 0))
        assert sum(len(metrics) for metrics, _ in batches) == 2502
        assert [position for _, position in batches] == [after_first] * 3 + [path.stat().st_size]

    def test_lines_without_numbers_are_confirmed_too(self, tmp_path: Path) -> None:
        path = tmp_path / METRICS
        write(path, {"kind": "skipped", "time": 1, "step": 2, "slides": []})
        assert list(read_batches(path, 0)) == [([], path.stat().st_size)]

    def test_a_line_that_cannot_be_read_is_named_and_holds_nothing_up(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / METRICS
        write(path, step(1))
        with path.open("a") as stream:
            stream.write('{"kind": "st{}\n[1]\n')
        write(path, step(2))
        with caplog.at_level(logging.WARNING):
            [(metrics, _)] = read_batches(path, 0)
        assert [metric.step for metric in metrics] == [1, 2]
        assert len(caplog.records) == 2
        assert f"'{path}': the line at byte {len(json.dumps(step(1))) + 1} is not sent" in caplog.text

    def test_a_file_that_is_shorter_than_what_was_sent_is_read_from_its_start(self, tmp_path: Path) -> None:
        path = tmp_path / METRICS
        write(path, step(1))
        [(metrics, _)] = read_batches(path, 10_000)
        assert [metric.step for metric in metrics] == [1]


def test_the_files_of_all_machines_are_followed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("system_b.jsonl", "system_a.jsonl", "rank0.log"):
        (tmp_path / "logs" / name).touch()
    names = [path.relative_to(tmp_path).as_posix() for path in followed_files(tmp_path)]
    assert names == ["metrics.jsonl", "logs/system_a.jsonl", "logs/system_b.jsonl"]


class TestSent:
    def test_is_written_and_read(self, tmp_path: Path) -> None:
        assert read_sent(tmp_path) == {}
        sent = {"mlflow.db": Sent("id", "token", {METRICS: 12}, {"report.html": "ab"}, "FINISHED"), "http://h": Sent()}
        write_sent(tmp_path, sent)
        assert read_sent(tmp_path) == sent

    @pytest.mark.parametrize("text", ["", "[]", '{"http://h": {"run": 1}}', "{"])
    def test_that_cannot_be_read_is_none(self, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "mlflow.json").write_text(text)
        assert read_sent(tmp_path) == {}
        assert "everything is sent to MLflow again" in caplog.text

    def test_is_cut_back_with_the_file_for_every_store(self, tmp_path: Path) -> None:
        write_sent(tmp_path, {"a": Sent(confirmed={METRICS: 500, "logs/system_h.jsonl": 70}), "b": Sent()})
        cut_sent(tmp_path, 100)
        assert {store: sent.confirmed for store, sent in read_sent(tmp_path).items()} == {
            "a": {METRICS: 100, "logs/system_h.jsonl": 70},
            "b": {METRICS: 0},
        }

    def test_nothing_was_sent_of_a_new_folder(self, tmp_path: Path) -> None:
        cut_sent(tmp_path, 100)
        assert list(tmp_path.iterdir()) == []

"""The comparison of predictions with trainings: its arithmetic, and the whole of it tiny."""

import json
from pathlib import Path

import pytest

from benchmarks import simulator
from benchmarks.simulator import FIT, QUICK, SLOW, WHOLE, Outcome, Point, differences, mean, read_seconds, summary
from gigamil.scaling.machine import load_machine
from gigamil.testing.runs import tiny_run


def test_only_predicted_points_count() -> None:
    outcomes = [
        Outcome(Point("fit", 1, is_fit=True), 2.0, 1.0, ()),
        Outcome(Point("a", 4), 1.1, 1.0, ()),
        Outcome(Point("b", 8), 0.8, 1.0, ()),
        Outcome(Point("c", 8), 1.0, 1.0, ("all_reduce sum 8: 1 predicted, 2 counted",)),
    ]
    assert summary(outcomes) == {
        "median_error": 0.1,
        "worst_error": 0.2,
        "points": 3,
        "collectives_exact": False,
    }
    assert summary(outcomes[:3])["collectives_exact"]
    assert "1 kinds differ" in outcomes[3].line()
    assert "-20.0 %" in outcomes[2].line()


def test_collectives_that_differ_are_named() -> None:
    two = Point("two", 2)
    assert not differences(two, {"a": 2}, {"a": 2})
    assert not differences(Point("one", 1), {"a": 2}, {})
    assert differences(two, {"a": 2, "b": 1}, {"a": 1, "c": 3}) == (
        "a: 2 predicted, 1 counted",
        "b: 1 predicted, 0 counted",
        "c: 0 predicted, 3 counted",
    )


def test_the_first_step_is_left_out() -> None:
    assert mean([100.0, 1.0, 2.0, 3.0]) == 2.0


def test_the_points_are_what_was_asked_for() -> None:
    predicted = [point for point in WHOLE.points if not point.is_fit]
    assert {point.ranks for point in FIT} == {1, 2}
    assert {point.ranks for point in predicted} >= {4, 8}
    assert {point.tiles for point in predicted} == {0.5, 1.0, 2.0}
    assert len({point.execution.get("chunk", 16) for point in predicted}) == 3
    assert {point.execution.get("zero_stage", 1) for point in predicted} == {0, 1, 3}
    assert len({point.bits_s for point in predicted if point.nodes > 1}) == 3
    assert any(point.slow == SLOW for point in predicted)
    assert {point.name for point in QUICK.points} < {point.name for point in WHOLE.points}


def test_seconds_come_from_the_rates_that_training_noted(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, science={"slides_per_step": 3})
    config.bookkeeping.out.mkdir(exist_ok=True)
    lines = [{"kind": "step", "slides_per_s": rate} for rate in (3.0, 6.0, 1.0)] + [{"kind": "epoch"}]
    (config.bookkeeping.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_seconds(config) == [1.0, 0.5, 2.0]  # eight slides: the last step has two


@pytest.mark.slow
def test_the_whole_of_it_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulator.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["points"] == 1
    assert result["collectives_exact"]
    assert result["median_error"] == result["worst_error"] >= 0
    raw = json.loads((tmp_path / "out.json").read_text())
    assert [point["point"]["name"] for point in raw["points"]] == ["1 rank", "2 ranks"]
    (tmp_path / "machine.yaml").write_text(json.dumps(raw["machine_file"]))
    assert load_machine(tmp_path / "machine.yaml").measured

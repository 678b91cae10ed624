"""The comparison of step costs runs, checks each arm's gradient, and refuses one that is wrong."""

import json
from pathlib import Path

import pytest
from gradients import BOUND

from benchmarks import step_cost
from benchmarks.step_cost import TINY, Problem, checked, gigamil, idle_share, naive


def test_all_arms_and_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step_cost.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    goals = (
        "replay_over_naive",
        "keep_over_naive",
        "half_over_replay",
        "accumulation_over_gigamil",
        "gather_over_gigamil",
    )
    assert all(result[name] > 0 for name in goals)
    shares = result["breakdown"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert {"forward without graph", "forward with graph", "encoder backward", "head backward", "rest"} <= shares.keys()

    raw = json.loads((tmp_path / "out.json").read_text())
    assert [row["arm"] for row in raw["arms"]] == list(step_cost.arms(8, 4, 2))
    assert all(row["error"] <= BOUND and len(row["cpu_s"]) == TINY.rounds for row in raw["arms"])
    assert {"command", "commit"} <= raw.keys()
    assert {"cpu", "cores", "load", "torch", "python", "date"} <= raw["machine"].keys()
    assert set(raw["ranks"]) == {"EAGLE", "gigamil keep", "gigamil replay"}


def test_a_wrong_gradient_is_refused() -> None:
    problem = Problem(6, TINY)
    with problem.recorded():
        naive(problem, 2)
    truth = problem.gradients
    with problem.recorded():
        gigamil(problem, 4, kept=0.5)
    assert checked("gigamil", problem.gradients, truth) < BOUND
    name = next(iter(truth))
    with pytest.raises(SystemExit, match=r"halved: its gradient is .* off"):
        checked("halved", problem.gradients | {name: truth[name] / 2}, truth)
    with pytest.raises(SystemExit, match=r"no step: its gradient is nan off"):
        checked("no step", {}, truth)


def test_one_idle_rank_of_four_is_a_quarter() -> None:
    assert idle_share(1200, num_ranks=4, encoding=3) == 0.25
    assert idle_share(1200, num_ranks=4, encoding=4) == 0

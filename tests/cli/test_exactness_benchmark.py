"""The benchmark that proves exactness runs, and fails when something is not exact."""

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from gigamil.testing.exactness import SHAPES, Errors, built_in_aggregators

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "exactness.py"


@pytest.fixture
def exactness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exactness", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exactness"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_one_rank_and_one_stage(exactness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exactness.main(["--ranks", "1", "--zero", "1"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["aggregators"], summary["cases"], summary["failed"]) == (1, 36, 0)
    assert 0 < summary["worst_fp64"] <= 1e-12 < summary["worst_deepspeed"] <= 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_aggregator_on_one_rank(exactness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exactness.main(["--all", "--ranks", "1", "--zero", "2"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary) == [
        "aggregators", "cases", "worst_fp64", "worst_fp64_pinv", "worst_deepspeed", "worst_deepspeed_pinv",
        "worst_bf16", "failed",
    ]  # fmt: skip
    assert (summary["aggregators"], summary["failed"]) == (len(built_in_aggregators()), 0)
    assert summary["worst_fp64"] <= 1e-12 < summary["worst_deepspeed"] < summary["worst_bf16"] <= 2**-8
    assert summary["worst_deepspeed_pinv"] > 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_engine_sees_every_aggregator_shape_and_setting(exactness: ModuleType, ranks: int) -> None:
    for zero in range(4):
        found = exactness.wanted_cases(ranks, zero, True)
        assert {case.aggregator for case in found} == set(built_in_aggregators())
        assert {case.keep for case in found} == {"all", "half", "none"}
        assert {case.group_size for case in found} == {size for size in (1, 2, 4) if size <= ranks}
        assert {(case.bfloat16, case.offload) for case in found} >= {(False, False), (True, False)}
        assert any(case.offload for case in found) == (zero in (1, 2))
        assert {len(case.sizes) for case in found} == {len(sizes) for sizes in SHAPES}


def test_cases_over_their_bound_are_counted_and_the_exit_code_says_so(
    exactness: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(ranks: int, zero: int | None, everything: bool) -> object:
        wanted = exactness.wanted_cases(ranks, zero, everything)[:6]
        errors = [Errors(0.0, 2e-15, 1e-15)] * 6
        if zero is not None:
            errors[1], errors[4] = Errors(0.0, 1e-7, 3e-4), Errors(2e-4, 1e-7, 0.0)
        return exactness.summarised(ranks, zero, wanted, [[Errors(0.0, 0.0, 0.0)] * 6, errors], 1.0)

    monkeypatch.setattr(exactness, "_compare", measured)
    assert exactness.main(["--ranks", "2", "--zero", "1"]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {
        "aggregators": 1,
        "cases": 12,
        "worst_fp64": 2e-15,
        "worst_fp64_pinv": None,
        "worst_deepspeed": 3e-4,
        "worst_deepspeed_pinv": None,
        "worst_bf16": None,
        "failed": 2,
    }


def test_errors_of_transmil_through_the_engine_are_reported_apart(
    exactness: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(ranks: int, zero: int | None, everything: bool) -> object:
        if zero is None:
            return []
        wanted = [case for case in exactness.wanted_cases(ranks, zero, everything) if not case.bfloat16]
        errors = [Errors(0.0, 9e-6 if case.aggregator == "transmil" else 2e-6, 0.0) for case in wanted]
        return exactness.summarised(ranks, zero, wanted, [errors], 1.0)

    monkeypatch.setattr(exactness, "_compare", measured)
    assert exactness.main(["--all", "--ranks", "1", "--zero", "0"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["worst_deepspeed"], summary["worst_deepspeed_pinv"]) == (2e-6, 9e-6)


RANK = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1], sys.argv[2]]))"


def test_ranks_that_hang_are_ended_with_their_launcher(
    exactness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    assert exactness.launched([sys.executable, "-c", LAUNCHER, RANK, str(pid)], os.environ, 3.0) is None
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)  # a killed orphan is there until init has taken note of it
    assert not psutil.pid_exists(int(pid.read_text()))

    monkeypatch.setattr(exactness, "launched", lambda *words: None)
    with pytest.raises(SystemExit, match=r"2 ranks, ZeRO None: not done after 1200 s, 0 answered; they were ended"):
        exactness.main(["--ranks", "2", "--zero", "1"])


def test_a_launcher_that_fails_says_so(exactness: ModuleType) -> None:
    assert exactness.launched([sys.executable, "-c", "raise SystemExit(3)"], os.environ, 60.0) == 3


@pytest.mark.parametrize("place", range(3))
def test_what_is_not_a_number_fails(exactness: ModuleType, place: int) -> None:
    wanted = exactness.wanted_cases(1, None, False)[:2]
    bad = Errors(*(math.nan if number == place else 0.0 for number in range(3)))
    (row,) = exactness.summarised(1, None, wanted, [[Errors(0.0, 0.0, 0.0), bad]], 1.0)
    assert row.failed == 1
    assert math.isnan(row.loss if place == 0 else row.gradient)

"""The benchmark that proves exactness runs, and fails when something is not exact."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
    assert summary["cases"] == 18
    assert summary["failed"] == 0
    assert 0 < summary["worst_fp64"] <= 1e-12 < summary["worst_deepspeed"] <= 1e-5


def test_cases_over_their_bound_are_counted_and_the_exit_code_says_so(
    exactness: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {None: (0.0, 2e-15, 0), 1: (1e-7, 3e-5, 2)}

    def measured(ranks: int, zero: int | None) -> object:
        loss, gradient, failed = rows[zero]
        return exactness.Row(ranks, zero, 6, loss, gradient, failed, 1.0)

    monkeypatch.setattr(exactness, "_compare", measured)
    assert exactness.main(["--ranks", "1", "--zero", "1"]) == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary == {"worst_fp64": 2e-15, "worst_deepspeed": 3e-5, "cases": 12, "failed": 2}

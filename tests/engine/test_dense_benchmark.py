"""`benchmarks/exactness.py --streaming` fails where something is not exact."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gigamil.testing import dense

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


@pytest.mark.parametrize(
    ("feature", "gradient", "failed"),
    [(1e-15, 1e-13, 0), (2e-12, 1e-13, 1), (1e-15, 2e-10, 1), (float("nan"), 0.0, 1), (0.0, float("nan"), 1)],
)
def test_one_rank_beyond_a_bound_is_a_failure(
    exactness: ModuleType, feature: float, gradient: float, failed: int
) -> None:
    row = exactness.streaming_row(2, "net", [[(0.0, 0.0), (0.0, 0.0)], [(0.0, 0.0), (feature, gradient)]])
    assert (row.cases, row.failed) == (2, failed)
    assert [str(worst) for worst in (row.feature, row.gradient)] == [str(feature), str(gradient)]


def test_errors_of_a_case_count_whatever_is_wrong() -> None:
    assert dense.DenseErrors(1e-15, 1.0, 2e-3, 3e-3).worst == (1e-15, 1.0)
    assert str(dense.DenseErrors(0.0, 0.0, float("nan"), 0.0).worst[1]) == "nan"


def test_the_last_line_sums_up(
    exactness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = {"dilated, max": dense.NETS["dilated, max"]}
    monkeypatch.setattr(dense, "NETS", nets)
    monkeypatch.setattr(
        exactness, "_stream_in_turn", lambda names: [r for name in names for r in exactness._stream_alone(name)]
    )
    assert exactness.main(["--streaming", "--ranks", "1"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["nets"], last["cases"], last["failed"]) == (1, 16, 0)
    assert 0 < last["worst_feature"] <= 1e-12
    assert 0 < last["worst_gradient"] <= 1e-10

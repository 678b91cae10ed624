"""`gigamil simulate` and `gigamil bench calibrate` as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gigamil import cli
from gigamil.config.load import to_yaml
from gigamil.scaling.machine import load_machine
from gigamil.testing.runs import tiny_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """A cohort of known sizes, and an encoder that no machine file knows."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_run(tmp_path, science={"precision": "bfloat16"})))
    return path


def test_table_plot_and_figure(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", str(run_yaml), "--nodes", "1,8,1024", "--plot", str(tmp_path / "plot.png")]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "machine: 8 x H200, 400 Gb/s per GPU, not measured" in out
    assert "cohort: 8 training slides, from the shards; 4 steps an epoch" in out
    rows = [line.split() for line in out.splitlines() if line.endswith("predicted, not validated")]
    assert [row[:2] for row in rows] == [["1", "8"], ["8", "64"], ["1024", "8192"]]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_figures_for_programs(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", str(run_yaml), "--nodes", "1,2", "--slides", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 50
    assert [point["nodes"] for point in found["points"]] == [1, 2]
    assert all(point["is_predicted"] for point in found["points"])
    assert sum(found["points"][0]["shares"].values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "8,1"], "numbers of nodes that ascend"),
        (["--machine", "none.yaml"], "no machine file 'none.yaml'"),
        (["--execution.group_size", "3"], "execution.group_size=3 does not divide world size 8"),
        (["--machine", str(ROOT / "configs" / "machines" / "laptop-2core.yaml")], "has no speed for encoder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_message_and_code_2(
    words: list[str], message: str, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", str(run_yaml), *words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert not out


def test_the_measured_machine_knows_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    laptop = ROOT / "configs" / "machines" / "laptop-2core.yaml"
    assert cli.main(["simulate", str(ROOT / "configs" / "demo.yaml"), "--nodes", "1", "--machine", str(laptop)]) == 0
    assert "measured here by gigamil bench calibrate" in capsys.readouterr().out


@pytest.mark.slow
def test_calibrate_then_simulate(run_yaml: Path, gigamil: Callable[..., Any], tmp_path: Path) -> None:
    command = gigamil("bench", "calibrate", run_yaml, "--quick", "--out", tmp_path / "here.yaml")
    assert command.wait() == 0, command.output()
    machine = load_machine(tmp_path / "here.yaml")
    assert machine.measured
    assert machine.ranks_per_node == 2
    assert machine.encoders[0].encoder["options"] == {"width": 4, "dropout": 0.1}
    assert cli.main(["simulate", str(run_yaml), "--nodes", "1", "--machine", str(tmp_path / "here.yaml")]) == 0

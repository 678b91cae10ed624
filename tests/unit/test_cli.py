"""The command line at work: what it makes of its words, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from gigamil import demo
from gigamil.cli import main


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 slides of 40 patients; two columns could be the label, two the site, and two the patient."""
    monkeypatch.chdir(tmp_path)
    rows = [f"s{n},p{n},{'xy'[n % 2]},{'vw'[n // 2 % 2]},{n % 4},h{n // 2 % 10}" for n in range(40)]
    Path("labels.csv").write_text("\n".join(["slide,patient,subtype,finding,site,hospital_code", *rows]) + "\n")
    return Path("labels.csv")


def split(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `gigamil split labels.csv` prints."""
    code = main(["split", "labels.csv", *words])
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


@pytest.mark.usefixtures("labels")
class TestColumnsOfALabelTable:
    def test_those_of_the_configuration_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--by-site", "--cohort.columns.site", "hospital_code", "--cohort.columns.label", "finding"]
        split(capsys, *words, "--out", "folds")
        header, row, *_ = Path("folds/folds.csv").read_text().splitlines()
        assert header.startswith("slide_id,case_id,label,site,")
        assert row.split(",")[:4] == ["s0", "p0", "v", "h0"]

    def test_options_win_over_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = split(capsys, "--cohort.columns.label", "finding", "--label-column", "subtype")
        assert {"x", "y"} <= set(text.splitlines()[0].split())

    def test_one_that_is_not_there_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "has no column 'nosuch'" in split(capsys, "--cohort.columns.label", "nosuch")


def test_output_that_nobody_reads_is_a_broken_pipe(labels: Path) -> None:
    words = [sys.executable, "-m", "gigamil", "split", str(labels)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141  # what a shell says of SIGPIPE


class TestGuideOfTheDemo:
    def test_it_names_the_store_of_the_run(self, tmp_path: Path) -> None:
        assert f"ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in demo._guide(tmp_path)

    def test_it_names_the_server_that_was_asked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:secret@host.example:5000")
        guide = demo._guide(tmp_path)
        assert "experiment gigamil-demo at https://host.example" in guide
        assert "mlflow.db" not in guide
        assert "secret" not in guide


def test_a_table_is_inspected_whatever_it_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a #2.csv", "[a].csv", "a: b.csv"):
        (tmp_path / name).write_text("slide_id,path\nslide-of-it,gone.svs\n")
        main(["inspect", str(tmp_path / name)])
        assert "slide-of-it" in capsys.readouterr().out

"""`gigamil split` as a user types it: on a bare label table, and on the slides of a run."""

from pathlib import Path

import pytest

from gigamil.cli import main
from gigamil.config.load import load_config
from gigamil.data.cohort import load_cohort
from gigamil.data.folds import Folds
from gigamil.data.split import load_splits
from gigamil.testing.shards import make_shards, noise_jpegs

NUM = 40


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 slides of 40 patients from 10 sites, half of each class."""
    monkeypatch.chdir(tmp_path)
    rows = [f"p{n},{'xy'[n % 2]},site{n // 2 % 10},s{n}.svs" for n in range(NUM)]
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(["patient,subtype,site,slide", *rows]) + "\n")
    return path


@pytest.fixture
def config(labels: Path) -> Path:
    """A run on the same slides, tiled, but for s3."""
    rows = [line.split(",") for line in labels.read_text().splitlines()[1:]]
    table = labels.with_name("slides.csv")
    lines = [f"{slide[:-4]},{slide},{patient},{label},{site}" for patient, label, site, slide in rows]
    table.write_text("\n".join(["slide_id,path,patient_id,label,site", *lines]) + "\n")
    for n in range(NUM):
        if n != 3:
            make_shards(labels.parent / "shards", f"s{n}", noise_jpegs(1, 16), tile_px=16)
    path = labels.with_name("my.yaml")
    path.write_text(
        "cohort: {table: slides.csv, split_method: kfold, folds: 4, fold: 1, preserve_sites: true}\n"
        "slides: {tile_px: 16}\nbookkeeping: {out: run, shards: shards}\n"
    )
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["split", *words]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.real_data
def test_folds_of_tcga_by_patient_and_site(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = real_data / "labels" / "tcga_lung_labels.csv"
    text = printed(capsys, str(table), "--folds", "5", "--by-site", "--out", str(tmp_path / "folds"))
    rows = [line.split() for line in text.splitlines()[1:16]]
    assert [row[:2] for row in rows] == [[str(n), side] for n in range(5) for side in ("train", "val", "test")]
    assert sum(int(row[2]) for row in rows if row[1] == "test") == 941
    assert sum(int(row[4]) for row in rows[:3]) == 39  # every site is on one side of the first fold
    assert all(80 <= int(number) <= 110 for row in rows if row[1] == "test" for number in row[5:])
    assert "no site on two sides" in text
    assert len(Folds.from_json((tmp_path / "folds" / "folds.json").read_text()).folds) == 5


class TestLabelTable:
    def test_without_a_folder_nothing_is_written(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = printed(capsys, "labels.csv")
        assert "holdout by patient, stratified by label, seed 0, test 0.3, val 0.15" in text
        assert "nothing is written; --out DIR writes folds.json and folds.csv" in text
        assert list(labels.parent.iterdir()) == [labels]

    def test_folds_are_frozen(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["labels.csv", "--folds", "4", "--by-site", "--out", "folds"]
        printed(capsys, *words)
        before = Path("folds/folds.json").read_bytes()
        printed(capsys, *words)
        assert "holds other folds" in printed(capsys, *words, "--cohort.split_seed", "1", code=2)
        assert Path("folds/folds.json").read_bytes() == before
        printed(capsys, *words, "--cohort.split_seed", "1", "--again")
        assert Path("folds/folds.json").read_bytes() != before

    def test_columns_are_named_or_asked_for(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        labels.write_text(labels.read_text().replace("patient,subtype", "donor,finding"))
        assert "known to be the patient_id" in printed(capsys, "labels.csv", code=2)
        text = printed(capsys, "labels.csv", "--patient-column", "donor", "--label-column", "finding")
        assert "y" in text.splitlines()[0].split()
        printed(capsys, "labels.csv", "--patient-is-slide", "--label-column", "finding")

    def test_options_of_a_run_are_refused(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--limit: not for a file such as 'labels.csv'" in printed(capsys, "labels.csv", "--limit", "2", code=2)

    def test_a_split_to_take_over_needs_a_run(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "cohort.splits: folds are made of 'labels.csv'" in printed(
            capsys, "labels.csv", "--cohort.splits", "theirs.tsv", "--out", "folds", code=2
        )
        assert not labels.with_name("folds").exists()

    def test_too_many_folds(self, labels: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = printed(capsys, "labels.csv", "--folds", "11", "--by-site", code=2)
        assert "class 'x' is absent from test; the table has 20 patient(s) with it of 10 site(s)" in text


class TestRun:
    def test_one_fold_is_frozen_and_all_are_recorded(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = printed(capsys, str(config))
        assert "fold 1 of 4 folds by patient, stratified by label, seed 0, val 0.15, no site on two sides" in text
        assert "1 slides have no tiles and are in no split: s3" in text
        cfg = load_config(config)
        table = load_cohort(cfg.cohort, need_files=False)
        splits = load_splits(Path("run/splits.json"), table)
        folds = Folds.from_json(Path("run/folds.json").read_text())
        assert splits.split_of() == {s: side for s, side in folds.sides(1).items() if s != "s3"}
        assert splits.sources_sha256
        assert Path("run/folds.csv").read_text().startswith("slide_id,case_id,label,site,fold_0,")

    def test_the_frozen_fold_stays(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        printed(capsys, str(config))
        before = Path("run/splits.json").read_bytes()
        printed(capsys, str(config))
        assert "was split otherwise" in printed(capsys, str(config), "--cohort.fold", "2", code=2)
        assert Path("run/splits.json").read_bytes() == before
        printed(capsys, str(config), "--cohort.fold", "2", "--again")
        assert Path("run/splits.json").read_bytes() != before

    def test_folds_of_the_label_table_are_those_of_the_run(
        self, config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        printed(capsys, "labels.csv", "--folds", "4", "--by-site", "--out", "folds")
        printed(capsys, str(config))
        assert Folds.from_json(Path("run/folds.json").read_text()) == Folds.from_json(
            Path("folds/folds.json").read_text()
        )
        taken = printed(
            capsys,
            str(config),
            "--again",
            "--cohort.split_method=holdout",
            "--cohort.preserve_sites=false",
            "--cohort.splits=folds/folds.json",
        )
        assert "'folds.json', sha256" in taken

    def test_options_of_a_label_table_are_refused(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = printed(capsys, str(config), "--patient-is-slide", "--out", "x", code=2)
        assert "--out, --patient-is-slide: not for a file such as" in text

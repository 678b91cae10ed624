"""The YAML files in configs/ load, are complete, and say what they claim; docs/configuration.md says what the schema says."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gigamil.config.load import known_keys, load_config, to_commented_yaml, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.demo import demo_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGE = (ROOT / "docs" / "configuration.md").read_text()
PROMISES = {"bitwise", "rounding", "results"}


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every key of the schema in nested data."""
    keys = set(known_keys())
    for name, value in data.items():
        if prefix + name in keys:
            yield prefix + name, value
        else:
            yield from flat(value, f"{prefix}{name}.")


def documented_rows() -> Iterator[tuple[str, str, str, str]]:
    """(key, default, group, promise) of each row of the page that is about a key."""
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            key, default, meaning, group, promise = cells
            assert meaning
            yield key.strip("`"), default.strip("`"), group, promise


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestEachConfig:
    def test_loads(self, path: Path) -> None:
        config = load_config(path)
        assert len(config.cohort.classes or ()) == 2
        assert config.bookkeeping.out == Path.cwd() / "runs" / path.stem

    def test_holds_every_key(self, path: Path) -> None:
        assert [key for key, _ in flat(yaml.safe_load(path.read_text()))] == list(known_keys())

    def test_says_how_to_start_and_keeps_to_120_columns(self, path: Path) -> None:
        text = path.read_text()
        assert f"configs/{path.name}" in text.partition("\ncohort:")[0]
        assert max(map(len, text.splitlines())) <= 120


def test_there_is_one_config_for_each_kind_of_task() -> None:
    assert [path.stem for path in CONFIGS] == [
        *("camelyon16", "demo", "streaming_clam", "streaming_cnn", "tcga_subtyping", "two_stage")
    ]


def test_demo_yaml_is_what_the_demo_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = demo_config(Path("runs/demo"))
    file = ROOT / "configs" / "demo.yaml"
    assert load_config(file) == config
    # The comments too, so that they do not grow old: paths are all that differs.
    assert file.read_text().partition("\n\n")[2] == to_commented_yaml(config).replace(f"{tmp_path.resolve()}/", "")


def test_tcga_columns_are_those_of_the_table_it_describes(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "tcga_subtyping.yaml").read_text()
    header = re.search(r"^# +(patient,subtype,\S+)$", text, flags=re.MULTILINE)
    assert header is not None
    table = tmp_path / "slides.csv"
    table.write_text(
        f"{header.group(1)}\n"
        "TCGA-83-5908,adenocarcinoma,Site-28,TCGA-83-5908-01Z-00-DX1.381c8f82,luad/a.svs\n"
        "TCGA-62-A46V,squamous,Site-124,TCGA-62-A46V-01Z-00-DX1.631E54D0,lusc/b.svs\n"
    )
    config = load_config(ROOT / "configs" / "tcga_subtyping.yaml", [f"cohort.table={table}"])
    row = load_cohort(config.cohort, need_files=False).rows[0]
    assert (row.slide_id, row.patient_id) == ("TCGA-83-5908-01Z-00-DX1.381c8f82", "TCGA-83-5908")
    assert (row.label, row.site, row.path) == ("adenocarcinoma", "Site-28", tmp_path / "luad" / "a.svs")


def test_camelyon_table_is_read_as_the_file_describes(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "camelyon16.yaml").read_text()
    rows = re.findall(r"^# +(\S+,\S+,\S+,\S+)$", text, flags=re.MULTILINE)
    table = tmp_path / "slides.csv"
    table.write_text("\n".join(rows) + "\n")
    config = load_config(ROOT / "configs" / "camelyon16.yaml", [f"cohort.table={table}"])
    cohort = load_cohort(config.cohort, need_files=False)
    assert cohort.classes == ("normal", "tumour")
    assert [(row.slide_id, row.patient_id, row.split) for row in cohort.rows] == [
        ("normal_001", "normal_001", "train"),
        ("tumor_001", "tumor_001", "val"),
        ("test_001", "test_001", "test"),
    ]


def test_every_key_has_one_row_and_every_row_a_key() -> None:
    assert [key for key, *_ in documented_rows()] == list(known_keys())


@pytest.mark.parametrize("row", list(documented_rows()), ids=lambda row: row[0])
def test_a_row_states_default_group_and_promise(row: tuple[str, str, str, str]) -> None:
    key, default, group, promise = row
    defaults = dict(flat(yaml.safe_load(to_yaml(RunConfig()))))
    assert yaml.safe_load(default) == defaults[key]
    assert group == key.partition(".")[0]
    assert promise in PROMISES


def test_no_execution_key_changes_results() -> None:
    promise = {key: promise for key, _, group, promise in documented_rows() if group == "execution"}
    assert "results" not in promise.values()


def test_science_keys_change_results() -> None:
    assert {promise for _, _, group, promise in documented_rows() if group == "science"} == {"results"}

"""Machine files: what is shipped loads, what is wrong is refused, and the page has a row for each key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gigamil.config.load import known_keys
from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.scaling import machine as module
from gigamil.scaling.machine import DEFAULT_MACHINE, Machine, find_speed, load_machine, save_machine

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs" / "machines").glob("*.yaml"))
PAGE = (ROOT / "docs" / "scaling.md").read_text()


def test_there_are_two() -> None:
    assert [path.stem for path in FILES] == ["h200-8x400g", "laptop-2core"]
    assert DEFAULT_MACHINE in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files_load_and_say_where_numbers_come_from(path: Path) -> None:
    machine = load_machine(path)
    assert machine.measured is (machine.largest is not None)
    assert machine.encoders or machine.roof
    for section in (machine.decode, machine.links, machine.storage, machine.step):
        assert section.source


def test_the_default_is_not_called_measured() -> None:
    machine = load_machine(DEFAULT_MACHINE)
    assert not machine.measured
    assert machine.validation is None


def test_the_optimiser_of_the_default_is_bound_by_memory() -> None:
    memory_bytes_s, moved = (
        4.8e12,
        16 / 4,
    )  # of an H200, by its data sheet; bytes read and written per byte of parameters
    least_s = moved * 1e9 / memory_bytes_s
    assert least_s <= load_machine(DEFAULT_MACHINE).step.update_s_per_gb <= 1.5 * least_s


def test_every_key_has_one_row() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", PAGE, flags=re.MULTILINE)
    assert rows == list(known_keys(Machine, into_lists=True))


def test_a_file_that_was_written_is_the_same_machine(tmp_path: Path) -> None:
    machine = load_machine(FILES[1])
    save_machine(machine, tmp_path / "here.yaml")
    assert load_machine(tmp_path / "here.yaml") == machine


def changed(**changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(DEFAULT_MACHINE.read_text())
    return data | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank_per_node": 8}, "unknown key 'rank_per_node'; did you mean 'ranks_per_node'"),
        ({"storage": {"node_byte_s": 1e9}}, "storage.node_bytes_s is missing.*did you mean 'storage.node_bytes_s'"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"links": None}, "links"),
        ({"device_bytes": float("inf")}, "device_bytes: Input should be a finite number"),
        ({"noise": float("inf")}, "noise: Input should be a finite number"),
        (
            {"roof": {"flops_s": {}, "efficiency": {"other": 0.0}, "launch_s": 0, "source": "x"}},
            "roof.efficiency.other: Input should be greater than 0",
        ),
        ({"roof": {"flops_s": {}, "efficiency": {"resnet18": 0.3}, "launch_s": 0, "source": "x"}}, "`other`"),
    ],
    ids=["unknown", "missing", "zero", "empty", "inf", "noise", "no share", "no other"],
)
def test_a_wrong_file_is_refused_by_key(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(changed(**changes)))
    with pytest.raises(ConfigError, match=f"is no machine file: .*{words}.*docs/scaling.md"):
        load_machine(path)


def test_calls_have_to_ascend() -> None:
    call = {"tiles": 4, "forward_s": 0.1, "backward_s": 0.2}
    speed = {"encoder": {"name": "x"}, "tile_px": 32, "precision": "float32", "saved_bytes": 1, "busy_cores": 1}
    data = changed(encoders=[speed | {"calls": [call, call], "source": "x"}])
    with pytest.raises(ValueError, match=r"must ascend; they are \[4, 4\]"):
        Machine.model_validate(data)


def test_a_file_that_is_not_there_is_answered_with_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"no machine file.*gigamil bench calibrate --out"):
        load_machine(tmp_path / "none.yaml")
    monkeypatch.setattr(module, "DEFAULT_MACHINE", tmp_path / "h200-8x400g.yaml")  # as where gigamil is installed
    with pytest.raises(ConfigError, match=r"not installed from a clone, which has 'h200-8x400g.yaml'.*--machine FILE"):
        load_machine(module.DEFAULT_MACHINE)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_machine(tmp_path / "bad.yaml")


def test_an_encoder_is_known_by_what_decides_its_speed() -> None:
    call = {"tiles": 4, "forward_s": 0.1, "backward_s": 0.2}
    wanted = {"name": "small_cnn", "options": {"width": 8}}
    speed = {"encoder": wanted, "tile_px": 64, "precision": "float32", "saved_bytes": 1, "busy_cores": 1}
    machine = Machine.model_validate(changed(encoders=[speed | {"calls": [call], "source": "x"}]))

    def config(tile_px: int = 64, **encoder: Any) -> RunConfig:
        return RunConfig.model_validate({"slides": {"tile_px": tile_px}, "science": {"encoder": wanted | encoder}})

    assert find_speed(machine, config(weights="elsewhere.pt", mean=(0.1, 0.1, 0.1))) == machine.encoders[0]
    assert find_speed(machine, config(freeze_blocks=1)) is None
    assert find_speed(machine, config(options={"width": 16})) is None
    assert find_speed(machine, config(tile_px=32)) is None

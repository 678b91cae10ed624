"""One YAML and overrides become a frozen configuration; what is wrong is named together with the nearest right thing."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from gigamil.config.load import (
    absolute_paths,
    known_keys,
    load_config,
    science_digest_data,
    to_commented_yaml,
    to_yaml,
)
from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError

CHANGED = {
    "cohort": {
        "table": "/data/my slides.csv",
        "root": "/data/wsi",
        "columns": {"label": "diagnosis: final"},
        "classes": ["null", "1.0", "1e4", "tumour # 2"],
        "test_fraction": 0.25,
    },
    "slides": {"tile_px": 128, "default_mpp": 1e-05 * 25_000},
    "science": {
        "seed": 7,
        "encoder": {"name": "small_cnn", "options": {"width": 8, "eps": 1e-06, "tag": "-1E4"}, "weights": "/w.pt"},
        "class_weights": [1.0, 2.5, 3],
        "optim": {"lr_encoder": 1e-06, "clip_norm": None, "betas": [0.8, 0.99]},
        "precision": "bfloat16",
        "early_stop_epochs": 3,
        "warm_start": "/runs/before",
    },
    "execution": {"ranks": 4, "group_size": 2, "memory_budget": 2e9, "zero_stage": 3},
    "bookkeeping": {"out": "/runs/it's", "shards": "/shards", "name": "on", "limit": 2, "progress": False},
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_stand_where_nothing_is_said(tmp_path: Path) -> None:
    assert load_config(None) == absolute_paths(RunConfig())
    assert load_config(write(tmp_path, "")) == absolute_paths(RunConfig())


@pytest.mark.parametrize("words", [["--science.epochs", "3"], ["--science.epochs=3"], ["science.epochs=3"]])
def test_overrides_win_over_the_file_in_every_form(tmp_path: Path, words: list[str]) -> None:
    path = write(tmp_path, "science: {epochs: 5, seed: 9}")
    config = load_config(path, words)
    assert (config.science.epochs, config.science.seed) == (3, 9)


def test_override_values_are_yaml(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            *("--science.optim.lr_head", "1e-3"),
            *("--science.optim.clip_norm", "null"),
            *("--science.class_weights", "[1, 2]"),
            *("--science.encoder.options", "{width: 8}"),
            *("--bookkeeping.progress", "false"),
            "--bookkeeping.name=a=b",
        ],
    )
    assert config.science.optim.lr_head == 0.001
    assert config.science.optim.clip_norm is None
    assert config.science.class_weights == (1.0, 2.0)
    assert config.science.encoder.options == {"width": 8}
    assert config.bookkeeping.progress is False
    assert config.bookkeeping.name == "a=b"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e4", 1e4), ("1e-1", 0.1), ("-2E+3", -2e3), ("1.5e3", 1.5e3), (".5e1", 5.0), ("'1e4'", "1e4"), ("1e4x", "1e4x")],
)
def test_a_number_with_an_exponent_needs_no_point(tmp_path: Path, text: str, value: object) -> None:
    path = write(tmp_path, f"science: {{aggregator: {{options: {{r: {text}}}}}}}")
    for config in (load_config(path), load_config(None, [f"science.aggregator.options={{r: {text}}}"])):
        assert config.science.aggregator.options == {"r": value}


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("science: {epochs: 5}\nslides: {}\nscience: {seed: 9}", "science", (1, 3)),
        ("science:\n  epochs: 5\n  seed: 1\n  'epochs': 6", "epochs", (2, 4)),
        ("science:\n  class_weights:\n  - {a: 1,\n     a: 1}", "a", (3, 4)),
    ],
)
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, text: str, key: str, lines: tuple[int, int]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"'{path}' .*: key '{key}' in line {lines[1]} was set in line {lines[0]}"):
        load_config(path)


def test_an_override_with_a_key_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--science.encoder.options: .*key 'width' in line 1 was set in line 1"):
        load_config(None, ["science.encoder.options={width: 8, width: 16}"])


def test_merge_keys_set_what_is_not_set_beside_them(tmp_path: Path) -> None:
    text = (
        "science:\n"
        "  encoder: {options: &base {<<: {width: 4, dropout: 0.1}, width: 8}}\n"
        "  aggregator: {options: {width: 2, <<: *base}}"
    )
    science = load_config(write(tmp_path, text)).science
    assert science.encoder.options == {"width": 8, "dropout": 0.1}
    assert science.aggregator.options == {"width": 2, "dropout": 0.1}


@pytest.mark.parametrize("text", ["science:  # epochs: 5", "science: {optim: }", "science: {encoder: {options: }}"])
def test_a_section_without_keys_has_the_defaults(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert load_config(path) == load_config(None)
    words = ["science.seed=3", "science.optim.lr_head=0.1", "science.encoder.options.width=8"]
    assert load_config(path, words) == load_config(None, words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["science.epochs"], "cannot read the override 'science.epochs'"),
        (["--science.epochs"], "cannot read the override '--science.epochs'"),
        (["--science.epochs.x", "3"], "--science.epochs.x: 'epochs' is a value, not a section"),
        (["--science.seed", "[1"], r"--science.seed: '\[1' is not a YAML value"),
    ],
)
def test_a_broken_override_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, "science: {epochs: 5}"), words)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("science.epoch", "science.epochs"),
        ("science.lr_encoder", "science.optim.lr_encoder"),
        ("execution.groupsize", "execution.group_size"),
        ("tile_px", "slides.tile_px"),
        ("slides.tilepx", "slides.tile_px"),
        ("science.regmie", "science.regime"),
        ("science.taks", "science.task"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    expected = f"unknown key '{key}'; did you mean '{nearest}'?"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(None, [f"{key}=1"])
    *parents, leaf = key.split(".")
    text = "{" + "".join(f"{name}: {{" for name in parents) + f"{leaf}: 1" + "}" * (len(parents) + 1)
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"'{path}': {expected}")):
        load_config(path)


def test_a_key_like_no_other_points_to_the_table() -> None:
    with pytest.raises(ConfigError, match="unknown key 'qqqqqq'; see docs/configuration.md"):
        load_config(None, ["qqqqqq=1"])


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path, "science: {epochs: 0, seed: x}\nslides: {jpeg_quality: 10, tille_px: 3}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    for part in ("science.epochs", "(got 0)", "science.seed", "(got 'x')", "slides.jpeg_quality", "slides.tile_px"):
        assert part in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_the_generators_do_not_take_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"science.seed: .* \\(got {seed}\\)"):
        load_config(None, ["science.seed=" + str(seed)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold sections such as `cohort:`; it holds a list"),
        ("a: [", "cannot be read as YAML"),
        ("science: 3", "science: "),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file .* gigamil init"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "slide.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "slide.yaml")


@pytest.mark.parametrize("dump", [to_yaml, to_commented_yaml])
@pytest.mark.parametrize("data", [{}, CHANGED], ids=["defaults", "changed"])
def test_what_is_written_loads_again(tmp_path: Path, dump, data: dict) -> None:
    config = absolute_paths(RunConfig.model_validate(data))
    text = dump(config)
    assert load_config(write(tmp_path, text)) == config
    assert dump(load_config(write(tmp_path, text))) == text


def test_the_commented_yaml_says_what_each_key_is_for() -> None:
    lines = to_commented_yaml(RunConfig()).splitlines()
    assert "  tile_px: 224  # tile side in pixels" in lines
    assert "  zero_stage: 1  # 0 | 1 | 2 | 3" in lines
    assert any(line.startswith("science:  # What is learned") for line in lines)
    assert list(yaml.safe_load("\n".join(lines))) == list(RunConfig.model_fields)


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    words = ["cohort.root=../wsi", "science.encoder.weights=~/w.pt", "bookkeeping.out=a/./b", "cohort.table=/x.csv"]
    config = load_config(None, words)
    assert config.cohort.root == tmp_path.parent / "wsi"
    assert config.science.encoder.weights == Path("/home/someone/w.pt")
    assert config.bookkeeping.out == tmp_path / "a" / "b"
    assert config.cohort.table == Path("/x.csv")
    assert config.science.warm_start is None
    assert config.bookkeeping.shard_root == tmp_path / "a" / "b" / "shards"


def test_every_path_of_the_schema_becomes_absolute() -> None:
    keys = list(known_keys())
    relative = RunConfig.model_validate(
        {
            "cohort": {"root": "r"},
            "science": {"encoder": {"weights": "w"}, "warm_start": "s"},
            "bookkeeping": {"shards": "s"},
        }
    )
    paths = {key: value for key in keys if isinstance(value := _value(absolute_paths(relative), key), Path)}
    assert len(paths) == 6
    assert [key for key, value in paths.items() if not value.is_absolute()] == []


def test_group_size_has_to_divide_the_ranks() -> None:
    with pytest.raises(
        ConfigError, match=r"execution.group_size=3 does not divide execution.ranks=8; .*\[1, 2, 4, 8\]"
    ):
        load_config(None, ["execution.ranks=8", "execution.group_size=3"])
    assert load_config(None, ["execution.ranks=8", "execution.group_size=4"]).execution.group_size == 4
    # Under torchrun or srun the world is not execution.ranks: it is checked when the ranks have met.
    assert load_config(None, ["execution.group_size=4"]).execution.group_size == 4


def test_every_section_is_frozen_and_closed() -> None:
    sections = list(_sections(RunConfig()))
    assert len(sections) == 14
    for section in sections:
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
        with pytest.raises(ValidationError, match="Extra inputs"):
            type(section).model_validate({"no_such_key": 1})


def test_science_digest_holds_what_changes_results_only() -> None:
    base = science_digest_data(RunConfig())
    same = RunConfig.model_validate({"execution": {"zero_stage": 3, "chunk": 7}, "bookkeeping": {"out": "/elsewhere"}})
    assert science_digest_data(same) == base
    for other in ({"science": {"seed": 1}}, {"slides": {"tile_px": 96}}, {"cohort": {"classes": ["a", "b"]}}):
        assert science_digest_data(RunConfig.model_validate(other)) != base


def _value(section: BaseModel, key: str) -> object:
    value: object = section
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _sections(section: BaseModel):
    yield section
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _sections(value)


class TestRegimes:
    def test_a_name_alone_will_do(self) -> None:
        config = RunConfig.model_validate({"science": {"regime": "select", "task": "survival"}})
        assert (config.science.regime.name, config.science.task.name) == ("select", "survival")

    def test_what_a_regime_means_is_in_the_resolved_configuration(self) -> None:
        blocks = load_config(None, ["--science.regime.name", "last_blocks", "--science.regime.blocks", "3"])
        assert blocks.science.encoder.freeze_blocks == -3
        lora = load_config(None, ["--science.regime.name", "lora"])
        assert lora.science.encoder.lora_rank == 8
        own = load_config(None, ["--science.regime.name", "lora", "--science.encoder.lora_rank", "4"])
        assert own.science.encoder.lora_rank == 4
        assert load_config(None, ["--science.regime.name", "frozen"]).data.source == "features"

    def test_a_frozen_encoder_does_not_read_slides(self) -> None:
        with pytest.raises(ConfigError, match="science.regime=frozen trains on features"):
            load_config(None, ["--science.regime.name", "frozen", "--data.source", "slides"])

    def test_only_some_choose_tiles(self) -> None:
        with pytest.raises(ConfigError, match="only sampled and select choose tiles"):
            load_config(None, ["--science.regime.how", "top"])

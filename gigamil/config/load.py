"""One YAML and dotted overrides -> a checked, frozen RunConfig; and back to a commented YAML.

Why not an argument-parser generator: `--help` has to fit a screen, and an unknown key has to be answered with the
nearest known one, whichever way it came in.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError

_PATHS = (
    "cohort.table",
    "cohort.root",
    "cohort.splits",
    "slides.masks",
    "slides.coords",
    "data.features",
    "science.encoder.weights",
    "science.warm_start",
    "execution.shard_cache",
    "bookkeeping.out",
    "bookkeeping.shards",
)
# PyYAML keeps to YAML 1.1, where 1e-4 without a point is a word; for YAML 1.2, and for people, it is a number.
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    """The safe loader, where a key that occurs twice is an error and 1e-4 is a number."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:  # what `<<` merges comes later, and may occur beside it
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"key '{key.value}' in line {line} was set in line {lines[key.value]} already")
                lines[key.value] = line
        return node


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which writes a text such as "1e4" with quotes, so that the loader reads it as one."""


_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted overrides, and validate.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: words of the command line, `--science.epochs 3` or `science.epochs=3`; values are parsed as YAML.
    Returns:
        The frozen configuration; relative paths are made absolute from the working directory.
    Raises:
        ConfigError: unreadable YAML, a key that occurs twice, an unknown key (with the nearest known one), a value of
            the wrong kind; all problems are in one message.
    """
    data: dict[str, Any] = {}
    where = "the defaults"
    if path is not None:
        where = f"'{path}'"
        data = _read_yaml(Path(path))
    for key, value in _parse_overrides(overrides):
        _set_dotted(data, key, value)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(explain_problem(item) for item in error.errors())) from None
    return absolute_paths(config)


def absolute_paths(config: RunConfig) -> RunConfig:
    """Make every path absolute, relative ones counted from the working directory."""
    data = config.model_dump()
    for dotted in _PATHS:
        *parents, leaf = dotted.split(".")
        node = data
        for name in parents:
            node = node[name]
        is_url = isinstance(node[leaf], str)  # of shards: kept as it is
        if node[leaf] is not None and not is_url:
            node[leaf] = _expanded(dotted, node[leaf]).resolve()
    return RunConfig.model_validate(data)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as plain YAML; loading it gives an equal configuration."""
    return yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, width=120)


def to_commented_yaml(config: RunConfig) -> str:
    """The configuration as YAML with the description of each key as a comment: what `gigamil init` writes."""
    lines = list(_commented(config, ""))
    return "\n".join(lines).lstrip("\n") + "\n"


def science_digest_data(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that a run has to keep while it is resumed, as plain data.

    Not in it: where weights came from (a checkpoint has them), and what only evaluation and tiling reports look at.
    """
    data = json.loads(config.model_dump_json())
    del data["slides"]["max_failed"], data["science"]["bootstrap"]
    del data["science"]["warm_start"], data["science"]["encoder"]["weights"]
    source = {"data": {"source": data["data"]["source"]}}  # not where it lies: a digest says what it is
    return {name: data[name] for name in ("slides", "science")} | {"classes": data["cohort"]["classes"]} | source


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "", *, into_lists: bool = False) -> Iterator[str]:
    """Every dotted key of the configuration, depth first, in the order of the schema.

    Args:
        into_lists: also keys of the items of a list, with the list's name in front.
    """
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation, into_lists=into_lists)
        if section is None:
            yield prefix + name
        else:
            yield from known_keys(section, f"{prefix}{name}.", into_lists=into_lists)


def _expanded(key: str, path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: '{path}': {error}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file '{path}'. Write one with: gigamil init {path} ...") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read as YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' must hold sections such as `cohort:`; it holds a {type(data).__name__}")
    return data


def _parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not rest:
                raise ConfigError(f"cannot read the override '{word}'; type --section.key VALUE or section.key=VALUE")
            text = rest.pop(0)
        try:
            yield key, yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: '{text}' is not a YAML value: {error}") from error


def _set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        if data.get(name) is None:  # not there, or a section without keys
            data[name] = {}
        data = data[name]
        if not isinstance(data, dict):
            raise ConfigError(f"--{key}: '{name}' is a value, not a section")
    data[leaf] = value


def explain_problem(
    item: typing.Mapping[str, Any], model: type[BaseModel] = RunConfig, page: str = "docs/configuration.md"
) -> str:
    """One of pydantic's complaints in words: the key, what is wrong with it, and the nearest known key.

    Args:
        item: of `ValidationError.errors()`.
        model: that refused.
        page: where its keys are listed.
    """
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        keys = list(known_keys(model, into_lists=True))
        sections = dict.fromkeys(name.rpartition(".")[0] for name in keys if "." in name)
        near = _nearest(".".join(part for part in item["loc"] if isinstance(part, str)), [*keys, *sections])
        return f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else f"; see {page}")
    if item["type"] == "missing":
        return f"{key} is missing"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})" if key else message


def _nearest(key: str, known: Sequence[str]) -> str | None:
    leaf = key.rpartition(".")[2]
    called_so = [name for name in known if name.rpartition(".")[2] == leaf]
    if len(called_so) == 1:  # in another section
        return called_so[0]
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    leaves = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.6)
    return leaves[close[0]] if close else None


def _section_of(annotation: Any, *, into_lists: bool) -> type[BaseModel] | None:
    is_list = typing.get_origin(annotation) is tuple
    for part in (
        annotation,
        *(() if is_list and not into_lists else typing.get_args(annotation)),
    ):  # one that may be null
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _commented(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            title = (type(value).__doc__ or "").strip().splitlines()[0]
            yield ("" if indent else "\n") + f"{indent}{name}:  # {title}"
            yield from _commented(value, indent + "  ")
            continue
        comment = field.description or _kind(field.annotation)
        yield f"{indent}{name}: {_scalar(section, name)}" + (f"  # {comment}" if comment else "")


def _scalar(section: BaseModel, name: str) -> str:
    value = json.loads(section.model_dump_json(include={name}))[name]
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _kind(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(filter(None, (_kind(part) for part in typing.get_args(annotation))))
    return ""

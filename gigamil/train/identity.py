"""What makes a run the run it is: a checkpoint is only continued, and only evaluated, by the configuration it belongs to."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gigamil.config.load import science_digest_data
from gigamil.config.schema import RunConfig
from gigamil.data.targets import has_classes
from gigamil.errors import ConfigError
from gigamil.train.cohort import TrainingData


def run_identity(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """What a checkpoint records: the part of the configuration that changes results, and a digest of splits and tiles, or of
    splits and features."""
    digest = hashlib.sha256(data.splits.to_json().encode())
    for slide_id in sorted(data.splits.split_of()):
        digest.update(f"{slide_id} {data.digest(slide_id)}\n".encode())
    if config.science.also or not has_classes(config.science.task):  # classes are in the digest of the split
        for split in ("train", "val", "test"):
            digest.update(repr(data.slides(split).target_SX.tolist()).encode())
    return {"science": science_digest_data(config), "data_sha256": digest.hexdigest()}


def refuse_other_run(identity: Mapping[str, Any], recorded: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a checkpoint of another run.

    A key that the version which wrote the checkpoint did not know had its default then; before there were tasks, `science.task.loss`
    was `science.loss`.

    Args:
        identity: from `run_identity`, of now.
        recorded: facts of the checkpoint.
        out: run folder, for the message.
    Raises:
        ConfigError: names the keys that differ, or says that splits or tiles do.
    """
    wanted = json.loads(json.dumps(identity["science"]))
    known = _completed(_renamed(recorded["science"]), science_digest_data(RunConfig()))
    different = sorted(_differences(known, wanted))
    if different:
        raise ConfigError(
            f"'{out}' holds a run with another configuration (different: {', '.join(different)}). Choose another "
            "bookkeeping.out, or delete that folder to start again."
        )
    if recorded["data_sha256"] != identity["data_sha256"]:
        raise ConfigError(
            f"'{out}' was trained on another split, or on other tiles or features of its slides. Choose another bookkeeping.out, or "
            "delete that folder to start again."
        )


def _renamed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    science = dict(recorded["science"])
    if "loss" in science:
        loss = science.pop("loss")
        science["task"] = {"loss": None if loss == "cross_entropy" else loss}
    return {**recorded, "science": science}


def _completed(recorded: Any, defaults: Any) -> Any:
    if not isinstance(recorded, dict) or not isinstance(defaults, dict):
        return recorded
    filled = {key: _completed(value, defaults.get(key)) for key, value in recorded.items()}
    return {key: value for key, value in defaults.items() if key not in recorded} | filled


def _differences(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    elif a != b:
        yield prefix.rstrip(".")

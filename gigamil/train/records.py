"""What a run writes about itself: metrics.jsonl (the truth) and run.json."""

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gigamil.files import replace_file

_PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "openslide-python", "openslide-bin", "mlflow", "numpy")


class MetricsLog:
    """Append-only JSON lines.

    Args:
        path: file; made if missing.
        cut_to: bytes to keep of what is there: lines after the checkpoint that a run continues from are dropped, as
            their steps are made again.
    """

    def __init__(self, path: Path, cut_to: int = 0) -> None:
        self._path = path
        with path.open("ab") as stream:
            stream.truncate(min(cut_to, stream.tell()))  # beyond its end a file would be filled with zeros
        self._stream = path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Add a line (`json_line`); it is in the file when this returns."""
        self._stream.write(json_line(kind, **values))
        self._stream.flush()

    def sync(self) -> int:
        """Force the lines to disk; returns the file's size in bytes, to be put into a checkpoint."""
        os.fsync(self._stream.fileno())
        return self._path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def json_line(kind: str, **values: Any) -> str:
    """A line `{"kind": ..., "time": ..., ...}`: milliseconds since 1970, by which MLflow knows a number that it has already.

    Numbers that are not finite are null.
    """
    known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"kind": kind, "time": time.time_ns() // 1_000_000, **known}) + "\n"


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


class RunRecord:
    """run.json: status, versions, world, MLflow run: what others read to know how a run stands.

    Args:
        path: the file; facts of an earlier session of the run are kept and overwritten by name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def update(self, **facts: Any) -> None:
        """Change facts and replace the file."""
        self.facts.update(facts)
        self.facts["updated"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        replace_file(self._path, json.dumps(self.facts, indent=1))


def versions() -> dict[str, str]:
    """Versions of gigamil, Python and the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("gigamil", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit(folder: Path) -> str | None:
    """Commit of the repository that `folder` is in, with "+" if files differ from it; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None

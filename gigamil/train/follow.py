"""Files of a run that grow, followed from where MLflow has them: lines of metrics.jsonl and logs/system_<host>.jsonl as numbers.

These files are the truth and the queue at once. `<out>/mlflow.json` says of each MLflow store what it has confirmed. A crash
before it is written sends lines again, which changes nothing: MLflow keeps one number of a name, step, time and value.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gigamil.files import replace_file

METRICS, SYSTEM, RECORD = "metrics.jsonl", "logs/system_*.jsonl", "mlflow.json"
MAX_METRICS = 1000  # in one call of MLflow
_PERFORMANCE = {"slides_per_s", "tiles_per_s", "data_wait_frac", "peak_memory_gb"}
_NOT_MEASURED = {"kind", "time", "step", "steps", "epoch"}

_log = logging.getLogger(__name__)


class Metric(NamedTuple):
    """A number as MLflow takes it; `time` in milliseconds since 1970."""

    name: str
    value: float
    step: int
    time: int


@dataclass
class Sent:
    """What an MLflow store has confirmed of a run folder.

    Attributes:
        run_id: of the run there; None before it is made.
        token: tag of the run, by which it is found if the answer to its creation was lost.
        confirmed: bytes of each followed file, by its name in the run folder.
        files: SHA-256 of each artefact, by its name in MLflow.
        status: set last; None while training goes on.
    """

    run_id: str | None = None
    token: str = ""
    confirmed: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    status: str | None = None


def metrics_of(line: Mapping[str, Any]) -> list[Metric]:
    """What MLflow gets of a line: its numbers, named by the line's kind; none of a kind that is not in docs/mlflow.md.

    Lists, words, flags and null (not finite, or undefined) are not sent.
    """
    step, time = line.get("step", 0), line.get("time", 0)
    numbers = {
        key: float(value)
        for key, value in line.items()
        if key not in _NOT_MEASURED and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return [Metric(name, value, step, time) for key, value in numbers.items() if (name := _name(line, key))]


def _name(line: Mapping[str, Any], key: str) -> str | None:
    match line.get("kind"):
        case "step":
            return ("perf/" if key in _PERFORMANCE else "train/") + key
        case "epoch":
            return f"val/{key.removeprefix('val_')}"
        case "ranks":
            return f"perf/{key}"
        case "system":
            return f"system/{line.get('host')}/{key}"
        case "metrics":
            return key
    return None


def followed_files(out: Path) -> list[Path]:
    """The files of a run folder whose lines MLflow gets."""
    return [out / METRICS, *sorted(out.glob(SYSTEM))]


def read_batches(path: Path, position: int) -> Iterator[tuple[list[Metric], int]]:
    """The numbers behind a position of a file of JSON lines, in parts that one call of MLflow takes.

    A last line without its newline is still being written and stays for the next time. A line that cannot be read is
    named in the log. A file that is shorter than `position` is another one than was sent, and read from its start.

    Args:
        position: bytes that are confirmed: the start of a line.
    Yields:
        At most 1000 numbers, perhaps none, and the position that is confirmed once MLflow has them.
    """
    size = path.stat().st_size if path.is_file() else 0
    if size in (0, position):
        return
    batch: list[Metric] = []
    with path.open("rb") as stream:
        at = yielded = position if position < size else 0
        stream.seek(at)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            found = _numbers_in(line, path, at)
            if batch and len(batch) + len(found) > MAX_METRICS:
                yield batch, at
                batch, yielded = [], at
            while len(found) > MAX_METRICS:
                yield found[:MAX_METRICS], at
                found = found[MAX_METRICS:]
            batch += found
            at += len(line)
    if at > yielded:
        yield batch, at


def read_sent(out: Path) -> dict[str, Sent]:
    """What mlflow.json says, by store; nothing of a file that cannot be read, as sending again does no harm."""
    path = out / RECORD
    if not path.is_file():
        return {}
    try:
        return {store: Sent(**facts) for store, facts in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("'%s' cannot be read (%s): everything is sent to MLflow again", path, error)
        return {}


def write_sent(out: Path, sent: Mapping[str, Sent]) -> None:
    """Replace mlflow.json."""
    replace_file(out / RECORD, json.dumps({store: asdict(facts) for store, facts in sent.items()}, indent=1))


def cut_sent(out: Path, metrics_bytes: int) -> None:
    """Before metrics.jsonl is cut back to a checkpoint: no store has confirmed more of it than what stays."""
    sent = read_sent(out)
    for facts in sent.values():
        facts.confirmed[METRICS] = min(facts.confirmed.get(METRICS, 0), metrics_bytes)
    if sent:
        write_sent(out, sent)


def _numbers_in(line: bytes, path: Path, at: int) -> list[Metric]:
    try:
        return metrics_of(json.loads(line))
    except (ValueError, AttributeError) as error:
        _log.warning("'%s': the line at byte %d is not sent to MLflow: %s", path, at, error)
        return []

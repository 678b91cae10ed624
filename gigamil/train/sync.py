"""`gigamil sync`: what an MLflow store does not have yet of a run folder is sent to it, after training and as often as needed."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from gigamil.errors import ConfigError, EnvironmentFault
from gigamil.lock import folder_lock
from gigamil.train.follow import METRICS, Metric
from gigamil.train.recorder import MLFLOW_STATUS, describe_run
from gigamil.train.tracking import RunSender, files_in, masked, tracking_uri

_RECORD, _CONFIG, _EVALUATION = "run.json", "config.resolved.yaml", "evaluation.json"
_FILES = (_CONFIG, "ds_config.resolved.json", "splits.json", METRICS, "predictions.csv", _EVALUATION, "report.html")
_FOLDERS = ("figures", "heatmaps")
_PAUSES_S = (1.0, 4.0)  # between tries; a server that stays away longer is for the user to look after

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What was sent.

    Attributes:
        place: the store, without credentials.
        run_id: MLflow's.
        line_bytes: of metrics.jsonl and logs/system_*.jsonl.
        files: artefacts that were not there, or not as they are now.
    """

    place: str
    run_id: str
    line_bytes: int
    files: int

    def text(self) -> str:
        """For the terminal."""
        where = f"MLflow run {self.run_id} at {self.place}"
        if not (self.line_bytes or self.files):
            return f"{where} has everything already"
        return f"{where} got {self.line_bytes} bytes of metrics and {self.files} files, and has everything now"


def sync_run(
    out: Path,
    uri: str | None = None,
    *,
    progress: bool = False,
    tries: int = len(_PAUSES_S) + 1,
    timeout_s: float = 60.0,
) -> SyncReport:
    """Send what is missing: the run itself, parameters, tags, metrics, artefacts, status. A second call sends nothing.

    Args:
        out: run folder.
        uri: of the MLflow store; None takes MLFLOW_TRACKING_URI, else the run's own SQLite file.
        progress: show a bar.
        tries: of a server that does not answer; at most 3.
        timeout_s: longest wait for an answer.
    Raises:
        ConfigError: this is no run folder, or the address is none.
        EnvironmentFault: the run is being trained, or MLflow does not answer; what it has got stays there.
    """
    if not (out / _RECORD).is_file() or not (out / _CONFIG).is_file():
        raise ConfigError(f"'{out}' holds no run ('{_RECORD}', '{_CONFIG}'). Name the folder of bookkeeping.out.")
    if uri is not None and "://" not in uri:
        raise ConfigError(
            f"--to {masked(uri)!r} is no address of an MLflow store. Write http://HOST:PORT or sqlite:///FILE."
        )
    with folder_lock(out, "gigamil sync"):
        config = yaml.safe_load((out / _CONFIG).read_text(encoding="utf-8"))
        facts = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        book = config["bookkeeping"]
        sender = RunSender(
            out,
            tracking_uri(out) if uri is None else uri,
            book["experiment"],
            book["name"],
            facts.get("mlflow_run"),
            timeout_s=timeout_s,
        )
        counts = _Counts()
        for pause in [*_PAUSES_S[: tries - 1], None]:
            try:
                _send(sender, out, config, facts, counts, progress)
                break
            except Exception as error:  # MLflow raises its own, SQLAlchemy's and requests' types
                if pause is None:
                    raise EnvironmentFault(
                        f"MLflow at {sender.place} did not take everything of '{out}': {masked(error)}. It keeps what it has "
                        f"got; `gigamil sync` sends the rest when it is back."
                    ) from error
                time.sleep(pause)
        assert sender.run_id is not None
        return SyncReport(sender.place, sender.run_id, counts.line_bytes, counts.files)


@dataclass
class _Counts:
    """Counts over all tries."""

    line_bytes: int = 0
    files: int = 0


def _send(
    sender: RunSender, out: Path, config: dict[str, Any], facts: dict[str, Any], counts: _Counts, progress: bool
) -> None:
    sender.open(is_running=False)
    sender.describe(*describe_run(config, facts))
    with tqdm(
        total=sender.bytes_left(), desc="metrics", unit="B", unit_scale=True, disable=not progress or None, leave=False
    ) as bar:
        for num_bytes in sender.send_lines():
            counts.line_bytes += num_bytes
            bar.update(num_bytes)
    evaluation = out / _EVALUATION
    if evaluation.is_file() and not sender.has_file(evaluation):
        sender.send_metrics(_evaluation_metrics(evaluation, int(facts.get("steps") or 0)))
    # Nobody trains here: a run that still calls itself running was killed.
    sender.end(MLFLOW_STATUS.get(facts.get("status", ""), "KILLED"), _milliseconds(facts.get("updated")))
    files = [*_artefacts(out, facts)]
    for path, folder in tqdm(files, desc="files", unit="file", disable=not progress or None, leave=False):
        counts.files += sender.send_file(path, folder)
    sender.save(at_once=True)


def _artefacts(out: Path, facts: dict[str, Any]) -> Iterator[tuple[Path, str | None]]:
    """Files of a run folder and their folders among the artefacts."""
    for name in _FILES:
        yield from files_in(out / name)
    for name in _FOLDERS:
        yield from files_in(out / name, name)
    best = out / "checkpoints" / "best"
    if facts.get("status") == "finished" and best.is_file():
        yield from files_in(best.parent / best.read_text(encoding="utf-8").strip(), "checkpoint")


def _evaluation_metrics(path: Path, step: int) -> list[Metric]:
    time_ms = int(path.stat().st_mtime * 1000)
    return [
        Metric(f"{split}/{name}", float(estimate["value"]), step, time_ms)
        for split, values in json.loads(path.read_text(encoding="utf-8"))["splits"].items()
        for name, estimate in values["metrics"].items()
        if estimate["value"] is not None
    ]


def _milliseconds(text: str | None) -> int | None:
    return None if text is None else int(datetime.fromisoformat(text).timestamp() * 1000)

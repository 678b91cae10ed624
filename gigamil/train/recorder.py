"""What rank 0 writes while a run goes on: metrics.jsonl, run.json, MLflow, the terminal. Other ranks have none."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.errors import Interrupted
from gigamil.files import replace_file
from gigamil.train.records import MetricsLog, RunRecord
from gigamil.train.tracking import Tracker

_log = logging.getLogger(__name__)
_PERFORMANCE = {"slides_per_s", "tiles_per_s", "data_wait_frac", "peak_memory_gb"}
MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED", "running": "RUNNING"}


class Recorder:
    """Opens the records of a run, or those of an interrupted one.

    A record that cannot be written (a full disk) is kept in `error` until the ranks next agree, instead of ending rank 0
    alone while the others wait.

    Args:
        config: resolved configuration.
        settings: DeepSpeed JSON.
        facts: of run.json.
        metrics_bytes: what metrics.jsonl is cut back to.
        mlflow_run: MLflow run to continue; None starts one.
    Attributes:
        error: first failure to write.
        mlflow_run: id of the MLflow run, that of an earlier session where this one does not reach it; None without one.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        metrics_bytes: int,
        mlflow_run: str | None,
    ) -> None:
        book = config.bookkeeping
        self._out = book.out
        self._config = config
        self.error: OSError | None = None
        self.mlflow_run = mlflow_run
        self._tracker: Tracker | None = None
        replace_file(self._out / "config.resolved.yaml", to_yaml(config))
        replace_file(self._out / "ds_config.resolved.json", json.dumps(settings, indent=1))
        self._metrics = MetricsLog(self._out / "metrics.jsonl", metrics_bytes)
        self._record = RunRecord(self._out / "run.json")
        if book.mlflow:
            self._tracker = Tracker(self._out, book.experiment, book.name, mlflow_run)
            self.mlflow_run = self._tracker.run_id or mlflow_run
            # What may change when a run continues on other machines is a tag; a parameter is for ever.
            science = config.science.model_dump(mode="json")
            self._tracker.describe(_flat({"science": science, "slides": config.slides.model_dump()}), _flat(facts))
            for name in ("config.resolved.yaml", "ds_config.resolved.json", "splits.json"):
                self._tracker.artefact(self._out / name)
        self._record.update(status="running", error=None, mlflow_run=self.mlflow_run, **facts)

    def step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """One optimiser step."""
        self._write("step", step=step, epoch=epoch, **values)
        self._send({("perf/" if k in _PERFORMANCE else "train/") + k: v for k, v in values.items()}, step)

    def skipped(self, step: int, slide_ids: Sequence[str]) -> None:
        """A step that no rank took, because a loss or the gradient was not finite."""
        self._write("skipped", step=step, slides=list(slide_ids))
        _log.warning("step %d skipped on all ranks: loss or gradient not finite, slides %s", step, list(slide_ids))

    def epoch(self, step: int, epoch: int, better: bool, values: Mapping[str, float | None]) -> None:
        """Validation after an epoch."""
        self._write("epoch", epoch=epoch, step=step, better=better, **values)
        known = {f"val/{name[4:]}": value for name, value in values.items() if value is not None}
        self._send(known, step)
        if self._config.bookkeeping.progress:
            words = ", ".join(f"{name} {value:.4f}" for name, value in known.items()) or "no validation slides"
            tqdm.write(f"epoch {epoch}: {words}{' (best so far)' if better else ''}")

    def sync(self) -> int:
        """Force metrics.jsonl to disk; its size in bytes."""
        return self._metrics.sync()

    @contextmanager
    def ended(self, final: Mapping[str, Any], best: Path) -> Iterator[None]:
        """run.json and MLflow say how the run ended, however it ends.

        Args:
            final: facts that are filled while the run goes on, read when it ends.
            best: folder that holds the best checkpoint's pointer.
        """
        status, error = "failed", "ended without a word"
        try:
            yield
            status, error = "finished", ""
        except Interrupted as raised:
            status, error = "interrupted", str(raised)
            raise
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            raise
        finally:
            try:
                self._metrics.close()
                self._record.update(status=status, error=error or None, **final)
            except OSError as failure:  # must not take the place of what ended the run
                _log.error("run.json could not be written: %s", failure)
            self._end_tracking(status, best)

    def _end_tracking(self, status: str, best: Path) -> None:
        if self._tracker is None:
            return
        self._tracker.artefact(self._out / "metrics.jsonl")
        if status == "finished" and (best / "best").is_file():
            self._tracker.artefact(best / (best / "best").read_text().strip(), "checkpoint")
        self._tracker.finish(MLFLOW_STATUS[status])

    def _write(self, kind: str, **values: Any) -> None:
        try:
            self._metrics.write(kind, **values)
        except OSError as error:
            self.error = self.error or error

    def _send(self, values: Mapping[str, float], step: int) -> None:
        if self._tracker is not None and values:
            self._tracker.log(values, step)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found

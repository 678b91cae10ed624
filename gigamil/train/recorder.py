"""What rank 0 writes while a run goes on: metrics.jsonl, run.json, the terminal. Other ranks have none.

MLflow gets the lines of metrics.jsonl from a thread of its own (tracking.py).
"""

import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.errors import Interrupted
from gigamil.files import replace_file
from gigamil.train.follow import METRICS, RECORD, cut_sent
from gigamil.train.records import MetricsLog, RunRecord, flat
from gigamil.train.stragglers import RankTimes
from gigamil.train.tracking import Tracker

_log = logging.getLogger(__name__)
MLFLOW_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# At the end MLflow is waited for no longer than the other ranks wait for rank 0, and hardly where the machine goes away.
_LAST_WAIT_S, _LAST_WAIT_INTERRUPTED_S = 60.0, 10.0


class Recorder:
    """Opens the records of a run, or those of an interrupted one.

    A record that cannot be written (a full disk) is kept in `error` until the ranks next agree, instead of ending rank 0
    alone while the others wait.

    Args:
        config: resolved configuration.
        settings: DeepSpeed JSON.
        facts: of run.json.
        metrics_bytes: what metrics.jsonl is cut back to.
        mlflow_run: MLflow run to continue. None starts one, unless `metrics_bytes` tells of a checkpoint: then the run of
            mlflow.json, which may have been made after it, goes on.
    Attributes:
        error: first failure to write.
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
        self._last_mlflow_run = mlflow_run
        self._tracker: Tracker | None = None
        replace_file(self._out / "config.resolved.yaml", to_yaml(config))
        replace_file(self._out / "ds_config.resolved.json", json.dumps(settings, indent=1))
        if metrics_bytes or mlflow_run:
            cut_sent(self._out, metrics_bytes)
        else:  # from the start, and in MLflow another run
            (self._out / RECORD).unlink(missing_ok=True)
        self._metrics = MetricsLog(self._out / METRICS, metrics_bytes)
        self._record = RunRecord(self._out / "run.json")
        if book.mlflow:
            self._tracker = Tracker(self._out, book.experiment, book.name, mlflow_run)
            self._tracker.describe(*describe_run(config.model_dump(mode="json"), facts))
            for name in ("config.resolved.yaml", "ds_config.resolved.json", "splits.json"):
                self._tracker.artefact(self._out / name)
        self._record.update(status="running", error=None, mlflow_run=self.mlflow_run, **facts)

    @property
    def mlflow_run(self) -> str | None:
        """Id of the MLflow run, that of an earlier session while this one has not reached it; None without one."""
        reached = None if self._tracker is None else self._tracker.run_id
        return reached or self._last_mlflow_run

    def step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """One optimiser step."""
        self._write("step", step=step, epoch=epoch, **values)

    def skipped(self, step: int, slide_ids: Sequence[str]) -> None:
        """A step that no rank took, because a loss or the gradient was not finite."""
        self._write("skipped", step=step, slides=list(slide_ids))
        _log.warning("step %d skipped on all ranks: loss or gradient not finite, slides %s", step, list(slide_ids))

    def epoch(
        self,
        step: int,
        epoch: int,
        better: bool,
        values: Mapping[str, float | None],
        selected_by: str,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Validation after an epoch.

        Args:
            values: by metric; empty without validation slides.
            selected_by: the metric that chooses the best epoch.
            extra: what else is known at that time, under its own name.
        """
        named = {f"val_{name}": value for name, value in values.items()}
        named |= extra or {}
        self._write("epoch", epoch=epoch, step=step, better=better, selected_by=selected_by, **named)
        if self._config.bookkeeping.progress:
            shown = {name: values.get(name) for name in dict.fromkeys((selected_by, "loss"))}
            known = [f"val/{name} {value:.4f}" for name, value in shown.items() if value is not None]
            words = ", ".join(known) or "no validation slides"
            tqdm.write(f"epoch {epoch}: {words}{' (best so far)' if better else ''}")

    def ranks(
        self, step: int, epoch: int, times: RankTimes, hosts: Sequence[str], shares: Sequence[int] | None
    ) -> None:
        """How long each rank took in the steps since the last such line.

        Args:
            hosts: machine of each rank.
            shares: of the ranks in steps to come; None: equal.
        """
        means = {
            "slowest_rank_s": times.slowest_s,
            "imbalance": times.imbalance,
            "rank_wait_s": statistics.fmean(times.wait_s),
        }
        by_rank = {
            name: [round(value, 6) for value in getattr(times, name)]
            for name in ("tiles", "step_s", "data_s", "own_s", "rest_s", "wait_s", "gradient_share")
        }
        self._write(
            "ranks", step=step, epoch=epoch, steps=times.steps, **means, hosts=list(hosts), shares=shares, **by_rank
        )

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
                self._record.update(status=status, error=error or None, mlflow_run=self.mlflow_run, **final)
            except OSError as failure:  # must not take the place of what ended the run
                _log.error("run.json could not be written: %s", failure)
            self._end_tracking(status, best)

    def _end_tracking(self, status: str, best: Path) -> None:
        if self._tracker is None:
            return
        self._tracker.artefact(self._out / METRICS)
        if status == "finished" and (best / "best").is_file():
            self._tracker.artefact(best / (best / "best").read_text().strip(), "checkpoint")
        longest_s = _LAST_WAIT_INTERRUPTED_S if status == "interrupted" else _LAST_WAIT_S
        self._tracker.finish(MLFLOW_STATUS[status], min(longest_s, self._config.execution.timeout_s / 2))

    def _write(self, kind: str, **values: Any) -> None:
        try:
            self._metrics.write(kind, **values)
        except OSError as error:
            self.error = self.error or error


def describe_run(config: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and tags of the MLflow run: what may change when a run continues elsewhere is a tag; a parameter stays.

    Args:
        config: the resolved configuration as plain data.
        facts: of run.json; how the run stands is left out.
    """
    params = flat({"science": config["science"], "slides": config["slides"]})
    left_out = {"status", "error", "updated", "mlflow_run"}
    return params, flat({key: value for key, value in facts.items() if key not in left_out})

"""Start the ranks of this machine through the DeepSpeed launcher, pass signals on, and tell how they ended.

The launcher returns 1, or even 0, after signals, so the outcome is what each rank wrote into a folder that only this
call and its ranks know. A rank watches the process that started it and ends with it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from gigamil.config.schema import Execution
from gigamil.cores import num_cores
from gigamil.errors import GigamilError, TrainingError

_OUTCOME_FOLDER, _PARENT, _DEVICES = "GIGAMIL_OUTCOME", "GIGAMIL_PARENT", "GIGAMIL_CUDA_VISIBLE_DEVICES"
_INTERRUPTED = 5
_LAST_PATIENCE_S = 15.0  # for a rank that waits for one that has failed; DeepSpeed's launcher takes 30 s for each
# What ranks say when another one has gone: a consequence, not a cause.
_CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo",
    "NCCL",
    "DistBackendError",
)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: what its process reports, and what `launch_ranks` raises from.

    Attributes:
        exit_code: 0, or that of the error class.
        message: of the error; empty if there was none.
        expected: the error is one of gigamil's own, so it needs no traceback.
        time: seconds since 1970; of several errors the first is the cause.
        is_loss: it ends because another rank was lost, so that one's own word is the cause, if there is one.
    """

    exit_code: int
    message: str
    expected: bool
    time: float
    is_loss: bool = False


class RanksFailed(GigamilError, RuntimeError):
    """The ranks ended with an error, which they agreed on or the first of them met."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # that of the rank's error: 5 is resumable, 6 failed, ...


def launch_ranks(
    module: str, arguments: Sequence[str], execution: Execution, *, logs: Path | None, continues: str
) -> None:
    """Run `python -m module arguments` on `execution.ranks` ranks of this machine and wait for them.

    SIGINT and SIGTERM are passed on to the ranks, which finish their step; a second one ends them at once.

    Args:
        module: calls `report_outcome` around its work.
        logs: where each rank writes `rank<i>.log`, for the message; None if tracebacks go to stderr only.
        continues: how the same command goes on after an interruption: "from the last checkpoint".
    Raises:
        RanksFailed: with the message and the exit code of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="gigamil-") as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(execution.ranks)]
        # Without a host file the launcher stays on this machine, whatever /job/hostfile of a cluster image says.
        command += ["--quiet"]  # else it reports its own start in a dozen lines
        command += ["--hostfile", os.devnull, "--master_port", str(free_port()), "--no_local_rank"]
        command += ["--module", module, *arguments]
        launcher = subprocess.Popen(command, env=_environment(execution, folder), start_new_session=True)
        with _pass_signals_on(launcher, Path(folder)) as was_asked:
            code = _await(launcher, Path(folder), execution.ranks)
        _end_group(launcher.pid)
        _raise_first_error(Path(folder), execution.ranks, code, was_asked(), logs, continues)


def restore_devices() -> None:
    """In a rank, before CUDA is used: see the GPUs that the user chose, which the DeepSpeed launcher replaces by 0..n-1."""
    if _DEVICES in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[_DEVICES]


def has_parent() -> bool:
    """In a rank: it was started by `launch_ranks`, which tells the user how it ended."""
    return _OUTCOME_FOLDER in os.environ


@contextmanager
def report_outcome(rank: int) -> Iterator[None]:
    """In a rank: tell the process that called `launch_ranks` how this rank ends, and end with that process.

    Under another launcher there is nobody to tell, and errors just pass.
    """
    folder = os.environ.get(_OUTCOME_FOLDER)
    if folder is None:
        yield
        return
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    _end_with_others(int(os.environ[_PARENT]), Path(folder))
    outcome = Outcome(0, "", True, 0.0)
    try:
        yield
    except GigamilError as error:
        outcome = Outcome(error.exit_code, str(error), True, time.time())
        raise
    except BaseException as error:
        outcome = Outcome(TrainingError.exit_code, f"{type(error).__name__}: {error}", False, time.time())
        raise
    finally:
        _write_outcome(rank, outcome)


def report_loss(rank: int, message: str) -> None:
    """In a rank that is about to end because another one was lost: tell the process that called `launch_ranks`."""
    if has_parent():
        _write_outcome(rank, Outcome(TrainingError.exit_code, message, True, time.time(), is_loss=True))


def is_consequence(error: Exception) -> bool:
    """What a rank meets when another one has gone, for example in a collective."""
    return any(words in str(error) for words in _CONSEQUENCES)


def _write_outcome(rank: int, outcome: Outcome) -> None:
    folder = Path(os.environ[_OUTCOME_FOLDER])
    temporary = folder / f"{rank}.tmp"
    temporary.write_text(json.dumps(asdict(outcome)))
    temporary.rename(folder / f"{rank}.json")


def _environment(execution: Execution, folder: str) -> dict[str, str]:
    cores = num_cores()
    threads = execution.threads or max(1, cores // execution.ranks)
    env = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    env |= {_OUTCOME_FOLDER: folder, _PARENT: str(os.getpid()), "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        env.pop(name, None)
    if "CUDA_VISIBLE_DEVICES" in env:
        env[_DEVICES] = env["CUDA_VISIBLE_DEVICES"]
    if execution.device == "cpu" or not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed says in every process that it looked for a GPU
    return env


@contextmanager
def _pass_signals_on(launcher: "subprocess.Popen[bytes]", folder: Path) -> Iterator[Callable[[], bool]]:
    asked = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def pass_on(number: int, _frame: object) -> None:
        nonlocal asked
        asked += 1
        ranks = [int(text) for text in (path.read_text() for path in folder.glob("*.pid")) if text]
        if asked > 1 or not ranks:
            _end_group(launcher.pid)
            return
        print("stopping after this step (again: at once)", file=sys.stderr, flush=True)
        for pid in ranks:
            with _gone_is_fine():
                os.kill(pid, signal.SIGTERM)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: asked > 0
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _raise_first_error(
    folder: Path, num_ranks: int, launcher_code: int, was_asked: bool, logs: Path | None, continues: str
) -> None:
    outcomes = _outcomes(folder)
    silent = [rank for rank in range(num_ranks) if rank not in outcomes]
    failed = {rank: outcome for rank, outcome in outcomes.items() if outcome.exit_code}
    known = {rank: outcome for rank, outcome in failed.items() if outcome.expected}
    causes = {rank: outcome for rank, outcome in failed.items() if not any(w in outcome.message for w in _CONSEQUENCES)}
    if known or causes or (failed and not silent):
        # The first is the cause. That a rank was lost is what the others say.
        rank, outcome = min((known | causes or failed).items(), key=lambda item: (item[1].is_loss, item[1].time))
        where = "above" if logs is None else f"in '{logs / f'rank{rank}.log'}'"
        hint = "" if outcome.expected else f" (rank {rank}; traceback {where})"
        raise RanksFailed(outcome.message + hint, outcome.exit_code)
    if silent and was_asked:
        raise RanksFailed(f"interrupted; the same command continues {continues}", _INTERRUPTED)
    if silent:
        raise RanksFailed(
            f"rank {silent[0]} of {num_ranks} ended without a word (launcher's exit code {launcher_code}): killed, or out "
            f"of memory? See {'above' if logs is None else repr(str(logs))}. The same command continues {continues}.",
            TrainingError.exit_code,
        )


def _await(launcher: "subprocess.Popen[bytes]", folder: Path, num_ranks: int) -> int:
    """Its exit code; it is ended where it stays although all ranks have told how they ended."""
    told_at = None
    while True:
        try:
            return launcher.wait(0.5)
        except subprocess.TimeoutExpired:
            if told_at is None and len(list(folder.glob("*.json"))) == num_ranks:
                told_at = time.monotonic()
            if told_at is not None and time.monotonic() - told_at > _LAST_PATIENCE_S:
                _end_group(launcher.pid)
                return launcher.wait()


def _outcomes(folder: Path) -> dict[int, Outcome]:
    return {int(path.stem): Outcome(**json.loads(path.read_text())) for path in folder.glob("*.json")}


def _end_with_others(parent: int, folder: Path) -> None:
    """End this process when `parent` is gone, or soon after another rank has failed.

    So a killed command leaves no ranks behind, and a rank that waits in a collective for one that has failed does not
    wait for the collective's time to run out.
    """
    started = psutil.Process(parent).create_time() if psutil.pid_exists(parent) else None

    def parent_lives() -> bool:
        try:
            return started is not None and psutil.Process(parent).create_time() == started
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        failed_since = None
        while parent_lives():
            time.sleep(0.5)
            if failed_since is None and any(o.exit_code not in (0, _INTERRUPTED) for o in _outcomes(folder).values()):
                failed_since = time.monotonic()
            if failed_since is not None and time.monotonic() - failed_since > _LAST_PATIENCE_S:
                break
        os._exit(TrainingError.exit_code)

    threading.Thread(target=watch, name="gigamil-others", daemon=True).start()


def _end_group(leader: int) -> None:
    with _gone_is_fine():
        os.killpg(leader, signal.SIGKILL)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def free_port() -> int:
    """A TCP port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""One rank of a training run, under any launcher: `python -m gigamil.train.worker CONFIG.yaml [--section.key VALUE]`."""

import argparse
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from gigamil.config.load import load_config
from gigamil.config.schema import RunConfig
from gigamil.errors import EnvironmentFault, GigamilError, Interrupted, TrainingError
from gigamil.lock import SAME_JOB_DEAD_AFTER_S, TOUCH_S, FolderInUse, folder_lock
from gigamil.parallel.meeting import Meeting, end_process, meet
from gigamil.parallel.topology import Topology, detect_topology, export_topology, launcher_job, told_rank
from gigamil.registry import import_plugins
from gigamil.train.agree import FirstRankLost, StopSignals
from gigamil.train.engine import start_distributed
from gigamil.train.handshake import common_facts, refuse_own_folders, refuse_unlike_ranks, told_to_all
from gigamil.train.launch import has_parent, is_consequence, report_loss, report_outcome, restore_devices
from gigamil.train.loop import Trainer
from gigamil.train.records import RunRecord

_log = logging.getLogger("gigamil")
_TERMINAL = os.dup(2)  # ranks other than 0 write to files later
_PATIENCE_S = 20.0  # with the others, for a rank that has nothing but an error to tell


def main(argv: Sequence[str] | None = None) -> int:
    """Train on this rank; returns the exit code (0 done, 5 interrupted and resumable, others in the README)."""
    parser = argparse.ArgumentParser(prog="python -m gigamil.train.worker", description=__doc__)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("--plugin", action="append", default=[], help="module that registers your encoders, ...")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher; RANK is used
    arguments, overrides = parser.parse_known_args(argv)
    restore_devices()
    try:
        topology = detect_topology()
        # Signals are noted from the start on: one that comes while libraries load stops the run at its first step.
        with report_outcome(topology.rank), StopSignals() as stop:
            try:
                config = load_config(arguments.config, overrides)
            except GigamilError as error:
                _tell_others(topology, error)
                raise
            run_rank(config, arguments.plugin, stop)
    except Interrupted as error:
        _tell(error)
        # All ranks agreed to stop; the DeepSpeed launcher would report a code other than 0 as a crash.
        return 0 if has_parent() else error.exit_code
    except GigamilError as error:
        _tell(error)
        return error.exit_code
    except Exception:
        if has_parent():  # the command prints the message, and the traceback is in this rank's log
            return TrainingError.exit_code
        raise
    return 0


def run_rank(config: RunConfig, plugins: Sequence[str] = (), stop: StopSignals | None = None) -> None:
    """Meet the other ranks, find that all are alike, train, leave.

    Args:
        config: resolved configuration.
        plugins: modules that register encoders, aggregators or losses.
        stop: signals noted so far.
    Raises:
        EnvironmentFault: ranks did not come, or differ; ConfigError: their configurations do.
    """
    topology = detect_topology()
    export_topology(topology)
    out, timeout_s = config.bookkeeping.out, config.execution.timeout_s
    meeting = meet(topology, timeout_s, (lambda: stop.asked) if stop is not None else (lambda: False))
    holds_folder = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(_watched(meeting, topology, out, holds_folder))
        with told_to_all(meeting):
            topology = detect_topology(config.execution.group_size)
            if topology.rank == 0:
                _patient_lock(stack, out)
                holds_folder.set()
            stack.enter_context(_own_log(out / "logs", topology))
            device = choose_device(config.execution.device, topology)
            torch.set_num_threads(config.execution.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
            import_plugins(plugins)
        refuse_unlike_ranks(meeting, common_facts(config, device, topology))
        refuse_own_folders(meeting, out)
        ranks = replace(start_distributed(topology, device, timeout_s, meeting.store), hosts=meeting.hosts)
        Trainer(config, ranks, device, stop, meeting).fit()
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()


def _tell_others(topology: Topology, error: GigamilError) -> None:
    """This rank cannot even read its configuration: the others may have read theirs, and wait."""
    if topology.world_size == 1:
        return
    try:
        export_topology(topology)
        meeting = meet(topology, _PATIENCE_S)
    except GigamilError:  # nobody came: what is to be told is the first error
        return
    try:
        with told_to_all(meeting):
            raise error
    finally:
        if meeting.is_first:
            time.sleep(1.0)  # the store goes with this rank, and the others look a few times a second


@contextmanager
def _watched(meeting: Meeting, topology: Topology, out: Path, holds_folder: threading.Event) -> Iterator[None]:
    """Ranks watch each other inside; if one is lost, this one ends, whatever it waits in."""

    def end(what: str, is_first_lost: bool) -> None:
        message = f"{what}. All ranks end; the same command continues from the last checkpoint."
        _log.error("%s", message)  # rank 0 has the terminal
        if is_first_lost and topology.local_rank == 0 and not has_parent():
            os.write(_TERMINAL, f"gigamil: rank {topology.rank}: {message}\n".encode())
        try:
            report_loss(topology.rank, message)
            if holds_folder.is_set():  # else run.json may be that of another run
                RunRecord(out / "run.json").update(status="failed", error=message)
        finally:
            os._exit(TrainingError.exit_code)  # the main thread may be in a collective that never ends

    meeting.watch(end)
    try:
        yield
    except Exception as error:
        if isinstance(error, FirstRankLost) or is_consequence(error):
            meeting.await_verdict()
        meeting.leave(str(error) if isinstance(error, GigamilError) else f"{type(error).__name__}: {error}")
        raise
    meeting.leave()


def choose_device(wanted: str, topology: Topology) -> torch.device:
    """The device of this rank.

    Raises:
        EnvironmentFault: CUDA is asked for and not there, or there are fewer GPUs than ranks on this machine.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if topology.local_rank >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"local rank {topology.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. Lower "
            "execution.ranks, or set execution.device to cpu."
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    # float32 means float32: TF32 convolutions would differ from the CPU's in the third digit.
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return device


def _tell(error: GigamilError) -> None:
    """Print a message once: by the command that started the ranks, or by the first rank of another launcher.

    What a rank met before it agreed with the others, only it can tell; and that the first rank was lost, the others.
    """
    rank = told_rank()
    if not has_parent() and (rank == "0" or not error.is_agreed):
        os.write(_TERMINAL, f"gigamil: rank {rank}: {error}\n".encode())


def _patient_lock(stack: ExitStack, out: Path) -> None:
    # The ranks of a killed command notice its end within half a second; a moment's patience spares a second try.
    start, job, is_told = time.monotonic(), launcher_job(), False
    while True:
        try:
            stack.enter_context(folder_lock(out, "gigamil train", launcher_job=job))
            return
        except FolderInUse as error:
            is_same_job = job is not None and error.holder is not None and error.holder.launcher_job == job
            if time.monotonic() - start > (SAME_JOB_DEAD_AFTER_S + TOUCH_S if is_same_job else 2.0):
                raise
            if is_same_job and not is_told:
                _log.warning("job %s was started again; waiting until its lost rank 0 is known to be dead", job)
                is_told = True
            time.sleep(0.2)


@contextmanager
def _own_log(folder: Path, topology: Topology) -> Iterator[None]:
    """Rank 0 keeps the terminal and copies its log; the others write to files, so that one message is seen, not P."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank{topology.rank}.log"
    if topology.rank:
        with path.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(file)
    terminal = logging.StreamHandler()  # of rank 0; the others' is in their file already
    terminal.addFilter(lambda record: topology.rank == 0 and record.exc_info is None)
    _log.addHandler(terminal)
    try:
        yield
    except Interrupted:
        raise
    except GigamilError as error:
        file.handle(_log.makeRecord(_log.name, logging.ERROR, path.name, 0, str(error), (), None))
        raise
    except Exception:
        _log.exception("rank %d", topology.rank)
        raise
    finally:
        for handler in (file, terminal):
            _log.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    end_process(main())

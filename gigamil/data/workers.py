"""Child processes of which any may die: a crash (a segmentation fault in a decoder, no memory) costs one job only.

`concurrent.futures` gives up all waiting jobs when one child dies, hence these few lines.
"""

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# Children start from nothing: neither open slide handles nor threads of the parent are carried over.
_context = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Died:
    """The outcome of a job whose process ended before it answered."""

    exit_code: int

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"its process ended with exit code {self.exit_code}; the traceback is in the log above"
        name = signal.Signals(-self.exit_code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def run_isolated(
    function: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Generator[tuple[int, Result | Died], None, None]:
    """Apply a function to each job in child processes.

    Args:
        function: importable by name, as are the types of jobs and results. An exception in it ends the child.
        jobs: handed out in order, one at a time.
        num_workers: children at once. They end when the generator is closed, and with the parent, however that ends;
            Ctrl-C is for the parent alone.
    Yields:
        (position of the job, its result or how its process died), in the order in which jobs finish.
    """
    waiting = iter(enumerate(jobs))
    busy: dict[Connection, _Worker[Job, Result]] = {}
    try:
        for _ in range(min(num_workers, len(jobs))):
            _hire(_Worker(function), waiting, busy)
        while busy:
            for connection in wait(list(busy)):
                worker = busy.pop(connection)  # type: ignore[call-overload]
                position, result = worker.take()
                if isinstance(result, Died):
                    worker = _Worker(function)
                _hire(worker, waiting, busy)
                yield position, result
    finally:
        for worker in busy.values():
            worker.end()


class _Worker(Generic[Job, Result]):
    def __init__(self, function: Callable[[Job], Result]) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(function, theirs), daemon=True)
        with _interrupts_held_back():
            self._process.start()
        theirs.close()  # the child holds the only copy, so its death ends the connection
        self._position = -1

    def give(self, position: int, job: Job) -> None:
        self._position = position
        try:
            self.connection.send(job)
        except BrokenPipeError:
            return  # it died already; `take` says so

    def take(self) -> tuple[int, Result | Died]:
        try:
            return self._position, self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            self.connection.close()
            return self._position, Died(self._process.exitcode or 0)

    def end(self) -> None:
        self._process.terminate()  # before it could complain of half a message
        self._process.join()
        self.connection.close()


def _hire(
    worker: _Worker[Job, Result], waiting: Iterator[tuple[int, Job]], busy: dict[Connection, _Worker[Job, Result]]
) -> None:
    """Give a worker the next job, or end it if there is none."""
    following = next(waiting, None)
    if following is None:
        worker.end()
        return
    busy[worker.connection] = worker
    worker.give(*following)


def _serve(function: Callable[[Job], Result], connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(function(job))


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """For starting a child: it never sees a Ctrl-C, and ours comes when the block is over.

    A child inherits the mask before its first instruction. The mask does not keep the signal from our other threads
    (those of a BLAS), which hand it to the main thread; between the child's start and the pipe from which it reads
    its task, that would tear the start, and the child would print a traceback. So the handler waits too.
    """
    multiprocessing.resource_tracker.ensure_running()  # else the first start makes it, and lifts the mask in doing so
    in_main = threading.current_thread() is threading.main_thread()  # the only one that is interrupted, or may say how
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)


def _end_with_parent() -> None:
    # A parent that was killed cannot end us, and the next run must not meet our half-written files.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)

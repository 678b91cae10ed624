"""Child processes of which any may die: a crash (a segmentation fault in a decoder, no memory) costs one job only.

Each job can be given a limit of memory and of time.

`concurrent.futures` gives up all waiting jobs when one child dies, hence these few lines.
"""

import heapq
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import resource
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, Literal, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

# Children start from nothing: neither open slide handles nor threads of the parent are carried over.
_context = multiprocessing.get_context("spawn")
_OUT_OF_MEMORY = 86  # exit code of a child that met its limit; nothing else that we start uses it
_LIMIT_OF: dict[int, Literal["memory", "time"]] = {_OUT_OF_MEMORY: "memory", -signal.SIGALRM: "time"}
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Limits:
    """What one job may take.

    Attributes:
        memory: bytes of address space that a child may add to what it holds when it starts; where the system has no
            /proc it is not enforced.
        seconds: wall time of a job, without the start of its child, which is then killed.
    """

    memory: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Died:
    """The outcome of a job whose process ended before it answered; `limit` names the limit that it met, if one."""

    exit_code: int
    limit: Literal["memory", "time"] | None = None

    def __str__(self) -> str:
        if self.limit:
            return f"its process met its limit of {self.limit}"
        if self.exit_code >= 0:
            return f"its process ended with exit code {self.exit_code}; the traceback is in the log above"
        name = signal.Signals(-self.exit_code).name
        return f"its process was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def run_isolated(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_workers: int,
    *,
    limits: Limits | None = None,
    more: Callable[[int, Result | Died], Sequence[Job]] | None = None,
) -> Generator[tuple[int, Result | Died], None, None]:
    """Apply a function to each job in child processes.

    Args:
        function: importable by name, as are the types of jobs and results. An exception in it ends the child.
        jobs: handed out in order, one at a time.
        num_workers: children at once. They end when the generator is closed, and with the parent, however that ends;
            Ctrl-C is for the parent alone.
        limits: of each job; default: none.
        more: given a job's position and result, the jobs that follow from it. They share its position, and are handed
            out before jobs of later positions.
    Yields:
        (position of the job, its result or how its process died), in the order in which jobs finish.
    """
    limits = limits or Limits()
    tickets = itertools.count()  # among jobs of one position, first come, first served; jobs are never compared
    waiting = [(position, next(tickets), job) for position, job in enumerate(jobs)]  # ascending, so it is a heap
    busy: dict[Connection, _Worker[Job, Result]] = {}
    idle: list[_Worker[Job, Result]] = []

    def hand_out() -> None:
        while waiting and (idle or len(busy) < num_workers):
            worker = idle.pop() if idle else _Worker(function, limits)
            position, _, job = heapq.heappop(waiting)
            worker.give(position, job)
            busy[worker.connection] = worker

    try:
        hand_out()
        while busy:
            results = _results(busy, idle)
            if more:
                for position, result in results:
                    for job in more(position, result):
                        heapq.heappush(waiting, (position, next(tickets), job))
            hand_out()  # before the caller handles the results
            yield from results
    finally:
        for worker in (*busy.values(), *idle):
            worker.end()


def _results(
    busy: "dict[Connection, _Worker[Job, Result]]", idle: "list[_Worker[Job, Result]]"
) -> "list[tuple[int, Result | Died]]":
    """Wait for the next results; workers that are alive become idle."""
    results: list[tuple[int, Result | Died]] = []
    for connection in wait(list(busy)):
        worker = busy.pop(connection)  # type: ignore[call-overload]
        position, result = worker.take()
        if not isinstance(result, Died):
            idle.append(worker)
        results.append((position, result))
    return results


class _Worker(Generic[Job, Result]):
    def __init__(self, function: Callable[[Job], Result], limits: Limits) -> None:
        self.connection, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(function, theirs, limits), daemon=True)
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
            code = self._process.exitcode or 0
            return self._position, Died(code, _LIMIT_OF.get(code))

    def end(self) -> None:
        self._process.terminate()  # before it could complain of half a message
        self._process.join()
        self.connection.close()


def _serve(function: Callable[[Job], Result], connection: Connection, limits: Limits) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(limits)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        # The kernel's timer: it also ends a decoder that never comes back to Python. The signal's default is the end.
        signal.setitimer(signal.ITIMER_REAL, limits.seconds or 0.0)
        try:
            result = function(job)
        except MemoryError:
            # Not an answer: what the job leaves behind would take from the next one's share.
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        connection.send(result)


def _limit(limits: Limits) -> None:
    """Bound what this process may take. Its functions are imported by now, so they are part of its size."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of each broken slide would fill the disk
    if limits.memory is not None and _STATM.exists():
        size = int(_STATM.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + limits.memory,) * 2)


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

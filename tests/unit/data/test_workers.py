"""A child that dies costs its own job; the others are done. (Functions of the standard library: children import them.)"""

import math
import os
import resource
import signal
import subprocess
import sys
import time

import psutil

from gigamil.data.workers import Died, Limits, run_isolated


def test_results_come_back_under_their_position() -> None:
    assert dict(run_isolated(math.sqrt, [0.0, 1.0, 4.0, 9.0, 16.0], 2)) == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    assert list(run_isolated(math.sqrt, [], 2)) == []


def test_an_exception_and_a_signal_cost_one_job_each(capfd) -> None:
    found = dict(run_isolated(math.sqrt, [4.0, -1.0, 9.0], 1))
    assert found == {0: 2.0, 1: Died(1), 2: 3.0}
    assert "exit code 1; the traceback is in the log above" in str(found[1])
    assert "ValueError" in capfd.readouterr().err
    # SIGCHLD is ignored by default, so that job ends well.
    found = dict(run_isolated(signal.raise_signal, [signal.SIGKILL, signal.SIGCHLD, signal.SIGSEGV], 2))
    assert found == {0: Died(-signal.SIGKILL), 1: None, 2: Died(-signal.SIGSEGV)}
    assert str(found[0]) == "its process was killed by SIGKILL (out of memory?)"
    assert str(found[2]) == "its process was killed by SIGSEGV"


def test_children_end_when_the_caller_stops_listening() -> None:
    before = set(psutil.Process().children())
    results = run_isolated(time.sleep, [0.0, 600.0], 2)
    assert next(results) == (0, None)
    results.close()
    names = [child.cmdline() for child in set(psutil.Process().children()) - before]
    assert [words for words in names if "spawn_main" in " ".join(words)] == []


def test_children_end_with_a_killed_parent() -> None:
    code = "import time; from gigamil.data.workers import run_isolated as r; list(r(time.sleep, [0, 600, 600], 2))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        children: list[psutil.Process] = []
        while len(children) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            found = psutil.Process(parent.pid).children()
            children = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
        assert len(children) == 2
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def test_jobs_that_follow_go_before_those_of_later_positions() -> None:
    def more(position: int, result: float | Died) -> list[float]:
        return [81.0, 1.0] if (position, result) == (0, 4.0) else []

    found = list(run_isolated(math.sqrt, [16.0, 25.0], 1, more=more))
    assert found == [(0, 4.0), (0, 9.0), (0, 1.0), (1, 5.0)]
    assert sorted(run_isolated(math.sqrt, [16.0, 25.0], 3, more=more)) == sorted(found)


def test_a_worker_without_a_job_waits_for_one_that_follows() -> None:
    def more(position: int, result: float | Died) -> list[float]:
        return [0.0] * 3 if position == 1 and not followed and not followed.append(1) else []

    followed: list[int] = []
    assert [position for position, _ in run_isolated(time.sleep, [0.0, 1.0], 2, more=more)] == [0, 1, 1, 1, 1]


def test_a_job_that_takes_too_long_is_ended_and_named() -> None:
    start = time.monotonic()
    found = dict(run_isolated(time.sleep, [600.0, 0.0, 0.0], 1, limits=Limits(seconds=0.5)))
    assert found == {0: Died(-signal.SIGALRM, "time"), 1: None, 2: None}
    assert time.monotonic() - start < 60
    assert str(found[0]) == "its process met its limit of time"


def test_the_limit_of_time_is_that_of_a_job_not_of_a_child() -> None:
    assert dict(run_isolated(time.sleep, [0.5] * 3, 1, limits=Limits(seconds=1))) == dict.fromkeys(range(3))


def test_a_worker_that_waits_for_a_job_has_no_limit_of_time() -> None:
    def more(position: int, result: None | Died) -> list[float]:
        followed.append(1)
        return {2: [0.8], 3: [0.0, 0.0]}.get(len(followed), [])

    followed: list[int] = []
    found = list(run_isolated(time.sleep, [0.0, 0.8], 2, limits=Limits(seconds=1.2), more=more))
    assert found == [(0, None), *[(1, None)] * 4]


def test_a_job_that_takes_too_much_memory_is_ended_and_named() -> None:
    found = dict(run_isolated(bytes, [4 << 30, 1 << 10, 64 << 20], 1, limits=Limits(memory=512 << 20)))
    assert {position: len(result) for position, result in found.items() if position} == {1: 1 << 10, 2: 64 << 20}
    assert isinstance(found[0], Died)
    assert found[0].limit == "memory"


def test_no_child_leaves_a_core_file() -> None:
    assert dict(run_isolated(resource.getrlimit, [resource.RLIMIT_CORE], 1)) == {0: (0, 0)}

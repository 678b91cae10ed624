"""A child that dies costs its own job; the others are done. (Functions of the standard library: children import them.)"""

import math
import os
import signal
import subprocess
import sys
import time

import psutil

from gigamil.data.workers import Died, run_isolated


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

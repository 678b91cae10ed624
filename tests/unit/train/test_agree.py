"""One process decides as many do; a signal asks for a stop and handlers are put back. (Ranks: tests/distributed.)"""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from gigamil.errors import ShardError
from gigamil.parallel.topology import Topology
from gigamil.train.agree import Decision, FirstRankLost, StopSignals, _wait_for_first_rank, agree
from gigamil.train.step import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(Topology())


@pytest.mark.parametrize(("stop", "save"), [(False, False), (True, False), (False, True), (True, True)])
def test_one_process_decides_for_itself(stop: bool, save: bool) -> None:
    assert agree(ALONE, CPU, error=None, stop=stop, save=save) == Decision(stop, save)


def test_one_process_raises_its_own_error() -> None:
    error = ShardError("slide 'a' is damaged")
    with pytest.raises(ShardError) as caught:
        agree(ALONE, CPU, error=error, stop=True, save=True)
    assert caught.value is error


FIRST_RANK = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def test_a_first_rank_that_dies_at_its_work_is_not_waited_for() -> None:
    command = [sys.executable, "-c", FIRST_RANK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        store = dist.TCPStore("127.0.0.1", int(process.stdout.readline()), is_master=False)
        threading.Timer(1.0, process.kill).start()
        start = time.monotonic()
        with pytest.raises(FirstRankLost, match="rank 0 was lost .* The same command continues"):
            _wait_for_first_rank(1, store)
        assert 0.5 < time.monotonic() - start < 10


def test_the_wait_for_the_first_rank_has_an_end() -> None:
    with pytest.raises(FirstRankLost, match="rank 0 was lost .* not done after 0.2 s"):
        _wait_for_first_rank(1, dist.HashStore(), longest_s=0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_and_does_not_end(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
    assert signal.getsignal(number) is before


def test_handlers_are_put_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="inside"), StopSignals():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]

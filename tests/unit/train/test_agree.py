"""One process decides as many do; a signal asks for a stop and handlers are put back. (Ranks: tests/distributed.)"""

import os
import signal
import threading

import pytest
import torch

from gigamil.errors import ShardError
from gigamil.parallel.topology import Topology
from gigamil.train.agree import Decision, StopSignals, agree
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

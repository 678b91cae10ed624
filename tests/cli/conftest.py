"""Commands as a user types them: in a process of their own, with a time limit, and with their output on failure."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

TIMEOUT_S = 200


class Command:
    """`gigamil ...` in its own session, so that a test can kill all of it."""

    def __init__(self, words: list[str], folder: Path, log: Path) -> None:
        self.log = log
        self._stream = log.open("ab")
        env = os.environ | {"PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gigamil", *words],
            cwd=folder,
            env=env,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Exit code."""
        return self.process.wait(timeout_s)

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Wait until something is seen; fails if the command ends or the time runs out first."""
        deadline = time.monotonic() + TIMEOUT_S
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{what} was not seen; the command says:\n{self.output()[-3000:]}")
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """Its rank processes."""
        found = [p for p in psutil.Process(self.process.pid).children(recursive=True) if p.is_running()]
        return [
            p
            for p in found
            if "gigamil.train.worker" in p.cmdline() and "deepspeed.launcher" not in " ".join(p.cmdline())
        ]

    def kill(self) -> None:
        """SIGKILL to the command and all that it started, at once."""
        everything = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)
        psutil.wait_procs(everything, timeout=10)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.kill()
        self._stream.close()


@pytest.fixture
def gigamil(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start `gigamil words...` in the test's folder."""
    started: list[Command] = []

    def start(*words: object) -> Command:
        started.append(Command([str(word) for word in words], tmp_path, tmp_path / f"output{len(started)}.log"))
        return started[-1]

    yield start
    for command in started:
        command.close()

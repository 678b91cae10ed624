"""One rank fails, or the folder is in use: everybody leaves soon, with one message and the right exit code."""

import time
from collections.abc import Callable
from pathlib import Path

from gigamil.config.load import to_yaml
from gigamil.testing.runs import tiny_run

PLUGIN = '''
"""An encoder that fails on one rank after some calls, as a bug or a lack of memory would."""
import os
from gigamil.models.encoder import SmallCNN, encoders


@encoders.register("fails_on_rank_1")
class Failing(SmallCNN):
    calls = 0

    def forward(self, image, key):
        Failing.calls += 1
        if os.environ["RANK"] == "1" and Failing.calls > 12:
            raise MemoryError("no memory for this chunk")
        return super().forward(image, key)
'''


def test_a_rank_that_raises_ends_all_with_its_message(tmp_path: Path, gigamil: Callable[..., object]) -> None:
    (tmp_path / "failing_plugin.py").write_text(PLUGIN)
    encoder = {"name": "fails_on_rank_1", "options": {"width": 4}}
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"encoder": encoder, "epochs": 50})
    (tmp_path / "run.yaml").write_text(to_yaml(config))

    command = gigamil("train", tmp_path / "run.yaml", "--plugin", "failing_plugin")
    log = config.bookkeeping.out / "logs" / "rank1.log"
    command.wait_for(lambda: log.is_file() and "MemoryError" in log.read_text(), "the error in the log of rank 1")
    start = time.monotonic()
    assert command.wait(60) == 6
    assert time.monotonic() - start < 30

    told = [line for line in command.output().splitlines() if line.startswith("gigamil:")]
    assert len(told) == 1, command.output()
    assert "MemoryError: no memory for this chunk (rank 1;" in told[0]
    assert "Traceback" not in command.output()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, gigamil: Callable[..., object]) -> None:
    config = tiny_run(tmp_path, science={"epochs": 500})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    first = gigamil("train", tmp_path / "run.yaml")
    lock = config.bookkeeping.out / ".gigamil.lock"
    first.wait_for(lambda: lock.is_file() and bool(lock.read_text()), "the lock")

    second = gigamil("train", tmp_path / "run.yaml")
    assert second.wait() == 4
    assert "is in use by `gigamil train`" in second.output()
    assert first.process.poll() is None

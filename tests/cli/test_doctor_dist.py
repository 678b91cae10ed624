"""`gigamil doctor --dist` as a user types it: alone, under launchers, and where something is wrong."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gigamil.train.launch import free_port

TIMEOUT_S = 90
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python module in the test's folder, with more variables."""
    started: list[subprocess.Popen[str]] = []

    def start_module(*words: object, **variables: object) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | {"DS_ACCELERATOR": "cpu"} | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_module
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate(timeout=20)


def rank(number: int, world: int, port: int) -> dict[str, object]:
    """What a launcher tells a rank of this machine."""
    return {
        "RANK": number,
        "WORLD_SIZE": world,
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def assert_good(text: str, num_ranks: int) -> None:
    assert f"ok    ranks          {num_ranks} on 1 host, {num_ranks} on each, all came\n" in text
    for name in ("meeting", "versions", "code", "clocks", "network", "shared folder", "all-reduce"):
        assert text.count(f"ok    {name:<13}  ") == 1, text
    assert text.count("these ranks can train together.") == 1


def test_ranks_of_a_launcher_report_once(start: Start, tmp_path: Path) -> None:
    port = free_port()
    ranks = [start("gigamil", "doctor", "--dist", "--out", tmp_path / "runs", **rank(i, 2, port)) for i in (0, 1)]
    texts = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], texts
    assert_good(texts[0], 2)
    assert texts[1] == ""
    assert list(tmp_path.iterdir()) == []


def test_without_the_address_of_the_first_host_it_says_what_to_export(start: Start) -> None:
    variables = rank(0, 2, 1) | {"MASTER_ADDR": ""}
    process = start("gigamil", "doctor", "--dist", **{name: value for name, value in variables.items() if value != ""})
    text = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 4
    assert text.startswith(
        f"gigamil: rank 0 on host '{socket.gethostname()}': MASTER_ADDR is not set for a world of 2."
    )
    assert "export MASTER_ADDR" in text


@pytest.mark.slow
class TestLaunchers:
    def test_none(self, start: Start) -> None:
        process = start("gigamil", "doctor", "--dist", "--ranks", "3")
        text = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 0, text
        assert_good(text, 3)

    def test_torchrun(self, start: Start) -> None:
        words = ("--standalone", "--nproc-per-node", "2", "-m", "gigamil", "doctor", "--dist")
        process = start("torch.distributed.run", *words)
        text = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 0, text
        assert_good(text, 2)

    def test_deepspeed(self, start: Start) -> None:
        words = ("--hostfile", os.devnull, "--num_gpus", "2", "--master_port", free_port(), "--module", "gigamil")
        process = start("deepspeed.launcher.runner", *words, "doctor", "--dist")
        text = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 0, text
        assert_good(text, 2)

    def test_srun(self, start: Start) -> None:
        port = free_port()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2}
        tasks = [start("gigamil", "doctor", "--dist", SLURM_PROCID=i, SLURM_LOCALID=i, **where) for i in (0, 1)]
        texts = [task.communicate(timeout=TIMEOUT_S)[0] for task in tasks]
        assert [task.returncode for task in tasks] == [0, 0], texts
        assert_good(texts[0], 2)


@pytest.mark.slow
class TestWhatIsWrong:
    def test_an_unfit_machine_is_code_4_without_a_launcher(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        process = start("gigamil", "doctor", "--dist", "--out", tmp_path / "file" / "runs")
        text = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 4
        host = socket.gethostname()
        assert f"fail  shared folder  '{tmp_path}/file/runs' cannot be written on {host}: Not a directory\n" in text
        assert text.endswith("gigamil: these ranks are not fit to train together: see the report above\n")

    def test_ranks_with_other_folders_are_told_so(self, start: Start, tmp_path: Path) -> None:
        port = free_port()
        folders = [tmp_path / "a", tmp_path / "b"]
        for folder in folders:
            folder.mkdir()
        # Two machines with a rank each, as far as they know: each has its own folder.
        alone = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        ranks = [
            start("gigamil", "doctor", "--dist", "--out", folders[i], **(rank(i, 2, port) | alone)) for i in (0, 1)
        ]
        texts = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [4, 4]
        assert f"fail  shared folder  '{folders[0]}' of" in texts[0]

    def test_a_rank_that_never_comes_is_named(self, start: Start) -> None:
        begin = time.monotonic()
        port = free_port()
        ranks = [start("gigamil", "doctor", "--dist", **rank(i, 3, port)) for i in (0, 2)]
        texts = [process.communicate(timeout=TIMEOUT_S)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [4, 4]
        assert "2 of 3 ranks came within 25 s" in texts[0]
        assert "without rank 1." in texts[0]
        assert texts[1] == ""  # all ranks know it, one says it
        assert time.monotonic() - begin < 60  # imports on a busy machine included

    def test_a_port_in_use_is_named(self, start: Start) -> None:
        with socket.create_server(("", 0)) as taken:
            port = taken.getsockname()[1]
            process = start("gigamil", "doctor", "--dist", **rank(0, 2, port))
            text = process.communicate(timeout=TIMEOUT_S)[0]
        assert process.returncode == 4
        assert (
            f"rank 0 of 2 on host '{socket.gethostname()}' could not listen for the others at 127.0.0.1:{port}" in text
        )
        assert "Choose another MASTER_PORT" in text

"""Ranks that cannot train together say so within seconds, once, with the cure: real workers, started by hand."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gigamil.config.load import to_yaml
from gigamil.testing.runs import tiny_run
from gigamil.train.launch import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(tiny_run(tmp_path, execution={"timeout_s": 20})))
    return path


def _outcome(*commands: list[str], num_ranks: int, **env: str) -> tuple[list[int], list[str]]:
    """Start a worker for each command, as ranks 0, 1, ... of `num_ranks`; exit codes, and what each printed."""
    # Only what is named here: a launcher around the tests must not be found.
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC", "MASTER"))
    }
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | env
    processes = []
    for rank, command in enumerate(commands):
        own = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "gigamil.train.worker", *command],
                env=clean
                | {name: value for name, value in place.items() if value}
                | {k: str(v) for k, v in own.items()},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        deadline = time.monotonic() + 60
        printed = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def test_ranks_of_different_configurations_name_the_key_once(yaml: Path) -> None:
    codes, printed = _outcome([str(yaml)], [str(yaml), "--science.seed", "7"], num_ranks=2)
    assert codes == [2, 2]
    assert "science.seed is 0 on host" in printed[0]
    assert "and 7 on host" in printed[0]
    assert "Start all with the same YAML" in printed[0]
    assert "science.seed" not in printed[1]


@pytest.mark.slow
def test_a_rank_without_the_yaml_is_named_to_the_others(yaml: Path) -> None:
    codes, printed = _outcome([str(yaml)], [str(yaml.with_name("none.yaml"))], num_ranks=2)
    assert codes == [2, 2]
    assert "rank 1 on host" in printed[0]
    assert "none.yaml" in printed[0]


@pytest.mark.slow
def test_the_first_rank_without_the_yaml_tells_the_others_before_it_leaves(yaml: Path) -> None:
    codes, printed = _outcome([str(yaml.with_name("none.yaml"))], [str(yaml)], num_ranks=2)
    assert codes == [2, 2]
    assert "rank 0 on host" in printed[0]
    assert "none.yaml" in printed[0]
    assert "was lost" not in printed[1]  # the store goes with rank 0


def test_a_wrong_yaml_is_told_also_where_nobody_can_meet(yaml: Path) -> None:
    yaml.write_text("science: {sed: 1}")
    codes, printed = _outcome([str(yaml)], num_ranks=2, MASTER_ADDR="")
    assert codes == [2]
    assert "did you mean 'science.seed'" in printed[0]
    assert "MASTER_ADDR" not in printed[0]


@pytest.mark.slow
def test_a_group_size_that_does_not_divide_is_told_once(yaml: Path) -> None:
    command = [str(yaml), "--execution.group_size", "3"]
    codes, printed = _outcome(command, command, num_ranks=2)
    assert codes == [2, 2]
    assert "group_size=3 does not divide world size 2" in printed[0]
    assert "group_size" not in printed[1]


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_told_with_its_host(yaml: Path) -> None:
    command = [str(yaml), "--execution.device", "cuda"]
    codes, printed = _outcome(command, command, num_ranks=2, CUDA_VISIBLE_DEVICES="-1")
    assert codes == [4, 4]
    assert f"rank 0 on host '{socket.gethostname()}': local rank 0 has no GPU" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set for a world of 2"),
        ({"MASTER_PORT": "taken"}, "Is the port in use? Choose another MASTER_PORT"),
    ],
)
def test_a_place_where_nobody_can_meet(yaml: Path, env: dict[str, str], words: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        if "MASTER_PORT" in env:
            env = {"MASTER_PORT": str(taken.getsockname()[1])}
        codes, printed = _outcome([str(yaml)], num_ranks=2, **env)
    assert codes == [4]
    assert words in printed[0]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named(yaml: Path) -> None:
    start = time.monotonic()
    codes, printed = _outcome([str(yaml)], num_ranks=2)
    assert time.monotonic() - start < 55
    assert codes == [4]
    assert "1 of 2 ranks came within 20 s" in printed[0]
    assert "without rank 1" in printed[0]


def test_what_aborts_while_the_interpreter_ends_is_no_failure_of_the_run(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "aborts.py").write_text("import atexit, os\natexit.register(os.abort)\n")
    words = [str(yaml), "--science.epochs", "1", "--plugin", "aborts"]
    codes, printed = _outcome(words, num_ranks=1, PYTHONPATH=str(tmp_path))
    assert codes == [0], printed

"""One run per folder; a dead run does not block the next one."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gigamil.errors import EnvironmentFault
from gigamil.lock import DEAD_AFTER_S, LOCK_NAME, SAME_JOB_DEAD_AFTER_S, TOUCH_S, FolderInUse, folder_lock
from gigamil.parallel.meeting import PATIENCE_S

HOLD = """
import sys, time
from gigamil.lock import folder_lock
with folder_lock(sys.argv[1], "gigamil train"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder_process(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.stdout.close()
    return process


def holder_file(folder: Path, **changes: object) -> None:
    me = {
        "what": "gigamil tile",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }
    folder.mkdir(exist_ok=True)
    (folder / LOCK_NAME).write_text(json.dumps(me | changes))


def test_held_by_another_process_then_by_its_corpse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = holder_process(tmp_path)
    try:
        with (
            pytest.raises(EnvironmentFault, match=rf"in use by `gigamil train`, process {process.pid} on .*delete"),
            folder_lock(tmp_path, "gigamil tile"),
        ):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with caplog.at_level(logging.WARNING), folder_lock(tmp_path, "gigamil tile"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert f"took over the lock of a run that is dead (`gigamil train`, process {process.pid}" in caplog.text
    assert not (tmp_path / LOCK_NAME).exists()


def test_folder_is_made_and_freed_also_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"

    def fail_inside() -> None:
        with folder_lock(folder, "first"):
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail_inside()
    with folder_lock(folder, "second"):
        assert (folder / LOCK_NAME).exists()
    assert list(folder.iterdir()) == []


def test_not_twice_in_one_process(tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path, "first"),
        pytest.raises(EnvironmentFault, match=f"in use by `first`, process {os.getpid()}"),
        folder_lock(tmp_path, "second"),
    ):
        pass


def set_age(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def test_another_host_is_believed_while_it_touches_its_lock(tmp_path: Path) -> None:
    holder_file(tmp_path, host="node-17", pid=1)
    set_age(tmp_path / LOCK_NAME, DEAD_AFTER_S - 10)
    with (
        pytest.raises(EnvironmentFault, match=r"process 1 on node-17.* dead, try again in 2 minutes, or delete"),
        folder_lock(tmp_path, "x"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_a_dead_run_on_another_host_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder_file(tmp_path, host="node-17", pid=1)
    set_age(tmp_path / LOCK_NAME, DEAD_AFTER_S + 10)
    with caplog.at_level(logging.WARNING), folder_lock(tmp_path, "x"):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["host"] == socket.gethostname()
    assert "took over the lock of a run that is dead (`gigamil tile`, process 1 on node-17" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("job", "is_taken"), [("17", True), ("18", False), (None, False)])
def test_a_job_that_was_started_again_elsewhere_waits_half_a_minute(
    tmp_path: Path, job: str | None, *, is_taken: bool
) -> None:
    holder_file(tmp_path, host="node-17", pid=1, launcher_job="17")
    set_age(tmp_path / LOCK_NAME, SAME_JOB_DEAD_AFTER_S + 10)
    if is_taken:
        with folder_lock(tmp_path, "x", launcher_job=job):
            assert json.loads((tmp_path / LOCK_NAME).read_text())["launcher_job"] == job
    else:
        with pytest.raises(FolderInUse) as refused, folder_lock(tmp_path, "x", launcher_job=job):
            pass
        assert refused.value.holder is not None
        assert refused.value.holder.launcher_job == "17"


def test_half_a_minute_is_longer_than_what_is_left_of_a_job() -> None:
    assert SAME_JOB_DEAD_AFTER_S > max(PATIENCE_S, 2 * TOUCH_S)


def test_the_holder_touches_its_lock_until_it_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DEAD_AFTER_S >= 10 * TOUCH_S
    monkeypatch.setattr("gigamil.lock.TOUCH_S", 0.01)
    file = tmp_path / LOCK_NAME
    with folder_lock(tmp_path, "x"):
        assert "gigamil-lock" in {thread.name for thread in threading.enumerate() if thread.daemon}
        set_age(file, 1000)
        deadline = time.monotonic() + 30
        while time.time() - file.stat().st_mtime > 500 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - file.stat().st_mtime < 500
    assert "gigamil-lock" not in {thread.name for thread in threading.enumerate()}


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    holder_file(tmp_path, started=psutil.Process().create_time() - 3600)
    with folder_lock(tmp_path, "x"):
        pass


def test_a_living_holder_without_a_kernel_lock_is_believed(tmp_path: Path) -> None:
    holder_file(tmp_path)
    with pytest.raises(EnvironmentFault, match="in use by `gigamil tile`"), folder_lock(tmp_path, "x"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_file_that_was_never_finished_does_not_block(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_NAME).write_text(text)
    with folder_lock(tmp_path, "x"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(EnvironmentFault, match="cannot be locked.*Name a writable one"),
        folder_lock(tmp_path / "file", "x"),
    ):
        pass


def test_jobs_of_one_array_share_a_folder(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "first", (1, 3)), folder_lock(tmp_path, "third", (3, 3)):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held", "wanted"),
    [((1, 3), (1, 3)), ((1, 3), (2, 4)), ((1, 3), None), (None, (1, 3))],
    ids=["the same job", "another array", "a run of its own", "beside a run of its own"],
)
def test_others_do_not_share_it_with_them(
    tmp_path: Path, held: tuple[int, int] | None, wanted: tuple[int, int] | None
) -> None:
    with folder_lock(tmp_path, "gigamil tile, the holder", held):
        before = sorted(tmp_path.iterdir())
        start = time.monotonic()
        with (
            pytest.raises(EnvironmentFault, match=f"in use by `gigamil tile, the holder`, process {os.getpid()}"),
            folder_lock(tmp_path, "x", wanted),
        ):
            pass
        assert time.monotonic() - start < 2
        assert sorted(tmp_path.iterdir()) == before
    with folder_lock(tmp_path, "x", wanted):
        pass


@pytest.mark.parametrize("wanted", [None, (1, 4)])
def test_dead_jobs_of_another_array_are_swept_away(tmp_path: Path, wanted: tuple[int, int] | None) -> None:
    holder_file(tmp_path, started=psutil.Process().create_time() - 3600)
    (tmp_path / LOCK_NAME).rename(tmp_path / ".gigamil-job-2-of-3.lock")
    (tmp_path / ".gigamil-mine.lock").touch()
    with folder_lock(tmp_path, "x", wanted):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".gigamil-mine.lock"]


def test_a_living_job_on_another_host_is_believed(tmp_path: Path) -> None:
    holder_file(tmp_path, host="node-17", pid=1)
    (tmp_path / LOCK_NAME).rename(tmp_path / ".gigamil-job-2-of-3.lock")
    with pytest.raises(EnvironmentFault, match="process 1 on node-17"), folder_lock(tmp_path, "x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".gigamil-job-2-of-3.lock"]


def test_of_many_that_start_at_once_never_two_get_in(tmp_path: Path) -> None:
    """Alternating: runs of their own, and jobs of two arrays; only jobs of one array may be inside together."""
    inside: list[tuple[int, int] | None] = []
    wrong: list[object] = []
    got_in = threading.Event()

    def try_often(job: tuple[int, int] | None) -> None:
        for _ in range(30):
            try:
                with folder_lock(tmp_path, "x", job):
                    inside.append(job)
                    others = list(inside)
                    if len(others) > 1 and (None in others or len({n for _, n in others}) > 1):
                        wrong.append(others)
                    got_in.set()
                    inside.remove(job)
            except EnvironmentFault:
                continue

    jobs = [None, None, (1, 2), (2, 2), (1, 3), (2, 3)]
    threads = [threading.Thread(target=try_often, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got_in.is_set()
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [LOCK_NAME, ".gigamil-job-1-of-2.lock"])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "precious").write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "precious")
    with (
        pytest.raises(EnvironmentFault, match=rf"'.*{name}' is a symbolic link to '.*precious'\. Remove it"),
        folder_lock(folder, "x"),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "precious"

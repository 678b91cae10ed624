"""What a machine does is sampled into a file that a killed run leaves readable, and never ends a run."""

import json
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from gigamil.train import system
from gigamil.train.follow import followed_files, metrics_of
from gigamil.train.system import SystemMeter, sample_system

CPU = torch.device("cpu")


def file_of(logs: Path) -> Path:
    return logs / f"system_{socket.gethostname()}.jsonl"


def sampled(logs: Path, num: int) -> list[dict[str, object]]:
    """Sample until there are so many lines; all of them that are whole."""
    deadline = time.monotonic() + 20
    with sample_system(logs, 0.01, CPU):
        while not file_of(logs).is_file() or file_of(logs).read_bytes().count(b"\n") < num:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    found = []
    for line in file_of(logs).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def test_samples_are_numbers_that_mlflow_gets_under_the_name_of_the_machine(tmp_path: Path) -> None:
    before = time.time()
    [first, second, *_] = sampled(tmp_path / "logs", 2)
    assert [first["step"], second["step"]] == [1, 2]
    assert before - 0.01 < first["time"] / 1000 <= second["time"] / 1000 <= time.time()
    assert 0 <= second["cpu_percent"] <= 100
    assert 0 < second["memory_percent"] <= 100
    assert 0 < second["memory_gb"] <= psutil.virtual_memory().total / 1e9
    names = {metric.name for metric in metrics_of(second)}
    assert {f"system/{socket.gethostname()}/{name}" for name in ("cpu_percent", "memory_gb")} <= names
    assert file_of(tmp_path / "logs") in followed_files(tmp_path)


def test_a_run_that_continues_goes_on_counting_after_a_torn_line(tmp_path: Path) -> None:
    sampled(tmp_path, 1)
    with file_of(tmp_path).open("a") as stream:
        stream.write('{"kind": "syst')
    num = file_of(tmp_path).read_bytes().count(b"\n")
    steps = [line["step"] for line in sampled(tmp_path, num + 3)]
    assert steps[:num] == list(range(1, num + 1))
    assert steps[num] == num + 1


def test_nothing_is_written_before_the_first_interval_and_no_thread_stays(tmp_path: Path) -> None:
    with sample_system(tmp_path / "logs", 100.0, CPU):
        assert any(thread.name == "gigamil-system" for thread in threading.enumerate())
    assert list(tmp_path.iterdir()) == []
    assert not any(thread.name == "gigamil-system" for thread in threading.enumerate())


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("a file")
    with sample_system(tmp_path / "logs", 0.01, CPU):
        deadline = time.monotonic() + 20
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert caplog.messages[0].startswith(f"'{file_of(tmp_path / 'logs')}' gets no more samples of this machine: ")


def test_rates_are_of_the_time_between_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, moved={"disk_read_mb_s": 10**9, "network_sent_mb_s": 5 * 10**6})
    monkeypatch.setattr(system, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(system, "_bytes_moved", lambda: dict(clock.moved))
    meter = SystemMeter(CPU)
    clock.now, clock.moved = 102.0, {"disk_read_mb_s": 10**9 + 6 * 10**6, "network_sent_mb_s": 0}
    found = meter.sample()
    assert found["disk_read_mb_s"] == 3.0
    assert found["network_sent_mb_s"] == 0.0  # an interface was taken away
    clock.now, clock.moved = 103.0, {"disk_read_mb_s": 10**9 + 6 * 10**6, "network_sent_mb_s": 10**6}
    assert meter.sample()["network_sent_mb_s"] == 1.0


def test_gpus_without_their_library_are_known_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_number: int) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "utilization", missing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    meter = SystemMeter(torch.device("cuda", 1))
    assert [meter.sample()["gpu1_memory_gb"] for _ in range(2)] == [50.0, 50.0]
    monkeypatch.setattr(torch.cuda, "utilization", lambda number: 40 + number)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda number: (number + 1) * 10**9)
    found = SystemMeter(torch.device("cuda", 1)).sample()
    assert {name: value for name, value in found.items() if name.startswith("gpu")} == {
        "gpu0_percent": 40.0,
        "gpu0_memory_gb": 1.0,
        "gpu1_percent": 41.0,
        "gpu1_memory_gb": 2.0,
    }

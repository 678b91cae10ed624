"""What a machine does while it trains: one rank of each machine samples it into `<out>/logs/system_<host>.jsonl`.

The MLflow thread of rank 0 follows these files over the shared folder (follow.py); no other rank has an MLflow client.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from gigamil.train.records import json_line

_log = logging.getLogger(__name__)


@contextmanager
def sample_system(logs: Path, every_s: float, device: torch.device) -> Iterator[None]:
    """Sample this machine every `every_s` seconds in a thread, from the first interval on.

    A file that cannot be written ends the samples with a warning, never the run.

    Args:
        logs: folder, the same on all machines; lines of an earlier session are kept.
        device: of this rank; of a GPU without nvidia-ml-py only its memory is known.
    """
    over = threading.Event()
    host = socket.gethostname()
    path = logs / f"system_{host}.jsonl"

    def work() -> None:
        meter, step = SystemMeter(device), None
        try:
            while not over.wait(every_s):
                step = (_num_samples(path) if step is None else step) + 1
                with path.open("a", encoding="utf-8") as stream:  # closed each time: then other machines see it, too
                    stream.write(json_line("system", host=host, step=step, **meter.sample()))
        except OSError as error:
            _log.warning("'%s' gets no more samples of this machine: %s", path, error)

    thread = threading.Thread(target=work, name="gigamil-system", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)  # a folder on a file server that is away must not hold the end of the run


class SystemMeter:
    """Samples of this machine: of its processors, disks and network since the sample before.

    Args:
        device: as in `sample_system`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_nvml = device.type == "cuda"  # until it is found missing
        self._time = time.monotonic()
        self._bytes = _bytes_moved()
        psutil.cpu_percent()  # counts from here

    def sample(self) -> dict[str, float]:
        """cpu_percent of all cores, memory_percent, memory_gb used; disk_* and network_* in MB/s; gpu<i>_percent (of the time
        with a kernel on it) and gpu<i>_memory_gb, by the numbers that this rank gives its GPUs."""
        memory = psutil.virtual_memory()
        found = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_percent": memory.percent,
            "memory_gb": memory.used / 1e9,
        }
        now, moved = time.monotonic(), _bytes_moved()
        seconds = max(now - self._time, 1e-3)
        for name, total in moved.items():
            # A disk or an interface that was taken away lowers the sum.
            found[name] = max(0, total - self._bytes.get(name, total)) / seconds / 1e6
        self._time, self._bytes = now, moved
        return {name: round(value, 3) for name, value in (found | self._gpus()).items()}

    def _gpus(self) -> dict[str, float]:
        if self._device.type != "cuda":
            return {}
        found: dict[str, float] = {}
        if self._has_nvml:
            try:
                for number in range(torch.cuda.device_count()):
                    found[f"gpu{number}_percent"] = float(torch.cuda.utilization(number))
                    found[f"gpu{number}_memory_gb"] = torch.cuda.device_memory_used(number) / 1e9
                return found
            except Exception as error:  # noqa: BLE001 - nvidia-ml-py is not installed, or raises its own types
                self._has_nvml = False
                _log.info("GPUs are sampled by their memory only: %s", error)
        free, total = torch.cuda.mem_get_info(self._device)  # of another rank's GPU it would take memory
        return {f"gpu{self._device.index or 0}_memory_gb": (total - free) / 1e9}


def _bytes_moved() -> dict[str, int]:
    """Bytes since the machine started; empty where the system does not tell (some containers)."""
    disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
    found: dict[str, int] = {}
    if disk is not None:
        found |= {"disk_read_mb_s": disk.read_bytes, "disk_write_mb_s": disk.write_bytes}
    if network is not None:
        found |= {"network_received_mb_s": network.bytes_recv, "network_sent_mb_s": network.bytes_sent}
    return found


def _num_samples(path: Path) -> int:
    """Lines of an earlier session, whose count goes on; one that a killed process did not finish is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        stream.seek(0)
        text = stream.read()
        if text and not text.endswith(b"\n"):
            stream.write(b"\n")
    return text.count(b"\n")

"""`gigamil doctor`: is this machine fit to run gigamil, and if not, what to type.

Only the standard library is imported here, and every other library is tried in a process of its own: a library that
breaks, hangs or crashes on import is a line of the report and not the end of it.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from gigamil.cores import num_cores
from gigamil.errors import EnvironmentFault

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
PROBE_TIMEOUT_S = 120.0

# One rank of the demo stays below 1.5 GB, so below 1 GiB nothing trains and below 4 GiB two ranks are tight.
MEMORY_FAIL, MEMORY_WARN = 1 * GIB, 4 * GIB
# A stored tile of 224 pixels takes about 20 kB and a slide has about 10,000 of them.
DISK_FAIL, DISK_WARN = 1 * GIB, 10 * GIB
OLDEST_BUILD_S = 30 * 60  # no DeepSpeed extension takes longer to build, so an older lock has lost its process
OPENSLIDE_FLOOR = (4, 0, 0)  # first release that reads DICOM

# Programs for a child process; each prints one JSON object as its last line.
PROBES: Mapping[str, str] = {
    "versions": """
import importlib.metadata as m
from packaging.requirements import Requirement
bad, good = [], 0
for text in m.requires("gigamil") or []:
    need = Requirement(text)
    if need.marker and not need.marker.evaluate({"extra": ""}):
        continue
    try:
        have = m.version(need.name)
    except m.PackageNotFoundError:
        have = None
    if have is not None and need.specifier.contains(have, prereleases=True):
        good += 1
    else:
        bad.append([need.name, str(need.specifier), have])
print(json.dumps({"bad": bad, "good": good}))
""",
    "torch": """
import tempfile, torch
import torch.distributed as dist
with tempfile.TemporaryDirectory() as folder:
    gloo = dist.is_available() and dist.is_gloo_available()
    if gloo:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        dist.all_reduce(torch.ones(1))
        dist.destroy_process_group()
devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "gloo": gloo,
    "nccl": dist.is_available() and dist.is_nccl_available(),
    "devices": [[d.name, d.total_memory] for d in devices],
}))
""",
    "torchvision": """
import torch, torchvision
torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
print(json.dumps({"version": torchvision.__version__}))
""",
    "openslide": """
import openslide
print(json.dumps({"version": openslide.__version__, "library": openslide.__library_version__}))
""",
    "deepspeed": """
import deepspeed
print(json.dumps({"version": deepspeed.__version__}))
""",
    "mlflow": """
import os, tempfile
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
from mlflow import __version__
from mlflow.tracking import MlflowClient
with tempfile.TemporaryDirectory() as folder:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    run = client.create_run(client.create_experiment("doctor", artifact_location=folder)).info.run_id
    client.log_metric(run, "metric", 1.0)
    assert client.get_run(run).data.metrics == {"metric": 1.0}
print(json.dumps({"version": __version__}))
""",
    "memory": """
import psutil
print(json.dumps({"available": psutil.virtual_memory().available, "total": psutil.virtual_memory().total}))
""",
}


@dataclass(frozen=True)
class Check:
    """One line of the report; `cure` is what to type or to change when the status is not ok."""

    name: str
    status: Status
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """What was found, in the order in which it should be mended; `praise` is the verdict if nothing is wrong."""

    checks: tuple[Check, ...]
    praise: str = "gigamil can run here"

    @property
    def exit_code(self) -> int:
        """0, or that of an environment fault when any check failed."""
        return EnvironmentFault.exit_code if any(check.status == "fail" for check in self.checks) else 0

    def text(self) -> str:
        """The report for a terminal: one line per check, cures below their line, a verdict last."""
        width = max((len(check.name) for check in self.checks), default=0)
        return "\n".join([*self._lines(width), self._verdict()])

    def _lines(self, width: int) -> Iterator[str]:
        for check in self.checks:
            yield f"{check.status:<4}  {check.name:<{width}}  {check.detail}"
            if check.cure:
                yield f"{'':<{6 + width}}  -> {check.cure}"

    def _verdict(self) -> str:
        failed = sum(check.status == "fail" for check in self.checks)
        warned = sum(check.status == "warn" for check in self.checks)
        if failed:
            return f"{failed} of {len(self.checks)} checks failed: follow the arrows from the top, then run it again."
        if warned:
            return f"{self.praise}; {warned} of {len(self.checks)} checks deserve a look."
        return f"{self.praise}."


@dataclass(frozen=True)
class Answer:
    """What a probe printed, or why it printed nothing."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run_doctor(out: Path | None = None) -> DoctorReport:
    """Check this machine for gigamil.

    Args:
        out: folder that runs will be written to; it need not exist. Default: the working directory.
    Returns:
        The report; nothing is raised for a machine that is not fit, see `DoctorReport.exit_code`.
    Cost: the imports of PyTorch, DeepSpeed and MLflow, side by side; about 10 s cold. Leaves no file behind.
    """
    with ThreadPoolExecutor(max_workers=min(4, len(PROBES))) as pool:
        answers = dict(zip(PROBES, pool.map(ask_child, PROBES), strict=True))
    return DoctorReport(
        (
            check_python(sys.version_info[:2]),
            *check_versions(answers["versions"]),
            check_torch(answers["torch"]),
            check_torchvision(answers["torchvision"]),
            check_openslide(answers["openslide"]),
            check_deepspeed(answers["deepspeed"]),
            check_build_locks(extension_folders(os.environ), time.time()),
            check_backends(answers["torch"]),
            check_devices(answers["torch"], has_driver=shutil.which("nvidia-smi") is not None),
            check_threads(num_cores(), os.environ.get("OMP_NUM_THREADS")),
            check_memory(answers["memory"]),
            check_disk(Path.cwd() if out is None else out),
            check_mlflow(answers["mlflow"], os.environ.get("MLFLOW_TRACKING_URI")),
        )
    )


def ask_child(name: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
    """Run one probe in a child process and read the last line it prints."""
    command = [sys.executable, "-c", "import json\n" + PROBES[name]]
    # A launcher's variables would make the gloo probe wait for the other ranks of a job.
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return Answer(error=f"no answer within {timeout_s:g} s")
    if done.returncode:
        return Answer(error=_last_line(done.stderr) or f"the process ended with status {done.returncode}")
    try:
        return Answer(facts=json.loads(_last_line(done.stdout)))
    except json.JSONDecodeError:
        return Answer(error=f"unexpected output: {_last_line(done.stdout)!r}")


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or newer."""
    detail = f"{'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return Check("python", "fail", detail, "gigamil needs Python 3.11 or newer: make a new environment with it")
    if platform.system() != "Linux":
        return Check("python", "warn", detail, "tested on Linux only; DeepSpeed on several ranks needs Linux")
    return Check("python", "ok", detail)


def check_versions(answer: Answer) -> list[Check]:
    """Every library that gigamil declares, in its declared range; one line per library that is not."""
    if answer.error:
        return [Check("libraries", "fail", answer.error, "install gigamil itself: make install, or pip install -e .")]
    checks = [
        Check(
            f"{name} version",
            "fail",
            f"{'not installed' if have is None else have}, needs {wanted}",
            f"pip install '{name}{wanted}'",
        )
        for name, wanted, have in answer.facts["bad"]
    ]
    summary = f"{answer.facts['good']} of {answer.facts['good'] + len(checks)} within their declared ranges"
    return [Check("libraries", "warn" if checks else "ok", summary), *checks]


def check_torch(answer: Answer) -> Check:
    """PyTorch imports and does a collective in one process."""
    if answer.error:
        cure = "pip install --force-reinstall -c constraints.txt torch torchvision"
        if "connect" in answer.error.lower() or "resolve" in answer.error.lower():
            cure = "gloo found no network interface: export GLOO_SOCKET_IFNAME=lo"
        return Check("torch", "fail", answer.error, cure)
    build = f"CUDA {answer.facts['cuda']}" if answer.facts["cuda"] else "CPU build"
    return Check("torch", "ok", f"{answer.facts['version']}, {build}")


def check_torchvision(answer: Answer) -> Check:
    """torchvision was built for the PyTorch that is installed; a mismatch shows only when it is imported."""
    if not answer.error:
        return Check("torchvision", "ok", answer.facts["version"])
    cure = (
        "torch and torchvision must be one pair from one index: "
        "pip uninstall -y torchvision, then pip install -c constraints.txt torch torchvision, "
        "with the --index-url that torch came from if it is a CPU or another special build"
    )
    return Check("torchvision", "fail", answer.error, cure)


def check_openslide(answer: Answer) -> Check:
    """The OpenSlide library, not only its Python binding, is found and new enough."""
    if answer.error:
        return Check("openslide", "fail", answer.error, "pip install openslide-bin")
    library = answer.facts["library"]
    detail = f"library {library}, Python binding {answer.facts['version']}"
    if tuple(int(part) for part in library.split(".")[:3]) < OPENSLIDE_FLOOR:
        return Check("openslide", "fail", detail, "DICOM slides need OpenSlide 4: pip install openslide-bin")
    return Check("openslide", "ok", detail)


def check_deepspeed(answer: Answer) -> Check:
    """DeepSpeed imports."""
    if answer.error:
        return Check("deepspeed", "fail", answer.error, "pip install --force-reinstall -c constraints.txt deepspeed")
    return Check("deepspeed", "ok", answer.facts["version"])


def extension_folders(environment: Mapping[str, str]) -> list[Path]:
    """Where PyTorch and DeepSpeed keep the extensions that they build on first use."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        return [Path(environment["TORCH_EXTENSIONS_DIR"])]
    return [Path.home() / ".cache" / "torch_extensions", Path(tempfile.gettempdir()) / "torch_extensions"]


def check_build_locks(folders: list[Path], now: float) -> Check:
    """A build that was killed leaves a file `lock`, and whoever builds next waits for it for ever."""
    ages: dict[Path, float] = {}
    try:
        for lock in (lock for folder in folders for lock in sorted(folder.glob("**/lock"))):
            with contextlib.suppress(FileNotFoundError):  # that build has just ended
                ages[lock] = now - lock.stat().st_mtime
    except OSError as error:
        cure = "export TORCH_EXTENSIONS_DIR=FOLDER, a folder of your own, or mend its rights"
        return Check("build locks", "fail", f"'{error.filename}' cannot be read: {error.strerror}", cure)
    stale = [lock for lock, age in ages.items() if age > OLDEST_BUILD_S]
    if stale:
        return Check("build locks", "warn", f"{len(stale)} left by a killed build", f"rm {' '.join(map(str, stale))}")
    if ages:
        lock = next(iter(ages))
        return Check("build locks", "warn", f"a build has been running for {ages[lock]:.0f} s", f"if not: rm {lock}")
    return Check("build locks", "ok", "none")


def check_backends(answer: Answer) -> Check:
    """gloo for CPU ranks; NCCL too where there are CUDA devices."""
    if answer.error:
        return Check("backends", "fail", "not tried, because torch failed", "mend torch first")
    found = [name for name in ("gloo", "nccl") if answer.facts[name]]
    detail = ", ".join(found) or "none"
    if "gloo" not in found:
        return Check("backends", "fail", detail, "this PyTorch has no gloo: install the official build")
    if answer.facts["devices"] and "nccl" not in found:
        return Check("backends", "warn", detail, "several GPUs need a PyTorch build with NCCL")
    return Check("backends", "ok", detail)


def check_devices(answer: Answer, *, has_driver: bool) -> Check:
    """CUDA devices; none is fine unless the machine has a driver that PyTorch does not see."""
    if answer.error:
        return Check("devices", "fail", "not tried, because torch failed", "mend torch first")
    devices = answer.facts["devices"]
    if devices:
        return Check("devices", "ok", ", ".join(f"{name} {memory / GIB:.0f} GiB" for name, memory in devices))
    if has_driver:
        cure = "compare nvidia-smi with torch.version.cuda, check CUDA_VISIBLE_DEVICES; execution.device=cpu works now"
        return Check("devices", "warn", "a driver is installed but PyTorch sees no CUDA device", cure)
    return Check("devices", "ok", "no CUDA device: training on CPU")


def check_threads(cores: int, omp_threads: str | None) -> Check:
    """More threads than cores make every rank wait for the others."""
    detail = f"{cores} cores, OMP_NUM_THREADS {omp_threads or 'not set (gigamil sets threads itself)'}"
    if omp_threads and omp_threads.isdigit() and int(omp_threads) > cores:
        return Check("cpu", "warn", detail, f"export OMP_NUM_THREADS={cores}, or less with several ranks")
    return Check("cpu", "ok", detail)


def check_memory(answer: Answer) -> Check:
    """Free main memory."""
    if answer.error:
        return Check("memory", "warn", answer.error, "pip install psutil")
    free = answer.facts["available"]
    detail = f"{free / GIB:.1f} GiB free of {answer.facts['total'] / GIB:.1f}"
    if free < MEMORY_FAIL:
        return Check("memory", "fail", detail, "close other programs; one rank needs about 1.5 GB")
    if free < MEMORY_WARN:
        return Check("memory", "warn", detail, "use execution.ranks=1, or a smaller execution.chunk")
    return Check("memory", "ok", detail)


def check_disk(out: Path) -> Check:
    """The output folder, or the nearest folder above it that exists, takes a file and has room."""
    # os.path.isdir, because Path.is_dir raises below a folder that may not be entered.
    folder = next(place for place in (out, *out.resolve().parents) if os.path.isdir(place))
    try:
        with tempfile.TemporaryFile(dir=folder) as handle:
            handle.write(b"gigamil")
    except OSError as error:
        cure = "choose another folder with --out or bookkeeping.out, or mend its rights"
        return Check("disk", "fail", f"'{folder}' cannot be written: {error.strerror}", cure)
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free at '{folder}'"
    if free < DISK_FAIL:
        return Check("disk", "fail", detail, "free some space, or set bookkeeping.out and bookkeeping.shards elsewhere")
    if free < DISK_WARN:
        return Check("disk", "warn", detail, "enough for a trial; a thousand slides take hundreds of GB of shards")
    return Check("disk", "ok", detail)


def check_mlflow(answer: Answer, tracking_uri: str | None) -> Check:
    """A fresh sqlite store takes a run; a failure costs the tracking only, so it is a warning."""
    if answer.error:
        return Check("mlflow", "warn", answer.error, "pip install 'mlflow>=3.11,<4', or set bookkeeping.mlflow=false")
    store = "sqlite in the run's root" if tracking_uri is None else f"MLFLOW_TRACKING_URI at {server_of(tracking_uri)}"
    return Check("mlflow", "ok", f"{answer.facts['version']}, runs go to {store}")


def server_of(uri: str) -> str:
    """The place of a tracking server without user name, password or query."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.hostname or parts.path}" if parts.scheme else uri


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip()

"""How much memory this process has used at most."""

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from gigamil.models.encoder import build_encoder
from gigamil.models.slide_model import build_model
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, make_optimizer

if TYPE_CHECKING:
    from gigamil.config.schema import RunConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class MemoryMeter:
    """What a rank takes above its start: what `gigamil plan` predicts.

    On a GPU: bytes allocated for tensors. On a CPU: resident memory without pages of files (code of libraries, which
    processes share and the kernel may drop). The start is when the libraries are loaded and the ranks have met, before
    model and data.

    Args:
        device: of this rank.
        config: its libraries are loaded first (`import_encoder`, and here DeepSpeed's, by all ranks together), else
            their memory would be taken for the run's. None: they are loaded, or count.
    Attributes:
        start: bytes at the start.
    """

    def __init__(self, device: torch.device, config: "RunConfig | None" = None) -> None:
        if config is not None:
            _load_libraries(config, device)
        self._device = device
        self._above = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR.write_text("5")  # the kernel's own mark of the peak starts anew from here
        except OSError:
            pass  # a kernel without it: the mark is of the whole life, which is the same unless imports took more
        self.start = _own_bytes("VmRSS")

    def above_start(self) -> int:
        """Most bytes above the start so far. Call it after each step: pages of files come later, and hide some."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _own_bytes("VmHWM")
        self._above = max(self._above, peak - self.start)
        return self._above


def _own_bytes(name: str) -> int:
    """Resident memory now (VmRSS) or at most (VmHWM), without pages of files."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return (int(lines[name].split()[0]) - int(lines["RssFile"].split()[0])) * 1024
    except (OSError, KeyError):  # not Linux
        return peak_memory_bytes(torch.device("cpu")) if name == "VmHWM" else psutil.Process().memory_info().rss


def import_encoder(config: "RunConfig") -> None:
    """Import the encoder's library, and find out whether it makes such an encoder; takes no memory for weights.

    Raises:
        ConfigError, EnvironmentFault: as `build_encoder`.
    """
    if config.data.source == "features":  # what made them need not be here
        return
    with torch.device("meta"):
        build_encoder(config.science.encoder.model_copy(update={"weights": None}))


def _load_libraries(config: "RunConfig", device: torch.device) -> None:
    """Everything that is imported late: some 600 modules by DeepSpeed's first engine. A collective."""
    import sklearn.metrics  # noqa: F401 - of the validation

    small = type(config).model_validate(
        {"science": {"encoder": {"name": "small_cnn", "options": {"width": 1}}}, "execution": config.execution}
    )
    model = build_model(small.science, 2)
    settings = deepspeed_config(small)
    settings["zero_optimization"]["reduce_bucket_size"] = 1024  # DeepSpeed never lets go of an engine and its buffers
    engine = DeepSpeedEngine(model, make_optimizer(model, small), settings, device)
    with engine.one_reduction():
        image = torch.zeros((1, 3, 16, 16), device=device)
        engine.backward(engine.encode(image, torch.zeros(1, dtype=torch.int64, device=device)).sum())
    engine.step([0.0] * len(engine._base_optimizer.param_groups))

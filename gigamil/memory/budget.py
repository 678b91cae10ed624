"""How many graphs fit: measured bytes of one chunk's graph against a budget."""

from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor, nn

from gigamil.memory.cgroup import cgroup_free_bytes


class SavedBytes:
    """Context manager that counts the bytes autograd saves for backward, each storage once, parameters left out.

    Args:
        module: its parameters and buffers are there anyway and are not counted.
    Attributes:
        total: bytes saved so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        tensors = [*module.parameters(), *module.buffers()]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)


def memory_budget(setting: float | None, device: torch.device, local_ranks: int, default: float = 0.5) -> int:
    """Bytes that kept graphs may take on this rank.

    Args:
        setting: bytes (> 1) or a fraction (<= 1) of free memory; None means `default`.
        device: whose memory.
        local_ranks: ranks that share this machine's memory (a GPU is taken to be a rank's own).
    """
    if setting is not None and setting > 1:
        return int(setting)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = free_memory() // local_ranks
    return int(free * (default if setting is None else setting))


def free_memory(cgroup_root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of main memory that may still be taken: what is free on the machine and within the job's own limit.

    Args:
        cgroup_root, membership: as `cgroup_free_bytes`.
    """
    free = psutil.virtual_memory().available
    allowed = cgroup_free_bytes(cgroup_root, membership)
    return free if allowed is None else min(free, allowed)


def chunks_to_keep(strategy: str, chunk_bytes: int, budget: int) -> int:
    """Number of chunks whose graphs are kept: all, none, or as many as fit (`keep`, `replay`, `auto`)."""
    if strategy == "replay":
        return 0
    if strategy == "keep":
        return 2**31 - 1
    return budget // max(1, chunk_bytes)

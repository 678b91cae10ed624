"""How many graphs fit: measured bytes of one chunk's graph against a budget."""

from pathlib import Path

import psutil
import torch

from gigamil.memory.cgroup import cgroup_free_bytes


def memory_budget(
    setting: float | None, device: torch.device, local_ranks: int, default: float = 0.5, reserve: int = 0
) -> int:
    """Bytes that kept graphs, or decoded tiles, may take on this rank.

    Args:
        setting: bytes (> 1) or a fraction (<= 1) of free memory; None means `default`.
        device: whose memory.
        local_ranks: ranks that share this machine's memory (a GPU is taken to be a rank's own).
        reserve: bytes of what is free now that something else will need at the same time.
    """
    if setting is not None and setting > 1:
        return int(setting)
    free = max(0, free_device_memory(device, local_ranks) - reserve)
    return int(free * (default if setting is None else setting))


def free_device_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank may still take: of its GPU, or its share of the machine's main memory."""
    if device.type != "cuda":
        return free_memory() // local_ranks
    # What the allocator holds without using it is not free to the driver, but to us.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


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

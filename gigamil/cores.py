"""How many cores this process may use."""

import os


def num_cores() -> int:
    """Cores that this process may use; fewer than the machine has inside a container or a Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

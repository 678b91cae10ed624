"""How many cores this process may use."""

import os


def num_cores() -> int:
    """Cores that this process may use, by its CPU set (taskset, Slurm, docker --cpuset-cpus).

    A CPU quota of a container is not seen: set execution.tile_workers and execution.threads there.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

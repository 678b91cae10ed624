"""Memory that the control groups of this process leave: the limit of a batch job (Slurm `--mem`) or of a container.

The kernel's own figure of free memory is the machine's and knows nothing of these limits; who exceeds one is killed.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Files:
    """Names in which a version of the interface keeps its numbers."""

    limit: str
    usage: str
    reclaimable: str  # line of memory.stat: cached file pages, which the kernel gives back before it kills


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process may still take under the limits of its groups and all groups above them.

    Args:
        root: where the groups are mounted, version 2 or version 1.
        membership: the kernel's list of this process's groups.
    Returns:
        The least of limit - usage + cached pages that can be given back; None without a limit that can be read.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    free: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            free += _free_upwards(root, path, _V2)
        elif "memory" in controllers.split(","):
            free += _free_upwards(root / "memory", path, _V1)
    return min(free, default=None)


def _free_upwards(mount: Path, path: str, files: _Files) -> Iterator[int]:
    """What each group from `path` up to the root leaves; in a container, groups above its own are not there."""
    group = mount / path.lstrip("/")
    for folder in itertools.takewhile(lambda folder: folder != mount.parent, (group, *group.parents)):
        try:
            limit, usage = (folder / files.limit).read_text().strip(), int((folder / files.usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            yield max(0, int(limit) - usage + int(statistics.get(files.reclaimable, 0)))

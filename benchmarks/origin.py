"""Where figures come from: command, commit and machine, as the JSON of every result has them.

Imports nothing that is large: what tiles a pyramid reports the memory of its processes, and they import this too.
"""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def origin(script: str, words: Sequence[str] | None, **more: object) -> dict[str, object]:
    """`command`, `commit` and `machine`.

    Args:
        script: `__file__` of the benchmark.
        words: what its `main` was given; None means the command line.
        more: what else belongs to the machine, above all versions of libraries.
    """
    given = sys.argv[1:] if words is None else words
    root = Path(__file__).resolve().parents[1]
    return {
        "command": shlex.join(["python", Path(script).resolve().relative_to(root).as_posix(), *given]),
        "commit": commit(Path(script).resolve().parent),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "python": platform.python_version(),
            **more,
            "date": time.strftime("%Y-%m-%d"),
        },
    }


def commit(folder: Path) -> str | None:
    """Short name of the commit that is checked out in a folder; None without git."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def cpu() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

"""Files that are whole or not there: written aside, forced to disk, renamed."""

import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from gigamil.errors import CohortError

SLOW_FOLDER_S = 10.0


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several writers may replace one file: threads, and containers of several machines, each as its process 1.
    staged = path.with_name(f".{path.name}.{socket.gethostname()}-{threading.get_native_id()}.tmp")
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(staged)
    staged.rename(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def appears(path: Path) -> bool:
    """Whether a file is there, or comes within `SLOW_FOLDER_S`: a network file system may show it late."""
    deadline = time.monotonic() + SLOW_FOLDER_S
    while not (found := path.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def parse_object(text: str, where: str, cure: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        CohortError: it is something else; says where, and what to do.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise CohortError(f"{where} is not JSON ({error}); {cure}") from error
    if not isinstance(found, dict):
        raise CohortError(f"{where} is a JSON {type(found).__name__}, not an object; {cure}")
    return found

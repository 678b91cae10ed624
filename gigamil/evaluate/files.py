"""Files of a run folder: written whole or not at all, and read with an error that names the file."""

import json
import os
from pathlib import Path
from typing import Any

from gigamil.errors import CohortError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_bytes(content)
    staged.replace(path)


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

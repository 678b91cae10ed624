"""Where shards lie: a local folder, or an object store or web server through fsspec. Reading only.

Names are relative to the root, in parts joined by "/". What a name leads to must lie under the root: a local path is
opened part by part, and a link in it is refused, so nothing can be swapped between a check and its use.
"""

import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gigamil.errors import ConfigError, EnvironmentFault

# Schemes that only ever read bytes. `pipe:` would run a command, `file:` and chained ones would get around the root.
SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "memory")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp"}
_TRIES, _RETRY_S = 3, 0.5
_LONGEST_URL = 2048
_PLAIN = re.compile(r"[^\s{}$*?~\\\[\]<>|`\x00-\x20\x7f]+")

# Of a folder only its place is needed; macOS has no way to say so.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: opening a fifo would wait for its writer.
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

Result = TypeVar("Result")


class Storage(Protocol):
    """A root and how to read below it.

    Attributes:
        is_remote: each read is a request to a server.
    """

    @property
    def is_remote(self) -> bool: ...

    def __hash__(self) -> int: ...

    def where(self, name: str) -> str:
        """Path or URL of a name, for messages."""
        ...

    def read(self, name: str) -> bytes:
        """A whole small file; FileNotFoundError or another OSError if it cannot be had."""
        ...

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end - 1, fewer where the file ends before; OSError if they cannot be had."""
        ...

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder, sorted; OSError if it cannot be listed."""
        ...


def is_url(root: Path | str) -> bool:
    """Whether a root is meant as a URL (and not as a path)."""
    return isinstance(root, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", root) is not None


def open_storage(root: Path | str) -> Storage:
    """Storage for a path or for a URL of an allowed scheme. Nothing is opened yet.

    Raises:
        ConfigError: the URL has another scheme, or patterns or variables in it, which are never expanded.
    """
    return RemoteStorage(str(root)) if is_url(root) else LocalStorage(Path(root))


@dataclass(frozen=True)
class LocalStorage:
    """A local folder. The root itself may be reached through links; nothing below it may."""

    root: Path
    is_remote = False

    def where(self, name: str) -> str:
        """Path of a name."""
        return str(self.root / name)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self._with_file(name, lambda handle, size: read_at(handle, 0, size))

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end - 1; what lies beyond the end of the file is never asked for, whatever `end` claims."""
        return self._with_file(name, lambda handle, size: read_at(handle, begin, min(end, size)))

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder; links are none."""
        with os.scandir(self.root / name) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))

    def _with_file(self, name: str, use: Callable[[int, int], Result]) -> Result:
        *folders, last = _parts(name)
        handle = os.open(self.root, _FOLDER)
        try:
            for part, kind in [(part, _FOLDER) for part in folders] + [(last, _FILE)]:
                below = os.open(part, kind | os.O_NOFOLLOW, dir_fd=handle)
                os.close(handle)
                handle = below
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"it is no regular file ({stat.filemode(found.st_mode)})")
            return use(handle, found.st_size)
        except OSError as error:
            raise self._explained(error, name) from error
        finally:
            os.close(handle)

    def _explained(self, error: OSError, name: str) -> OSError:
        path = self.root
        for part in _parts(name):
            path /= part
            if path.is_symlink():
                return OSError(f"'{path}' is a link, and links below '{self.root}' are not followed")
        return error


@dataclass(frozen=True)
class RemoteStorage:
    """A URL of an allowed scheme, read by fsspec; credentials are those that its packages find by themselves.

    Raises:
        ConfigError: another scheme, or a URL with patterns, variables or control characters.
    """

    url: str
    is_remote = True

    def __post_init__(self) -> None:
        shown, (scheme, separator, rest) = repr(self.url[:80]), self.url.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ConfigError(
                f"{shown} is neither a local folder nor a URL that shards are read from. Use a plain path, or one of "
                + ", ".join(f"{allowed}://" for allowed in SCHEMES if allowed != "memory")  # that one is for tests
            )
        if "::" in rest or len(rest) > _LONGEST_URL or not _PLAIN.fullmatch(rest):
            raise ConfigError(
                f"{shown} is not a plain URL: braces, wildcards, variables, spaces and chains (::) are not expanded in it. "
                "Write out the one folder that holds slides/."
            )

    def where(self, name: str) -> str:
        """URL of a name."""
        return "/".join((self.url.rstrip("/"), *_parts(name)))

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self._tried(lambda: self._files.cat_file(self._path(name)))

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin..end - 1 in one request."""
        found: bytes = self._tried(lambda: self._files.cat_file(self._path(name), start=begin, end=end))
        if len(found) > end - begin:
            raise OSError(
                f"asked for {end - begin} bytes, the server sent {len(found)}: it does not know range requests"
            )
        return found

    def folders(self, name: str) -> list[str]:
        """Names of the folders in a folder, as far as the server lists them."""
        listed = self._tried(lambda: self._files.ls(self._path(name), detail=True))
        return sorted(
            {entry["name"].rstrip("/").rpartition("/")[2] for entry in listed if entry["type"] == "directory"}
        )

    def _path(self, name: str) -> str:
        return self._files._strip_protocol(self.where(name))

    @cached_property
    def _files(self) -> Any:
        import fsspec

        scheme = self.url.partition("://")[0]
        try:
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES.get(scheme.removesuffix("s") if scheme == "https" else scheme, scheme)
            raise EnvironmentFault(f"'{self.url}' needs the package {package}: `pip install {package}`.") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # a connection is not carried to another process

    def _tried(self, request: Callable[[], Result]) -> Result:
        """Servers are busy now and then: a request is made up to three times."""
        for attempt in range(_TRIES):
            try:
                return request()
            except (FileNotFoundError, EnvironmentFault):
                raise
            except Exception as error:  # each package has exceptions of its own
                if attempt == _TRIES - 1:
                    raise OSError(f"{type(error).__name__}: {error}") from error
                time.sleep(_RETRY_S * 4**attempt)
        raise AssertionError("unreachable")


def read_at(handle: int, begin: int, end: int) -> bytes:
    """Bytes begin..end - 1 of an open file, fewer where it ends before. One system call reads at most 2 GiB."""
    data = os.pread(handle, max(0, end - begin), begin)
    while data and begin + len(data) < end:
        more = os.pread(handle, end - begin - len(data), begin + len(data))
        if not more:
            break
        data += more
    return data


def _parts(name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise OSError(f"{name[:80]!r} is not a name below a folder")
    return parts

"""What the reader asks of a file format, and how text from a slide file may enter a message."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Protocol

from PIL import Image

MAX_SHOWN = 120


class ReadError(OSError):
    """A backend cannot decode a region; the text says why."""


@dataclass(frozen=True)
class Header:
    """All that leaves a file beside its pixels; sizes in pixels of level 0 unless another level is named.

    There is no field for free text, and none for label or macro images: they hold names of patients.
    """

    vendor: str
    level_dimensions: tuple[tuple[int, int], ...]
    level_downsamples: tuple[float, ...] = (1.0,)
    mpp: tuple[str, str] | None = None  # x and y as the file has them, yet to be checked
    mpp_note: str = ""  # why there is none, where that is known
    objective: str | None = None
    bounds: tuple[int, int] = (0, 0)
    icc: bytes | None = None


class Backend(Protocol):
    """One open file of some format. Not shared between threads, and not taken through a fork."""

    header: Header

    def read(self, x: float, y: float, level: int, width: int, height: int) -> tuple[Image.Image, float, float]:
        """Pixels (x, y, width, height) of a level, all inside it.

        Returns:
            RGB or RGBA image, and how far right and down of (x, y) it really lies, in pixels of the level.
        Raises:
            ReadError: they cannot be decoded.
        """

    def close(self) -> None:
        """Give the file handle back."""

    @property
    def held_bytes(self) -> int:
        """Memory of pixels that stay decoded until `close`; 0 where that is bounded anyway."""


def shown(text: object) -> str:
    """Text from a file, or a path, fit for a message: control characters and line ends escaped.

    Text is cut at 120 characters, a path is not.
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))
    return plain if len(plain) <= MAX_SHOWN or isinstance(text, PurePath) else plain[:MAX_SHOWN] + "..."

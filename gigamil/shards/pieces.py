"""What a child process of `gigamil tile` does: one piece of a slide at a time, and a reason instead of an error.

Nothing here imports torch (tests/unit/shards/test_build.py).
"""

import logging
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from gigamil.shards.build import Part, PreparedSlide, StoredPart, finish_slide, prepare_slide, store_part
from gigamil.shards.job import SlideJob
from gigamil.shards.manifest import SlideManifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Finish:
    """The last piece of a slide: its parts, in order."""

    prepared: PreparedSlide
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class Failed:
    """Why a slide cannot be tiled."""

    reason: str


Piece = SlideJob | Part | Finish
Made = PreparedSlide | StoredPart | SlideManifest | Failed


def make_piece(piece: Piece) -> tuple[Made, float]:
    """Do one piece of a slide.

    A `SlideJob` prepares the slide, and finishes it at once if it has but one tar; else the caller sends each `Part` of
    the `PreparedSlide`, and then `Finish`.

    Returns:
        What was made, and the seconds that it took. Any error but MemoryError is a `Failed`; what is not a fault of the
        slide or the disk is also logged with its traceback.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # of damaged headers, without saying of which slide
            made = _make(piece)
    except OSError as error:  # a SlideError, or the disk
        made = Failed(str(error))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of whatever library; it costs this slide only, and is not hidden
        _log.exception("an error that should not be:")
        place = traceback.extract_tb(error.__traceback__)[-1]
        made = Failed(f"unexpected {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")
    return made, time.perf_counter() - start


def _make(piece: Piece) -> Made:
    if isinstance(piece, Part):
        return store_part(piece)
    if isinstance(piece, Finish):
        return finish_slide(piece.prepared, piece.parts)
    prepared = prepare_slide(piece)
    parts = prepared.parts()
    if len(parts) > 1:
        return prepared
    return finish_slide(prepared, [store_part(part) for part in parts])

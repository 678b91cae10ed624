"""A bounded number of open slides: for readers that go through thousands of them."""

import os
import threading
from collections import OrderedDict
from pathlib import Path

from gigamil.slides.reader import Icc, Slide, open_slide

# Plain images stay decoded while they are open.
MAX_HELD_BYTES = 256 << 20

_Key = tuple[Path, float | None, float | None, Icc]


class SlidePool:
    """Open slides by path; the least recently used is closed when there are too many.

    Each thread and each process, forked ones too, has slides of its own: a handle must not be shared. A slide that
    failed to read opens its file again by itself.

    Args:
        max_open: slides open at once, per thread, >= 1.
    """

    def __init__(self, max_open: int = 8) -> None:
        if max_open < 1:
            raise ValueError(f"max_open={max_open}: a pool holds at least one slide")
        self.max_open = max_open
        self._local = threading.local()

    def get(
        self, path: Path | str, *, mpp: float | None = None, default_mpp: float | None = None, icc: Icc = "ignore"
    ) -> Slide:
        """An open slide. It belongs to the pool: do not close it, and use it before the next `get` of this thread.

        Args, Raises: as `open_slide`.
        """
        slides = self._slides()
        key = (Path(path), mpp, default_mpp, icc)
        if key in slides:
            slides.move_to_end(key)
            return slides[key]
        # Room is made first: the bound holds while the new slide is being opened.
        while len(slides) >= self.max_open or sum(slide.held_bytes for slide in slides.values()) > MAX_HELD_BYTES:
            slides.popitem(last=False)[1].close()
        slides[key] = open_slide(path, mpp=mpp, default_mpp=default_mpp, icc=icc)
        return slides[key]

    def close(self) -> None:
        """Close the slides of this thread; those of another one are closed when it ends."""
        slides = self._slides()
        while slides:
            slides.popitem()[1].close()

    def _slides(self) -> OrderedDict[_Key, Slide]:
        if getattr(self._local, "pid", None) != os.getpid():
            # Slides of the parent are not closed here: their locks may have been held at the fork. Those of this
            # thread, which forked, are kept, so that they are not freed. Those of the parent's other threads are:
            # Python frees what belongs to a thread that is not in the child.
            self._local.inherited = getattr(self._local, "slides", None)
            self._local.pid, self._local.slides = os.getpid(), OrderedDict()
        slides: OrderedDict[_Key, Slide] = self._local.slides
        return slides

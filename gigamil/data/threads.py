"""Reads that are shared out over threads: decoders give Python's lock back while they work."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property


class ReadThreads:
    """Threads that read and decode; started when they are needed first.

    Args:
        number: of threads; fewer than two: who asks reads.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def run(self, reads: Sequence[Callable[[], object]]) -> None:
        """Read all.

        Raises:
            Of several errors the first in order, whatever the number of threads.
        """
        if self.number < 2 or len(reads) < 2:
            for read in reads:
                read()
            return
        started = [self._pool.submit(read) for read in reads]
        try:
            for each in started:
                each.result()
        finally:
            for each in started:
                each.cancel()
            wait(started)  # after an error too: the memory that they write to is used again

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.number, "gigamil-decode")

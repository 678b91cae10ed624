"""The harness of these tests: a rank that raises is shown, a rank that dies is noticed, a hang ends.

Torch is imported by the ranks, not by this module, so that they start quickly.
"""

import multiprocessing
import os
import time

import pytest

from gigamil.testing.ranks import run_on_ranks


def test_a_rank_that_raises_is_shown_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:.*in raise_on_last.*ValueError: only here"):
        run_on_ranks(raise_on_last, 2, 2)
    assert multiprocessing.active_children() == []


def test_a_rank_that_dies_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="rank 0 failed:\nthe process ended without a word"):
        run_on_ranks(die, 1)


def test_a_hang_ends_at_the_limit() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks \[0\] did not finish in time"):
        run_on_ranks(hang, 1, timeout_s=3.0)
    assert time.monotonic() - start < 30
    assert multiprocessing.active_children() == []


def raise_on_last(rank: int, num_ranks: int) -> None:
    if rank == num_ranks - 1:
        raise ValueError("only here")


def die(rank: int) -> None:
    os._exit(3)


def hang(rank: int) -> None:
    time.sleep(600)

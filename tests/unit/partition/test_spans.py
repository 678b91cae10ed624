"""Who owns which tiles: contiguous, complete, balanced, without starting a process."""

import pytest

from gigamil.partition.spans import Span, chunk_ranges, owned_range, owned_spans, shared_bounds


def test_a_small_case_by_hand() -> None:
    # 13 + 1 + 6 tiles end to end, over 3 ranks: 0..6, 6..13, 13..20.
    sizes = [13, 1, 6]
    assert owned_spans(sizes, 0, 3) == (Span(0, 0, 6),)
    assert owned_spans(sizes, 1, 3) == (Span(0, 6, 13),)
    assert owned_spans(sizes, 2, 3) == (Span(1, 0, 1), Span(2, 0, 6))


def test_more_ranks_than_tiles_leaves_ranks_empty() -> None:
    spans = [owned_spans([1, 2], rank, 5) for rank in range(5)]
    assert [sum(span.num_tiles for span in own) for own in spans] == [0, 1, 0, 1, 1]


def test_no_slides_and_empty_slides() -> None:
    assert owned_spans([], 0, 2) == ()
    assert owned_spans([0, 3, 0], 0, 1) == (Span(1, 0, 3),)


def test_thousands_of_ranks_own_a_large_step_once() -> None:
    num_ranks, sizes = 4096, [90_001, 3, 412_377]
    covered = [0] * len(sizes)
    counts = []
    for rank in range(num_ranks):
        spans = owned_spans(sizes, rank, num_ranks)
        counts.append(sum(span.num_tiles for span in spans))
        for span in spans:
            assert span.start == covered[span.slide]  # in order, without a gap or an overlap
            covered[span.slide] = span.stop
    assert covered == sizes
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_that_does_not_exist_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} is not in 0..2"):
        owned_range(10, rank, 3)


def test_chunks_cover_the_tiles_in_order() -> None:
    assert chunk_ranges(7, 3) == ((0, 3), (3, 6), (6, 7))
    assert chunk_ranges(6, 3) == ((0, 3), (3, 6))
    assert chunk_ranges(0, 3) == ()


def test_shares_by_hand() -> None:
    # 20 tiles in the proportion 1 : 0 : 3.
    assert shared_bounds(20, [1, 0, 3]) == (0, 5, 5, 20)
    sizes = [13, 1, 6]
    assert owned_spans(sizes, 0, 3, [1, 0, 3]) == (Span(0, 0, 5),)
    assert owned_spans(sizes, 1, 3, [1, 0, 3]) == ()
    assert owned_spans(sizes, 2, 3, [1, 0, 3]) == (Span(0, 5, 13), Span(1, 0, 1), Span(2, 0, 6))


@pytest.mark.parametrize("share", [1, 7, 1000])
def test_equal_shares_are_no_shares(share: int) -> None:
    sizes = [90_001, 3, 412_377]
    for num_ranks in (1, 3, 8, 1021):
        shares = [share] * num_ranks
        for rank in range(num_ranks):
            assert owned_spans(sizes, rank, num_ranks, shares) == owned_spans(sizes, rank, num_ranks)


@pytest.mark.parametrize("shares", [[], [0, 0], [3, -1, 2]])
def test_shares_that_give_no_partition_are_refused(shares: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must not be negative, and not all 0"):
        shared_bounds(10, shares)

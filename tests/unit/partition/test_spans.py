"""Who owns which tiles: contiguous, complete, balanced, without starting a process."""

import pytest

from gigamil.partition.spans import Span, chunk_ranges, owned_range, owned_spans


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

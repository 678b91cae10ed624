"""Who sends which rows to whom is a pure function: every rank's view of it agrees with every other's, without a process."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gigamil.parallel.collectives import _Route

counts_and_wanted = st.lists(st.integers(0, 7), min_size=1, max_size=6).flatmap(
    lambda counts: st.tuples(
        st.just(counts),
        st.lists(
            st.lists(
                st.tuples(st.integers(0, sum(counts)), st.integers(0, sum(counts))).map(
                    lambda ends: (min(ends), max(ends))
                ),
                max_size=4,
            ),
            min_size=len(counts),
            max_size=len(counts),
        ),
    )
)


@settings(max_examples=300, deadline=None)
@given(counts_and_wanted)
def test_what_one_sends_the_other_expects(case: tuple[list[int], list[list[tuple[int, int]]]]) -> None:
    counts, wanted = case
    routes = [_Route(counts, wanted, rank) for rank in range(len(counts))]
    for sender, route in enumerate(routes):
        for receiver, other in enumerate(routes):
            sent = [stop - start for start, stop in route.sends[receiver]]
            assert sent == [rows for _, rows in other.receives[sender]]


@settings(max_examples=300, deadline=None)
@given(counts_and_wanted)
def test_every_row_that_is_asked_for_comes_once_and_in_order(
    case: tuple[list[int], list[list[tuple[int, int]]]],
) -> None:
    counts, wanted = case
    for rank, ranges in enumerate(wanted):
        routes = [_Route(counts, wanted, sender) for sender in range(len(counts))]
        pieces = {}
        for sender, route in enumerate(routes):
            first = sum(counts[:sender])
            for (place, _), (start, stop) in zip(routes[rank].receives[sender], route.sends[rank], strict=True):
                pieces[place] = range(first + start, first + stop)
        found = [number for place in sorted(pieces) for number in pieces[place]]
        assert found == [number for start, stop in ranges for number in range(start, stop)]
        assert sorted(pieces) == list(range(len(pieces)))


def test_a_route_over_thousands_of_ranks_is_made_quickly_and_touches_neighbours_only() -> None:
    counts = [3] * 4096
    wanted = [[(max(3 * rank - 1, 0), min(3 * rank + 4, 3 * 4096))] for rank in range(4096)]
    route = _Route(counts, wanted, 1000)
    assert [rank for rank, pieces in enumerate(route.sends) if pieces] == [999, 1000, 1001]
    assert [rank for rank, pieces in enumerate(route.receives) if pieces] == [999, 1000, 1001]
    assert [rows for pieces in route.receives for _, rows in pieces] == [1, 3, 1]

"""Spans that are not equal change no gradient: float64, against full-bag autograd in one process."""

from dataclasses import replace
from unittest.mock import patch

import pytest

from gigamil.partition.schedule import StepPlan
from gigamil.testing import exactness
from gigamil.testing.exactness import Case, Errors, check_cases
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-12
# The last rank gets most, one gets none, one of several groups gets nearly all.
SHARES = {2: ((1, 5), (0, 1)), 3: ((1, 1, 5), (4, 0, 1), (0, 0, 1)), 4: ((3, 1, 0, 2), (9, 1, 1, 9))}
SIZES = (9, 4, 2)


def _cases(shares: tuple[int, ...]) -> list[Case]:
    """Every group size with which each group has a share."""
    num_ranks = len(shares)
    return [
        exactness.large_enough(Case(SIZES, size, name, variant, chunk=2, keep=keep))
        for name, variant in (("gated_attention", 0), ("transformer", 0), ("clam_sb", 1))
        for size in exactness.group_sizes(num_ranks)
        if size > 1 and all(any(shares[first : first + size]) for first in range(0, num_ranks, size))
        for keep in ("half", "none")
    ]


def _errors(rank: int, num_ranks: int) -> list[Errors]:
    make_plan = exactness.make_plan
    found = []
    for shares in SHARES[num_ranks]:

        def uneven(case: Case, num_groups: int, shares: tuple[int, ...] = shares) -> StepPlan:
            even = make_plan(case, num_groups)
            plan = replace(even, shares=shares)
            assert any(plan.counts(group) != even.counts(group) for group in range(num_groups))
            return plan

        with patch.object(exactness, "make_plan", uneven):
            found += check_cases(rank, num_ranks, _cases(shares))
    return found


@pytest.mark.parametrize("num_ranks", SHARES)
def test_uneven_spans_give_the_gradient_of_the_whole_bag(num_ranks: int) -> None:
    for errors in run_on_ranks(_errors, num_ranks, num_ranks):
        assert len(errors) == sum(len(_cases(shares)) for shares in SHARES[num_ranks])
        assert all(error.within(BOUND) for error in errors), errors

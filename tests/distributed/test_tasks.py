"""Every task has the gradient of full-bag autograd in one process, whatever the ranks: float64, some targets not known.

Cox compares each slide with all others of the step, also with those that other groups of ranks pool.
"""

import pytest

from gigamil.testing import exactness
from gigamil.testing.exactness import TASKS, Case, Errors, check_cases
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-12
SHAPES = ((9, 4, 2, 5, 1), (3, 7), (6,))  # ragged; fewer slides than groups; one, of which Cox learns nothing


def _cases(num_ranks: int) -> list[Case]:
    return [
        Case(sizes, group_size, name, chunk=2, keep=keep, task=task)
        for task in TASKS
        for name in ("gated_attention", "lse")
        for sizes in (SHAPES[:-1] if task == "cox" else SHAPES)
        for group_size in exactness.group_sizes(num_ranks)
        for keep in ("half", "none")
    ]


def _errors(rank: int, num_ranks: int) -> list[Errors]:
    return check_cases(rank, num_ranks, _cases(num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_task_on_any_ranks(num_ranks: int) -> None:
    for errors in run_on_ranks(_errors, num_ranks, num_ranks):
        wrong = [
            (case, found) for case, found in zip(_cases(num_ranks), errors, strict=True) if not found.within(BOUND)
        ]
        assert not wrong, wrong[:3]

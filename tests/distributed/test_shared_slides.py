"""Ranks that share each slide row by row give the step of the whole slide in one process, float64, and each ZeRO stage."""

import pytest

from gigamil.testing.dense import SHAPES, DenseCase, check_dense_cases
from gigamil.testing.ranks import run_on_ranks

NETS = ("convolutions, mean", "convnext", "resnet18 layer1")


def cases(num_ranks: int) -> list[DenseCase]:
    """Slides with fewer rows of tiles than ranks, and more; graphs kept or made again; groups of one and of all."""
    return [
        DenseCase(net, shapes, group_size, keep=keep, random=keep != "half", exchange=True)
        for net in NETS
        for shapes in SHAPES
        for group_size in {1, num_ranks}
        for keep in ("all", "half", "none")
    ]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)]
)
def test_step_over_shared_slides_is_that_of_whole_slides(num_ranks: int) -> None:
    wanted = cases(num_ranks)
    if num_ranks == 1:
        worlds = [check_dense_cases(0, 1, wanted)]
    else:
        worlds = run_on_ranks(check_dense_cases, num_ranks, num_ranks, wanted, timeout_s=300)
    for errors in worlds:
        assert len(errors) == len(wanted)
        for case, error in zip(wanted, errors, strict=True):
            assert error.within(1e-10), (case, error)


@pytest.mark.slow
def test_zero_stages_on_shared_slides() -> None:
    wanted = [DenseCase(NETS[0], SHAPES[0], 2, zero_stage=stage, exchange=True) for stage in range(4)]
    for errors in run_on_ranks(check_dense_cases, 2, 2, wanted, timeout_s=120):
        for case, error in zip(wanted, errors, strict=True):
            assert error.within(1e-5), (case, error)

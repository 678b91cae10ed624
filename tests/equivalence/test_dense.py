"""A dense encoder over blocks and ranks = the network over each whole slide, in float64: loss and every gradient."""

import pytest

from gigamil.testing.dense import NETS, SHAPES, DenseCase, check_dense_cases, dense_cases
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-10
FLOAT32_BOUND = 1e-5


@pytest.mark.parametrize("net", NETS)
def test_blocks_of_one_process_are_whole_slides(net: str) -> None:
    wanted = list(dense_cases(1, [net]))
    for case, errors in zip(wanted, check_dense_cases(0, 1, wanted), strict=True):
        assert errors.within(BOUND), case


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_blocks_exactly(num_ranks: int) -> None:
    wanted = list(dense_cases(num_ranks, ["convolutions, mean", "resnet18 layer1"]))
    for errors in run_on_ranks(check_dense_cases, num_ranks, num_ranks, wanted, timeout_s=280):
        assert all(error.within(BOUND) for error in errors), errors


def test_through_deepspeed_at_every_stage() -> None:
    shapes = SHAPES[0]
    wanted = [DenseCase("convolutions, mean", shapes, 2, 16, keep="half", zero_stage=stage) for stage in (0, 1, 2, 3)]
    for errors in run_on_ranks(check_dense_cases, 2, 2, wanted, timeout_s=200):
        assert all(error.within(FLOAT32_BOUND) for error in errors), errors

"""A dense encoder over blocks and ranks = the network over each whole slide, in float64: loss and every gradient."""

import pytest

from gigamil.testing.dense import (
    DEEP,
    NETS,
    SHAPES,
    DenseCase,
    DenseErrors,
    check_dense_cases,
    check_image_case,
    check_training,
    dense_cases,
    image_cases,
)
from gigamil.testing.ranks import run_on_ranks

BOUND = 1e-10
GRID_BOUND = 1e-12
FLOAT32_BOUND = 1e-5
WEIGHTS_BOUND = 1e-8

by_cost = [
    pytest.param(net, marks=pytest.mark.slow) if net in (*DEEP, "resnet18 layer2", "resnet50 layer2") else net
    for net in NETS
]


def on_ranks(
    rank: int, num_ranks: int, wanted: list[DenseCase], trained: list[DenseCase]
) -> tuple[list[DenseErrors], list[float]]:
    return check_dense_cases(rank, num_ranks, wanted), [check_training(rank, num_ranks, case) for case in trained]


@pytest.mark.parametrize("net", by_cost)
def test_blocks_of_one_process_are_whole_slides(net: str) -> None:
    wanted = list(dense_cases(1, [net]))
    for case, errors in zip(wanted, check_dense_cases(0, 1, wanted), strict=True):
        assert errors.features <= GRID_BOUND, case
        assert errors.within(BOUND), case


@pytest.mark.parametrize("net", by_cost)
def test_blocks_of_images_of_any_size_are_the_image(net: str) -> None:
    for case in image_cases(net):
        errors = check_image_case(case)
        assert errors.features <= GRID_BOUND, case
        assert errors.gradient <= BOUND, case


@pytest.mark.parametrize("net", ["convolutions, mean", "resnet18 layer1"])
def test_steps_of_training_on_blocks_are_steps_on_whole_slides(net: str) -> None:
    assert check_training(0, 1, DenseCase(net, SHAPES[1], 1, 5, "half")) <= WEIGHTS_BOUND


@pytest.mark.parametrize(
    ("num_ranks", "nets"),
    [
        (2, ["convolutions, mean"]),
        pytest.param(3, ["convolutions, mean", "resnet18 layer1"], marks=pytest.mark.slow),
        pytest.param(2, ["resnet18 layer1", "convnext", *DEEP], marks=pytest.mark.slow),
        (4, ["convolutions, mean"]),
        pytest.param(4, ["resnet18 layer1", "convnext", *DEEP], marks=pytest.mark.slow),
    ],
)
def test_ranks_share_blocks_exactly(num_ranks: int, nets: list[str]) -> None:
    wanted = list(dense_cases(num_ranks, nets))
    trained = [DenseCase("convolutions, mean", shapes, num_ranks, 5, "half") for shapes in SHAPES[1:]]
    for errors, of_weights in run_on_ranks(on_ranks, num_ranks, num_ranks, wanted, trained, timeout_s=280):
        assert all(error.within(BOUND) and error.features <= GRID_BOUND for error in errors), errors
        assert max(of_weights) <= WEIGHTS_BOUND


def test_through_deepspeed_at_every_stage() -> None:
    shapes = SHAPES[0]
    wanted = [DenseCase("convolutions, mean", shapes, 2, 16, keep="half", zero_stage=stage) for stage in (0, 1, 2, 3)]
    for errors in run_on_ranks(check_dense_cases, 2, 2, wanted, timeout_s=200):
        assert all(error.within(FLOAT32_BOUND) for error in errors), errors

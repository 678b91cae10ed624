"""Learning rates are a function of the step: warm-up, half a cosine, shares of blocks, exactly zero for a frozen encoder."""

import pytest

from gigamil.config.schema import Optim
from gigamil.train.schedule import learning_rates

OPTIM = Optim(lr_encoder=1e-4, lr_head=1e-3, warmup_steps=4, final_lr_fraction=0.1)


def head(step: int, num_steps: int = 24, optim: Optim = OPTIM) -> float:
    return learning_rates(optim, step, num_steps, True)[1]


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    assert [head(step) for step in range(4)] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])


def test_the_cosine_starts_at_the_rate_and_ends_at_its_share() -> None:
    assert head(4) == pytest.approx(1e-3)
    assert head(14) == pytest.approx((1e-3 + 1e-4) / 2)
    assert head(24) == pytest.approx(1e-4)
    assert head(1000) == pytest.approx(1e-4)  # a longer run than planned does not climb again
    rates = [head(step) for step in range(4, 25)]
    assert rates == sorted(rates, reverse=True)


def test_both_groups_follow_one_curve_and_a_frozen_encoder_has_rate_zero() -> None:
    for step in (0, 3, 4, 10, 23):
        encoder, other = learning_rates(OPTIM, step, 24, True)
        assert encoder == pytest.approx(other / 10)
        assert learning_rates(OPTIM, step, 24, False) == [0.0, other]


def test_without_warm_up_and_with_more_warm_up_than_steps() -> None:
    assert head(0, 10, OPTIM.model_copy(update={"warmup_steps": 0})) == pytest.approx(1e-3)
    assert head(1, 2, OPTIM) == pytest.approx(0.5e-3)
    assert head(4, 4, OPTIM) == pytest.approx(1e-3)
    assert head(5, 4, OPTIM) == pytest.approx(1e-4)


def test_groups_of_the_encoder_have_their_share_of_its_rate() -> None:
    for step in (0, 3, 10):
        encoder, other = learning_rates(OPTIM, step, 24, True)
        shared = learning_rates(OPTIM, step, 24, True, (0.25, 0.5, 1.0))
        assert shared == [0.25 * encoder, 0.5 * encoder, encoder, other]
        assert learning_rates(OPTIM, step, 24, False, (0.25, 0.5, 1.0)) == [0.0, 0.0, 0.0, other]
        assert learning_rates(OPTIM, step, 24, True, ()) == [other]  # an encoder of which nothing is trained

"""The encoder that sleeps takes the time that it is told, and learns from its tiles."""

import pytest
import torch

from gigamil.models.encoder import encoders
from gigamil.testing import sleep
from gigamil.testing.sleep import Pace, SleepEncoder


class Clock:
    """Stands in for `time`: sleeps end late, by a quarter and 0.1 ms."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asleep = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 1.25 * seconds + 1e-4
        self.asleep += 1.25 * seconds + 1e-4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(sleep, "time", fake)
    return fake


def test_forward_and_twice_as_long_backward(clock: Clock) -> None:
    encoder = SleepEncoder(seconds_per_tile=0.01)
    image = torch.rand((8, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    embedding = encoder(image, None)
    assert embedding.shape == (8, encoder.dim)
    assert clock.now - 100 == pytest.approx(0.08, rel=0.3)
    before = clock.now
    embedding.sum().backward()
    assert clock.now - before == pytest.approx(0.16, rel=0.3)
    weight = encoder.project.weight
    assert weight.grad is not None
    assert float(weight.grad.abs().min()) > 0


def test_many_short_calls_take_their_time_together(clock: Clock) -> None:
    encoder = SleepEncoder(seconds_per_tile=1e-4)
    with torch.no_grad():
        for _ in range(500):
            encoder(torch.zeros((2, 3, 16, 16)), None)
    assert clock.now - 100 == pytest.approx(500 * 2e-4, rel=0.01)


def test_what_was_computed_counts_and_what_took_too_long_is_given_back(clock: Clock) -> None:
    pace = Pace()
    since = clock.now
    clock.now += 0.5  # computing, or waiting for a core
    pace.sleep(0.1, since)
    assert clock.asleep == 0  # 0.4 s too long
    pace.sleep(1.0, clock.now)
    assert clock.now - since == pytest.approx(0.5 + 1.25 * 0.6, rel=1e-3)


def test_ballast_makes_the_gradient_larger() -> None:
    encoder = SleepEncoder(seconds_per_tile=0.0, ballast=1000)
    encoder(torch.rand((3, 3, 16, 16)), None).sum().backward()
    assert encoder.ballast is not None
    assert encoder.ballast.grad is not None
    torch.testing.assert_close(encoder.ballast.grad, torch.full((1000,), 3 * encoder.dim / 1000))
    assert sum(p.numel() for p in encoder.parameters()) == 1000 + 48 * encoder.dim + encoder.dim


def test_it_is_known_by_its_name() -> None:
    assert encoders["sleep"] is SleepEncoder

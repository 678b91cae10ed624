"""Live bytes are counted to the byte, whoever holds them."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gigamil.memory.peak import Linear, LiveBytes, measure_calls


def test_now_and_peak_of_temporaries() -> None:
    with LiveBytes() as live:
        first = torch.zeros(100)
        second = first + 1
        assert (live.now, live.peak) == (800, 800)
        del first
        assert (live.now, live.peak) == (400, 800)
        live.mark()
        assert live.peak == 400
    assert second.sum() == 100


def test_views_and_writing_in_place_take_nothing() -> None:
    before = torch.zeros(100)
    with LiveBytes() as live:
        before.add_(1)
        view = before.view(10, 10)[:5]
        assert (live.now, live.peak) == (0, 0)
    assert view.sum() == 50


def test_a_storage_that_grows_is_counted_once() -> None:
    with LiveBytes() as live:
        tensor = torch.zeros(10)
        tensor.resize_(30)
        assert live.now == 120


def test_what_checkpointing_keeps_is_seen_and_goes_with_the_graph() -> None:
    layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    image = torch.rand(10, 8)
    with LiveBytes() as live:
        whole = layers(image)
        kept = live.now
        del whole
        assert live.now == 0
        again = checkpoint(layers, image, use_reentrant=False)
        assert live.now < kept
        again.sum().backward()
    assert layers[0].weight.grad is not None


def test_lines_through_two_sizes_hold_at_a_third() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

    def encode(num: int) -> torch.Tensor:
        return model(torch.rand(num, 3, 8, 8))

    found, direct = measure_calls(encode, model, (20, 22)), measure_calls(encode, model, (90, 95))
    for name in ("kept", "first", "later", "blind"):
        assert getattr(found, name).at(90) == getattr(direct, name).at(90), name
    assert found.kept.per_tile == 4 * (3 * 64 + 4 * 36 + 5)  # image, ReLU's result (the linear's input), embedding
    assert next(model.parameters()).grad is None


def test_a_line_is_never_below_zero() -> None:
    assert Linear(-10.0, 2.0).at(3) == 0
    assert Linear(1.4, 2.0).at(3) == 7


def test_a_model_that_is_fixed_keeps_nothing_for_a_backward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).requires_grad_(False)
    found = measure_calls(lambda num: model(torch.rand(num, 3, 8, 8)), model, (20, 22))
    assert found.kept.at(50) == 50 * 5 * 4  # what it gives
    assert found.first.at(50) >= found.blind.at(50)

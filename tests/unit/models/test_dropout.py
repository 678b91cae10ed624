"""Keyed dropout: unbiased, one mask per key and layer, blind to chunks, and off without keys."""

import pytest
import torch

from gigamil import keyed
from gigamil.models.dropout import KeyedDropout


def keys(num: int) -> torch.Tensor:
    return keyed.fold(keyed.root_key(4), torch.arange(num))


def test_the_mean_is_kept_and_elements_are_dropped_or_scaled() -> None:
    dropped_nX = KeyedDropout(0.25, "layer")(torch.ones(2000, 50), keys(2000))
    assert set(dropped_nX.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    # 100 000 draws: 5 standard errors of the mean of 4/3 * Bernoulli(3/4).
    assert abs(float(dropped_nX.double().mean()) - 1) < 5 * (1 / 3 / 100_000) ** 0.5


def test_any_chunking_gives_the_same_mask() -> None:
    layer, values_nX = KeyedDropout(0.5, "layer"), torch.rand(30, 8, generator=torch.Generator().manual_seed(0))
    whole_nX = layer(values_nX, keys(30))
    chunks = [layer(v, k) for v, k in zip(values_nX.split(7), keys(30).split(7), strict=True)]
    assert torch.equal(torch.cat(chunks), whole_nX)
    assert torch.equal(layer(values_nX, keys(30)), whole_nX)  # and again, as in a replay


def test_the_mask_does_not_depend_on_the_shape_or_dtype() -> None:
    layer, key_n = KeyedDropout(0.5, "layer"), keys(5)
    flat = layer(torch.ones(5, 24), key_n) == 0
    assert torch.equal(layer(torch.ones(5, 2, 3, 4), key_n).flatten(1) == 0, flat)
    for dtype in (torch.float64, torch.bfloat16):
        dropped = layer(torch.ones(5, 24, dtype=dtype), key_n)
        assert dropped.dtype == dtype
        assert torch.equal(dropped == 0, flat)


def test_layers_and_keys_draw_masks_of_their_own() -> None:
    ones = torch.ones(50, 64)
    a, b = (KeyedDropout(0.5, name)(ones, keys(50)) == 0 for name in ("a", "b"))
    assert len({tuple(row) for row in torch.cat([a, b]).tolist()}) == 100
    assert 0.4 < float((a == b).float().mean()) < 0.6


def test_without_keys_or_with_p_zero_nothing_happens() -> None:
    values = torch.rand(3, 4)
    assert KeyedDropout(0.5, "layer")(values, None) is values
    assert KeyedDropout(0.0, "layer")(values, keys(3)) is values


def test_the_gradient_is_masked_as_the_values() -> None:
    values = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
    dropped = KeyedDropout(0.5, "layer")(values, keys(4))
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_an_infinite_element_that_is_dropped_is_gone() -> None:
    dropped = KeyedDropout(0.5, "layer")(torch.full((10, 10), torch.inf), keys(10))
    assert set(dropped.flatten().tolist()) == {0.0, torch.inf}


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_impossible_p_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout p={p} of layer 'head'"):
        KeyedDropout(p, "head")


def test_it_is_shown_with_its_settings() -> None:
    assert repr(KeyedDropout(0.1, "head.slide")) == "KeyedDropout(p=0.1, layer='head.slide')"

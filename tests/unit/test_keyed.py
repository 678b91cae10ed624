"""Draws are functions of their key: frozen values, no dependence on order or chunking, and a flat distribution."""

import pytest
import torch

from gigamil import keyed


def test_values_are_stable() -> None:
    # Frozen: a change here changes every dropout mask and augmentation of runs that people have published.
    # Texts too: Python's own hash is another one in every process.
    assert keyed.text_key("augment") == 2333421271699273465
    assert int(keyed.root_key(0)) == -8469215461636344404
    assert int(keyed.root_key(-1)) == -9073517811768691942
    assert int(keyed.fold(keyed.fold(keyed.root_key(5), 11), 3)) == -3069756236955355610
    assert (keyed.uniform(keyed.root_key(0), 4) * 2**24).tolist() == [8336682, 11270730, 8613556, 13018631]


@pytest.mark.parametrize("value", [0, 1, -1, 123456789012345, 2**63 - 1, -(2**63)])
def test_an_integer_folds_as_a_tensor_does(value: int) -> None:
    # It is mixed outside torch, whose int64 products wrap by themselves.
    key_n = keyed.fold(keyed.root_key(1), torch.arange(5))
    assert torch.equal(keyed.fold(key_n, value), keyed.fold(key_n, torch.tensor(value)))


def test_draws_are_the_published_generator() -> None:
    # The first outputs of SplitMix64 from state 0 are 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F.
    top_bits = (keyed.uniform(torch.tensor(0), 3) * 2**24).long().tolist()
    assert top_bits == [0xE220A8, 0x6E789E, 0x06C45D]


def test_any_chunking_and_order_draws_the_same() -> None:
    key_n = keyed.fold(keyed.root_key(3), torch.arange(100))
    whole_nX = keyed.uniform(key_n, 7)
    assert torch.equal(torch.cat([keyed.uniform(part, 7) for part in key_n.split(13)]), whole_nX)
    assert torch.equal(keyed.uniform(key_n.flip(0), 7), whole_nX.flip(0))
    assert torch.equal(keyed.uniform(key_n, 9)[:, :7], whole_nX)  # asking for more changes nothing before
    state = torch.get_rng_state()
    keyed.uniform(key_n, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_broadcast_and_order_matters() -> None:
    root = keyed.root_key(1)
    key_ab = keyed.fold(keyed.fold(root, torch.arange(3))[:, None], torch.arange(4))
    assert key_ab.shape == (3, 4)
    assert int(key_ab[2, 1]) == int(keyed.fold(keyed.fold(root, 2), 1))
    assert len(set(key_ab.flatten().tolist())) == 12
    assert int(keyed.fold(keyed.fold(root, 1), 2)) != int(keyed.fold(keyed.fold(root, 2), 1))


def test_keys_of_many_tiles_are_distinct() -> None:
    steps, slides, tiles = torch.arange(20), torch.arange(20), torch.arange(500)
    key = keyed.fold(keyed.fold(keyed.root_key(0), steps)[:, None], slides)
    key = keyed.fold(key[..., None], tiles).flatten()
    assert len(key.unique()) == len(key) == 200_000


@pytest.mark.parametrize("along", ["keys", "draws"])
def test_draws_are_uniform(along: str) -> None:
    num = 200_000
    root = keyed.root_key(9)
    draw = keyed.uniform(keyed.fold(root, torch.arange(num)), 1)[:, 0] if along == "keys" else keyed.uniform(root, num)
    assert 0 <= float(draw.min())
    assert float(draw.max()) < 1
    counts = torch.histc(draw.double(), bins=100, min=0, max=1)
    chi_square = float(((counts - num / 100) ** 2 / (num / 100)).sum())
    assert 50 < chi_square < 160  # 99 degrees of freedom: both ends are less likely than 1 in 10 000
    # Neighbours, and neighbours in the top bit alone, are not correlated: 5 standard errors.
    centred = draw.double() - 0.5
    top = (draw >= 0.5).double() - 0.5
    for values, variance in ((centred, 1 / 12), (top, 1 / 4)):
        correlation = float((values[1:] * values[:-1]).mean()) / variance
        assert abs(correlation) < 5 / num**0.5


def test_each_bit_of_a_draw_is_fair() -> None:
    bits = (keyed.uniform(keyed.fold(keyed.root_key(2), torch.arange(50_000)), 2) * 2**24).long()
    for bit in range(24):
        share = float(((bits >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / 100_000**0.5

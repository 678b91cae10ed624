"""What a tile gets depends on its key only: any chunking, all symmetries, settings of zero leave it alone."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from gigamil import keyed
from gigamil.config.schema import Augment
from gigamil.data.augment import augment_tiles, to_float

OFF = {"flips": False, "turns": False, "brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}


def settings(**changed: object) -> Augment:
    return Augment.model_validate(OFF | changed)


def keys(num: int) -> Tensor:
    return keyed.fold(keyed.root_key(1), torch.arange(num))


def tiles(num: int, side: int = 8) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(0))


def symmetries(image: Tensor) -> list[Tensor]:
    turned = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    return turned + [view.flip(-1) for view in turned]


def test_to_float_scales_and_moves_channels_first() -> None:
    image_nHWC = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 4, 5, 3)
    image_nCHW = to_float(image_nHWC)
    assert (image_nCHW.shape, image_nCHW.dtype) == ((1, 3, 4, 5), torch.float32)
    assert image_nCHW[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert to_float(image_nHWC, torch.float64).dtype == torch.float64


def test_any_chunking_augments_the_same() -> None:
    image_nCHW, key_n, augment = tiles(20), keys(20), Augment()
    whole_nCHW = augment_tiles(image_nCHW, key_n, augment)
    parts = [augment_tiles(i, k, augment) for i, k in zip(image_nCHW.split(6), key_n.split(6), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole_nCHW, rtol=0, atol=1e-6)  # sums of other shapes round otherwise
    order = torch.randperm(20)
    torch.testing.assert_close(augment_tiles(image_nCHW[order], key_n[order], augment), whole_nCHW[order])
    assert torch.equal(augment_tiles(image_nCHW, key_n, augment), whole_nCHW)  # a replay sees the same bits


def test_settings_of_zero_change_nothing() -> None:
    image_nCHW = tiles(5)
    result = augment_tiles(image_nCHW, keys(5), settings())
    assert torch.equal(result, image_nCHW)


def test_the_input_is_not_written_to() -> None:
    image_nCHW = tiles(5)
    before = image_nCHW.clone()
    augment_tiles(image_nCHW, keys(5), Augment())
    assert torch.equal(image_nCHW, before)


@pytest.mark.parametrize(
    ("changed", "allowed"),
    [
        ({"flips": True}, {0, 2, 4, 6}),  # as they are, half turn, left-right, upside down
        ({"turns": True}, {0, 1, 2, 3}),
        ({"flips": True, "turns": True}, set(range(8))),
    ],
)
def test_orientations_are_the_chosen_ones_and_equally_likely(changed: dict, allowed: set[int]) -> None:
    num = 800
    image = tiles(1, side=3)
    result_nCHW = augment_tiles(image.expand(num, -1, -1, -1), keys(num), settings(**changed))
    views = symmetries(image[0])
    found = Counter(
        next(number for number, view in enumerate(views) if torch.equal(view, tile)) for tile in result_nCHW
    )
    assert set(found) == allowed
    expected = num / len(allowed)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in found.values())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "stain"])
def test_each_colour_setting_acts_alone_and_within_its_range(name: str) -> None:
    image_nCHW = 0.3 + 0.4 * tiles(300, side=4)  # far from 0 and 1, so nothing is clamped
    image_nCHW = image_nCHW[:1].expand(300, -1, -1, -1)
    result_nCHW = augment_tiles(image_nCHW, keys(300), settings(**{name: 0.2}))
    difference_n = (result_nCHW - image_nCHW).abs().flatten(1).amax(1)
    assert float(difference_n.min()) < 0.02  # factors near 1 occur
    assert 0.03 < float(difference_n.max()) < 0.25  # and factors near 1 +- 0.2
    if name == "brightness":
        factor_n = (result_nCHW / image_nCHW).mean(dim=(1, 2, 3))
        assert 0.8 <= float(factor_n.min()) < 0.82
        assert 1.18 < float(factor_n.max()) <= 1.2001
        assert abs(float(factor_n.mean()) - 1) < 5 * 0.2 / 3**0.5 / 300**0.5


def test_a_grey_tile_keeps_its_colour_under_saturation_and_contrast() -> None:
    grey = torch.full((10, 3, 4, 4), 0.5)
    result = augment_tiles(grey, keys(10), settings(saturation=0.5, contrast=0.5))
    torch.testing.assert_close(result, grey)


def test_stain_jitter_leaves_white_alone() -> None:
    # Glass has no stain: an optical density of zero times any factor.
    white = torch.ones(10, 3, 4, 4)
    torch.testing.assert_close(augment_tiles(white, keys(10), settings(stain=0.3)), white)


def test_results_stay_in_range() -> None:
    image_nCHW = tiles(100).round()  # black and white pixels
    wild = settings(flips=True, turns=True, brightness=1, contrast=1, saturation=1, stain=1)
    result_nCHW = augment_tiles(image_nCHW, keys(100), wild)
    assert bool(result_nCHW.isfinite().all())
    assert float(result_nCHW.min()) >= 0
    assert float(result_nCHW.max()) <= 1


def test_float64_and_no_tiles() -> None:
    assert augment_tiles(tiles(3).double(), keys(3), Augment()).dtype == torch.float64
    assert augment_tiles(tiles(1)[:0], keys(1)[:0], Augment()).shape == (0, 3, 8, 8)


def test_values_are_stable() -> None:
    # Frozen: a change here changes the pixels of runs that people have published. exp and log may round otherwise.
    image_nCHW = torch.linspace(0.1, 0.9, 2 * 3 * 2 * 2, dtype=torch.float64).view(2, 3, 2, 2)
    corner_nC = augment_tiles(image_nCHW, keys(2), Augment())[:, :, 0, 0]
    expected_nC = [
        [0.13142219878809308, 0.24977555420343664, 0.4086100260023886],
        [0.6682394042777443, 0.8173377276125394, 0.9823223403478256],
    ]
    torch.testing.assert_close(corner_nC, torch.tensor(expected_nC, dtype=torch.float64), rtol=1e-12, atol=0)

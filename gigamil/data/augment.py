"""Tile augmentation on batches; what a tile gets depends on its key only, so a replay sees the same pixels.

Shapes: n tiles, H W pixels.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gigamil import keyed
from gigamil.data.blocks import Turn

if TYPE_CHECKING:
    from gigamil.config.schema import Augment

_LAYER = keyed.text_key("augment")
_NUM_DRAWS = 9  # flip x, flip y, turn, brightness, contrast, saturation, three stains
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# Optical densities (RGB) of hematoxylin, eosin and their residual: Ruifrok & Johnston 2001, table 1; rows of length 1.
_STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))


def to_float(image_nHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (n, H, W, 3) -> RGB in 0..1, (n, 3, H, W). Features (n, D) stay what they are."""
    if image_nHWC.dim() == 2:
        return image_nHWC.to(dtype)
    return image_nHWC.permute(0, 3, 1, 2).to(dtype).div_(255)


def augment_tiles(image_nCHW: Tensor, tile_key_n: Tensor, settings: "Augment") -> Tensor:
    """Flip, turn and recolour each tile by draws from its key.

    Args:
        image_nCHW: RGB in 0..1, square tiles.
        tile_key_n: int64 key of (seed, step, slide, tile).
        settings: ranges; a factor of range r is uniform in [1 - r, 1 + r].
    Returns:
        A new tensor of the same shape, in 0..1.
    """
    draw_nX = keyed.uniform(keyed.fold(tile_key_n, _LAYER), _NUM_DRAWS).to(image_nCHW.dtype)
    image_nCHW = _orient(image_nCHW, draw_nX, settings)
    return _recolour(image_nCHW, draw_nX, settings, lambda image: _per_tile(_gray(image).mean(dim=(1, 2, 3))))


def _recolour(image_nCHW: Tensor, draw_nX: Tensor, settings: "Augment", middle: Callable[[Tensor], Tensor]) -> Tensor:
    """Stain, brightness, contrast about the middle, and saturation."""
    spread = (settings.brightness, settings.contrast, settings.saturation, *[settings.stain] * 3)
    factor_nX = 1 + (2 * draw_nX[:, 3:] - 1) * _constant(spread, draw_nX.dtype, draw_nX.device)
    if settings.stain:
        image_nCHW = _jitter_stain(image_nCHW, factor_nX[:, 3:])
    brightness_n, contrast_n, saturation_n = factor_nX[:, :3].unbind(1)
    if settings.brightness:
        image_nCHW = image_nCHW * _per_tile(brightness_n)
    if settings.contrast:
        image_nCHW = _blend(image_nCHW, middle(image_nCHW), contrast_n)
    if settings.saturation:
        image_nCHW = _blend(image_nCHW, _gray(image_nCHW), saturation_n)
    return image_nCHW.clamp(0, 1)


def augment_block(image_1CHW: Tensor, slide_key_1: Tensor, settings: "Augment") -> Tensor:
    """Recolour a block by draws from the key of its slide: all blocks of a slide are recoloured alike.

    As `augment_tiles`, but contrast is about a middle grey: the mean of a block is not that of the slide. Flips and turns
    are those of the whole slide (`draw_turn`).
    """
    draw_1X = keyed.uniform(keyed.fold(slide_key_1, _LAYER), _NUM_DRAWS).to(image_1CHW.dtype)
    middle_1111 = image_1CHW.new_full((1, 1, 1, 1), 0.5)
    return _recolour(image_1CHW, draw_1X, settings, lambda _: middle_1111)


def draw_turn(slide_key: int, settings: "Augment") -> Turn:
    """How a slide is laid in training: one of eight ways, by a draw from its key."""
    flip_x, flip_y, turn = keyed.uniform(keyed.fold(torch.tensor([slide_key]), _LAYER), _NUM_DRAWS)[0, :3].tolist()
    quarters = int(turn * 4) * settings.turns
    # A quarter turn is a transposition and a flip, a half turn is both flips.
    return Turn(
        transpose=quarters % 2 == 1,
        flip_y=(quarters in (1, 2)) ^ (settings.flips and flip_y < 0.5),
        flip_x=(quarters in (2, 3)) ^ (settings.flips and flip_x < 0.5),
    )


def _orient(image_nCHW: Tensor, draw_nX: Tensor, settings: "Augment") -> Tensor:
    quarters_n = (draw_nX[:, 2] * 4).long() * settings.turns  # turns by 0, 90, 180 or 270 degrees
    half_n, quarter_n = quarters_n >= 2, quarters_n % 2 == 1
    # A half turn is both flips. With flips and turns, all eight symmetries of the square are equally likely.
    flip_x_n = ((draw_nX[:, 0] < 0.5) & settings.flips) ^ half_n
    flip_y_n = ((draw_nX[:, 1] < 0.5) & settings.flips) ^ half_n
    for chosen_n, change in (
        (flip_x_n, lambda image: image.flip(3)),
        (flip_y_n, lambda image: image.flip(2)),
        (quarter_n, lambda image: torch.rot90(image, 1, (2, 3))),
    ):
        image_nCHW = torch.where(chosen_n[:, None, None, None], change(image_nCHW), image_nCHW)
    return image_nCHW


def _jitter_stain(image_nCHW: Tensor, factor_n3: Tensor) -> Tensor:
    # Beer-Lambert: optical density is linear in the amount of each stain, so the amounts are scaled there.
    stains_33, inverse_33 = _stains(image_nCHW.dtype, image_nCHW.device)
    density_nCHW = -torch.log(image_nCHW.clamp(min=1 / 255))
    # rows: density = amount @ stains; scaling by diag(f) in between gives one 3 x 3 matrix per tile.
    matrix_n33 = inverse_33 @ torch.diag_embed(factor_n3) @ stains_33
    return torch.exp(-torch.einsum("nchw,ncd->ndhw", density_nCHW, matrix_n33))


def _gray(image_nCHW: Tensor) -> Tensor:
    luma_C = _constant(_LUMA, image_nCHW.dtype, image_nCHW.device)
    return torch.einsum("nchw,c->nhw", image_nCHW, luma_C)[:, None]


def _blend(image_nCHW: Tensor, other: Tensor, factor_n: Tensor) -> Tensor:
    return other + (image_nCHW - other) * _per_tile(factor_n)


def _per_tile(values_n: Tensor) -> Tensor:
    return values_n[:, None, None, None]


@cache
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that is copied to the device once: each copy makes the CPU wait for all that a GPU has to do."""
    return torch.tensor(values, dtype=dtype, device=device)


@cache
def _stains(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stains, rows of length 1, and their inverse, found on the CPU: a GPU would be waited for, to learn of errors."""
    stains_33 = torch.nn.functional.normalize(torch.tensor(_STAINS, dtype=dtype, device="cpu"), dim=1)
    return stains_33.to(device), torch.linalg.inv(stains_33).to(device)

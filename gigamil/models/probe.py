"""A numerical test that an encoder looks at one tile at a time, before anything is trained on it.

Shapes: n tiles of the test, C H W image, D embedding.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.encoder import TileEncoder
from gigamil.models.networks import refuse_train_batchnorm

_NUM_TILES = 3  # the middle one has neighbours on both sides
_Rows = list[Tensor]


def refuse_tile_mixing(encoder: TileEncoder, tile_px: int) -> None:
    """Encode a tile twice, among different others, and refuse an encoder that gives it two embeddings.

    The chunks of a step, and so what else is in a tile's chunk, depend on memory and on the number of ranks. The encoder
    is run as it is, in its mode and on its device; weights, buffers and torch's generators are left as they were.

    Raises:
        ConfigError: names the first layer that mixes tiles, and the cure; or the encoder does not take tiles of this
            size, or does not give (n, dim), or has BatchNorm in training mode.
    Cost: 6 forwards of a tile; 12 if the embeddings are not equal in every bit.
    """
    refuse_train_batchnorm(encoder)
    first_nCHW, second_nCHW = _images(encoder, tile_px)
    first_nD, second_nD = _encode(encoder, first_nCHW), _encode(encoder, second_nCHW)
    shape = tuple(first_nD.shape) if isinstance(first_nD, Tensor) else type(first_nD).__name__
    if shape != (_NUM_TILES, encoder.dim):
        raise ConfigError(
            f"{_title(encoder)} gives {shape} for {_NUM_TILES} tiles and must give (n, dim) = "
            f"{(_NUM_TILES, encoder.dim)}. A network of timm needs a pooling option, such as "
            "science.encoder.options: {global_pool: avg}."
        )
    if torch.equal(first_nD[1], second_nD[1]):
        return
    # A difference within rounding may come from one that is not, in a branch with a small factor (LayerScale).
    layer = _find_mixer(encoder, first_nCHW, second_nCHW)
    if layer is None and _is_equal(list(_rows(first_nD)), list(_rows(second_nD))):
        return
    layer = layer or _title(encoder)
    raise ConfigError(
        f"{layer} mixes the tiles of a chunk: the embedding of a tile changes when other tiles are encoded with it. Which "
        "tiles share a chunk depends on memory and ranks, so the gradient would be wrong. Use layers that look at one "
        "tile (GroupNorm or LayerNorm, no sums or statistics over the first dimension); what looks at many tiles belongs "
        "into the aggregator."
    )


def _images(encoder: TileEncoder, tile_px: int) -> tuple[Tensor, Tensor]:
    """The same tile between two that are alike, and between black and white."""
    generator = torch.Generator().manual_seed(0)
    noise_nCHW = torch.rand((_NUM_TILES, 3, tile_px, tile_px), generator=generator).to(encoder.mean_C11)
    other_nCHW = noise_nCHW.clone()
    other_nCHW[0], other_nCHW[2] = 0, 1
    return noise_nCHW, other_nCHW


@torch.no_grad()
def _encode(encoder: TileEncoder, image_nCHW: Tensor) -> Any:
    """What the encoder gives; of an encoder of others that may be anything."""
    key_n = torch.arange(_NUM_TILES, device=image_nCHW.device) if encoder.training else None
    # The generators are put back: layers of others that draw do so alike in every call.
    with torch.random.fork_rng(devices=[image_nCHW.device] if image_nCHW.is_cuda else []):
        try:
            return encoder(image_nCHW, key_n)
        except Exception as error:  # whatever the encoder raises; the cause is kept
            side = image_nCHW.shape[-1]
            raise ConfigError(
                f"{_title(encoder)} does not take tiles of slides.tile_px={side}: {error}. A network of timm that wants "
                f"one image size takes another with science.encoder.options: {{img_size: {side}}}, and any with "
                "{dynamic_img_size: true}."
            ) from error


def _find_mixer(encoder: TileEncoder, *images: Tensor) -> str | None:
    """The first layer, innermost, whose input for the tile is equal in both runs and whose output is not."""
    names = {module: f"layer 'encoder.{name}'" for name, module in encoder.named_modules() if name}
    runs: list[list[tuple[nn.Module, _Rows, _Rows]]] = []
    for image_nCHW in images:
        calls: list[tuple[nn.Module, _Rows, _Rows]] = []

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, calls: Any = calls) -> None:
            calls.append((module, list(_rows((args, kwargs))), list(_rows(output))))

        with ExitStack() as stack:
            for module in names:
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            _encode(encoder, image_nCHW)
        runs.append(calls)
    # A layer's hook runs when its forward ends: inner layers before outer ones, otherwise in the order of execution.
    for (module, input_a, output_a), (_, input_b, output_b) in zip(*runs, strict=False):
        if _is_equal(input_a, input_b) and not _is_equal(output_a, output_b):
            return f"{names[module]} ({type(module).__name__})"
    return None


def _rows(values: Any) -> Iterator[Tensor]:
    """What is known to be the middle tile's of all tensors in nested arguments; windows of a tile lie together."""
    if isinstance(values, Tensor) and values.dim() and values.is_floating_point() and not len(values) % _NUM_TILES:
        yield values.detach().reshape(_NUM_TILES, -1)[1].clone()
    elif isinstance(values, dict):
        yield from _rows(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _rows(value)


def _is_equal(a: _Rows, b: _Rows) -> bool:
    """Equal but for rounding, which other tiles may change if kernels depend on them: sqrt(eps) is thousands of roundings.

    The tiles around are as different as tiles can be, so that a mean over the chunk moves by far more.
    """
    return len(a) == len(b) and all(
        bool((x - y).norm() <= torch.finfo(x.dtype).eps ** 0.5 * x.norm()) or not bool(x.isfinite().all())
        for x, y in zip(a, b, strict=True)
    )


def _title(encoder: TileEncoder) -> str:
    return f"encoder {type(getattr(encoder.backbone, 'network', encoder.backbone)).__name__}"

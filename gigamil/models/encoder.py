"""Encoders: tile -> embedding. Ordinary modules that see a batch of tiles and know nothing of bags or ranks.

Shapes: n tiles of a chunk, C H W image, D embedding.
An encoder is a module with an attribute `dim` (D) and `forward(image_nCHW, tile_key_n) -> embedding_nD`; images are
normalised; keys are for `KeyedDropout` and may be ignored. An attribute `block_names` tells its blocks (blocks.py), for
those who freeze some or let them learn slower. Register your own with `@encoders.register("name")`: a factory that takes
the `science.encoder.options` of the YAML.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.blocks import freeze_blocks
from gigamil.models.dense import ChannelNorm, pooled
from gigamil.models.dropout import KeyedDropout
from gigamil.models.lora import add_lora
from gigamil.models.networks import RESNETS, FrozenStatistics, timm_network, torchvision_resnet
from gigamil.registry import Registry

if TYPE_CHECKING:
    from gigamil.config.schema import Encoder

# int64 (c, 2): (row, column) of cells in the grid of a block; or, where ranks share a slide, what takes the place of the
# network: normalised rows of pixels -> embeddings (c, D).
Cells = Tensor | Callable[[Tensor], Tensor]

encoders: Registry[Callable[..., nn.Module]] = Registry("encoder", "gigamil.encoders")

_OTHER_SIZE = (
    " The weights are for another image size: science.encoder.options: {img_size: that of the weights, dynamic_img_size: "
    "true} takes tiles of any size."
)


class TileEncoder(nn.Module):
    """Input normalisation around a backbone.

    Args:
        backbone: encoder as the module docstring says.
        mean, std: of the RGB input in 0..1; stored as buffers, so they travel with the weights.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim = int(backbone.dim)  # type: ignore[arg-type]
        self.register_buffer("mean_C11", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std_C11", torch.tensor(std).view(3, 1, 1))

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """RGB in 0..1 -> embedding (n, D)."""
        return self.backbone(self._prepared(image_nCHW), tile_key_n)

    def _prepared(self, image_nCHW: Tensor) -> Tensor:
        image_nCHW = _normalised(image_nCHW, self.mean_C11, self.std_C11)
        if image_nCHW.is_cuda:
            # Convolutions take their memory layout from the image. Tensor cores want channels last, float32 does not.
            narrow = torch.is_autocast_enabled("cuda")
            image_nCHW = image_nCHW.contiguous(memory_format=torch.channels_last if narrow else torch.contiguous_format)
        return image_nCHW


class DenseEncoder(TileEncoder):
    """Input normalisation around a dense backbone.

    Args:
        backbone, mean, std: as of `TileEncoder`.
    Attributes:
        cell_px: pixels along the side of a cell.
    """

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(backbone, mean, std)
        self.cell_px = int(backbone.cell_px)  # type: ignore[arg-type]

    @property
    def network(self) -> nn.Module:
        """Of the backbone: image (n, C, H, W) -> grid (n, D, h, w)."""
        network = self.backbone.network
        assert isinstance(network, nn.Module)
        return network

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """RGB in 0..1 -> embeddings.

        Args:
            image_nCHW: tiles, one block (1, C, H, W), or this rank's rows of a slide.
            tile_key_n: not used: a network of layers that are local draws nothing.
            cells: of the block that are wanted, or what computes them; None for tiles without surroundings.
        Returns:
            (n, D), or (c, D) of the cells.
        """
        image_nCHW = self._prepared(image_nCHW)
        if cells is not None and not isinstance(cells, Tensor):
            return cells(image_nCHW)
        grid_nDhw = self.network(image_nCHW)
        if cells is None:
            return grid_nDhw[:, :, 0, 0]
        return grid_nDhw[0, :, cells[:, 0], cells[:, 1]].T


class GivenFeatures(nn.Module):
    """In the place of an encoder, where tiles were encoded before: rows are embeddings already, nothing is learned.

    Args:
        dim: D of the features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.backbone = nn.Identity()

    def forward(self, feature_nD: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Features (n, D) -> the same."""
        return feature_nD


def _normalised(image_nCHW: Tensor, mean_C11: Tensor, std_C11: Tensor) -> Tensor:
    image_nHWC = image_nCHW.permute(0, 2, 3, 1)
    if not image_nHWC.is_contiguous():
        return (image_nCHW - mean_C11) / std_C11
    # Decoded tiles lie as (H, W, C): a row at a time, the same numbers are five times as fast as three at a time (CPU).
    width = image_nHWC.shape[2]
    row_nHX = (image_nHWC.flatten(2) - mean_C11.flatten().repeat(width)).div_(std_C11.flatten().repeat(width))
    return row_nHX.view(image_nHWC.shape).permute(0, 3, 1, 2)


@encoders.register("small_cnn")
class SmallCNN(nn.Module):
    """Four strided convolutions with group normalisation, then a global mean: a CPU-sized encoder.

    About 4 million multiply-adds for a 64 x 64 tile at the default width.

    Args:
        width: channels of the first layer; each of the next two doubles them, the last keeps them.
        dropout: keyed dropout on the embedding.
    """

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        blocks: list[nn.Module] = []
        for num_in, num_out in itertools.pairwise(channels):
            # Group normalisation looks at one tile only, so it cannot tell how tiles are chunked.
            conv = nn.Conv2d(num_in, num_out, kernel_size=3, stride=2, padding=1, bias=False)
            blocks += [conv, nn.GroupNorm(_num_groups(num_out), num_out), nn.ReLU()]
        self.features = nn.Sequential(*blocks)
        self.block_names = [[f"features.{i}", f"features.{i + 1}"] for i in range(0, len(blocks), 3)]
        self.dropout = KeyedDropout(dropout, "encoder.embedding")
        self.dim = channels[-1]

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> embedding (n, D)."""
        return self.dropout(self.features(image_nCHW).mean(dim=(2, 3)), tile_key_n)


class SmallDenseCNN(nn.Module):
    """Four strided convolutions with normalisation over channels, then a pooling: a CPU-sized dense encoder.

    Args:
        width: channels of the first layer; each of the next two doubles them, the last keeps them.
        pool: cells of 16 pixels along each side that are pooled to one.
    """

    def __init__(self, width: int = 16, pool: int = 1, pool_kind: Literal["mean", "max"] = "mean") -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (num_in, num_out) in enumerate(itertools.pairwise(channels)):
            layers[f"conv{number}"] = nn.Conv2d(num_in, num_out, kernel_size=3, stride=2, padding=1, bias=False)
            layers[f"norm{number}"] = ChannelNorm(num_out)
            layers[f"relu{number}"] = nn.ReLU()
        self.network = pooled(layers, pool, pool_kind)
        self.block_names = [[f"network.conv{i}", f"network.norm{i}"] for i in range(4)]
        self.dim, self.cell_px = channels[-1], 16 * pool

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> grid (n, D, h, w)."""
        return self.network(image_nCHW)


encoders.register("small_dense_cnn")(SmallDenseCNN)


def _num_groups(channels: int) -> int:
    """Groups of about eight channels: the largest number up to an eighth of them that divides them."""
    return next(num for num in range(max(1, channels // 8), 0, -1) if channels % num == 0)


for _name in RESNETS:
    encoders.register(_name)(torchvision_resnet(_name))
encoders.register_family("timm")(timm_network)


def build_encoder(part: "Encoder") -> TileEncoder:
    """The encoder that the configuration names: weights from a local file or a random start, then what is to be trained.

    Raises:
        ConfigError: unknown name, options that the factory does not take, weights that do not fit, or blocks or linear
            layers that the encoder does not have.
    """
    dense: dict[str, Any] = {} if part.dense is None else {"dense": part.dense}
    if dense or (part.pool, part.pool_kind) != (1, "mean"):
        dense |= {"pool": part.pool, "pool_kind": part.pool_kind}
    try:
        backbone = encoders[part.name](**dense, **part.options)
    except (TypeError, ConfigError) as error:
        if any(f"'{key}'" in str(error) for key in dense):
            raise ConfigError(
                f"encoder '{part.name}' does not take science.encoder.{' and '.join(dense)} beside its options: {error}. The "
                "ResNets of torchvision take them, and small_dense_cnn takes pool (docs/encoders.md)."
            ) from error
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"science.encoder.options do not fit encoder '{part.name}': {error}") from error
    dim = getattr(backbone, "dim", None)
    if not (isinstance(dim, int) and dim > 0):
        raise ConfigError(
            f"encoder '{part.name}' must have an integer attribute `dim` above 0, the width of its embedding, not {dim}"
        )
    kind = TileEncoder if getattr(backbone, "cell_px", None) is None else DenseEncoder
    encoder = kind(backbone, part.mean, part.std)
    if part.weights is not None:
        load_backbone_weights(encoder, part.weights)
    if part.lora_rank is not None:
        add_lora(backbone, part.lora_rank, part.lora_alpha)
    freeze_blocks(backbone, part.freeze_blocks)
    return encoder


def load_backbone_weights(encoder: TileEncoder, path: Path) -> None:
    """Fill the backbone from a local state_dict.

    A classifier in the file (`fc.*`, or what timm calls it) is left out, but for keys that the backbone has too.

    Args:
        path: .safetensors, or a file of `torch.save`, which is read with `weights_only=True`.
    Raises:
        ConfigError: no such file, unreadable, or keys or shapes that do not fit (the first of them are named).
    """
    if not path.is_file():
        raise ConfigError(f"science.encoder.weights: no file '{path}'")
    target: nn.Module = encoder.backbone
    classifier: tuple[str, ...] = ("fc",)
    if isinstance(target, FrozenStatistics):
        classifier, target = target.classifier, target.network
    surplus = tuple(f"{layer}." for layer in classifier)
    want = target.state_dict()
    state = {key: value for key, value in _read_state(path).items() if key in want or not key.startswith(surplus)}
    missing, unexpected = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    wrong = sorted(key for key in want.keys() & state.keys() if want[key].shape != state[key].shape)
    if missing or unexpected or wrong:
        shapes = [f"{key} {tuple(state[key].shape)} for {tuple(want[key].shape)}" for key in wrong[:3]]
        raise ConfigError(
            f"science.encoder.weights: '{path}' does not fit the encoder: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {shapes}."
            + (_OTHER_SIZE if "pos_embed" in wrong else "")
        )
    target.load_state_dict(state)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise a dozen unrelated types; the cause is kept
        raise ConfigError(f"science.encoder.weights: '{path}' cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"science.encoder.weights: '{path}' holds a {type(state).__name__}, not a state_dict")
    odd = [key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if odd:
        raise ConfigError(
            f"science.encoder.weights: '{path}' is not a state_dict: {odd[:3]} are not names of tensors. Save the "
            "state_dict alone."
        )
    return state

"""Encoders: tile -> embedding. Ordinary modules that see a batch of tiles and know nothing of bags or ranks.

Shapes: n tiles of a chunk, C H W image, D embedding.
An encoder is a module with an attribute `dim` (D) and `forward(image_nCHW, tile_key_n) -> embedding_nD`; images are
normalised; keys are for `KeyedDropout` and may be ignored. Register your own with `@encoders.register("name")`: a
factory that takes the `science.encoder.options` of the YAML.
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError, EnvironmentFault
from gigamil.models.dropout import KeyedDropout
from gigamil.registry import Registry

encoders: Registry[Callable[..., nn.Module]] = Registry("encoder", "gigamil.encoders")


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
        return self.backbone((image_nCHW - self.mean_C11) / self.std_C11, tile_key_n)


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
        self.dropout = KeyedDropout(dropout, "encoder.embedding")
        self.dim = channels[-1]

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> embedding (n, D)."""
        return self.dropout(self.features(image_nCHW).mean(dim=(2, 3)), tile_key_n)


def _num_groups(channels: int) -> int:
    """Groups of about eight channels: the largest number up to an eighth of them that divides them."""
    return next(num for num in range(max(1, channels // 8), 0, -1) if channels % num == 0)


class FrozenStatistics(nn.Module):
    """A torchvision network whose BatchNorm layers normalise by their stored statistics, in training too.

    Statistics of a chunk are not those of the bag: a chunked step with train-mode BatchNorm has another gradient than
    the whole bag. The affine parameters stay trainable.
    """

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        self.network = network
        self.dim = dim

    def train(self, mode: bool = True) -> "FrozenStatistics":
        """As `nn.Module.train`, but BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> embedding (n, D); torchvision ResNets have no stochastic layer, so keys are unused."""
        return self.network(image_nCHW)


def _torchvision_resnet(name: str) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        try:
            import torchvision.models
        except (ImportError, RuntimeError, OSError) as error:
            raise EnvironmentFault(
                f"encoder '{name}' needs torchvision, which cannot be imported ({error}). "
                "Its version must fit torch: run `gigamil doctor` for the cure, or use encoder small_cnn."
            ) from error
        network = getattr(torchvision.models, name)(weights=None, **options)
        dim = network.fc.in_features
        network.fc = nn.Identity()
        return FrozenStatistics(network, dim)

    return build


for _name in ("resnet18", "resnet34", "resnet50"):
    encoders.register(_name)(_torchvision_resnet(_name))


def build_encoder(
    name: str, options: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], weights: Path | None
) -> TileEncoder:
    """The encoder that the configuration names, with weights from a local file or a random start.

    Raises:
        ConfigError: unknown name, options that the factory does not take, or weights that do not fit.
    """
    try:
        backbone = encoders[name](**options)
    except TypeError as error:
        raise ConfigError(f"science.encoder.options do not fit encoder '{name}': {error}") from error
    if not isinstance(getattr(backbone, "dim", None), int):
        raise ConfigError(f"encoder '{name}' must have an integer attribute `dim`, the width of its embedding")
    encoder = TileEncoder(backbone, mean, std)
    if weights is not None:
        load_backbone_weights(encoder, weights)
    return encoder


def load_backbone_weights(encoder: TileEncoder, path: Path) -> None:
    """Fill the backbone from a local state_dict; a classifier on top of it (`fc.*`) is left out.

    Args:
        path: .safetensors, or a file of `torch.save`, which is read with `weights_only=True`.
    Raises:
        ConfigError: no such file, unreadable, or keys or shapes that do not fit (the first of them are named).
    """
    if not path.is_file():
        raise ConfigError(f"science.encoder.weights: no file '{path}'")
    target = encoder.backbone.network if isinstance(encoder.backbone, FrozenStatistics) else encoder.backbone
    state = {key: value for key, value in _read_state(path).items() if not key.startswith("fc.")}
    want = target.state_dict()
    missing, surplus = sorted(want.keys() - state.keys()), sorted(state.keys() - want.keys())
    wrong = [key for key in want.keys() & state.keys() if want[key].shape != state[key].shape]
    if missing or surplus or wrong:
        raise ConfigError(
            f"science.encoder.weights: '{path}' does not fit the encoder: {len(missing)} missing {missing[:3]}, "
            f"{len(surplus)} unexpected {surplus[:3]}, {len(wrong)} of another shape {sorted(wrong)[:3]}"
        )
    target.load_state_dict(state)


def refuse_train_batchnorm(model: nn.Module) -> None:
    """Refuse a BatchNorm layer that would normalise by the statistics of a chunk.

    Raises:
        ConfigError: names the layer and the remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ConfigError(
                f"layer '{name}' is BatchNorm in training mode: its statistics would be those of a chunk, not of the "
                "bag, and the gradient would be wrong. Wrap the network in gigamil.models.FrozenStatistics, or use "
                "GroupNorm or LayerNorm."
            )


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

"""Networks of torchvision and timm as encoders: random start, no classifier, BatchNorm on its stored statistics.

Shapes: n tiles of a chunk, C H W image, D embedding. Both libraries are imported when a network of theirs is built.
"""

import difflib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from gigamil.errors import ConfigError, EnvironmentFault
from gigamil.models.dense import STRIDES, pooled

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)


class FrozenStatistics(nn.Module):
    """A network whose BatchNorm layers normalise by their stored statistics, in training too.

    Statistics of a chunk are not those of the bag: a chunked step with train-mode BatchNorm has another gradient than
    the whole bag. The affine parameters stay trainable.

    Args:
        network: image (n, C, H, W) -> embedding (n, D). It is not given the tiles' keys: layers of its own that draw
            at random are replayed exactly, but draw otherwise for other chunks.
        dim: D.
        block_names: names within `network`, as `gigamil.models.blocks` wants them; None if its blocks are not known.
        classifier: layers of a file of weights that the network does not have.
        cell_px: of a dense network, which gives a grid (n, D, h, w): pixels along the side of a cell.
    """

    def __init__(
        self,
        network: nn.Module,
        dim: int,
        block_names: Sequence[Sequence[str]] | None = None,
        classifier: Sequence[str] = ("fc",),
        cell_px: int | None = None,
    ) -> None:
        super().__init__()
        self.cell_px = cell_px
        self.network = network
        self.dim = dim
        self.classifier = tuple(classifier)
        self.block_names = None
        if block_names is not None:
            self.block_names = [[f"network.{name}" for name in names] for names in block_names]

    def train(self, mode: bool = True) -> "FrozenStatistics":
        """As `nn.Module.train`, but BatchNorm layers stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> embedding (n, D)."""
        return self.network(image_nCHW)


def torchvision_resnet(name: str) -> Callable[..., FrozenStatistics]:
    """Factory of a ResNet of torchvision; its blocks are the stem and the four layers.

    With `dense` it ends at that layer, and gives a grid of features.
    """

    def build(
        dense: str | None = None, pool: int = 1, pool_kind: Literal["mean", "max"] = "mean", **options: Any
    ) -> FrozenStatistics:
        try:
            import torchvision.models
        except (ImportError, RuntimeError, OSError) as error:
            raise EnvironmentFault(
                f"encoder '{name}' needs torchvision, which cannot be imported ({error}). "
                "Its version must fit torch: run `gigamil doctor` for the cure, or use encoder small_cnn."
            ) from error
        network = _made(name, getattr(torchvision.models, name), {"weights": None}, options)
        layers = [f"layer{i}" for i in (1, 2, 3, 4)]
        if dense is None:
            dim = network.fc.in_features
            network.fc = nn.Identity()
            return FrozenStatistics(network, dim, [["conv1", "bn1"], *([layer] for layer in layers)])
        kept, cut = layers[: layers.index(dense) + 1], layers[layers.index(dense) + 1 :]
        names = ("conv1", "bn1", "relu", "maxpool", *kept)
        grid = pooled(OrderedDict((name, getattr(network, name)) for name in names), pool, pool_kind)
        last = getattr(network, dense)[-1]
        dim = (last.conv3 if hasattr(last, "conv3") else last.conv2).out_channels
        blocks = [["conv1", "bn1"], *([layer] for layer in kept)]
        return FrozenStatistics(grid, dim, blocks, ("fc", *cut), STRIDES[dense] * pool)

    return build


def timm_network(name: str) -> Callable[..., FrozenStatistics]:
    """Factory of a network of timm; its blocks are those of timm's own layer decay.

    Nothing is downloaded: the start is random, or a local file (`science.encoder.weights`).

    Raises (the factory):
        EnvironmentFault: timm cannot be imported.
        ConfigError: timm has no such network.
    """

    def build(**options: Any) -> FrozenStatistics:
        try:
            import timm
            from timm.models import group_parameters
        except (ImportError, RuntimeError, OSError) as error:
            raise EnvironmentFault(
                f"encoder 'timm/{name}' needs timm, which cannot be imported ({error}). Install it with "
                "`pip install timm`; if it is there, run `gigamil doctor`."
            ) from error
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            raise ConfigError(
                f"timm {timm.__version__} has no network '{name}'. Near: {near}. All: "
                '`python -c "import timm; print(*timm.list_models())"`'
            )
        # Named here, they are an error among the options: one would download, another be unpickled.
        ours = {"pretrained": False, "checkpoint_path": None, "features_only": None, "num_classes": 0}
        network = _made(f"timm/{name}", partial(timm.create_model, name), ours, options)
        blocks = None
        if hasattr(network, "group_matcher"):
            groups = group_parameters(network, network.group_matcher(coarse=False))
            blocks = [[_layer(parameter) for parameter in groups[number]] for number in sorted(groups)]
        # Some (MobileNetV3) have a layer between the pooled features and the classifier, whose width it is.
        dim = getattr(network, "head_hidden_size", None) or network.num_features
        classifier = network.pretrained_cfg.get("classifier") or ()
        return FrozenStatistics(network, dim, blocks, (classifier,) if isinstance(classifier, str) else classifier)

    return build


def _made(name: str, factory: Callable[..., Any], ours: dict[str, Any], options: dict[str, Any]) -> Any:
    """A network; what the library refuses is an error of the configuration."""
    taken = sorted(ours.keys() & options.keys())
    if taken:
        raise ConfigError(f"science.encoder.options of encoder '{name}' may not set {taken[0]}: gigamil does")
    try:
        return factory(**ours, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"science.encoder.options do not fit encoder '{name}': {error}") from error


def _layer(parameter: str) -> str:
    """Name of the layer that owns a parameter, or of the parameter if that is the network itself."""
    return parameter.rpartition(".")[0] or parameter


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


def has_blank_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm layer still has the statistics that it was made with: it then scales and shifts nothing."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    pairs = [(norm.running_mean, norm.running_var) for norm in norms]
    return any(m is not None and v is not None and bool((m == 0).all() and (v == 1).all()) for m, v in pairs)

"""Where each output of a network looks in the image, read off its layers: the halos of blocks follow from it.

Shapes: n images, C H W image.
A network qualifies if every output depends on a bounded part of the image: convolutions, poolings, and what works pixel
by pixel (activations, BatchNorm on stored statistics, LayerNorm and Linear over channels). A module of your own says
where it looks by an attribute `geometry`, a `Geometry`. Everything else is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from gigamil.errors import ConfigError
from gigamil.models.dense import ChannelNorm
from gigamil.partition.halo import Branches, Net, Window

# They work value by value, or (BatchNorm on stored statistics) channel by channel.
_POINTWISE = (
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Hardswish,
        nn.Sigmoid,
        nn.Tanh,
        nn.Softplus,
    ),
    *(nn.Hardsigmoid, nn.Hardtanh, nn.Identity, nn.PReLU, ChannelNorm),
)
_DROPOUTS = (nn.Dropout, nn.Dropout2d)
_CHANNELS_LAST, _CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


@dataclass(frozen=True)
class Geometry:
    """Of a network that makes a grid of features of an image: one net for each axis.

    Attributes:
        rows, cols: along the height and the width of the image.
    """

    rows: Net
    cols: Net

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels per cell of the grid, in (rows, cols)."""
        return self.rows.stride, self.cols.stride

    def grid_shape(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid of an image."""
        return self.rows.output_size(height), self.cols.output_size(width)


def refuse_wrong_geometry(network: nn.Module, geometry: Geometry, channels: int = 3) -> None:
    """Run the network once along each axis on a strip that is not a number where a cell should not look.

    It guards against layers that look further than their class lets expect, and against a wrong attribute `geometry`.

    Args:
        network: as `geometry_of`; run as it is, in its mode and on its device.
        channels: C of its images.
    Raises:
        ConfigError: a cell depends on pixels outside its receptive field, or the grid has another size.
    Cost: forwards of two strips, as long as the receptive field and as narrow as the network takes.
    """
    like = next(network.parameters(), torch.zeros(()))
    nets = (geometry.rows, geometry.cols)
    for axis, (net, other) in enumerate((nets, nets[::-1])):
        before, behind = (max(0, length) for length in net.receptive_field)
        cell = before // net.stride + 1
        length = (cell + 1) * net.stride + behind + 1
        width = next(
            size for size in range(1, sum(other.receptive_field) + other.stride + 1) if other.output_size(size)
        )
        first, last = net.needs(cell, cell + 1, length)
        image_nCHW = torch.full((1, channels, length, width), torch.nan, dtype=like.dtype, device=like.device)
        image_nCHW[:, :, first:last] = 0.5
        with torch.no_grad():
            grid_nDhw = network(image_nCHW if axis == 0 else image_nCHW.transpose(2, 3))
        if axis == 1:
            grid_nDhw = grid_nDhw.transpose(2, 3)
        what = ("rows", "columns")[axis]
        if grid_nDhw.shape[2:] != (net.output_size(length), other.output_size(width)):
            raise ConfigError(
                f"the network makes {grid_nDhw.shape[2]} x {grid_nDhw.shape[3]} cells of {length} x {width} pixels, and by "
                f"its geometry they are {net.output_size(length)} x {other.output_size(width)} ({what})"
            )
        if not grid_nDhw[:, :, cell].isfinite().all():
            raise ConfigError(
                f"a cell of the network depends on {what} beyond the {last - first} pixels of its receptive field: a layer "
                "looks further than its class says. Give that class an attribute `geometry`, or replace the layer"
            )


Layers = tuple[tuple[Window | Branches, ...], tuple[Window | Branches, ...]]  # along rows and columns
_NONE: Layers = ((), ())


def geometry_of(network: nn.Module, name: str = "") -> Geometry:
    """Read the geometry of a network off its layers.

    Known are convolutions and poolings with zero padding, pointwise layers, `nn.Sequential`, the residual blocks of
    torchvision's ResNets and ConvNeXts, and modules with an attribute `geometry`.

    Args:
        network: image (n, C, H, W) -> grid (n, D, h, w).
        name: of a layer of another network, for messages.
    Raises:
        ConfigError: names the first layer that looks at the whole image, or that is not known, and the cure.
    Cost: none; nothing is run.
    """
    rows, cols = _layers(network, name)
    return Geometry(Net(rows), Net(cols))


def _layers(module: nn.Module, name: str) -> Layers:
    declared = getattr(module, "geometry", None)
    if isinstance(declared, Geometry):
        return declared.rows.layers, declared.cols.layers
    if isinstance(module, _POINTWISE):
        return _NONE
    for kind, read in _READERS:
        if isinstance(module, kind):
            return read(module, name)
    by_name = _BLOCKS.get(_class_name(module))
    if by_name is not None:
        return by_name(module, name)
    for inner_name, inner in module.named_modules():
        # The cure for what is not known does not help a layer in it that looks at the whole image.
        if isinstance(inner, _WHOLE_IMAGE) or _class_name(inner) == _SQUEEZE_EXCITATION:
            _whole_image(inner, f"{name}.{inner_name}" if name and inner_name else name or inner_name)
    _refuse(
        module,
        name,
        "is not known. Give its class an attribute `geometry` (gigamil.memory.geometry.Geometry) that says where it looks, "
        "or use a ResNet or ConvNeXt of torchvision, or an nn.Sequential of convolutions, poolings and activations",
    )


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _refuse(module: nn.Module, name: str, what: str) -> NoReturn:
    raise ConfigError(f"layer '{name or '(the network)'}' ({type(module).__name__}) {what}.")


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _windows(kernel: Any, stride: Any, padding: Any, dilation: Any = 1, ceil_mode: bool = False) -> Layers:
    axes = zip(*map(_pair, (kernel, stride, padding, dilation)), strict=True)
    rows, cols = (Window(k, s, p, d, ceil_mode) for k, s, p, d in axes)
    return (rows,), (cols,)


def _convolution(module: nn.Conv2d, name: str) -> Layers:
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        _refuse(
            module, name, f"pads with '{module.padding_mode}', which looks at the other side; use padding_mode='zeros'"
        )
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reaches = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        if any(reach % 2 for reach in reaches):
            _refuse(module, name, "pads unequally on its two sides; use an odd kernel")
        padding = (reaches[0] // 2, reaches[1] // 2)
    return _windows(module.kernel_size, module.stride, padding, module.dilation)


def _max_pooling(module: nn.MaxPool2d, name: str) -> Layers:
    return _windows(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)


def _mean_pooling(module: nn.AvgPool2d, name: str) -> Layers:
    return _windows(module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode)


def _batch_norm(module: nn.BatchNorm2d, name: str) -> Layers:
    if module.training or not module.track_running_stats:
        _refuse(
            module,
            name,
            "normalises by statistics of the whole image; put it into evaluation mode, and keep it there by wrapping the "
            "network in gigamil.models.FrozenStatistics",
        )
    return _NONE


def _dropout(module: nn.Module, name: str) -> Layers:
    if module.training and module.p > 0:  # type: ignore[operator]
        _refuse(module, name, "draws at random, otherwise in each block; set its p to 0")
    return _NONE


def _whole_image(module: nn.Module, name: str) -> Layers:
    _refuse(
        module,
        name,
        "looks at the whole image, so a block cannot make the same of it. Use BatchNorm on stored statistics or LayerNorm "
        "over channels in its place, or cut the network off before it",
    )


def _sequential(module: nn.Sequential, name: str) -> Layers:
    if type(module).forward is not nn.Sequential.forward:
        _refuse(
            module, name, "has a `forward` of its own; give its class an attribute `geometry` that says where it looks"
        )
    rows: list[Window | Branches] = []
    cols: list[Window | Branches] = []
    is_channels_last = False
    for key, child in module._modules.items():  # `named_children` leaves out a layer that stands here twice
        if child is None:
            continue
        where = f"{name}.{key}" if name else key
        dims = list(getattr(child, "dims", ())) if type(child).__name__ == "Permute" else None
        if dims is not None:
            if dims != (_CHANNELS_FIRST if is_channels_last else _CHANNELS_LAST):
                _refuse(child, where, f"orders the axes as {dims}, which is not known")
            is_channels_last = not is_channels_last
        elif isinstance(child, (nn.Linear, nn.LayerNorm)) and not _is_layer_norm_2d(child):
            if not is_channels_last or (isinstance(child, nn.LayerNorm) and len(child.normalized_shape) != 1):
                _whole_image(child, where)
        else:
            more_rows, more_cols = _layers(child, where)
            if is_channels_last and (more_rows or more_cols):
                _refuse(child, where, "stands where channels come last, and would look along rows and channels")
            rows += more_rows
            cols += more_cols
    if is_channels_last:
        _refuse(module, name, "ends with channels last")
    return tuple(rows), tuple(cols)


def _is_layer_norm_2d(module: nn.Module) -> bool:
    """Of torchvision: over the channels of (n, C, H, W)."""
    return type(module).__name__ == "LayerNorm2d" and type(module).__module__.startswith("torchvision.")


def _joined(*nets: Layers) -> Layers:
    rows, cols = (tuple(Net(net[axis]) for net in nets) for axis in (0, 1))
    return (Branches(rows),), (Branches(cols),)


def _chain(module: nn.Module, name: str, children: tuple[str, ...]) -> Layers:
    found = [_layers(getattr(module, child), f"{name}.{child}" if name else child) for child in children]
    return tuple(layer for rows, _ in found for layer in rows), tuple(layer for _, cols in found for layer in cols)


def _residual(children: tuple[str, ...]) -> Callable[[Any, str], Layers]:
    def read(module: Any, name: str) -> Layers:
        around = _NONE if module.downsample is None else _chain(module, name, ("downsample",))
        return _joined(_chain(module, name, children), around)

    return read


def _convnext_block(module: Any, name: str) -> Layers:
    if module.training and module.stochastic_depth.p > 0:
        _refuse(module.stochastic_depth, f"{name}.stochastic_depth", "draws at random; set its p to 0")
    return _joined(_chain(module, name, ("block",)), _NONE)


_WHOLE_IMAGE = (nn.GroupNorm, nn.InstanceNorm2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample)
_SQUEEZE_EXCITATION = "torchvision.ops.misc.SqueezeExcitation"
_READERS: tuple[tuple[Any, Callable[[Any, str], Layers]], ...] = (
    (nn.Conv2d, _convolution),
    (nn.MaxPool2d, _max_pooling),
    (nn.AvgPool2d, _mean_pooling),
    (nn.BatchNorm2d, _batch_norm),
    (_DROPOUTS, _dropout),
    (nn.Sequential, _sequential),
    (_WHOLE_IMAGE, _whole_image),
)
_RESNET, _CONVNEXT = "torchvision.models.resnet", "torchvision.models.convnext"
_BLOCKS: dict[str, Callable[[Any, str], Layers]] = {
    f"{_RESNET}.BasicBlock": _residual(("conv1", "bn1", "conv2", "bn2")),
    f"{_RESNET}.Bottleneck": _residual(("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")),
    f"{_CONVNEXT}.CNBlock": _convnext_block,
    f"{_CONVNEXT}.LayerNorm2d": lambda module, name: _NONE,
    _SQUEEZE_EXCITATION: _whole_image,
}

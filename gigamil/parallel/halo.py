"""A convolutional network over one image whose rows lie on several ranks: neighbours exchange what each layer looks at.

Shapes: n images, C H W image; rank r of R holds rows bounds[r]..bounds[r + 1] - 1 of it, maybe none.
Where blocks that are read with their surroundings compute these again (memory/stream.py), here every pixel is computed once,
all activations stay in memory, and each convolution and pooling waits for the rows of its neighbours. Statistics over the
whole image (BatchNorm in training, GroupNorm) are possible here only: their moments are summed over the ranks.

What a rank does with its part of the grid is its part of the loss; as everywhere (collectives.py) gradients of parameters are
then added up over the ranks, and those of R equal losses are R times too large before the mean is taken.

Source: Tsaris et al. 2023, doi:10.1145/3592979.3593401 (spatial decomposition with direct halo traffic); bounds, exchange and
its adjoint are our own derivation. Test: distributed/test_halo.py
"""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn import functional

from gigamil.errors import ConfigError
from gigamil.memory.geometry import Geometry, geometry_of
from gigamil.parallel.collectives import fetch_rows, sum_over_ranks
from gigamil.partition.halo import Window

Bounds = tuple[int, ...]  # R + 1 cuts of the rows of an image, ascending

_JOINS: tuple[Callable[..., Any], ...] = (operator.add, operator.iadd, operator.mul, torch.add, torch.mul)
_BY_PIXEL = ("ChannelNorm", "Permute", "StochasticDepth")  # layers, by name: torchvision need not be there
_POINTWISE: tuple[Callable[..., Any], ...] = (torch.relu, functional.relu, functional.gelu, functional.silu)


@dataclass(frozen=True)
class _Rows:
    """A part of an image, and where all parts are cut."""

    values: Tensor
    bounds: Bounds


class ShardedNetwork:
    """A network over an image that lies on the ranks of a group, row by row.

    Args:
        network: image (n, C, H, W) -> grid (n, D, h, w), of layers that torch.fx can trace: convolutions, poolings,
            normalisation, pointwise layers, sums of branches. It is used as it is, in its mode.
        group: the ranks, or None for a process alone.
        rank: of this process in the group.
    Raises:
        ConfigError: names the layer that cannot be computed so.
    Cost: an all-to-all of the halo rows for each convolution and pooling that is wider than its stride, one more in
        backward; two all-reduces of the channels for each layer with statistics.
    """

    def __init__(self, network: nn.Module, group: dist.ProcessGroup | None, rank: int = 0) -> None:
        self._group, self._rank = group, rank
        network = network if list(network.children()) else nn.Sequential(network)  # a layer alone would be traced into
        self._graph = _Tracer().trace(network)
        self._modules = dict(network.named_modules())
        self._network = network
        for node in self._graph.nodes:  # before any rank waits for another
            if node.op == "call_module":
                _check_layer(self._modules[node.target], node.target)
            elif node.op in ("call_function", "call_method"):
                _check_function(node)

    def __call__(self, rows_nCHW: Tensor, bounds: Bounds) -> tuple[Tensor, Bounds]:
        """Rows of the image -> rows of the grid, and where that is cut; differentiable. All ranks call it.

        Args:
            rows_nCHW: rows bounds[r]..bounds[r + 1] - 1 of rank r.
            bounds: equal on all ranks.
        """
        if bounds[self._rank + 1] - bounds[self._rank] != rows_nCHW.shape[2]:
            raise ValueError(f"rank {self._rank} has {rows_nCHW.shape[2]} rows, and the bounds are {bounds}")
        found: dict[fx.Node, Any] = {}

        def look_up(argument: Any) -> Any:
            return found[argument] if isinstance(argument, fx.Node) else argument

        for node in self._graph.nodes:
            arguments = fx.node.map_arg(node.args, look_up)
            if node.op == "placeholder":
                found[node] = _Rows(rows_nCHW, bounds)
            elif node.op == "get_attr":
                found[node] = operator.attrgetter(node.target)(self._network)
            elif node.op == "call_module":
                found[node] = self._layer(self._modules[node.target], node.target, *arguments)
            elif node.op == "output":
                result: _Rows = arguments[0]
                return result.values, result.bounds
            else:
                found[node] = _joined(node, arguments, fx.node.map_arg(node.kwargs, look_up))
        raise AssertionError("a traced network has an output")

    def _layer(self, module: nn.Module, name: str, rows: _Rows) -> _Rows:
        if isinstance(module, nn.Conv2d):
            return self._on_windows(module, name, rows, 0.0, _convolved)
        if isinstance(module, nn.MaxPool2d):
            return self._on_windows(module, name, rows, -torch.inf, _max_pooled)
        if isinstance(module, nn.AvgPool2d):
            return self._on_windows(module, name, rows, 0.0, _mean_pooled)
        if isinstance(module, nn.BatchNorm2d) and module.training:
            return _Rows(self._batch_norm(module, rows), rows.bounds)
        if isinstance(module, nn.GroupNorm):
            return _Rows(self._group_norm(module, rows), rows.bounds)
        return _Rows(module(rows.values), rows.bounds)

    def _on_windows(
        self, module: Any, name: str, rows: _Rows, padding: float, compute: Callable[[Any, Tensor], Tensor]
    ) -> _Rows:
        """A layer's output on this rank: of the rows that it depends on, padded at the edges of the image."""
        (window,) = geometry_of(module).rows.layers
        assert isinstance(window, Window)
        size = rows.bounds[-1]
        num = window.output_size(size)
        if not num:
            _refuse(module, name, f"has no output of {size} rows")
        bounds = (*(min(num, -(-bound // window.stride)) for bound in rows.bounds[:-1]), num)
        wanted = [_needed(window, first, last, size) for first, last in itertools.pairwise(bounds)]
        start, stop = bounds[self._rank], bounds[self._rank + 1]
        # A rank without outputs makes one and drops it: it must have their type, and the layer's parameters in its graph.
        top, bottom = 0, window.reach
        if start < stop:
            first, last = window.needs(start, stop)
            top, bottom = max(0, -first), max(0, last - size)
        values = compute(module, functional.pad(self._fetch(rows, wanted), (0, 0, top, bottom), value=padding))
        return _Rows(values[:, :, : stop - start], bounds)

    def _fetch(self, rows: _Rows, wanted: list[tuple[int, int]]) -> Tensor:
        if self._group is None:
            (first, last) = wanted[0]
            return rows.values[:, :, first:last]
        counts = [b - a for a, b in zip(rows.bounds[:-1], rows.bounds[1:], strict=True)]
        ranges = [[span] if span[0] < span[1] else [] for span in wanted]
        rows_HnCW = rows.values.permute(2, 0, 1, 3).contiguous()
        found_HnCW = fetch_rows(rows_HnCW, counts, ranges, self._rank, self._group)
        return found_HnCW.permute(1, 2, 0, 3).contiguous()

    def _sum(self, values: Tensor) -> Tensor:
        return values if self._group is None else sum_over_ranks(values, self._group)

    def _batch_norm(self, module: nn.BatchNorm2d, rows: _Rows) -> Tensor:
        """By the statistics of the whole image, which the running ones follow as torch's do."""
        values = rows.values
        number = values.shape[0] * rows.bounds[-1] * values.shape[3]
        mean_C = self._sum(values.sum(dim=(0, 2, 3))) / number
        centred = values - mean_C[:, None, None]
        var_C = self._sum(centred.square().sum(dim=(0, 2, 3))) / number
        if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
            with torch.no_grad():
                assert module.num_batches_tracked is not None
                module.num_batches_tracked += 1
                share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
                module.running_mean.lerp_(mean_C, share)
                module.running_var.lerp_(var_C * number / max(1, number - 1), share)
        result = centred * torch.rsqrt(var_C + module.eps)[:, None, None]
        return _affine(result, module.weight, module.bias)

    def _group_norm(self, module: nn.GroupNorm, rows: _Rows) -> Tensor:
        """By the statistics of the whole image, one for each group of channels."""
        n, channels, height, width = rows.values.shape
        values = rows.values.reshape(n, module.num_groups, -1)
        number = channels // module.num_groups * rows.bounds[-1] * width
        mean_nG = self._sum(values.sum(dim=2)) / number
        centred = values - mean_nG[:, :, None]
        var_nG = self._sum(centred.square().sum(dim=2)) / number
        result = (centred * torch.rsqrt(var_nG + module.eps)[:, :, None]).reshape(n, channels, height, width)
        return _affine(result, module.weight, module.bias)


class _Tracer(fx.Tracer):
    """Layers of torch and of its relatives are leaves; blocks of torchvision are looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called as a whole."""
        known = type(m).__name__ in (*_BY_PIXEL, "LayerNorm2d") or isinstance(getattr(m, "geometry", None), Geometry)
        return known or super().is_leaf_module(m, module_qualified_name)


def _check_layer(module: nn.Module, name: str) -> None:
    """Refuse a layer that cannot be computed on ranks."""
    if isinstance(module, nn.Conv2d) and "forward" in vars(module):
        _refuse(module, name, "is computed together with its BatchNorm; set execution.fold_batchnorm to false")
    if isinstance(module, nn.AvgPool2d) and (
        module.ceil_mode or (any(_pair(module.padding)) and not module.count_include_pad)
    ):
        _refuse(module, name, "counts the pixels at the edge otherwise; use count_include_pad and no ceil_mode")
    if isinstance(
        module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.BatchNorm2d | nn.GroupNorm | nn.Linear | nn.LayerNorm
    ):
        return
    if type(module).__name__ not in _BY_PIXEL:
        geometry = geometry_of(module, name)
        if geometry.rows.layers or geometry.cols.layers:
            _refuse(module, name, "looks at its neighbours in a way that is not known here")


def _check_function(node: fx.Node) -> None:
    """Refuse a function that may look at more than a pixel."""
    if node.target not in (*_JOINS, *_POINTWISE):
        raise ConfigError(
            f"'{node.name}' ({node.target}) is not known to work pixel by pixel, so it cannot be computed on ranks. Make it "
            "a layer with an attribute `geometry`, or stream with execution.halo=read"
        )


def _needed(window: Window, start: int, stop: int, size: int) -> tuple[int, int]:
    """Rows of the input that outputs [start, stop) depend on; at least one, for outputs that see nothing but padding."""
    if start == stop:
        return 0, 0
    first, last = window.needs(start, stop)
    first = min(max(0, first), size - 1)
    return first, max(min(size, last), first + 1)


def _convolved(module: nn.Conv2d, values: Tensor) -> Tensor:
    padding = module.padding
    if padding == "same":
        cols = module.dilation[1] * (module.kernel_size[1] - 1) // 2
    else:
        cols = 0 if padding == "valid" else int(padding[1])
    return functional.conv2d(
        values, module.weight, module.bias, module.stride, (0, cols), module.dilation, module.groups
    )


def _max_pooled(module: nn.MaxPool2d, values: Tensor) -> Tensor:
    kernel, stride, padding, dilation = map(_pair, (module.kernel_size, module.stride, module.padding, module.dilation))
    return functional.max_pool2d(values, kernel, stride, (0, padding[1]), dilation, module.ceil_mode)


def _mean_pooled(module: nn.AvgPool2d, values: Tensor) -> Tensor:
    kernel, stride, padding = map(_pair, (module.kernel_size, module.stride, module.padding))
    return functional.avg_pool2d(
        values, kernel, stride, (0, padding[1]), module.ceil_mode, module.count_include_pad, module.divisor_override
    )


def _affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    values = values if weight is None else values * weight[:, None, None]
    return values if bias is None else values + bias[:, None, None]


def _joined(node: fx.Node, arguments: tuple[Any, ...], words: dict[str, Any]) -> _Rows:
    """A function of the parts of one or more images, pixel by pixel."""
    rows = [argument for argument in arguments if isinstance(argument, _Rows)]
    if len({row.bounds for row in rows}) != 1:
        raise ConfigError(f"'{node.name}' joins branches of other sizes: {[row.bounds for row in rows]}")
    values = [argument.values if isinstance(argument, _Rows) else argument for argument in arguments]
    function: Any = node.target
    return _Rows(function(*values, **words), rows[0].bounds)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _refuse(module: nn.Module, name: str, what: str) -> NoReturn:
    raise ConfigError(f"layer '{name}' ({type(module).__name__}) {what}.")

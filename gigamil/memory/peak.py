"""Bytes that live tensors take at most, counted tensor by tensor as operations make them and drop them."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the storages that are made inside it and still alive, whoever holds them.

    Results do not change. What a kernel takes for itself (workspaces of oneDNN or cuDNN) is no tensor and not seen.
    What others than autograd keep for backward is seen too, for example by DeepSpeed's activation checkpointing.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once since the start or the last `mark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        # The Python object of a storage lives as long as the storage, so a weak reference tells its end.
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def mark(self) -> None:
        """Count the peak anew from here on."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Views, and results written into a tensor that was there before, take no memory.
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata in self._sizes or storage._cdata not in before:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._sizes.get(key)
        counted = known[1] if known is not None and known[0]() is storage else 0  # more than before if it was resized
        ref = weakref.ref(storage, lambda gone: self._drop(gone, key))
        self._sizes[key] = ref, storage.nbytes()
        self.now += storage.nbytes() - counted
        self.peak = max(self.peak, self.now)

    def _drop(self, gone: "weakref.ref[Any]", key: int) -> None:
        known = self._sizes.get(key)
        if known is not None and known[0] is gone:  # not of an earlier storage at the same address
            self.now -= known[1]
            del self._sizes[key]


class Linear(NamedTuple):
    """Bytes that are a straight line in the number of tiles."""

    fixed: float
    per_tile: float

    def at(self, num_tiles: float) -> int:
        """Bytes of so many tiles."""
        return max(0, round(self.fixed + self.per_tile * num_tiles))


@dataclass(frozen=True)
class CallBytes:
    """What an encoder call takes besides parameters and gradients, as a function of its tiles.

    Attributes:
        kept: its graph, from the end of the forward to its backward.
        first: most in forward and backward, where gradients come into being too.
        later: most in forward and backward, where gradients are there already.
        blind: most in a forward without a graph.
    """

    kept: Linear
    first: Linear
    later: Linear
    blind: Linear


def measure_calls(encode: Callable[[int], Tensor], module: nn.Module, sizes: tuple[int, int]) -> CallBytes:
    """Run an encoder forward and backward at two sizes and draw lines through what it took.

    Args:
        encode: number of tiles -> embeddings, all of the way from uint8 tiles.
        module: what gets gradients; they are gone afterwards.
        sizes: two numbers of tiles, the smaller one first.
    """
    small, large = (_measure_call(encode, module, size) for size in sizes)
    lines = []
    for a, b in zip(small, large, strict=True):
        slope = (b - a) / (sizes[1] - sizes[0])
        lines.append(Linear(a - slope * sizes[0], slope))
    return CallBytes(*lines)


def _measure_call(encode: Callable[[int], Tensor], module: nn.Module, size: int) -> tuple[int, int, int, int]:
    module.zero_grad(set_to_none=True)
    with LiveBytes() as live:
        kept = 0
        peaks = []
        for _ in range(2):
            start = live.now
            live.mark()
            graph_nD = encode(size)
            kept = live.now - start
            if graph_nD.requires_grad:  # else all of the encoder is fixed
                graph_nD.sum().backward()
            del graph_nD
            peaks.append(live.peak - start)
        start = live.now
        live.mark()
        with torch.no_grad():
            encode(size)
        blind = live.peak - start
    module.zero_grad(set_to_none=True)
    return kept, peaks[0], peaks[1], blind


def _storages(values: object) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]
    return [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]

"""Which input a part of a convolutional network's output depends on: pure integers, one image axis at a time.

A net is a sequence of layers with a window (convolutions and poolings; what works pixel by pixel has none) and of
branches that are joined again (residual blocks). To own outputs [start, stop) of it, a block of the input is read that
holds all they depend on. The block begins on a multiple of the net's stride, so that every layer samples it in the
phase in which it samples the whole image, and is clipped to the image, whose own edge is padded by every layer as
always. Outputs that the padding at an inner edge of the block has reached are not owned.

Intervals are half open. Source: own derivation; the halo of a chain is the receptive field
arithmetic of Araujo et al. 2019, Distill, doi:10.23915/distill.00021. Test: partition/test_halo.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Window:
    """A convolution or a pooling along one axis.

    Args:
        kernel, stride, padding, dilation: as torch has them, the padding on both sides.
        ceil_mode: of a pooling: a last window that begins inside the input counts, though it hangs over the end.
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or self.padding < 0:
            raise ValueError(f"{self}: kernel, stride and dilation are at least 1, and padding is at least 0")

    @property
    def reach(self) -> int:
        """Inputs from the first to the last that an output depends on."""
        return self.dilation * (self.kernel - 1) + 1

    def output_size(self, size: int) -> int:
        """Outputs of an input of `size`; 0 where not one window fits."""
        room = size + 2 * self.padding - self.reach
        if not self.ceil_mode:
            return max(0, room // self.stride + 1)
        num = max(0, -(-room // self.stride) + 1)
        return num - (num > 0 and (num - 1) * self.stride >= size + self.padding)

    def needs(self, start: int, stop: int) -> tuple[int, int]:
        """Inputs that outputs [start, stop) depend on; what lies outside the input is padding."""
        return start * self.stride - self.padding, (stop - 1) * self.stride - self.padding + self.reach


@dataclass(frozen=True)
class Branches:
    """Nets with one input whose outputs are joined place by place; an empty one passes the input on."""

    nets: tuple["Net", ...]

    @property
    def stride(self) -> int:
        """Inputs per output, equal in all branches."""
        strides = {net.stride for net in self.nets}
        if len(strides) != 1:
            raise ValueError(f"branches of strides {sorted(strides)} cannot be joined place by place")
        return strides.pop()

    def output_size(self, size: int) -> int:
        """Outputs of an input of `size`."""
        sizes = {net.output_size(size) for net in self.nets}
        if len(sizes) != 1:
            raise ValueError(f"for {size} inputs the branches give {sorted(sizes)} outputs, which cannot be joined")
        return sizes.pop()

    def needs(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Inputs of `size` that outputs [start, stop) depend on, over all branches."""
        intervals = [net.needs(start, stop, size) for net in self.nets]
        return min(first for first, _ in intervals), max(last for _, last in intervals)


@dataclass(frozen=True)
class Block:
    """What is read to own some outputs.

    Attributes:
        start, stop: of the inputs, inside the image; `start` is a multiple of the net's stride.
        crop: the owned outputs are those of the block from here on.
    """

    start: int
    stop: int
    crop: int

    @property
    def size(self) -> int:
        """Inputs that are read."""
        return self.stop - self.start


@dataclass(frozen=True)
class Net:
    """Layers with a window, and branches, in the order in which they are applied."""

    layers: tuple[Window | Branches, ...] = ()

    @cached_property
    def stride(self) -> int:
        """Inputs per output."""
        product = 1
        for layer in self.layers:
            product *= layer.stride
        return product

    @cached_property
    def receptive_field(self) -> tuple[int, int]:
        """Inputs before the first and behind the last of an output's own `stride` inputs that the output depends on."""
        start, stop = 0, 1
        for layer in reversed(self.layers):
            start, stop = _unclipped(layer, start, stop)
        return -start, stop - self.stride

    @cached_property
    def halo(self) -> int:
        """Inputs that a block inside the image is wider than its owned outputs: both sides, a multiple of the stride."""
        before, behind = (max(0, length) for length in self.receptive_field)
        return (-(-before // self.stride) + -(-behind // self.stride)) * self.stride

    def output_size(self, size: int) -> int:
        """Outputs of an image of `size` inputs; 0 where it, or what a layer makes of it, is too small for one.

        Raises:
            ValueError: branches do not give equally many.
        """
        for layer in self.layers:
            if size == 0:
                break
            size = layer.output_size(size)
        return size

    def needs(self, start: int, stop: int, size: int) -> tuple[int, int]:
        """Inputs of an image of `size` that outputs [start, stop) depend on, inside the image."""
        sizes = list(self._sizes(size))
        for layer, before in zip(reversed(self.layers), reversed(sizes), strict=True):
            start, stop = layer.needs(start, stop, before) if isinstance(layer, Branches) else layer.needs(start, stop)
            # Beyond the edge is padding. Clipped here, so that it is not taken for something that depends on more. (An
            # output may depend on nothing but padding: then on the input next to it.)
            start = min(max(0, start), before - 1)
            stop = max(min(before, stop), start + 1)
        return start, stop

    def block(self, start: int, stop: int, size: int) -> Block:
        """What to read of an image of `size` inputs to own outputs [start, stop).

        Raises:
            ValueError: there are no such outputs.
        """
        num = self.output_size(size)
        if not 0 <= start < stop <= num:
            raise ValueError(f"outputs [{start}, {stop}) are not some of the {num} of {size} inputs")
        first, last = self.needs(start, stop, size)
        first = first // self.stride * self.stride
        # Inputs at the end that nothing depends on are read too: with them the block ends where the image does.
        return Block(first, size if stop == num else last, start - first // self.stride)

    def _sizes(self, size: int) -> Iterator[int]:
        """Size of the input of each layer."""
        for layer in self.layers:
            yield size
            size = layer.output_size(size)


def _unclipped(layer: Window | Branches, start: int, stop: int) -> tuple[int, int]:
    if isinstance(layer, Window):
        return layer.needs(start, stop)
    intervals = []
    for net in layer.nets:
        first, last = start, stop
        for inner in reversed(net.layers):
            first, last = _unclipped(inner, first, last)
        intervals.append((first, last))
    return min(first for first, _ in intervals), max(last for _, last in intervals)

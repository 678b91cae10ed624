"""Owned outputs of a block are those of the whole image, value by value, for any net, size and cut."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gigamil.partition.halo import Block, Branches, Net, Window

Values = list[Hashable]


def evaluate(net: Net, values: Sequence[Hashable]) -> Values:
    """What a net makes of inputs, where an output is the tuple of all that went into it: two are equal only if they
    were computed alike. Along one axis, with torch's rules, written down without any interval arithmetic."""
    found = list(values)
    for number, layer in enumerate(net.layers):
        if isinstance(layer, Branches):
            joined = [evaluate(branch, found) for branch in layer.nets]
            found = [hash((number, parts)) for parts in zip(*joined, strict=True)]
            continue
        outputs: Values = []
        for at in range(layer.output_size(len(found))):
            places = [at * layer.stride - layer.padding + tap * layer.dilation for tap in range(layer.kernel)]
            # What lies beyond the padding, as at the end with ceil_mode, is not there.
            inputs = [
                found[place] if 0 <= place < len(found) else "pad" if place < len(found) + layer.padding else "nothing"
                for place in places
            ]
            outputs.append(hash((number, tuple(inputs))))
        found = outputs
    return found


windows = st.builds(
    Window,
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    ceil_mode=st.booleans(),
)


@st.composite
def residuals(draw: st.DrawFn) -> Branches:
    """A block of a residual net: a main path that keeps or strides the size, and a way around it."""
    stride, half = draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 2))
    main = Net((Window(2 * half + 1, stride, half), Window(3, padding=1)))
    around = Net() if stride == 1 else Net((Window(1, stride),))
    third = draw(st.sampled_from([(), (Net((Window(5, stride, 2),)),)]))
    return Branches((main, around, *third))


nets = st.lists(st.one_of(windows, residuals()), min_size=1, max_size=5).map(lambda layers: Net(tuple(layers)))


@settings(max_examples=400, deadline=None)
@given(net=nets, size=st.integers(1, 90), data=st.data())
def test_owned_outputs_of_a_block_are_those_of_the_image(net: Net, size: int, data: st.DataObject) -> None:
    whole = evaluate(net, range(size)) if net.output_size(size) else []
    assert len(whole) == net.output_size(size)
    assume(whole)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    block = net.block(start, stop, size)
    assert 0 <= block.start < block.stop <= size
    assert block.start % net.stride == 0
    mine = evaluate(net, range(block.start, block.stop))
    assert mine[block.crop : block.crop + stop - start] == whole[start:stop]


# A window of these holds an input always, and no gaps: what it depends on is an interval.
dense = st.integers(1, 5).flatmap(
    lambda kernel: st.builds(
        Window,
        kernel=st.just(kernel),
        stride=st.integers(1, 3),
        padding=st.integers(0, min(3, kernel - 1)),
        ceil_mode=st.booleans(),
    )
)


@settings(max_examples=200, deadline=None)
@given(
    net=st.lists(st.one_of(dense, residuals()), min_size=1, max_size=4).map(lambda layers: Net(tuple(layers))),
    size=st.integers(1, 40),
    data=st.data(),
)
def test_no_more_is_needed_than_outputs_depend_on(net: Net, size: int, data: st.DataObject) -> None:
    num = net.output_size(size)
    assume(num)
    at = data.draw(st.integers(0, num - 1))
    plain = evaluate(net, range(size))[at]
    depends = [
        other
        for other in range(size)
        if evaluate(net, [-1 if place == other else place for place in range(size)])[at] != plain
    ]
    assert net.needs(at, at + 1, size) == (depends[0], depends[-1] + 1)


def resnet(blocks: Sequence[int], *, bottleneck: bool = False) -> Net:
    layers: list[Window | Branches] = [Window(7, 2, 3), Window(3, 2, 1)]
    for stage, num in enumerate(blocks):
        for number in range(num):
            stride = 2 if stage and not number else 1
            main = Net((Window(3, stride, 1), *(() if bottleneck else (Window(3, padding=1),))))
            layers.append(Branches((main, Net((Window(1, stride),)))))
    return Net(tuple(layers))


@pytest.mark.parametrize(
    ("net", "stride", "before", "behind", "halo"),
    [
        (resnet([2, 2, 2]), 16, 105, 90, 208),
        (resnet([2, 2, 2, 2]), 32, 217, 186, 416),
        (resnet([3, 4, 6]), 16, 273, 258, 560),
        (resnet([3, 4, 6, 3]), 32, 449, 418, 928),
        (resnet([3, 4, 6], bottleneck=True), 16, 133, 118, 272),
        (resnet([3, 4, 6, 3], bottleneck=True), 32, 213, 182, 416),
    ],
)
def test_halos_of_resnets(net: Net, stride: int, before: int, behind: int, halo: int) -> None:
    assert (net.stride, net.receptive_field, net.halo) == (stride, (before, behind), halo)


def test_a_block_inside_is_wider_by_the_halo_and_one_at_an_edge_by_less() -> None:
    net = resnet([2, 2, 2, 2])
    inside = net.block(20, 30, 65536)
    assert 10 * 32 + 217 + 186 <= inside.size <= 10 * 32 + net.halo
    assert inside.start % 32 == 0
    assert net.block(0, 10, 65536) == Block(0, 10 * 32 + 186, 0)
    assert net.block(2038, 2048, 65536).stop == 65536
    assert net.block(0, net.output_size(100), 100) == Block(0, 100, 0)


def test_sizes_are_those_of_torch() -> None:
    """Also a last window with ceil_mode that would begin in the padding behind the input, and does not count."""
    import torch
    from torch.nn import functional

    for size in range(1, 12):
        for kernel, stride, padding in ((2, 2, 1), (3, 2, 1), (2, 3, 0), (3, 3, 1), (1, 2, 0)):
            for ceil_mode in (False, True):
                window = Window(kernel, stride, padding, ceil_mode=ceil_mode)
                if window.output_size(size) == 0:
                    continue
                pooled = functional.max_pool1d(torch.zeros(1, 1, size), kernel, stride, padding, ceil_mode=ceil_mode)
                assert pooled.shape[-1] == window.output_size(size)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Window(3, stride=0)
    with pytest.raises(ValueError, match="padding is at least 0"):
        replace(Window(3), padding=-1)
    apart = Net((Branches((Net((Window(3, 2, 1),)), Net())),))
    with pytest.raises(ValueError, match=r"strides \[1, 2\]"):
        _ = apart.stride
    with pytest.raises(ValueError, match="cannot be joined"):
        Net((Branches((Net((Window(3),)), Net())),)).output_size(9)
    net = Net((Window(3, padding=1),))
    for start, stop in ((0, 10), (-1, 3), (4, 4)):
        with pytest.raises(ValueError, match="are not some of the 9 of 9 inputs"):
            net.block(start, stop, 9)

"""Seconds of the parts of a step: encoder calls by their size, collectives by a latency and a bandwidth.

Shapes: all functions take whole arrays of tile counts, one per step. docs/scaling.md has the formulas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.models.slide_model import SlideModel
from gigamil.scaling.machine import Link, Machine, Precision, Roof, encoder_identity, find_speed
from gigamil.scaling.traffic import Collective

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_STEP = 1e-3  # tiles


@dataclass(frozen=True)
class Line:
    """Seconds as a function of tiles: straight between the points, and beyond them as between the last two.

    A single point means that time is proportional.

    Attributes:
        tiles, seconds: of the points, ascending.
    """

    tiles: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, tiles: Floats | Ints) -> Floats:
        """Seconds of so many tiles."""
        x, y = np.array(self.tiles, dtype=np.float64), np.array(self.seconds)
        if len(x) == 1:
            return np.asarray(tiles) * y[0] / x[0]
        first, last = (y[1] - y[0]) / (x[1] - x[0]), max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
        below = np.minimum(np.asarray(tiles) - x[0], 0) * first
        above = np.maximum(np.asarray(tiles) - x[-1], 0) * last
        found: Floats = np.maximum(np.interp(tiles, x, y) + below + above, 0.0)
        return found

    def launch(self, tiles: Floats | Ints) -> Floats:
        """Of the seconds of a call on so many tiles those that do not shrink with them: what its line has at no tiles."""
        counts = np.asarray(tiles, dtype=np.float64)
        less = self.at(np.maximum(counts - _STEP, 0.0))
        found: Floats = np.maximum(less - (self.at(counts) - less) / _STEP * (counts - _STEP), 0.0)
        return found


@dataclass(frozen=True)
class EncoderCost:
    """What encoder calls cost.

    Attributes:
        forward: without a graph.
        beyond: what a forward with a graph and its backward take beyond that.
        busy_cores: cores that a call keeps busy.
        saved_bytes: of a tile's graph; None where only `gigamil plan` knows.
        source: how this is known.
    """

    forward: Line
    beyond: Line
    busy_cores: float
    saved_bytes: float | None
    source: str


class RankSeconds(NamedTuple):
    """Encoder calls of a rank in each step.

    Attributes:
        total: seconds.
        launch: of them those that do not shrink with the tiles of a call.
        calls: first passes.
        kept: tiles whose graphs are kept.
    """

    total: Floats
    launch: Floats
    calls: Ints
    kept: Ints


class Seconds(NamedTuple):
    """Of a collective.

    Attributes:
        latency: whatever its size.
        transfer: in proportion to its bytes.
    """

    latency: float
    transfer: float


def encoder_cost(config: RunConfig, model: SlideModel, machine: Machine) -> EncoderCost:
    """What an encoder call costs on a machine, as it was measured there, else by its operations and the machine's roof.

    Args:
        model: from `gigamil.train.plan.build_planned_model`.
    Raises:
        ConfigError: the machine file has neither.
    """
    speed = find_speed(machine, config)
    if speed is not None:
        tiles = tuple(float(call.tiles) for call in speed.calls)
        forward = Line(tiles, tuple(call.forward_s for call in speed.calls))
        beyond = Line(tiles, tuple(call.backward_s for call in speed.calls))
        cost = EncoderCost(forward, beyond, speed.busy_cores, speed.saved_bytes, speed.source)
    elif machine.roof is not None and config.science.precision in machine.roof.flops_s:
        cost = _under_roof(config, model, machine.roof)
    else:
        raise ConfigError(
            f"machine '{machine.name}' has no speed for encoder {encoder_identity(config)} at {config.slides.tile_px} px in "
            f"{config.science.precision}. Measure it there: gigamil bench calibrate CONFIG.yaml --out machine.yaml"
        )
    if config.execution.activation_checkpointing != "none":  # one more forward, within the backward
        tiles = tuple(sorted({*cost.forward.tiles, *cost.beyond.tiles}))  # between them both are straight
        seconds = cost.beyond.at(np.array(tiles)) + cost.forward.at(np.array(tiles))
        beyond = Line(tiles, tuple(seconds.tolist()))
        return EncoderCost(cost.forward, beyond, cost.busy_cores, None, cost.source)
    return cost


def _under_roof(config: RunConfig, model: SlideModel, roof: Roof) -> EncoderCost:
    name = config.science.encoder.name
    share = roof.efficiency.get(name, roof.efficiency["other"])
    precision: Precision = config.science.precision
    rate = share * roof.flops_s[precision]
    forward, backward = count_flops(model, config.slides.tile_px)
    whose = name if name in roof.efficiency else "other"
    return EncoderCost(
        _launched(roof.launch_s, forward / rate),
        _launched(2 * roof.launch_s, backward / rate),
        0.0,
        None,
        f"{(forward + backward) / 1e9:.3g} GFLOP a tile, forward and backward, at {share:.0%} of "
        f"{roof.flops_s[precision] / 1e12:.0f} TFLOP/s (efficiency of '{whose}'; {roof.source})",
    )


def _launched(launch_s: float, seconds_per_tile: float) -> Line:
    """A call whose kernels are launched while earlier ones run: what takes longer counts."""
    hidden = launch_s / seconds_per_tile if seconds_per_tile else math.inf  # tiles behind which launches hide
    if hidden == math.inf:
        return Line((1.0, 2.0), (launch_s, launch_s))
    if hidden <= 1:
        return Line((1.0,), (seconds_per_tile,))
    return Line((1.0, hidden, 2 * hidden), (launch_s, launch_s, 2 * launch_s))


def count_flops(model: SlideModel, tile_px: int) -> tuple[int, int]:
    """Floating-point operations of one tile: of its forward, and of its backward. Frozen blocks have none of the latter.

    Cost: a forward and a backward of one tile on the CPU.
    """
    image_1CHW, key_1 = torch.zeros(1, 3, tile_px, tile_px), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        embedding_1D = model.encode(image_1CHW, key_1)
        forward = counter.get_total_flops()
        if embedding_1D.requires_grad:
            embedding_1D.sum().backward()
        both = counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    return forward, both - forward


def rank_seconds(
    cost: EncoderCost, tiles: Ints, chunk: int, num_keep: int, factor: float = 1.0, *, is_padded: bool = False
) -> RankSeconds:
    """Encoder calls on a rank that owns so many tiles: kept chunks F + B, replayed ones 2 F + B.

    Args:
        tiles: of the rank, in each step; a rank without any makes one call on a blank tile.
        chunk: tiles of a call, at most.
        num_keep: calls whose graphs are kept.
        factor: pixels that are computed per pixel of a tile (dense encoders).
        is_padded: the last call is filled up to `chunk` (a compiled encoder).
    """
    owned = np.maximum(tiles, 1)
    full, rest = owned // chunk, owned % chunk
    has_rest = (rest > 0).astype(np.int64)
    kept_full = np.minimum(full, num_keep)
    kept_rest = has_rest * (num_keep > full)
    whole = np.full(len(owned), float(chunk)) * factor
    part = whole if is_padded else rest * factor

    def summed(seconds: Callable[[Floats], Floats], fulls: Ints, rests: Ints) -> Floats:
        return fulls * seconds(whole) + rests * seconds(part)

    def all_of(forward: Callable[[Floats], Floats], beyond: Callable[[Floats], Floats]) -> Floats:
        again = summed(forward, full - kept_full, has_rest - kept_rest)
        return summed(forward, full, has_rest) + summed(beyond, full, has_rest) + again

    total = all_of(cost.forward.at, cost.beyond.at)
    launch = np.minimum(all_of(cost.forward.launch, cost.beyond.launch), total)
    kept = np.minimum(kept_full * chunk + kept_rest * rest, tiles)
    return RankSeconds(total, launch, full + has_rest, kept)


def collective_seconds(call: Collective, machine: Machine) -> Seconds:
    """Seconds of one collective on its ranks, which fill nodes one after another.

    Raises:
        ConfigError: the ranks are on several nodes, and the machine file does not know what lies between them.
    """
    ranks = call.ranks
    if ranks == 1:
        return Seconds(0.0, 0.0)
    links, inside = machine.links, min(ranks, machine.ranks_per_node)
    nodes = -(-ranks // machine.ranks_per_node)
    if nodes > 1 and links.between is None:
        raise ConfigError(
            f"machine '{machine.name}' does not say what lies between nodes. Set links.between in its file (latency_s, bytes_s): "
            "what `gigamil doctor --dist` shows on two nodes, or the data sheet of the network."
        )
    if links.algorithm == "ring":
        return _ring(call, machine, nodes)
    return _tree(call, machine, inside, nodes)


def _ring(call: Collective, machine: Machine, nodes: int) -> Seconds:
    """As gloo: messages one after another, each as slow as the slowest link. Messages inside a node are work of its cores."""
    links, ranks = machine.links, call.ranks
    latency, rate = links.inside.latency_s * machine.stretch, links.inside.bytes_s / machine.stretch
    if nodes > 1 and links.between is not None:
        crossing = min(ranks, machine.ranks_per_node) if links.shared and call.name == "all_to_all_single" else 1
        latency, rate = max(latency, links.between.latency_s), min(rate, links.between.bytes_s / crossing)
    if call.name == "all_reduce":
        messages, size = 2 * (ranks - 1), call.bytes / ranks
    elif call.name in ("all_gather", "all_gather_into_tensor"):
        messages, size = ranks - 1, float(call.bytes)
    else:  # reduce_scatter_tensor, all_to_all_single
        messages, size = ranks - 1, call.bytes / ranks
    return Seconds(messages * latency, messages * size / rate)


def _tree(call: Collective, machine: Machine, inside: int, nodes: int) -> Seconds:
    """As NCCL: inside each node, then each rank's part of the result between nodes."""
    links = machine.links
    between = links.between or Link(latency_s=0.0, bytes_s=links.inside.bytes_s)
    outside_rate = between.bytes_s / (inside if links.shared else 1)
    there = math.ceil(math.log2(inside)) * links.inside.latency_s + math.ceil(math.log2(nodes)) * between.latency_s
    if call.name == "all_to_all_single":
        near = call.bytes * (inside - 1) / call.ranks / links.inside.bytes_s
        return Seconds(there, near + call.bytes * (call.ranks - inside) / call.ranks / outside_rate)
    ways = 2 if call.name == "all_reduce" else 1
    is_gather = call.name in ("all_gather", "all_gather_into_tensor")
    size = call.bytes * call.ranks if is_gather else call.bytes  # of the whole result, or what is reduced
    near = (inside - 1) / inside * size / links.inside.bytes_s
    far = (nodes - 1) / nodes * size / inside / outside_rate
    return Seconds(ways * there, ways * (near + far))


def expected_largest(count: int) -> float:
    """Mean of the largest of so many numbers of a standard normal distribution.

    Source: Blom 1958, Statistical Estimates and Transformed Beta-Variables.
    """
    from scipy.stats import norm

    return float(norm.ppf((count - 0.375) / (count + 0.25))) if count > 1 else 0.0


def fit_link(algorithm: Literal["ring", "tree"], ranks: int, sizes: Sequence[int], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth inside a node that explain measured all-reduces best; relative errors count.

    Args:
        algorithm: of `Links`.
        ranks: that took part, at least 2.
        sizes, seconds: bytes and time of each all-reduce; at least two of different sizes.
    """
    from scipy.optimize import nnls

    messages = 2 * (ranks - 1) if algorithm == "ring" else 2 * math.ceil(math.log2(ranks))
    sent = 2 * (ranks - 1) / ranks
    rows = np.array([[messages, sent * size] for size in sizes]) / np.array(seconds)[:, None]
    scale = rows.max(axis=0)  # the two columns differ by many orders of magnitude
    latency_s, seconds_per_byte = nnls(rows / scale, np.ones(len(sizes)))[0] / scale
    return Link(latency_s=float(latency_s), bytes_s=1 / max(float(seconds_per_byte), 1e-15))

"""`gigamil simulate`: step time, efficiency and bottleneck of a run on so many nodes, by the real schedule of its steps.

Which tiles a rank owns is not modelled: it is the same pure functions as in training. What they cost is, by the terms of
docs/scaling.md and a machine file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.errors import ConfigError, GigamilError
from gigamil.models.encoder import TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.partition.schedule import epoch_order, plan_steps
from gigamil.scaling.cost import (
    EncoderCost,
    Floats,
    Ints,
    Line,
    collective_seconds,
    encoder_cost,
    expected_largest,
    rank_seconds,
)
from gigamil.scaling.machine import Machine
from gigamil.scaling.traffic import Collective, step_collectives
from gigamil.shards.cohort_table import read_cohort
from gigamil.train.cohort import load_training_data
from gigamil.train.plan import Plan, build_planned_model, plan_worlds

MIX = "log-normal around 20,000 tiles, 5,000 to 100,000, seed 0"
_MIX_SLIDES = 400
_JPEG_BYTES = 15_000  # of a tile of 224 pixels at quality 90
TERMS = ("compute", "imbalance", "latency", "gradient reduction", "aggregator traffic", "decode", "storage")
_READERS = ("decode", "storage")  # what they take beside all else is not in the time; what ranks wait for them is


@dataclass(frozen=True)
class Cohort:
    """The slides that are trained on.

    Attributes:
        sizes: tiles of each.
        tile_bytes: of a stored tile.
        words: how this is known.
    """

    sizes: tuple[int, ...]
    tile_bytes: float
    words: str


class StepTiles(NamedTuple):
    """How the tiles of each step of an epoch fall on ranks; arrays by step.

    Attributes:
        total: tiles of all ranks.
        largest: of the busiest rank.
        group: tiles of the slides of each step's largest group, of the step of median size.
    """

    total: Ints
    largest: Ints
    group: tuple[int, ...]


@dataclass(frozen=True)
class NodePoint:
    """A run on so many nodes.

    Attributes:
        nodes, ranks: how many.
        step_s, step_p95_s: mean and 95th percentile over the steps of an epoch.
        slides_s, tiles_s: per second, over the epoch.
        efficiency: slides per second and node, over those of the first point.
        kept_share: f, of all tiles.
        bottleneck: one of TERMS.
        shares: of the epoch's time by term; what ranks wait for tiles is decode or storage.
        epoch_s: of all training steps.
        sent_bytes: that a rank gives to collectives in a step.
        is_predicted: beyond what the machine file was measured with.
        fits: whether `gigamil plan` finds room for it.
        hint: what would lift the bottleneck; empty if nothing simple does.
    """

    nodes: int
    ranks: int
    step_s: float
    step_p95_s: float
    slides_s: float
    tiles_s: float
    efficiency: float
    kept_share: float
    bottleneck: str
    shares: dict[str, float]
    epoch_s: float
    sent_bytes: int
    is_predicted: bool
    fits: bool
    hint: str


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found.

    Attributes:
        machine: its name, and whether it was measured.
        encoder: how its speed is known.
        cohort: how its slides are known.
        steps: of an epoch.
        band: largest relative error where predictions were compared with measurements; None if they never were.
        band_words: where the band comes from.
        points: by number of nodes.
    """

    machine: str
    encoder: str
    cohort: str
    steps: int
    band: float | None
    band_words: str
    points: tuple[NodePoint, ...]

    def text(self) -> str:
        """Table and plot, for people."""
        lines = [
            f"machine: {self.machine}",
            f"encoder: {self.encoder}",
            f"cohort: {self.cohort}; {self.steps} steps an epoch",
        ]
        lines += [f"error band: {self.band_words}", ""]
        lines.append(
            "nodes  ranks    step s     p95 s  slides/s  efficiency  kept f   epoch h  bottleneck (of the time)"
        )
        for point in self.points:
            lines.append(
                f"{point.nodes:5} {point.ranks:6} {point.step_s:9.4g} {point.step_p95_s:9.4g} {point.slides_s:9.4g}"
                f" {point.efficiency:11.2f} {point.kept_share:7.2f} {point.epoch_s / 3600:9.3g}  {point.bottleneck}"
                f" ({point.shares[point.bottleneck]:.0%}{' waiting' * (point.bottleneck in _READERS)})  {self._status(point)}"
            )
        lines += ["", "efficiency (slides/s and node, over the first row)", *self._bars()]
        hints = dict.fromkeys(f"{point.nodes} node(s): {point.hint}" for point in self.points if point.hint)
        return "\n".join([*lines, *([""] if hints else []), *hints])

    def _status(self, point: NodePoint) -> str:
        room = "" if point.fits else ", DOES NOT FIT: see gigamil plan"
        if not point.is_predicted:
            return f"within measured sizes{room}"
        return f"predicted, {'not validated' if self.band is None else f'within {self.band:.0%}'}{room}"

    def _bars(self) -> list[str]:
        most = max(point.efficiency for point in self.points)
        filled = [max(1, round(40 * point.efficiency / most)) for point in self.points]
        return [
            f"{point.nodes:5} {('.' if point.is_predicted else '#') * width:40} {point.efficiency:.2f}"
            for point, width in zip(self.points, filled, strict=True)
        ] + ["      # measured sizes   . predicted"]


def simulate(
    config: RunConfig,
    machine: Machine,
    nodes: Sequence[int],
    *,
    cohort: Cohort | None = None,
    slow_rank: float = 1.0,
) -> Simulation:
    """Predict a run on several numbers of nodes, from the schedule of one epoch and the machine's figures.

    Args:
        config: of the run; `execution.ranks` and `device` are the machine's.
        machine: a kind of node.
        nodes: how many of them, ascending; efficiencies are over the first.
        cohort: slides; default `find_cohort`.
        slow_rank: one rank takes so many times as long as the others; 1 or more.
    Raises:
        ConfigError: slow_rank is less than 1, the encoder's speed is not known, `execution.group_size` does not divide the ranks, or
            `execution.halo` is exchange.
    Cost: seconds: a few forwards and backwards of a handful of tiles for `gigamil plan`, and arithmetic.
    """
    cohort = find_cohort(config) if cohort is None else cohort
    run, plans = _prepare(config, machine, nodes, cohort, slow_rank)
    points = [_point(run, plan, count) for count, plan in zip(nodes, plans, strict=True)]
    first = points[0].slides_s / points[0].nodes
    band = machine.validation
    return Simulation(
        machine=f"{machine.name}, {'measured' if machine.measured else 'not measured: data sheets and estimates'}",
        encoder=run.cost.source,
        cohort=cohort.words,
        steps=-(-len(cohort.sizes) // config.science.slides_per_step),
        band=None if band is None else band.worst_error,
        band_words="not validated: no prediction of this machine file was compared with a measurement"
        if band is None
        else f"{band.worst_error:.0%} at worst, {band.median_error:.0%} median of {band.points} comparisons ({band.source})",
        points=tuple(replace(point, efficiency=point.slides_s / point.nodes / first) for point in points),
    )


def step_seconds(
    config: RunConfig, machine: Machine, nodes: int, *, cohort: Cohort | None = None, slow_rank: float = 1.0
) -> list[float]:
    """Seconds of each step of the first epoch, in its order; arguments and errors as of `simulate`."""
    cohort = find_cohort(config) if cohort is None else cohort
    run, (plan,) = _prepare(config, machine, [nodes], cohort, slow_rank)
    found: list[float] = run.epoch(plan, nodes).seconds.tolist()
    return found


def _prepare(
    config: RunConfig, machine: Machine, nodes: Sequence[int], cohort: Cohort, slow_rank: float
) -> "tuple[_Run, tuple[Plan, ...]]":
    if slow_rank < 1:
        raise ConfigError(f"--slow-rank {slow_rank:g}: one rank takes so many times as long as the others, 1 or more")
    model = build_planned_model(config)
    worlds = [count * machine.ranks_per_node for count in nodes]
    plans = plan_worlds(config, worlds, cohort.sizes, model, machine.device, int(machine.device_bytes))
    nothing = Line((1.0,), (0.0,))
    cost = EncoderCost(nothing, nothing, 0.0, None, "none: features are read")
    if isinstance(model.encoder, TileEncoder):
        cost = encoder_cost(config, model, machine)
        if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
            cost = replace(cost, beyond=nothing, saved_bytes=None)  # one pass without graphs
            plans = tuple(replace(plan, num_kept=sum(cohort.sizes)) for plan in plans)
    return _Run(config, machine, cohort, model, cost, slow_rank), plans


def find_cohort(config: RunConfig, num_slides: int | None = None) -> Cohort:
    """The training slides of a run: from its shards, else from the table that tiling wrote, else a mix that is said.

    Args:
        num_slides: draw so many of them, with replacement; None takes them as they are.
    """
    sizes, words = _known_sizes(config)
    draw = np.random.default_rng(0)
    stored = config.slides.tile_px**2 * _JPEG_BYTES / 224**2
    if config.data.source == "shards":
        stored = _stored_bytes(config) or stored
    if not sizes:
        count = num_slides or _table_rows(config) or _MIX_SLIDES
        sizes = np.clip(np.exp(draw.normal(math.log(20_000), 0.75, count)), 5_000, 100_000).astype(int).tolist()
        return Cohort(tuple(sizes), stored, f"{count} slides of a stated mix ({MIX}); {words}")
    if num_slides is not None:
        sizes = draw.choice(sizes, num_slides).tolist()
        words = f"{num_slides} slides drawn from {words}"
    return Cohort(tuple(sizes), stored, words)


def schedule_tiles(
    sizes: Sequence[int], order: Sequence[int] | np.ndarray, slides_per_step: int, num_groups: int, group_size: int
) -> StepTiles:
    """How an epoch's tiles fall on ranks, by `gigamil.partition.schedule.plan_steps`.

    With one group, or no more slides than groups, what it gives is known without asking: all tiles, or the largest slide.
    """
    steps = [order[start : start + slides_per_step] for start in range(0, len(order), slides_per_step)]
    per_step = [tuple(int(sizes[index]) for index in step) for step in steps]
    total = [sum(step) for step in per_step]
    middle = sorted(range(len(total)), key=total.__getitem__)[len(total) // 2]
    groups: list[tuple[int, ...]]  # sizes in the largest group of each step
    if num_groups == 1:
        groups = per_step
    elif slides_per_step <= num_groups:
        groups = [(max(step),) for step in per_step]
    else:
        plans = plan_steps(order, sizes, slides_per_step, num_groups, group_size)
        groups = [max((plan.group_sizes(g) for g in range(num_groups)), key=sum) for plan in plans]
    largest = [-(-sum(group) // group_size) for group in groups]
    return StepTiles(np.array(total, dtype=np.int64), np.array(largest, dtype=np.int64), groups[middle])


class _Epoch(NamedTuple):
    """The steps of an epoch on so many nodes.

    Attributes:
        seconds: of each step.
        terms: seconds of the epoch by term; what ranks wait for tiles is that of what they wait for.
        bottleneck: one of TERMS.
        kept: f, over all tiles.
        largest: tiles of the busiest rank in the largest step.
        sent_bytes: that a rank gives to collectives in a step.
        decode_cores: cores of a rank that decoding keeps busy, if it is to be as fast as all else.
        launch_share: of encoder calls, seconds that larger calls would not have.
    """

    seconds: Floats
    terms: dict[str, float]
    bottleneck: str
    kept: float
    largest: int
    sent_bytes: int
    decode_cores: float
    launch_share: float


@dataclass(frozen=True)
class _Run:
    """What is the same for all numbers of nodes."""

    config: RunConfig
    machine: Machine
    cohort: Cohort
    model: SlideModel
    cost: EncoderCost
    slow_rank: float

    def epoch(self, plan: Plan, nodes: int) -> _Epoch:
        """Simulate the steps of the first epoch."""
        config, machine, cohort, model, cost = self.config, self.machine, self.cohort, self.model, self.cost
        ranks, science = nodes * machine.ranks_per_node, config.science
        group_size = config.execution.group_size or ranks
        order = epoch_order(len(cohort.sizes), science.seed, 0)
        steps = schedule_tiles(cohort.sizes, order, science.slides_per_step, ranks // group_size, group_size)
        num_keep = _num_keep(config, cost, plan)
        chunk = plan.chunk if plan.blocks is not None else config.execution.tiles_per_call
        factor = 1.0 if plan.blocks is None else plan.blocks.factor

        is_padded = config.execution.compile and config.data.source != "features"
        busiest = rank_seconds(cost, steps.largest, chunk, num_keep, factor, is_padded=is_padded)
        mean_tiles = np.maximum(1, np.rint(steps.total / ranks).astype(np.int64))
        usual = rank_seconds(cost, mean_tiles, chunk, num_keep, factor, is_padded=is_padded)
        own = busiest.total * self._late(group_size) * (1 + machine.noise * expected_largest(ranks))
        decode, storage = _data_seconds(self, plan, steps, usual.kept / mean_tiles)
        # A rank's calls and its decoding share its cores, whatever waits for what.
        cores = machine.cores_per_rank
        working = np.maximum(own, (own * cost.busy_cores + decode.core) / cores if cost.busy_cores else 0.0)
        head = steps.largest * machine.step.head_s * machine.stretch
        update = _updated_bytes(config, model, ranks) / 1e9 * machine.step.update_s_per_gb
        update, fixed = update * machine.stretch, machine.step.fixed_s * machine.stretch
        calls = step_collectives(config, model, steps.group, science.slides_per_step, ranks)
        latency, reduction, pooling = _collectives(calls, machine)
        consumed = working + head + update + fixed + latency + reduction + pooling
        produced = np.maximum(decode.seconds, storage)
        ended = _pipeline(config, consumed, produced, decode.is_held)

        terms = dict.fromkeys(TERMS, 0.0)
        one_launch = busiest.launch / busiest.calls  # fewer tiles of a rank make fewer calls, down to one
        terms["compute"] = float((usual.total - one_launch + working - own + head + update).sum())
        terms["imbalance"] = float((own - usual.total).sum())
        terms["latency"] = float((one_launch + fixed + latency).sum())
        terms["gradient reduction"] = reduction * len(consumed)
        terms["aggregator traffic"] = pooling * len(consumed)
        reader = "decode" if decode.seconds.sum() >= storage.sum() else "storage"
        terms[reader] = max(0.0, float(ended[-1] - consumed.sum()))
        # Data that takes longer than all else bounds the speed, however little of the time is left to wait for it.
        is_data = float(produced.sum()) > float(consumed.sum())
        return _Epoch(
            seconds=np.diff(ended, prepend=0.0),
            terms=terms,
            bottleneck=reader if is_data else max(terms, key=lambda name: terms[name]),
            kept=float(usual.kept.sum() / mean_tiles.sum()),
            largest=int(steps.largest.max()),
            sent_bytes=sum(call.bytes for call in calls if call.ranks > 1),
            decode_cores=float(decode.core.sum() / consumed.sum()),
            launch_share=float(busiest.launch.sum() / busiest.total.sum()) if cost.forward.seconds[-1] else 0.0,
        )

    def _late(self, group_size: int) -> float:
        """How much longer the slowest rank takes for its tiles than one of the others would for as many as it has."""
        if self.config.execution.balance == "even":
            return self.slow_rank
        return group_size / (group_size - 1 + 1 / self.slow_rank)  # ranks own tiles in proportion to their speed


def _point(run: _Run, plan: Plan, nodes: int) -> NodePoint:
    epoch, machine, cohort = run.epoch(plan, nodes), run.machine, run.cohort
    epoch_s, largest = float(epoch.seconds.sum()), machine.largest
    ranks = nodes * machine.ranks_per_node
    is_measured = largest is not None and nodes <= largest.nodes and ranks <= largest.ranks
    return NodePoint(
        nodes=nodes,
        ranks=ranks,
        step_s=float(epoch.seconds.mean()),
        step_p95_s=float(np.quantile(epoch.seconds, 0.95)),
        slides_s=len(cohort.sizes) / epoch_s,
        tiles_s=sum(cohort.sizes) / epoch_s,
        efficiency=1.0,
        kept_share=epoch.kept,
        bottleneck=epoch.bottleneck,
        shares={name: value / epoch_s for name, value in epoch.terms.items()},
        epoch_s=epoch_s,
        sent_bytes=epoch.sent_bytes,
        is_predicted=not is_measured or largest is None or epoch.largest > largest.tiles,
        fits=plan.fits,
        hint=_hint(run, epoch),
    )


class _DataSeconds(NamedTuple):
    """Reading the tiles of each step on the busiest rank.

    Attributes:
        seconds: of decoding, by all of its threads.
        core: seconds of one core.
        is_held: decoded once, steps ahead; else chunk by chunk.
    """

    seconds: Floats
    core: Floats
    is_held: bool


def _data_seconds(run: _Run, plan: Plan, steps: StepTiles, kept: Floats) -> tuple[_DataSeconds, Floats]:
    """Decoding, and reading what is decoded, on the busiest rank in each step.

    Args:
        kept: share of its tiles whose graphs are kept.
    """
    tiles, total = steps.largest.astype(np.float64), steps.total.astype(np.float64)
    config, machine, cohort = run.config, run.machine, run.cohort
    execution, rate = config.execution, machine.decode
    mpx = config.slides.tile_px**2 / 1e6 * (1.0 if plan.blocks is None else plan.blocks.factor)
    row_bytes, stored = float(config.slides.tile_px**2 * 3), cohort.tile_bytes
    core: Floats = tiles * mpx / (rate.slides_mpx_s if config.data.source == "slides" else rate.shards_mpx_s)
    if config.data.source == "features":
        row_bytes = stored = 4.0 * run.model.encoder.dim
        core = np.zeros(len(tiles))
    limit = 0.25 if execution.tile_cache is None else execution.tile_cache

    def cache(free: float) -> float:
        return limit if limit > 1 else limit * free

    ahead = execution.prefetch + 2 if execution.prefetch and execution.decode_workers else 1
    most = int(tiles.max()) * row_bytes
    is_held = plan.blocks is None and most * ahead <= cache(machine.host_bytes / machine.ranks_per_node)
    if not is_held and most > cache(machine.device_bytes):
        core = core * (2 - kept)  # decoded again for the chunks that are encoded again
    threads = min(max(1, execution.decode_workers), max(1.0, machine.cores_per_rank))
    storage = machine.storage
    per_node = tiles * stored * machine.ranks_per_node
    if (
        config.data.source == "shards"
        and execution.shard_cache is not None
        and _cached_gb(cohort) <= execution.shard_cache_gb
    ):
        read: Floats = per_node / storage.local_bytes_s
    else:
        read = per_node / storage.node_bytes_s
        if storage.total_bytes_s is not None:
            read = np.maximum(read, total * stored / storage.total_bytes_s)
    return _DataSeconds(core / threads, core, is_held), read


def _num_keep(config: RunConfig, cost: EncoderCost, plan: Plan) -> int:
    """Calls whose graphs are kept: by the measured bytes of a graph where there are some, else as planned."""
    if config.execution.memory != "auto" or cost.saved_bytes is None or plan.blocks is not None:
        return plan.num_kept
    return int(plan.graph_budget // (cost.saved_bytes * config.execution.tiles_per_call))


def _updated_bytes(config: RunConfig, model: SlideModel, ranks: int) -> float:
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return trained / ranks if config.execution.zero_stage else float(trained)


def _collectives(calls: Sequence[Collective], machine: Machine) -> tuple[float, float, float]:
    """Seconds of a step's latencies, of the bytes of gradients and parameters, and of those of the aggregator."""
    found = [(call, collective_seconds(call, machine)) for call in calls]
    latency = sum(seconds.latency for _, seconds in found)
    pooling = sum(seconds.transfer for call, seconds in found if call.purpose == "pooling")
    return latency, sum(seconds.transfer for _, seconds in found) - pooling, pooling


def _pipeline(config: RunConfig, consumed: Floats, produced: Floats, is_held: bool) -> Floats:
    """When each step ends: a step begins when the one before it has ended and its tiles are there.

    Tiles that are held are read steps ahead, as `StepLoader` does with a queue of `execution.prefetch`; others chunk by
    chunk within the step.
    """
    prefetch, execution = config.execution.prefetch, config.execution
    if not execution.decode_workers or (is_held and not prefetch):
        return np.cumsum(consumed + produced)
    if not is_held:
        return np.cumsum(np.maximum(consumed, produced))
    begun: list[float] = []
    ended, put = 0.0, 0.0
    ends = []
    for number, (takes, reads) in enumerate(zip(consumed.tolist(), produced.tolist(), strict=True)):
        room = begun[number - prefetch] if number >= prefetch else 0.0
        put = max(put + reads, room)
        begun.append(max(ended, put))
        ended = begun[-1] + takes
        ends.append(ended)
    return np.array(ends)


def _cached_gb(cohort: Cohort) -> float:
    """Of all tars: whole ones are copied, and over the epochs every node reads of each."""
    return sum(cohort.sizes) * cohort.tile_bytes / 1e9


def _hint(run: _Run, epoch: _Epoch) -> str:
    config, machine, bottleneck = run.config, run.machine, epoch.bottleneck
    execution, cores = config.execution, int(machine.cores_per_rank)
    if bottleneck == "decode":
        wanted = math.ceil(epoch.decode_cores)
        if wanted <= cores and execution.decode_workers < wanted:
            return f"decode: execution.decode_workers {wanted} would feed a rank"
        return f"decode: a rank needs {wanted} cores to read its tiles, and has {machine.cores_per_rank:.3g}"
    if bottleneck == "compute" and epoch.launch_share > 0.5 and epoch.largest > execution.tiles_per_call:
        return "compute: encoder calls are too small to keep the device busy; a larger execution.chunk would"
    size = _cached_gb(run.cohort)
    is_cached = execution.shard_cache is not None and size <= execution.shard_cache_gb
    if bottleneck == "storage" and config.data.source == "shards" and not is_cached:
        return (
            f"storage: execution.shard_cache on the nodes' own disks, with shard_cache_gb {math.ceil(size)}, takes it off from "
            "the second epoch on"
        )
    if bottleneck == "imbalance" and execution.group_size is not None:
        return "imbalance: a larger execution.group_size shares slides among more ranks"
    if bottleneck == "latency":
        return "latency: more nodes help little; more science.slides_per_step would (and changes results)"
    return ""


def _known_sizes(config: RunConfig) -> tuple[list[int], str]:
    """Tiles of the training slides, and how they are known; none, and why not."""
    where = config.bookkeeping.shard_root
    try:
        sizes = list(load_training_data(config).slides("train").sizes)
        kind = "features" if config.data.source == "features" else "shards"
        return sizes, f"{len(sizes)} training slides, from the {kind}"
    except (GigamilError, OSError) as error:
        why = str(error)
    if isinstance(where, str) or config.data.source == "features":
        return [], why
    try:
        sizes = [row.tiles for row in read_cohort(where) if row.tiles]
        return sizes, f"all {len(sizes)} tiled slides of '{where}' (they are not split yet)"
    except (GigamilError, OSError):
        return [], f"its tiles are not known: {why.split('. ')[0]}"


def _stored_bytes(config: RunConfig) -> float | None:
    """Mean size of a stored tile; None where no table of tiling says it."""
    where = config.bookkeeping.shard_root
    if isinstance(where, str):
        return None
    try:
        rows = read_cohort(where)
    except (GigamilError, OSError):
        return None
    tiles = sum(row.tiles for row in rows)
    return sum(row.bytes for row in rows) / tiles if tiles else None


def _table_rows(config: RunConfig) -> int | None:
    """Slides of the slide table; None without one."""
    try:
        return len(load_cohort(config.cohort, need_files=False, need_labels=False).rows) or None
    except (GigamilError, OSError):
        return None


def parse_nodes(text: str) -> tuple[int, ...]:
    """Numbers of nodes from "1,8,64".

    Raises:
        ConfigError: they are no ascending list of whole numbers from 1 on.
    """
    try:
        nodes = tuple(int(word) for word in text.split(","))
    except ValueError:
        nodes = ()
    if not nodes or nodes[0] < 1 or list(nodes) != sorted(set(nodes)):
        raise ConfigError(
            f"--nodes {text}: write numbers of nodes that ascend, with commas between them, such as 1,8,64"
        )
    return nodes

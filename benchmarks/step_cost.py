"""What does an exact step cost in CPU time, beside the plain graph and beside what others do?

Expected: replay encodes each tile twice, 4 forwards' worth of work where the plain graph has 3, so 4/3 at best; kept
graphs cost nothing; half kept 3.5. ABMIL-ACC runs the head once per chunk, so its cost rises with N / chunk. EAGLE's
rank 0 only aggregates, so 2 ranks do the work of one. GradCache is the same algorithm as replay on one process, and
nothing is claimed against it.

Arms, each written here from the papers' description, with the same tiles, model, loss, clipping and optimiser:

    naive        whole bag, one graph
    checkpoint   one graph whose chunks are checkpointed (Chen et al. 2016, arXiv:1604.06174)
    ABMIL-ACC    Andersson et al. 2022, arXiv:2203.03981: per chunk, the head runs on [fresh chunk, cached others]
    GradCache    Gao et al. 2021, arXiv:2101.06983: cached gradient of the features, chunks encoded again
    EAGLE        Campanella et al. 2024, arXiv:2403.04865: features gathered on rank 0, which has the head; 2 ranks
    gigamil      `gigamil.train.step.ExactStep`: replay, half kept, keep (what `auto` does where all fits)

A thin ResNet-18 (16 channels) on 96 x 96 tiles, gated attention of 256, float32, one thread a rank. Before any timing
the gradient of each arm is compared with naive's, in float64 on a few tiles and in float32 on all. Arms take turns,
round after round; a ratio is the median over rounds of the ratio within a round. Figures are CPU time, which other
load on the machine disturbs less than wall time; ranks are compared by wall time, which needs a core for each. glibc
is told to keep freed memory (a large graph's page faults are the kernel's work, not the arm's), so the script starts
itself again with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1.

    python benchmarks/step_cost.py [--quick] [--out FILE]

The last line is JSON: replay_over_naive, keep_over_naive and half_over_replay (worst over N),
accumulation_over_gigamil (ABMIL-ACC at chunk 16 over replay at gigamil's chunk, largest N), gather_over_gigamil
(EAGLE over gigamil, 2 ranks, wall time), and where the time of replay goes.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from gradients import Gradients, checked, recorded
from options import add_sizes
from origin import origin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from gigamil.data.augment import to_float
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool, Pooled
from gigamil.models.encoder import Cells, TileEncoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.partition.spans import owned_range
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
BOUND_FLOAT64 = 1e-12
RANKS = 2


@dataclass(frozen=True)
class Sizes:
    """How large the comparison is."""

    num_tiles: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tile_px: int = 96
    width: int = 16
    hidden: int = 256
    rounds: int = 5
    ranks_tiles: int = 1024
    small_chunk: int = 16  # ABMIL-ACC's own is 25; the smaller, the less memory it takes and the more heads it runs
    chunks: tuple[int, ...] = (16, 32, 64, 128, 256)  # gigamil's chunk is the fastest of these


QUICK = Sizes(num_tiles=(64, 256), rounds=3, ranks_tiles=256)
TINY = Sizes(num_tiles=(8,), tile_px=16, width=4, hidden=8, rounds=2, ranks_tiles=8, small_chunk=2, chunks=(2, 4))


class Problem:
    """One slide, one model, one optimiser: what all arms share.

    The learning rate is 0: the update is done and paid for, and each step starts from the same weights.

    Args:
        num_tiles: N.
        sizes: of tiles and model.
        dtype: of the model.
    """

    def __init__(self, num_tiles: int, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        # Each tile has a colour of its own: embeddings of pure noise are all but equal, and their gradient cancels.
        colour_N113 = torch.randint(40, 216, (num_tiles, 1, 1, 3), generator=generator)
        noise_1HW3 = torch.randint(-40, 40, (1, sizes.tile_px, sizes.tile_px, 3), generator=generator)
        self.image_NHWC = torch.cat(
            [(colour_1113 + noise_1HW3).to(torch.uint8) for colour_1113 in colour_N113.split(1)]
        )
        self.label_B = torch.ones(1, dtype=torch.int64)
        self.model, self.dtype = make_model(sizes.width, sizes.hidden).to(dtype), dtype
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.gradients: dict[str, Tensor] = {}

    @property
    def num_tiles(self) -> int:
        """N."""
        return len(self.image_NHWC)

    def encode(self, start: int, stop: int) -> Tensor:
        """Embeddings of tiles start..stop - 1."""
        embedding_cD: Tensor = self.model.encode(to_float(self.image_NHWC[start:stop], self.dtype), None)
        return embedding_cD

    def loss(self, embedding_ND: Tensor) -> Tensor:
        """Loss of the slide; the order of the embeddings means nothing to it."""
        size = len(embedding_ND)
        bag = Bag(embedding_ND, torch.zeros(size, 2, dtype=torch.float64), (size,), LocalPool(size))
        return cross_entropy(self.model.classify(bag)[0], self.label_B).mean()

    def chunks(self, chunk: int) -> list[tuple[int, int]]:
        """Ranges of tiles."""
        return [(start, min(start + chunk, self.num_tiles)) for start in range(0, self.num_tiles, chunk)]

    def update(self) -> None:
        """What `PlainEngine.step` does."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep a copy of the gradients that the optimiser is given."""
        with recorded(self.model, self.optimizer) as self.gradients:
            yield


def make_model(width: int, hidden: int) -> SlideModel:
    """ResNet-18 with `width` channels in place of 64, gated attention, two classes; BatchNorm on frozen statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        layers.append(nn.MaxPool2d(3, 2, 1))
        channels = width
        for stage, block in ((stage, block) for stage in range(4) for block in range(2)):
            wanted, stride = width * 2**stage, 2 if stage and not block else 1
            shortcut = None
            if stride == 2:
                shortcut = nn.Sequential(nn.Conv2d(channels, wanted, 1, 2, bias=False), nn.BatchNorm2d(wanted))
            layers.append(BasicBlock(channels, wanted, stride, shortcut))
            channels = wanted
        network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoder = TileEncoder(FrozenStatistics(network, channels).train(), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        return SlideModel(encoder, GatedAttention(channels, hidden), num_classes=2)


# ---- one process ----


def naive(problem: Problem, chunk: int) -> None:
    """The whole bag in one graph."""
    problem.loss(problem.encode(0, problem.num_tiles)).backward()
    problem.update()


def checkpointed(problem: Problem, chunk: int) -> None:
    """One graph that holds the chunks' inputs and makes the rest again."""
    parts = [checkpoint(problem.encode, start, stop, use_reentrant=False) for start, stop in problem.chunks(chunk)]
    problem.loss(torch.cat(parts)).backward()
    problem.update()


def abmil_acc(problem: Problem, chunk: int) -> None:
    """Gradient of the head from cached features; then for each chunk the head again, over it and the cached others."""
    encoder, head = problem.model.encoder, [problem.model.aggregator, problem.model.head]
    with torch.no_grad():
        cached_ND = torch.cat([problem.encode(start, stop) for start, stop in problem.chunks(chunk)])
    encoder.requires_grad_(False)
    problem.loss(cached_ND).backward()
    encoder.requires_grad_(True)
    for part in head:
        part.requires_grad_(False)
    for start, stop in problem.chunks(chunk):
        problem.loss(torch.cat([problem.encode(start, stop), cached_ND[:start], cached_ND[stop:]])).backward()
    for part in head:
        part.requires_grad_(True)
    problem.update()


def grad_cache(problem: Problem, chunk: int) -> None:
    """Gradient of the loss by the features, then chunk by chunk the product with it; random states as in pass 1."""
    states, parts = [], []
    with torch.no_grad():
        for start, stop in problem.chunks(chunk):
            states.append(torch.get_rng_state())
            parts.append(problem.encode(start, stop))
    cached_ND = torch.cat(parts).requires_grad_()
    problem.loss(cached_ND).backward()
    for (start, stop), state in zip(problem.chunks(chunk), states, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            embedding_cD = problem.encode(start, stop)
        torch.dot(embedding_cD.flatten(), cached_ND.grad[start:stop].flatten()).backward()
    problem.update()


def gigamil(
    problem: Problem, chunk: int, *, kept: float, ranks: Ranks | None = None, timer: "Timer | None" = None
) -> None:
    """The step that training runs."""
    topology = Topology() if ranks is None else ranks.topology
    world = None if ranks is None else ranks.world
    plan = plan_steps([0], [problem.num_tiles], 1, 1, topology.world_size)[0]
    start, stop = owned_range(problem.num_tiles, topology.rank, topology.world_size)
    size = stop - start
    tiles = StepTiles(
        HeldImages(problem.image_NHWC[start:stop]),
        torch.zeros(size, dtype=torch.int64),
        torch.arange(start, stop),
        torch.zeros(size, 2, dtype=torch.float64),
    )
    engine = PlainEngine(problem.model, problem.optimizer, world=world)
    if timer is not None:
        engine = TimedEngine(problem.model, timer, problem.optimizer)
    num_keep = round(kept * -(-size // chunk))
    step = ExactStep(
        engine, ranks or Ranks(topology), cross_entropy, chunk=chunk, num_keep=num_keep, keys=DrawKeys(0, ["slide"])
    )
    step.train(plan, tiles, problem.label_B, torch.ones(1, dtype=torch.float64), step=0, learning_rates=[0.0])


Arm = Callable[[Problem, int], None]


def arms(num_tiles: int, chunk: int, small: int) -> dict[str, tuple[Arm, int]]:
    """Name -> arm and its chunk. Half can be kept where there are two chunks, so half may need a replay beside it."""
    two = min(chunk, max(1, num_tiles // 2))
    beside: dict[str, tuple[Arm, int]] = {"replay beside half": (partial(gigamil, kept=0.0), two)}
    return {
        "naive": (naive, chunk),
        "checkpoint": (checkpointed, chunk),
        "ABMIL-ACC small": (abmil_acc, small),
        "ABMIL-ACC": (abmil_acc, chunk),
        "GradCache": (grad_cache, chunk),
        "gigamil small": (partial(gigamil, kept=0.0), small),
        "gigamil replay": (partial(gigamil, kept=0.0), chunk),
        "gigamil half": (partial(gigamil, kept=0.5), two),
        "gigamil keep": (partial(gigamil, kept=1.0), chunk),
    } | (beside if two != chunk else {})


@dataclass
class Figure:
    """An arm at one N: seconds of each round."""

    num_tiles: int
    arm: str
    chunk: int
    error: float
    cpu_s: list[float]
    user_s: list[float]

    def over(self, other: "Figure") -> list[float]:
        """Ratio of CPU times in each round."""
        return [a / b for a, b in zip(self.cpu_s, other.cpu_s, strict=True)]


def compare(num_tiles: int, chunk: int, sizes: Sizes) -> dict[str, Figure]:
    """All arms at one N.

    Raises:
        SystemExit: an arm has another gradient than naive.
    """
    problem = Problem(num_tiles, sizes)
    figures = {}
    truth: Gradients = {}
    for name, (arm, size) in arms(num_tiles, chunk, sizes.small_chunk).items():
        with problem.recorded():
            arm(problem, size)
        truth = truth or problem.gradients
        figures[name] = Figure(num_tiles, name, size, checked(name, problem.gradients, truth), [], [])
    for _ in range(sizes.rounds):
        for name, (arm, size) in arms(num_tiles, chunk, sizes.small_chunk).items():
            user, cpu = user_time(), time.process_time()
            arm(problem, size)
            figures[name].cpu_s.append(time.process_time() - cpu)
            figures[name].user_s.append(user_time() - user)
    return figures


def best_chunk(num_tiles: int, sizes: Sizes, rounds: int = 3) -> int:
    """The chunk at which replay takes least CPU time."""
    problem = Problem(num_tiles, sizes)
    spent: dict[int, list[float]] = {chunk: [] for chunk in sizes.chunks if chunk <= max(sizes.chunks[0], num_tiles)}
    for number in range(rounds + 1):
        for chunk, times in spent.items():
            cpu = time.process_time()
            gigamil(problem, chunk, kept=0.0)
            if number:  # the first round only warms up
                times.append(time.process_time() - cpu)
    return min(spent, key=lambda chunk: min(spent[chunk]))


def check_in_float64(sizes: Sizes) -> float:
    """Worst error of all arms on a few tiles, where rounding cannot hide a mistake."""
    problem = Problem(2 * sizes.small_chunk + 1, sizes, torch.float64)
    truth: Gradients = {}
    errors = []
    for name, (arm, chunk) in arms(problem.num_tiles, sizes.small_chunk, sizes.small_chunk).items():
        with problem.recorded():
            arm(problem, chunk)
        truth = truth or problem.gradients
        errors.append(checked(name, problem.gradients, truth, BOUND_FLOAT64))
    return max(errors)


def user_time() -> float:
    """CPU seconds of this process outside the kernel."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


# ---- where the time goes ----


class Timer:
    """CPU seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Add what is spent inside."""
        start = time.process_time()
        yield
        self.spent[name] += time.process_time() - start


class TimedEngine(PlainEngine):
    """Tells how long each of its calls took."""

    def __init__(self, model: nn.Module, timer: Timer, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self._timer = timer

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """First pass without a graph, second with."""
        with self._timer.section("forward with graph" if torch.is_grad_enabled() else "forward without graph"):
            return super().encode(image_nCHW, tile_key_n, cells)

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """The head."""
        with self._timer.section("head forward"):
            return super().classify(bag)

    def backward(self, scalar: Tensor) -> None:
        """The first is the head's."""
        with self._timer.section("encoder backward" if "head backward" in self._timer.spent else "head backward"):
            super().backward(scalar)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Norm and update."""
        with self._timer.section("update"):
            return super().step(learning_rates)


def breakdown(num_tiles: int, chunk: int, sizes: Sizes) -> dict[str, float]:
    """Shares of the CPU time of a replayed step; `rest` is uint8 to float, draws' keys, bag and loss."""
    problem = Problem(num_tiles, sizes)
    gigamil(problem, chunk, kept=0.0)
    rounds = []
    for _ in range(sizes.rounds):
        timer, cpu = Timer(), time.process_time()
        gigamil(problem, chunk, kept=0.0, timer=timer)
        total = time.process_time() - cpu
        shares = {name: seconds / total for name, seconds in timer.spent.items()}
        rounds.append(shares | {"rest": 1 - sum(shares.values())})
    return {name: round(statistics.median(shares[name] for shares in rounds), 4) for name in rounds[0]}


# ---- ranks ----


def eagle(problem: Problem, encoders: dist.ProcessGroup | None) -> None:
    """Rank 0 aggregates, the others encode: gather of features, scatter of their gradients, a barrier before each.

    All graphs are kept. The number of encoding ranks divides that of tiles.
    """
    rank, num_encoders = dist.get_rank(), dist.get_world_size() - 1
    share = problem.num_tiles // num_encoders
    dim = problem.model.encoder.dim
    if rank:
        feature_nD = problem.encode((rank - 1) * share, rank * share)
        dist.barrier()
        dist.gather(feature_nD.detach(), None, dst=0)
        cotangent_nD = torch.empty_like(feature_nD)
        dist.barrier()
        dist.scatter(cotangent_nD, None, src=0)
        # Times their number, because the gradient is then averaged over the encoding ranks.
        ((feature_nD * cotangent_nD).sum() * num_encoders).backward()
        for parameter in problem.model.encoder.parameters():
            if num_encoders > 1:
                dist.all_reduce(parameter.grad, group=encoders)
                parameter.grad /= num_encoders
    else:
        gathered = [torch.empty(share, dim) for _ in range(num_encoders + 1)]
        dist.barrier()
        dist.gather(torch.zeros(share, dim), gathered, dst=0)
        feature_ND = torch.cat(gathered[1:]).requires_grad_()
        problem.loss(feature_ND).backward()
        dist.barrier()
        dist.scatter(torch.empty(share, dim), [torch.zeros(share, dim), *feature_ND.grad.split(share)], src=0)
    problem.update()


def rank_times(rank: int, num_ranks: int, chunk: int, sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """On one rank: seconds of the slowest rank (wall) and of the busiest (CPU) per round, and each arm's error."""
    world, encoders = dist.group.WORLD, dist.new_group(list(range(1, num_ranks)))
    problem = Problem(sizes.ranks_tiles, sizes)
    ranks = Ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks), world, world)
    wanted: dict[str, Callable[[], None]] = {
        "EAGLE": partial(eagle, problem, encoders),
        "gigamil keep": partial(gigamil, problem, chunk, kept=1.0, ranks=ranks),
        "gigamil replay": partial(gigamil, problem, chunk, kept=0.0, ranks=ranks),
    }
    with problem.recorded():
        naive(problem, chunk)
    truth = problem.gradients
    found: dict[str, dict[str, list[float]]] = {}
    for name, arm in wanted.items():
        with problem.recorded():
            arm()
        own = truth
        if name == "EAGLE":  # a rank has the gradient of its own half of the model
            own = {key: value for key, value in truth.items() if key.startswith("encoder.") == (rank > 0)}
        found[name] = {"error": [checked(name, problem.gradients, own)], "wall_s": [], "busiest_cpu_s": []}
    for _ in range(sizes.rounds):
        for name, arm in wanted.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            spent = torch.tensor([time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            found[name]["wall_s"].append(float(spent[0]))
            found[name]["busiest_cpu_s"].append(float(spent[1]))
    return found


def idle_share(num_tiles: int, num_ranks: int, encoding: int) -> float:
    """Share of the ranks' time that is waited away while tiles are encoded, by count: no timing."""
    return 1 - num_tiles / (num_ranks * -(-num_tiles // encoding))


# ---- report ----


def median_iqr(values: Sequence[float]) -> tuple[float, float]:
    """Median and distance of the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def summary(by_size: Mapping[int, Mapping[str, Figure]]) -> dict[str, float]:
    """The ratios that have goals."""

    def worst(arm: str, other: str, fallback: str = "naive") -> float:
        return max(statistics.median(f[arm].over(f.get(other, f[fallback]))) for f in by_size.values())

    largest = by_size[max(by_size)]
    return {
        "replay_over_naive": round(worst("gigamil replay", "naive"), 3),
        "keep_over_naive": round(worst("gigamil keep", "naive"), 3),
        "half_over_replay": round(worst("gigamil half", "replay beside half", "gigamil replay"), 3),
        "accumulation_over_gigamil": round(
            statistics.median(largest["ABMIL-ACC small"].over(largest["gigamil replay"])), 3
        ),
    }


def print_table(figures: Mapping[str, Figure]) -> None:
    """One N."""
    base = figures["naive"]
    for figure in figures.values():
        seconds, spread = median_iqr(figure.cpu_s)
        ratio, ratio_spread = median_iqr(figure.over(base))
        print(
            f"{figure.num_tiles:6}  {figure.arm:18} {figure.chunk:5} {figure.error:9.1e} {seconds:8.3f} {spread:7.3f}"
            f" {statistics.median(figure.user_s):8.3f} {ratio:8.3f} {ratio_spread:7.3f}",
            flush=True,
        )


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Sizes(), QUICK, TINY, "two N, three rounds")
    parser.add_argument("--rounds", type=int, help="of all arms in turn")
    parser.add_argument("--chunk", type=int, help="gigamil's; default: the fastest for each N up to 512, measured")
    parser.add_argument("--skip-ranks", action="store_true", help="one process only")
    parser.add_argument("--out", type=Path, help="JSON with every round")
    arguments = parser.parse_args(words)
    sizes: Sizes = arguments.sizes
    if arguments.rounds:
        sizes = Sizes(**vars(sizes) | {"rounds": arguments.rounds})
    torch.set_num_threads(1)

    worst = check_in_float64(sizes)
    print(f"gradients of all arms against naive, float64: {worst:.1e}\n")
    print("     N  arm                chunk    error    CPU s     IQR   user s  / naive     IQR")
    by_size: dict[int, dict[str, Figure]] = {}
    chunk = arguments.chunk or sizes.chunks[0]
    for num_tiles in sizes.num_tiles:
        if arguments.chunk is None and num_tiles <= 512:
            chunk = best_chunk(num_tiles, sizes)
        by_size[num_tiles] = compare(num_tiles, chunk, sizes)
        print_table(by_size[num_tiles])
    result: dict[str, object] = dict(summary(by_size)) | {"gradient_error_float64": worst}
    accumulation = {n: statistics.median(f["ABMIL-ACC small"].over(f["gigamil replay"])) for n, f in by_size.items()}
    same_chunk = {n: statistics.median(f["ABMIL-ACC small"].over(f["gigamil small"])) for n, f in by_size.items()}
    result["accumulation_by_tiles"] = {n: round(ratio, 3) for n, ratio in accumulation.items()}
    result["accumulation_by_tiles_same_chunk"] = {n: round(ratio, 3) for n, ratio in same_chunk.items()}
    ranks: dict[str, dict[str, list[float]]] = {}
    if not arguments.skip_ranks:
        ranks = run_on_ranks(rank_times, RANKS, RANKS, chunk, sizes, timeout_s=600)[0]
        result |= print_ranks(ranks, sizes.ranks_tiles)
    result["breakdown"] = breakdown(max(sizes.num_tiles), chunk, sizes)
    if arguments.out is not None:
        raw = {
            **origin(__file__, words, load=[round(load, 2) for load in os.getloadavg()], torch=torch.__version__),
            "sizes": vars(sizes),
            "result": result,
            "arms": [vars(figure) for figures in by_size.values() for figure in figures.values()],
            "ranks": ranks,
        }
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def print_ranks(found: Mapping[str, Mapping[str, Sequence[float]]], num_tiles: int) -> dict[str, object]:
    """The table of two ranks; its ratios."""
    print(f"\n{RANKS} ranks, N = {num_tiles}       error   wall s     IQR  busiest rank's CPU s")
    for name, values in found.items():
        wall, spread = median_iqr(values["wall_s"])
        cpu = statistics.median(values["busiest_cpu_s"])
        print(f"        {name:16} {values['error'][0]:9.1e} {wall:8.3f} {spread:7.3f} {cpu:8.3f}")

    def ratio(key: str) -> float:
        pairs = zip(found["EAGLE"][key], found["gigamil keep"][key], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "gather_over_gigamil": ratio("wall_s"),
        "gather_over_gigamil_cpu": ratio("busiest_cpu_s"),
        "idle_share_4_ranks": {
            "EAGLE": round(idle_share(num_tiles, 4, 3), 3),
            "gigamil": round(idle_share(num_tiles, 4, 4), 3),
        },
    }


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEEP_FREED_MEMORY.items()):
        os.environ.update(KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": "1"})
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.exit(main())

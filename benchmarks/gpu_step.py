"""How near does an exact step on one NVIDIA GPU come to what the GPU can do?

For each encoder at 224 x 224 under bfloat16 autocast: tiles per second of `replay`, `keep` and `auto`, beside the
loop that users write (float32, NCHW, eager, a checkpoint per chunk); the share of the roof; peak memory beside what
`gigamil plan` predicts; and how many tiles one slide may have. Tiles lie in main memory as uint8 and are copied while
chunks compute.

Expected: on an H200, keep at 0.25 of the roof or more for ResNets, 0.35 for ViT-S, 0.5 for ViT-L; auto, which keeps
all where all fits, 1.28 times replay (the limit is 4/3); at least 4 times the plain loop. Figures of one GPU hold for
it alone.

The roof, in tiles per second, is the lower of two:

    compute   R / (3 F)        F: forward FLOPs of a tile, counted; backward is twice that. R: bf16 FLOP/s of this GPU,
                               measured on a product of 8192 x 8192 matrices (H200: about 790e12)
    memory    W / (16 A)       A: outputs of convolutions per tile, counted; 16 bytes of traffic for each, forward and
                               backward, is the least there can be: write and read it and its gradient once more in
                               backward, 2 bytes each, and again for the layer that follows. W: bytes/s of a copy, read
                               and write, measured (H200: about 4.3e12). Networks without convolutions but the first
                               have no such roof here: their products reuse what they read.

Replay does 4 F in place of 3 F, so its share is of R / (4 F) and 3/4 of the memory roof. Before anything is timed,
the gradients of replay, keep and part-kept are compared: in float32 with the plain loop's (TF32 is off all along),
and under bfloat16 autocast, which is what is timed, with one graph in one process under the same autocast. Peaks are
taken while the model of the plain loop is not there yet. Arms take turns; medians over rounds.

    python benchmarks/gpu_step.py --out FOLDER        # about ten minutes on an H200
    python benchmarks/gpu_step.py --cpu-smoke         # that it runs, with tiny sizes: no figure of it means anything

Writes gpu_step.json and gpu_step.png into the folder. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from gradients import checked, recorded
from origin import origin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gigamil.config import schema
from gigamil.config.schema import RunConfig
from gigamil.data.augment import to_float
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.memory.budget import chunks_to_keep, memory_budget
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import Cells, build_encoder
from gigamil.models.fold import fold_batchnorm
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.speed import seconds_of
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.compare import gradient_error
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.plan import plan_run
from gigamil.train.step import ExactStep, Ranks, measure_chunk_bytes

BOUND = 1e-3  # float32, TF32 off; sums in another order, through a hundred layers
# bfloat16, against one process and one graph over the same chunks under autocast: activations, and the gradient of each
# weight once per chunk, are rounded to 8 bits in both. What is left is the order of float32 sums, which a GPU's atomics
# change; it can turn a rounding the other way, and one rounding to 8 bits is 2^-8 of a number at most. Found on a CPU,
# where the order is fixed: 1e-7. (Over the bag in one call a weight's gradient is rounded once: 2.0e-3 to 2.9e-3 away
# for ResNets and ViT-S. To float32 it is 0.8 % for ViT-S and 16 % for ResNet-50: that is bfloat16, in one process too.)
BOUND_BFLOAT16 = 2.0**-8
KEEP_SHARE = 0.45  # of free memory: the most that the timed step's graphs take, so that keep and auto are the same
BYTES_PER_ACTIVATION = 16


@dataclass(frozen=True)
class Encoder:
    """What is measured.

    Attributes:
        name: as in `science.encoder.name`.
        chunk: tiles per encoder call.
        goal: share of the roof that `keep` should reach on an H200; None without one.
        options: as `science.encoder.options`.
    """

    name: str
    chunk: int
    goal: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How large the measurement is."""

    encoders: tuple[Encoder, ...] = (
        Encoder("resnet18", 256, 0.25),
        Encoder("resnet34", 256),
        Encoder("resnet50", 128, 0.25),
        Encoder("timm/vit_small_patch16_224", 128, 0.35),
        Encoder("timm/vit_large_patch16_224", 64, 0.50),
    )
    tile_px: int = 224
    rounds: int = 5
    step_s: float = 1.0  # tiles of the timed step: as many as replay does in about this time, if their graphs fit
    most_tiles: int = 16384
    checked_tiles: int = 32
    slope_chunks: tuple[int, int] = (4, 64)


SMOKE = Sizes(
    (Encoder("resnet18", 2),),
    tile_px=32, rounds=2, step_s=0.0, most_tiles=6, checked_tiles=5, slope_chunks=(1, 2),
)  # fmt: skip


class AutocastEngine(PlainEngine):
    """Torch alone, the encoder under bfloat16 autocast, as DeepSpeed's engine has it in a bfloat16 run."""

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """Tiles -> embeddings."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return super().encode(image_nCHW, tile_key_n, cells)


class Problem:
    """One slide, one model, one optimiser with learning rate 0 (the update is made and changes nothing).

    Args:
        encoder: which.
        num_tiles: N; their pixels are random.
        tile_px: side.
        device: where.
        plain: as users write it: NCHW, BatchNorm as a layer of its own.
    """

    def __init__(self, encoder: Encoder, num_tiles: int, tile_px: int, device: torch.device, plain: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            backbone = build_encoder(schema.Encoder(name=encoder.name, options=dict(encoder.options)))
            model = SlideModel(backbone, GatedAttention(backbone.dim, 128), num_classes=2).to(device).train()
        if not plain:
            folded = fold_batchnorm(model.encoder)
            assert folded or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()), "nothing folded"
            model.to(memory_format=torch.channels_last)
        self.model, self.device = model, device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        # Each tile has a colour of its own: embeddings of pure noise would be all but equal.
        colour_N3 = torch.randint(40, 216, (num_tiles, 1, 1, 3), generator=generator)
        shape = (1, tile_px, tile_px, 3)
        noise = torch.randint(-40, 40, shape, generator=generator)
        self.image_NHWC = torch.cat([(colour_N3[i : i + 1] + noise).to(torch.uint8) for i in range(num_tiles)])

    def learn(self, embedding_ND: Tensor) -> None:
        """Loss of the slide, backward, clip, update."""
        size = len(embedding_ND)
        bag = Bag(embedding_ND, torch.zeros(size, 2, dtype=torch.float64), (size,), LocalPool(size))
        label_B = torch.ones(1, dtype=torch.int64, device=self.device)
        cross_entropy(self.model.classify(bag)[0], label_B).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_loop(problem: Problem, num_tiles: int, chunk: int) -> None:
    """What users write to make a slide fit: one float32 graph over checkpointed chunks."""
    model = problem.model

    def encode(start: int) -> Tensor:
        image = problem.image_NHWC[start : min(start + chunk, num_tiles)].to(problem.device)
        result: Tensor = model.encode(to_float(image).contiguous(), None)
        return result

    starts = range(0, num_tiles, chunk)
    problem.learn(torch.cat([checkpoint(encode, start, use_reentrant=False) for start in starts]))


def autocast_graph(problem: Problem, num_tiles: int, chunk: int) -> None:
    """The reference in bfloat16: one graph over the same chunks; no step of gigamil's, and nothing is made again."""
    parts = []
    for start in range(0, num_tiles, chunk):
        image = problem.image_NHWC[start : min(start + chunk, num_tiles)].to(problem.device)
        with torch.autocast(problem.device.type, torch.bfloat16):
            parts.append(problem.model.encode(to_float(image), None))
    problem.learn(torch.cat(parts).float())


def gigamil(problem: Problem, num_tiles: int, chunk: int, num_keep: int, bfloat16: bool = True) -> None:
    """The step that training runs."""
    kind = AutocastEngine if bfloat16 else PlainEngine
    tiles = StepTiles(
        HeldImages(problem.image_NHWC[:num_tiles]),
        torch.zeros(num_tiles, dtype=torch.int64),
        torch.arange(num_tiles),
        torch.zeros(num_tiles, 2, dtype=torch.float64),
    )
    step = ExactStep(
        kind(problem.model, problem.optimizer), Ranks(Topology()), cross_entropy,
        chunk=chunk, num_keep=num_keep, keys=DrawKeys(0, ["slide"]),
    )  # fmt: skip
    plan = plan_steps([0], [num_tiles], 1, 1, 1)[0]
    label, weight = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    result = step.train(plan, tiles, label, weight, step=0, learning_rates=[0.0])
    if result.skipped or step.chunk != chunk:
        raise SystemExit(f"the step of {num_tiles} tiles did not go through at chunk {chunk}: {result}")


def check(encoder: Encoder, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Errors of the gradients: of each strategy, in float32 and in bfloat16; and how far bfloat16 is from float32.

    Raises:
        SystemExit: more than rounding.
    """
    simple = Problem(encoder, sizes.checked_tiles, sizes.tile_px, device, plain=True)
    tuned = Problem(encoder, sizes.checked_tiles, sizes.tile_px, device, plain=False)
    num, chunk = sizes.checked_tiles, max(1, sizes.checked_tiles // 4)
    num_chunks = -(-num // chunk)
    with recorded(simple.model, simple.optimizer) as exact:
        plain_loop(simple, num, chunk)
    with recorded(tuned.model, tuned.optimizer) as rounded:
        autocast_graph(tuned, num, chunk)
    errors = {}
    with recorded(tuned.model, tuned.optimizer) as found:
        for prefix, truth, bound in (("", exact, BOUND), ("bfloat16 ", rounded, BOUND_BFLOAT16)):
            for strategy, num_keep in (("replay", 0), ("keep", num_chunks), ("part", num_chunks // 2)):
                gigamil(tuned, num, chunk, num_keep, bfloat16=truth is rounded)
                name = prefix + strategy
                errors[name] = checked(f"{encoder.name}, {name}", found, truth, bound)
    errors["bfloat16 to float32"] = gradient_error(rounded, exact)
    return errors


# ---- what the GPU could do ----


def measured_ceilings(device: torch.device) -> dict[str, float]:
    """bf16 FLOP/s of a large product, and bytes/s of a copy (read and write)."""
    size = 8192 if device.type == "cuda" else 64
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.empty(2**30 if device.type == "cuda" else 2**16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "flops": 2 * size**3 / min(seconds_of(lambda: matrix @ matrix, device) for _ in range(20)),
        "bytes": 2 * source.numel() / min(seconds_of(lambda: target.copy_(source), device) for _ in range(20)),
    }


def count(model: SlideModel, tile_px: int, device: torch.device) -> tuple[int, int]:
    """Forward FLOPs of a tile, and outputs of its convolutions (0 if only the first layer is one)."""
    sizes: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, __, result: sizes.append(result.numel()))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 3, tile_px, tile_px, device=device), None)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops(), sum(sizes) if len(sizes) > 1 else 0


def roof(flops: int, activations: int, ceilings: Mapping[str, float]) -> float:
    """Tiles per second of forward and backward that the GPU cannot pass."""
    compute = ceilings["flops"] / (3 * flops)
    return min(compute, ceilings["bytes"] / (BYTES_PER_ACTIVATION * activations)) if activations else compute


# ---- measurement ----


@dataclass
class Outcome:
    """Figures of one encoder; times and memory are None on a CPU, where they mean nothing.

    Attributes:
        errors: of gradients, as `check` returns them.
        tiles_s: arm -> tiles per second in each round.
        roof_tiles_s: of forward and backward.
        share: arm -> share of its roof.
        peak_bytes: strategy -> allocated at most, with nothing else on the GPU.
        planned_bytes: strategy -> what `gigamil plan` predicts; empty if it cannot.
        largest_n_estimated: tiles of one slide with replay, by the measured slope; not run.
    """

    name: str
    chunk: int
    num_tiles: int
    errors: dict[str, float]
    flops: int
    activations: int
    tiles_s: dict[str, list[float]] = field(default_factory=dict)
    roof_tiles_s: float | None = None
    share: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    planned_bytes: dict[str, int] = field(default_factory=dict)
    slope_bytes: float | None = None
    largest_n_estimated: int | None = None
    goal: float | None = None

    def rate(self, arm: str) -> float:
        """Median."""
        return statistics.median(self.tiles_s[arm])


def measure(encoder: Encoder, sizes: Sizes, device: torch.device, ceilings: Mapping[str, float]) -> Outcome:
    """Everything about one encoder."""
    errors = check(encoder, sizes, device)
    is_gpu, chunk = device.type == "cuda", encoder.chunk
    forget(device)
    tuned = Problem(encoder, max(sizes.most_tiles, chunk), sizes.tile_px, device, plain=False)
    flops, activations = count(tuned.model, sizes.tile_px, device)
    engine = AutocastEngine(tuned.model, tuned.optimizer)
    chunk_bytes = measure_chunk_bytes(engine, chunk, sizes.tile_px)
    budget = int(memory_budget(KEEP_SHARE, device, 1))

    gigamil(tuned, chunk, chunk, 0)  # warms up
    took = (
        seconds_of(lambda: gigamil(tuned, 2 * chunk, chunk, 0), device) if len(tuned.image_NHWC) >= 2 * chunk else 1.0
    )
    wanted = int(sizes.step_s * 2 / took) if sizes.step_s else sizes.most_tiles // chunk
    num_chunks = max(1, min(wanted, budget // max(1, chunk_bytes), len(tuned.image_NHWC) // chunk))
    num_tiles = num_chunks * chunk
    auto = min(num_chunks, chunks_to_keep("auto", chunk_bytes, int(memory_budget(None, device, 1))))
    outcome = Outcome(encoder.name, chunk, num_tiles, errors, flops, activations, goal=encoder.goal)

    arms: dict[str, tuple[int, Callable[[], None]]] = {
        "replay": (num_tiles, lambda: gigamil(tuned, num_tiles, chunk, 0)),
        "keep": (num_tiles, lambda: gigamil(tuned, num_tiles, chunk, num_chunks)),
        "auto": (num_tiles, lambda: gigamil(tuned, num_tiles, chunk, auto)),
    }
    # Peaks first: the plain loop has a model of its own, with moments, which is no part of them.
    outcome.peak_bytes = {name: peak_of(arm, device) for name, (_, arm) in arms.items()}
    low, high = (min(chunks * chunk, len(tuned.image_NHWC)) for chunks in sizes.slope_chunks)
    peaks = [peak_of(lambda num=num: gigamil(tuned, num, chunk, 0), device) for num in (low, high)]

    simple = Problem(encoder, min(num_tiles, max(4 * chunk, num_tiles // 8)), sizes.tile_px, device, plain=True)
    few = len(simple.image_NHWC)
    arms["plain"] = (few, lambda: plain_loop(simple, few, chunk))
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(sizes.rounds + 1):
        for name, (tiles, arm) in arms.items():
            rate = tiles / seconds_of(arm, device)
            if number:  # the first round warms up
                rates[name].append(rate)
    if not is_gpu:
        return replace(outcome, peak_bytes={})
    outcome.tiles_s = rates
    outcome.roof_tiles_s = top = roof(flops, activations, ceilings)
    outcome.share = {
        arm: outcome.rate(arm) / (top * factor) for arm, factor in (("keep", 1.0), ("auto", 1.0), ("replay", 0.75))
    }
    outcome.slope_bytes = max(1.0, (peaks[1] - peaks[0]) / max(1, high - low))
    spare = torch.cuda.get_device_properties(device).total_memory - peaks[1]
    outcome.largest_n_estimated = high + int(spare / outcome.slope_bytes)
    outcome.planned_bytes = planned(encoder, num_tiles, sizes.tile_px, device, ("replay", "keep"))
    return outcome


def forget(device: torch.device) -> None:
    """Give back what nothing uses; what was left in reference cycles would count as memory of what comes next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_of(function: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at most; 0 on a CPU."""
    forget(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def planned(
    encoder: Encoder, num_tiles: int, tile_px: int, device: torch.device, strategies: Sequence[str]
) -> dict[str, int]:
    """Peak that `gigamil plan` predicts for the timed step: strategy -> bytes."""
    peaks = {}
    for strategy in strategies:
        config = RunConfig.model_validate(
            {
                "slides": {"tile_px": tile_px},
                "science": {
                    "encoder": {"name": encoder.name, "options": dict(encoder.options)},
                    "precision": "bfloat16",
                    "slides_per_step": 1,
                },
                "execution": {
                    "chunk": encoder.chunk,
                    "memory": strategy,
                    "tile_cache": 2,  # bytes: none, as in the timed step
                    "zero_stage": 0,
                    "device": device.type,
                },
            }
        )
        peaks[strategy] = plan_run(config, ranks=1, tiles=num_tiles).peak
    return peaks


# ---- report ----


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Tiles per second of each arm, with the roof above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    arms, width = ("plain", "replay", "keep", "auto"), 0.2
    for number, arm in enumerate(arms):
        places = [place + (number - 1.5) * width for place in range(len(outcomes))]
        heights = [outcome.rate(arm) for outcome in outcomes]
        low_high = [[h - min(o.tiles_s[arm]) for h, o in zip(heights, outcomes, strict=True)],
                    [max(o.tiles_s[arm]) - h for h, o in zip(heights, outcomes, strict=True)]]  # fmt: skip
        axis.bar(places, heights, width, yerr=low_high, label=arm if arm != "plain" else "plain float32 loop")
    for place, outcome in enumerate(outcomes):
        axis.hlines(outcome.roof_tiles_s or 0, place - 0.45, place + 0.45, color="black", linewidth=1.5)
        axis.annotate(
            f"{outcome.share['keep']:.0%} of the roof", (place, outcome.roof_tiles_s or 0), ha="center", va="bottom"
        )
    axis.set_xticks(range(len(outcomes)), [f"{o.name.removeprefix('timm/')}\nN = {o.num_tiles}" for o in outcomes])
    axis.set(yscale="log", ylabel="tiles per second", title=title)
    axis.legend(ncols=4, loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    words = ("N", "chunk", "error fp32", "bf16", "plain", "replay", "keep", "auto")
    widths = (6, 6, 11, 11, 7, 7, 7, 7)
    titles = " ".join(f"{word:>{width}}" for word, width in zip(words, widths, strict=True))
    lines = [f"{'encoder':28} {titles}  share of roof, peak of keep, largest N"]
    for outcome in outcomes:
        line = f"{outcome.name:28} {outcome.num_tiles:6} {outcome.chunk:6} {outcome.errors['replay']:11.1e}"
        line += f" {outcome.errors['bfloat16 replay']:11.1e}"
        if outcome.tiles_s:
            line += "".join(f" {outcome.rate(arm):7.0f}" for arm in ("plain", "replay", "keep", "auto"))
            goal = "" if outcome.goal is None else f" (goal {outcome.goal})"
            line += f"  {outcome.share['keep']:.3f}{goal}  {outcome.peak_bytes['keep'] / 2**30:.1f}"
            line += f"  {outcome.largest_n_estimated}"
        lines.append(line)
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, draw, print, return 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (%(default)s)")
    parser.add_argument("--encoders", help="names, with commas between them; default: all five")
    parser.add_argument("--rounds", type=int, help="of all arms in turn (5)")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny, on the CPU, no figures")
    arguments = parser.parse_args(words)
    sizes = SMOKE if arguments.cpu_smoke else Sizes()
    if not arguments.cpu_smoke and not torch.cuda.is_available():
        raise SystemExit(
            "no NVIDIA GPU is visible to torch. `--cpu-smoke` shows that the script runs, without figures."
        )
    device = torch.device("cpu" if arguments.cpu_smoke else "cuda")
    if arguments.encoders:
        names = arguments.encoders.split(",")
        unknown = sorted(set(names) - {encoder.name for encoder in sizes.encoders})
        if unknown:
            raise SystemExit(f"--encoders: {unknown} are not among {[encoder.name for encoder in sizes.encoders]}")
        sizes = replace(sizes, encoders=tuple(encoder for encoder in sizes.encoders if encoder.name in names))
    if arguments.rounds:
        sizes = replace(sizes, rounds=arguments.rounds)

    # All along: cuDNN has TF32 on by default, and the plain loop would then not be a float32 one.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = measured_ceilings(device)
    outcomes = []
    for encoder in sizes.encoders:
        outcomes.append(measure(encoder, sizes, device, ceilings))
        print(table(outcomes[-1:]), flush=True)
    if arguments.cpu_smoke:
        errors = {outcome.name: outcome.errors for outcome in outcomes}
        print(json.dumps({"smoke": True, "figures": None, "gradient_errors": errors}))
        return 0

    arguments.out.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name(device)
    result = {
        outcome.name: {
            "share_of_roof": round(outcome.share["keep"], 3),
            "auto_over_replay": round(outcome.rate("auto") / outcome.rate("replay"), 3),
            "over_plain": round(outcome.rate("auto") / outcome.rate("plain"), 2),
            "peak_over_plan": {
                name: round(outcome.peak_bytes[name] / size, 3) for name, size in outcome.planned_bytes.items()
            },
            "largest_n_estimated": outcome.largest_n_estimated,
        }
        for outcome in outcomes
    }
    about = origin(__file__, words, gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda)
    encoders = [asdict(outcome) for outcome in outcomes]
    raw = about | {"ceilings": ceilings, "result": result, "encoders": encoders}
    (arguments.out / "gpu_step.json").write_text(json.dumps(raw, indent=1) + "\n")
    draw(outcomes, arguments.out / "gpu_step.png", f"One exact step on {gpu}, bfloat16 (plain: float32)")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

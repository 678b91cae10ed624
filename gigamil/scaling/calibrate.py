"""`gigamil bench calibrate`: measure this machine, and write what `gigamil simulate` asks for.

`python -m gigamil.scaling.calibrate ROLE FOLDER` is one rank of it: alone (encoder, decoding, head, optimiser, what a step
costs by itself) or together with others (all-reduce). Nothing is trained, and no slide is needed.

Shapes: c tiles of a call, n tiles of a rank, D embedding.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from gigamil.config.load import load_config, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.cores import num_cores
from gigamil.data.augment import augment_tiles, to_float
from gigamil.data.decode import decode_tiles
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.errors import ConfigError, GigamilError
from gigamil.memory.budget import free_device_memory
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import DenseEncoder, TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.speed import measure_all_reduce, seconds_of
from gigamil.parallel.topology import Topology, detect_topology
from gigamil.partition.schedule import plan_steps
from gigamil.registry import import_plugins
from gigamil.scaling.cost import Line, fit_link
from gigamil.scaling.machine import (
    CallTime,
    Decode,
    EncoderSpeed,
    Largest,
    Link,
    Links,
    Machine,
    StepCost,
    Storage,
    encoder_identity,
)
from gigamil.shards.read import ShardSet
from gigamil.train.cohort import open_source
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, make_optimizer, start_distributed
from gigamil.train.launch import launch_ranks, report_outcome, restore_devices
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.plan import build_planned_model
from gigamil.train.step import ExactStep, Ranks, measure_chunk_bytes
from gigamil.train.worker import choose_device

_HERE = "measured here by gigamil bench calibrate"
_DECODED = 64  # tiles
_UPDATED = 8_000_000  # numbers that the optimiser is timed with: 32 MB, more than caches hold
_SLIDES_MPX_S = 24.0  # out of slide files: OpenSlide's 370 tiles of 256 px a second and core
_DISK_BYTES_S = 1.0e9
_GPU_LINK = Link(latency_s=5e-6, bytes_s=100e9)  # where there is one GPU and nothing to measure


def calibrate(
    config: RunConfig, *, ranks: int | None = None, quick: bool = False, plugins: Sequence[str] = ()
) -> Machine:
    """Measure this machine with the encoder, tile size and precision of a run.

    Args:
        config: of the run; its shards are decoded if they are there, else drawn tiles.
        ranks: processes whose all-reduce is measured, and ranks of a node; default its GPUs, or 2.
        quick: fewer sizes and rounds; figures scatter more.
        plugins: modules that register encoders.
    Raises:
        ConfigError: the encoder is dense, or tiles are features.
        RanksFailed: a rank met an error.
    Cost: a minute or some; memory of the model, its optimiser and one chunk.
    """
    import_plugins(plugins)
    is_gpu = config.execution.device != "cpu" and torch.cuda.is_available()
    ranks = ranks or (torch.cuda.device_count() if is_gpu else 2)
    with tempfile.TemporaryDirectory(prefix="gigamil-") as name:
        folder = Path(name)
        threads = config.execution.threads or max(1, num_cores() // ranks)  # as where all ranks of the node are at work
        execution = config.execution.model_copy(update={"group_size": None, "threads": threads})
        (folder / "config.yaml").write_text(to_yaml(config.model_copy(update={"execution": execution})))
        words = [str(folder), *(["--quick"] if quick else [])]
        words += [word for plugin in plugins for word in ("--plugin", plugin)]
        for role, count in (("alone", 1), ("together", ranks)):
            if role == "alone" or count > 1:
                there = execution.model_copy(update={"ranks": count})
                launch_ranks("gigamil.scaling.calibrate", [role, *words], there, logs=None, continues="from the start")
        alone = json.loads((folder / "alone.json").read_text())
        together = json.loads((folder / "together.json").read_text()) if ranks > 1 else None
    return _machine(config, "cuda" if is_gpu else "cpu", ranks, alone, together)


def _machine(
    config: RunConfig, device: str, ranks: int, alone: dict[str, Any], together: dict[str, Any] | None
) -> Machine:
    link, stretch = _GPU_LINK, max(1.0, ranks / num_cores())
    algorithm: Literal["ring", "tree"] = "tree" if device == "cuda" else "ring"
    if together is not None:
        link = fit_link(algorithm, ranks, together["sizes"], together["seconds"])
        if (
            device == "cpu"
        ):  # `Machine.stretch` says how much longer ranks take that share cores: measured with it, so taken off
            link = Link(latency_s=link.latency_s / stretch, bytes_s=link.bytes_s * stretch)
    about_links = _HERE if together is not None else "one rank, nothing to measure: assumed"
    calls = tuple(CallTime(**call) for call in alone["calls"])
    return Machine.model_validate(
        {
            "name": alone["name"],
            "measured": True,
            "device": device,
            "ranks_per_node": ranks,
            "cores_per_node": num_cores(),
            "device_bytes": alone["device_bytes"] / (1 if device == "cuda" else ranks),
            "host_bytes": psutil.virtual_memory().total,
            "encoders": (
                EncoderSpeed(
                    encoder=encoder_identity(config),
                    tile_px=config.slides.tile_px,
                    precision=config.science.precision,
                    calls=calls,
                    saved_bytes=alone["saved_bytes"],
                    busy_cores=alone["busy_cores"],
                    source=_HERE,
                ),
            ),
            "decode": Decode(
                shards_mpx_s=alone["decode_mpx_s"],
                slides_mpx_s=_SLIDES_MPX_S,
                source=f"{alone['decoded']}, {_HERE}; out of slide files: assumed",
            ),
            "links": Links(
                algorithm=algorithm,
                inside=link,
                between=None,
                shared=device == "cpu",
                source=f"inside: {about_links}; between: not known",
            ),
            "storage": Storage(
                node_bytes_s=_DISK_BYTES_S,
                total_bytes_s=None,
                local_bytes_s=_DISK_BYTES_S,
                source="not measured: assumed",
            ),
            "step": StepCost(
                fixed_s=alone["fixed_s"],
                head_s=alone["head_s"],
                update_s_per_gb=alone["update_s_per_gb"],
                source=_HERE,
            ),
            "noise": alone["noise"],
            "largest": Largest(nodes=1, ranks=ranks, tiles=calls[-1].tiles),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on this rank; rank 0 leaves what it found in the folder. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gigamil.scaling.calibrate")
    parser.add_argument("role", choices=("alone", "together"))
    parser.add_argument("folder", type=Path, help="holds config.yaml")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plugin", action="append", default=[])
    arguments = parser.parse_args(argv)
    restore_devices()
    topology = detect_topology()
    try:
        with report_outcome(topology.rank):
            _run_rank(arguments, topology)
    except GigamilError as error:
        return error.exit_code
    return 0


def _run_rank(arguments: argparse.Namespace, topology: Topology) -> None:
    config = load_config(arguments.folder / "config.yaml")
    import_plugins(arguments.plugin)
    device = choose_device(config.execution.device, topology)
    torch.set_num_threads(config.execution.threads or 1)
    ranks = start_distributed(topology, device, config.execution.timeout_s)
    if arguments.role == "alone":
        found = measure_alone(config, ranks, device, arguments.quick)
    else:
        speed = measure_all_reduce(device, budget_s=2.0 if arguments.quick else 10.0)
        found = {"sizes": speed.sizes, "seconds": speed.times_s}
    if topology.rank == 0:
        (arguments.folder / f"{arguments.role}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure_alone(config: RunConfig, ranks: Ranks, device: torch.device, quick: bool) -> dict[str, Any]:
    """What one rank measures by itself, as plain data.

    Raises:
        ConfigError: the encoder is dense, or tiles are features.
    """
    rounds, chunk = (3, min(16, config.execution.tiles_per_call)) if quick else (7, config.execution.tiles_per_call)
    sizes = sorted({max(1, chunk // part) for part in (16, 4, 2, 1)})
    bar = tqdm(total=len(sizes) + 5, desc="calibrate", unit="part", disable=None, leave=False)

    def done(value: Any) -> Any:
        bar.update()
        return value

    with bar:
        model = build_planned_model(config)
        if isinstance(model.encoder, DenseEncoder) or not isinstance(model.encoder, TileEncoder):
            raise ConfigError(
                "calibration measures encoders of tiles: set science.encoder.dense to null and data.source to shards"
            )
        model.to(device)
        # The largest first: it also pays for what is made on first use.
        measured = [done(measure_call(config, model, device, size, rounds)) for size in reversed(sizes)]
        busy = measured[0][1]
        calls = _growing([call for call, _ in reversed(measured)])
        saved = measure_chunk_bytes(PlainEngine(model), sizes[-1], config.slides.tile_px) / sizes[-1]
        rate, decoded = done(measure_decode(config, device, rounds))
        head_s = done(measure_head(model, device, quick, rounds))
        update = done(measure_update(config, device, rounds))
        step_s, spread, tiles, updated = done(measure_step(config, model, ranks, device, rounds))
        seconds = [Line(tuple(map(float, sizes)), tuple(c[key] for c in calls)) for key in ("forward_s", "backward_s")]
        known = sum(float(line.at(np.array([float(tiles)]))[0]) for line in seconds)
        done(None)
    is_gpu = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if is_gpu else f"{num_cores()} cores, {_processor()}",
        "device_bytes": torch.cuda.get_device_properties(device).total_memory
        if is_gpu
        else free_device_memory(device, 1),
        "calls": calls,
        "saved_bytes": max(1.0, saved),
        "busy_cores": 0.0 if is_gpu else busy,  # who waits for a GPU keeps a core busy, but gives it up
        "noise": spread,
        "decode_mpx_s": rate,
        "decoded": decoded,
        "head_s": head_s,
        "update_s_per_gb": update,
        "fixed_s": max(0.0, step_s - known - head_s * tiles - update * updated / 1e9),
    }


def measure_call(
    config: RunConfig, model: SlideModel, device: torch.device, size: int, rounds: int
) -> tuple[dict[str, float], float]:
    """An encoder call on so many tiles, from uint8 on the way as training takes it.

    Returns:
        Values of `CallTime`; cores that it kept busy.
    """
    tile_px, is_narrow = config.slides.tile_px, config.science.precision == "bfloat16"
    image_cHWC = torch.randint(0, 256, (size, tile_px, tile_px, 3), dtype=torch.uint8)
    key_c = torch.arange(size, device=device)

    def encode() -> Tensor:
        with torch.no_grad():
            image_cCHW = augment_tiles(to_float(image_cHWC.to(device)), key_c, settings=config.science.augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_narrow):
            return model.encode(image_cCHW, key_c)

    def forward() -> None:
        with torch.no_grad():
            encode()

    def both() -> None:
        embedding_cD = encode()
        if embedding_cD.requires_grad:  # else all of the encoder is fixed
            embedding_cD.float().sum().backward()

    cpu, start = time.process_time(), time.perf_counter()
    alone, whole = _times(forward, device, rounds), _times(both, device, rounds)
    busy = (time.process_time() - cpu) / (time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    first, last = statistics.median(alone), statistics.median(whole)
    return {"tiles": size, "forward_s": first, "backward_s": max(last - first, 1e-9)}, busy


def _growing(calls: list[dict[str, float]]) -> list[dict[str, float]]:
    """More tiles never take less; where they did, the machine was disturbed at the smaller call."""
    for smaller, larger in zip(calls[-2::-1], calls[:0:-1], strict=True):
        for key in ("forward_s", "backward_s"):
            smaller[key] = min(smaller[key], larger[key])
    return calls


def measure_decode(config: RunConfig, device: torch.device, rounds: int) -> tuple[float, str]:
    """Megapixels per second of one thread that reads and decodes tiles, and which tiles they were."""
    tile_px = config.slides.tile_px
    try:
        shards = ShardSet(config.bookkeeping.shard_root)
        slide_id = max(shards.slide_ids, key=lambda name: shards.manifest(name).num_tiles)
        count = min(_DECODED, shards.manifest(slide_id).num_tiles)
        shards.check_tiles([slide_id], tile_px, config.slides.tile_mpp)
        execution = config.execution.model_copy(update={"decode_workers": 1})
        source = open_source(config.model_copy(update={"execution": execution}), shards, [slide_id], device, {})
        seconds = statistics.median(_times(lambda: source.read_tiles(slide_id, 0, count), device, rounds))
        return count * tile_px**2 / 1e6 / seconds, "the run's own tiles"
    except (GigamilError, OSError, ValueError):  # there are none yet, or they are on a server that is away
        jpegs = [_drawn_tile(tile_px, number) for number in range(_DECODED)]
    decoder = config.execution.decoder
    seconds = statistics.median(_times(lambda: decode_tiles(jpegs, tile_px, decoder, device), device, rounds))
    return _DECODED * tile_px**2 / 1e6 / seconds, "drawn tiles, without reading"


def measure_head(model: SlideModel, device: torch.device, quick: bool, rounds: int) -> float:
    """Seconds of aggregator and head per tile, forward and backward: the slope between two slides."""
    numbers = (256, 1024) if quick else (1024, 8192)
    times = []
    for number in numbers:
        embedding_nD = torch.randn(number, model.encoder.dim, device=device, requires_grad=True)
        keys = torch.arange(number, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        bag = Bag(
            embedding_nD,
            torch.rand(number, 2, dtype=torch.float64, device=device),
            (number,),
            LocalPool(number),
            *keys,
            torch.zeros(1, dtype=torch.int64, device=device),
        )

        def work(bag: Bag = bag) -> None:
            cross_entropy(model.classify(bag)[0], torch.zeros(1, dtype=torch.int64, device=device)).mean().backward()

        times.append(statistics.median(_times(work, device, rounds)))
    model.zero_grad(set_to_none=True)
    return max(0.0, (times[1] - times[0]) / (numbers[1] - numbers[0]))


def measure_update(config: RunConfig, device: torch.device, rounds: int) -> float:
    """Seconds of the optimiser per GB of parameters, of a size beside which what a call costs is nothing."""
    parameter = nn.Parameter(torch.zeros(_UPDATED, device=device))
    optimizer = torch.optim.AdamW([parameter], betas=config.science.optim.betas, fused=device.type == "cuda")
    parameter.grad = torch.ones_like(parameter)
    return statistics.median(_times(lambda: optimizer.step(), device, rounds)) / (parameter.nbytes / 1e9)


def measure_step(
    config: RunConfig, model: SlideModel, ranks: Ranks, device: torch.device, rounds: int
) -> tuple[float, float, int, int]:
    """A whole step of one tile per slide through DeepSpeed.

    Returns:
        Seconds; their relative standard deviation from step to step; tiles; bytes that the optimiser updates.
    """
    trained = sum(
        parameter.nbytes for parameter in model.parameters() if parameter.requires_grad
    )  # before ZeRO 3 parts them
    engine = DeepSpeedEngine(model, make_optimizer(model, config), deepspeed_config(config), device)
    slides, tile_px = config.science.slides_per_step, config.slides.tile_px
    names = [f"s{number}" for number in range(slides)]
    step = ExactStep(
        engine,
        ranks,
        cross_entropy,
        chunk=slides,
        num_keep=1,
        keys=DrawKeys(0, names),
        augment=partial(augment_tiles, settings=config.science.augment),
    )
    plan = plan_steps(range(slides), [1] * slides, slides, 1, 1)[0]
    tiles = StepTiles(
        HeldImages(torch.zeros((slides, tile_px, tile_px, 3), dtype=torch.uint8)),
        torch.arange(slides),
        torch.zeros(slides, dtype=torch.int64),
        torch.zeros((slides, 2), dtype=torch.float64),
    )
    label, weight = torch.zeros(slides, dtype=torch.int64), torch.ones(slides, dtype=torch.float64)
    rates = [0.0] * len(make_optimizer(model, config).param_groups)

    def work() -> None:
        step.train(plan, tiles, label, weight, step=0, learning_rates=rates)

    times = _times(work, device, 4 * rounds)[2 * rounds :]  # DeepSpeed's first steps make much
    usual = statistics.median(times)
    deviation = statistics.median(abs(seconds - usual) for seconds in times) / usual
    # Half of what is normally distributed lies within 0.6745 standard deviations.
    return usual, deviation / 0.6745, slides, trained


def _times(function: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each round; one more before them warms up."""
    return [seconds_of(function, device) for _ in range(rounds + 1)][1:]


def _drawn_tile(tile_px: int, number: int) -> bytes:
    """A JPEG about as long as one of stained tissue: blots of colour, and the grain of a sensor."""
    draw = np.random.default_rng(number)
    blots = Image.fromarray(draw.integers(90, 255, (max(2, tile_px // 16),) * 2 + (3,), dtype=np.uint8))
    smooth = np.asarray(blots.resize((tile_px, tile_px), Image.Resampling.BICUBIC), dtype=np.float64)
    grain = draw.normal(0, 4, (tile_px, tile_px, 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    sys.exit(main())

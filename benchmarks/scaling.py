"""How much faster is training on more nodes, and what is lost on the way?

Each point is a training of some steps, started by the real launchers: on network namespaces by DeepSpeed's (`--no_ssh
--node_rank`, a node's part on each) where several nodes share this machine, by srun inside of a Slurm job, by torchrun
where all points have one node. Slides have the sizes of a cohort, log-normal between the two numbers of --tiles-per-slide; the
default is 5,000 to 100,000 divided by 100, so that a CPU has an end. Tiles are JPEGs of noise.

    strong   the same steps on more ranks: efficiency is T1 / (n Tn), per tile
    weak     n ranks take n times as many slides in a step, an epoch over the same slides; learning rates are 0, so that the
             loss of a slide stays what it is and points can be compared: efficiency is T1 / Tn, per tile

Encoders: `thin` computes (small_cnn, width 4); `sleep` (gigamil.testing.sleep) takes --seconds-per-tile for a forward and
twice that for a backward without a core, while data, collectives, gradients and optimiser are real: for ranks that are more
than cores. `auto` takes thin where all points fit on the cores; else sleep for all, and thin beside it where that fits.
Times are only compared between points of the same encoder and kept share, losses between those of the same encoder.

Expected: spans are equal to a tile, so strong scaling loses what is the same on every rank (head, optimiser, the calls of
chunks that are not full) and the latency of a handful of collectives; a few per cent at 4 nodes with steps of seconds.
Bytes per step and node are those of a ring for gradients, updated parameters and pooling, plus headers, and for so small
gradients the heartbeats and agreements beside them are more than the formula. With --kept 0 every tile is encoded twice:
without it, ranks that hold fewer tiles keep a larger share of their graphs, which is a gain of memory and not of scaling.

    python benchmarks/scaling.py --nodes 1,2,4 --mode strong [--ranks-per-node 1,2] [--kept auto,0] [--out DIR]
    srun and Slurm: launch/slurm/scaling.sh

If the first 5 losses of two points differ by more than 1e-5, nothing is reported, and the benchmark ends with 1. The first two
steps are left out of all times. `own` is encoding and its backward, `data` waiting for tiles, `wait` waiting for other
ranks, and `together` head, collectives and optimiser (see gigamil/train/stragglers.py). Points that --out has with the same settings are not
run again. The last line is JSON: points, max_loss_difference, imbalance_tiles (largest number of tiles of a rank minus the
mean, per step), efficiency_4_nodes (1 rank per node; null without these points).
"""

import argparse
import csv
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import add_sizes
from origin import origin
from tqdm import tqdm

import gigamil.testing.sleep  # noqa: F401 - the plan of a point builds its model
from gigamil.config.load import absolute_paths, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.cores import num_cores
from gigamil.errors import EnvironmentFault
from gigamil.evaluate.style import PALETTE, drawing
from gigamil.files import replace_file
from gigamil.lock import folder_lock
from gigamil.pipeline import split_cohort
from gigamil.scaling.traffic import Collective, step_collectives
from gigamil.shards.format import MANIFEST, slide_folder
from gigamil.testing.nodes import Nodes, last_words, rank_environment, start_on_nodes, why_no_nodes
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.plan import build_planned_model
from gigamil.train.tracking import Tracker, tracking_uri

WARM_UP = 2  # steps that are not timed; the ranks' times are gathered as often
NUM_LOSSES = 5
LOSS_BOUND = 1e-5
POINT_LIMIT_S = 3600.0
LOOK_S = 0.05  # between looks at a point's metrics: bytes are read as soon as a step is done
NUM_JPEGS = 512  # different tiles; slides begin at different places among them
EXPERIMENT = "gigamil-scaling"
THIN = {"name": "small_cnn", "options": {"width": 4}}


@dataclass(frozen=True)
class Settings:
    """What all points have in common; other settings measure anew.

    Attributes:
        steps: of the point with most ranks; even.
        slides_per_step: of a step; with weak scaling of a rank in a step.
        tiles_per_slide: fewest and most.
        tile_px: side of a tile.
        chunk: tiles per encoder call.
        seconds_per_tile: that the sleep encoder takes for a forward.
        slides: to train on; 0: as many as the steps need.
    """

    steps: int = 8
    slides_per_step: int = 4
    tiles_per_slide: tuple[int, int] = (50, 1000)
    tile_px: int = 32
    chunk: int = 16
    seconds_per_tile: float = 2.5e-3
    slides: int = 0


QUICK = Settings(steps=6, slides_per_step=2, tiles_per_slide=(30, 300))
TINY = Settings(steps=4, slides_per_step=2, tiles_per_slide=(5, 20), chunk=4, seconds_per_tile=1e-3)


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        mode: "strong" or "weak".
        encoder: "thin", "sleep", or the name of one.
        kept: graphs of chunks: "auto", or "0" for none.
    """

    mode: str
    encoder: str
    kept: str
    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """Of all nodes."""
        return self.nodes * self.ranks_per_node

    @property
    def kind(self) -> tuple[str, str, str]:
        """What points have to have in common to be compared."""
        return self.mode, self.encoder, self.kept

    @property
    def name(self) -> str:
        """Of its folder."""
        encoder = self.encoder.replace("/", "_")
        return f"{self.mode}-{encoder}-kept_{self.kept}-{self.nodes}x{self.ranks_per_node}"

    def words(self) -> str:
        """For people."""
        return f"{self.mode}, {self.encoder}, kept {self.kept}, {self.nodes} nodes x {self.ranks_per_node} ranks"


@dataclass(frozen=True)
class Measured:
    """What a point gave. Lists by rank are means per step.

    Attributes:
        losses, grad_norms: of every step.
        step_s: mean over the timed steps.
        slides_per_s, tiles_per_s: of all ranks together.
        own_s, data_s, wait_s, together_s: by rank.
        imbalance_tiles: largest number of tiles of a rank minus the mean, in the worst stretch.
        bytes_per_step: that a node put on its link, mean over nodes; None where no link is counted.
        bytes_formula: of a ring through all ranks.
        launcher: what started it.
    """

    losses: list[float]
    grad_norms: list[float]
    step_s: float
    slides_per_s: float
    tiles_per_s: float
    own_s: list[float]
    data_s: list[float]
    wait_s: list[float]
    together_s: list[float]
    imbalance_tiles: float
    bytes_per_step: float | None
    bytes_formula: float
    launcher: str


Results = dict[Point, Measured]


def main(words: Sequence[str] | None = None) -> int:
    """Measure, report; 1 if losses differ."""
    arguments = parse(words)
    settings: Settings = arguments.sizes
    out: Path = arguments.out
    points = make_points(arguments, cores_of_a_machine())
    launcher = choose_launcher(points)
    settings = with_slides(settings, points)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(out / "cohort", "benchmarks/scaling.py"):
            table = make_cohort(out / "cohort", settings)
    except EnvironmentFault as error:
        raise SystemExit(str(error)) from None
    for number, point in enumerate(points, start=1):
        if read_point(out, point, settings) is not None:
            print(f"point {number} of {len(points)}: {point.words()}: measured before", flush=True)
            continue
        if is_for_others(point):
            print(f"point {number} of {len(points)}: {point.words()}: left to a job with more nodes", flush=True)
            continue
        print(f"point {number} of {len(points)}: {point.words()}, by {launcher}", flush=True)
        config = write_config(out, table, point, settings, "cpu" if launcher == "deepspeed" else "auto")
        bytes_per_step = run_point(out / "points" / point.name, config, point, launcher)
        measured = read_metrics(config, point, bytes_per_step, launcher)
        save_point(out, point, settings, measured)
    found = read_all(out, settings, arguments.mode)
    if not found:
        raise SystemExit("the Slurm job has too few nodes for every point: ask for more, or give a smaller --nodes")
    difference = loss_difference(found)
    if difference is not None and difference > LOSS_BOUND:
        print(f"losses of points differ by {difference:.3g}, more than {LOSS_BOUND:g}: no figures", file=sys.stderr)
        return 1
    result = report(out, found, settings, words)
    log_to_mlflow(out, found, settings, result)
    print(json.dumps(result))
    return 0


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; single settings win over --quick and --tiny."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Settings(), QUICK, TINY, "fewer and smaller slides: a few minutes")
    parser.add_argument("--nodes", type=numbers, default=[1, 2, 4], help="numbers of nodes (1,2,4)")
    parser.add_argument("--ranks-per-node", type=numbers, default=[1], help="numbers of ranks of a node (1)")
    parser.add_argument("--mode", choices=("strong", "weak"), default="strong", help="(%(default)s)")
    parser.add_argument("--encoder", default="auto", help="auto, thin, sleep, or the name of an encoder (%(default)s)")
    parser.add_argument(
        "--kept", default="auto", help="share of graphs that are kept: auto, 0, or auto,0 (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="keeps all points (%(default)s)")
    for field in fields(Settings):
        kind = sizes_from_to if field.name == "tiles_per_slide" else type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, help=f"({shown(field.default)})")
    arguments = parser.parse_args(words)
    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    changes = {name: value for name, value in given.items() if value is not None}
    arguments.sizes = Settings(**(asdict(arguments.sizes) | changes))
    if arguments.sizes.steps < 2 * WARM_UP or arguments.sizes.steps % WARM_UP:
        parser.error(
            f"--steps {arguments.sizes.steps}: must be even, {2 * WARM_UP} or more: the first {WARM_UP} are not timed"
        )
    if not set(arguments.kept.split(",")) <= {"auto", "0"}:
        parser.error(f"--kept {arguments.kept}: must be auto, 0, or auto,0")
    arguments.out = arguments.out.resolve()
    return arguments


def numbers(text: str) -> list[int]:
    """Numbers above 0, separated by commas."""
    found = sorted({int(word) for word in text.split(",")})
    if found[0] < 1:
        raise ValueError(text)
    return found


def sizes_from_to(text: str) -> tuple[int, int]:
    """Fewest and most tiles, "50-1000"."""
    low, high = map(int, text.split("-"))
    if not 1 <= low <= high:
        raise ValueError(text)
    return low, high


def shown(default: object) -> str:
    """A default for the help."""
    return "-".join(map(str, default)) if isinstance(default, tuple) else str(default)


def is_slurm() -> bool:
    """Inside of a Slurm job."""
    return "SLURM_JOB_ID" in os.environ


def cores_of_a_machine() -> int:
    """Cores of this machine that may be used; in a Slurm job those of a node."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE", num_cores()))


def make_points(arguments: argparse.Namespace, cores: int) -> list[Point]:
    """What is to be run, fewest ranks first."""
    shapes = sorted(itertools.product(arguments.nodes, arguments.ranks_per_node), key=lambda s: (s[0] * s[1], s))

    def fits(nodes: int, ranks_per_node: int) -> bool:
        return (1 if is_slurm() else nodes) * ranks_per_node <= cores

    encoder = arguments.encoder
    encoders = [encoder] if encoder != "auto" else ["thin"] if all(fits(*s) for s in shapes) else ["sleep", "thin"]
    return [
        Point(arguments.mode, name, kept, *shape)
        for name in encoders
        for kept in arguments.kept.split(",")
        for shape in shapes
        if encoder != "auto" or name == "sleep" or fits(*shape)
    ]


def choose_launcher(points: Sequence[Point]) -> str:
    """What starts ranks here: "srun", "deepspeed" (on namespaces), or "torchrun".

    Raises:
        SystemExit: there are points of several nodes, and nothing to make nodes of.
    """
    most = max(point.nodes for point in points)
    if is_slurm():
        return "srun"
    if most == 1:
        return "torchrun"
    reason = why_no_nodes()
    if reason is not None:
        raise SystemExit(
            f"--nodes {most}: {reason}, so several nodes cannot be had on this machine. Run as root, use --nodes 1, or a Slurm "
            "job (launch/slurm/scaling.sh)."
        )
    return "deepspeed"


def is_for_others(point: Point) -> bool:
    """The Slurm job has too few nodes: each job of a study is given all points, so that all make the same cohort."""
    return is_slurm() and point.nodes > int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def with_slides(settings: Settings, points: Sequence[Point]) -> Settings:
    """The settings with the number of slides that the steps need.

    Raises:
        SystemExit: a number of slides that makes no whole steps for some point.
    """
    per_step = [slides_of_a_step(point, settings) for point in points]
    slides = settings.slides or settings.steps * max(per_step)
    if any(slides % (WARM_UP * number) or slides < 2 * WARM_UP * number for number in per_step):
        raise SystemExit(
            f"{slides} slides make no even number of steps, {2 * WARM_UP} at least, of {sorted(set(per_step))} slides. "
            "Set --slides to a multiple of twice the largest number for which all numbers of ranks divide each other."
        )
    return Settings(**(asdict(settings) | {"slides": slides}))


def slides_of_a_step(point: Point, settings: Settings) -> int:
    """All ranks together."""
    return settings.slides_per_step * (point.ranks if point.mode == "weak" else 1)


def draw_sizes(settings: Settings) -> list[int]:
    """Tiles of each slide: log-normal about three times the fewest, within the limits; those of fewer slides come first."""
    low, high = settings.tiles_per_slide
    drawn = np.random.default_rng(0).lognormal(np.log(3 * low), 0.8, settings.slides)
    return [int(size) for size in np.clip(drawn, low, high)]


def make_cohort(folder: Path, settings: Settings) -> Path:
    """Shards of all slides, those that are there already kept; the table.

    Validation and test have slides of one tile, because a training has them.
    """
    low, high = settings.tiles_per_slide
    folder = folder / f"{settings.tile_px}px-{low}-{high}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [*draw_sizes(settings), 1, 1, 1, 1]
    splits = ["train"] * settings.slides + ["val", "val", "test", "test"]
    jpegs = noise_jpegs(min(NUM_JPEGS, high), settings.tile_px)
    rows = []
    for number, (size, split) in enumerate(tqdm(list(zip(sizes, splits, strict=True)), desc="slides", disable=None)):
        slide_id = f"{split}{number:05d}-{size}"
        rows.append([slide_id, f"{slide_id}.tiff", f"p{number}", "ab"[number % 2], split])
        if not (slide_folder(folder / "shards", slide_id) / MANIFEST).is_file():
            own = list(itertools.islice(itertools.cycle(jpegs), number % len(jpegs), number % len(jpegs) + size))
            make_shards(folder / "shards", slide_id, own, tile_px=settings.tile_px, tile_mpp=1.0)
    table = folder / f"slides-{settings.slides}.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["slide_id", "path", "patient_id", "label", "split"], *rows])
    return table


def write_config(out: Path, table: Path, point: Point, settings: Settings, device: str = "cpu") -> RunConfig:
    """The YAML of a point, in an empty run folder."""
    folder = out / "points" / point.name
    encoders = {"thin": THIN, "sleep": {"name": "sleep", "options": {"seconds_per_tile": settings.seconds_per_tile}}}
    rates = {"lr_encoder": 0.0, "lr_head": 0.0} if point.mode == "weak" else {}
    plain = {"flips": False, "turns": False, "brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}
    data = {
        "cohort": {"table": table, "classes": ["a", "b"], "near_duplicates": "ignore"},
        "slides": {"tile_px": settings.tile_px, "tile_mpp": 1.0},
        "science": {
            "encoder": encoders.get(point.encoder, {"name": point.encoder}),
            "aggregator": {"options": {"hidden": 32}},
            "class_weights": "none",
            # Draws are keyed by the step, which has other slides where ranks are more.
            "augment": plain,
            "optim": rates | {"clip_norm": None},
            "epochs": 1,
            "slides_per_step": slides_of_a_step(point, settings),
        },
        "execution": {
            "ranks": point.ranks,
            "chunk": settings.chunk,
            "memory": "replay" if point.kept == "0" else "auto",
            "device": device,
            "timeout_s": 300,
        },
        "bookkeeping": {
            "out": folder / "run",
            "shards": table.parent / "shards",
            "mlflow": False,
            "progress": False,
            "checkpoint_minutes": 1e6,
            "ranks_every": WARM_UP,
        },
    }
    config = absolute_paths(RunConfig.model_validate(data))
    shutil.rmtree(config.bookkeeping.out, ignore_errors=True)  # of a point that was interrupted
    config.bookkeeping.out.mkdir(parents=True)
    split_cohort(config)
    replace_file(folder / "run.yaml", to_yaml(config))
    return config


def run_point(folder: Path, config: RunConfig, point: Point, launcher: str) -> float | None:
    """Train; bytes that a node has put on its link per step.

    Raises:
        SystemExit: it did not end well; with its last words.
    """
    words = [str(folder / "run.yaml"), "--plugin", "gigamil.testing.sleep"]
    if launcher == "deepspeed":
        with Nodes(point.nodes, folder / "nodes") as nodes:
            started = start_on_nodes(nodes, "deepspeed", point.ranks_per_node, words)
            count = lambda: sum(nodes.bytes_sent(node) for node in range(point.nodes)) / point.nodes
            bytes_per_step = follow(config, started, count, lambda: last_words(nodes))
        return bytes_per_step if point.nodes > 1 else None
    log = folder / "launcher.log"
    command = srun_command(point) if launcher == "srun" else torchrun_command(point)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if launcher == "srun":
        environment |= meeting_point()
    elif not torch.cuda.is_available():
        environment |= rank_environment(folder)
    command += ["-m", "gigamil.train.worker", *words]
    print(f"+ {shlex.join(command)}", flush=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            return follow(config, [process], None, lambda: log.read_text(errors="replace")[-3000:])
        finally:
            process.terminate()
            process.wait()


def torchrun_command(point: Point) -> list[str]:
    """All ranks on this machine."""
    python = [sys.executable, "-m", "torch.distributed.run"]
    return [*python, "--standalone", "--nproc-per-node", str(point.ranks_per_node)]


def srun_command(point: Point) -> list[str]:
    """A step of the Slurm job on its first nodes."""
    hosts = ",".join(slurm_hosts()[: point.nodes])
    size = ["--nodes", str(point.nodes), "--ntasks", str(point.ranks), "--ntasks-per-node", str(point.ranks_per_node)]
    return ["srun", *size, "--nodelist", hosts, "--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=60", sys.executable]


def slurm_hosts() -> list[str]:
    """Of the job."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def meeting_point() -> dict[str, str]:
    """Where ranks meet, if the job's script has not said it."""
    port = str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000)
    return {"MASTER_ADDR": slurm_hosts()[0], "MASTER_PORT": port} | {
        name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ
    }


def follow(
    config: RunConfig,
    processes: "Sequence[subprocess.Popen[bytes]]",
    count_bytes: Callable[[], float] | None,
    said: Callable[[], str],
) -> float | None:
    """Wait for the end of a point with a bar of its steps; bytes per timed step, counted between steps.

    Raises:
        SystemExit: some process failed or did not end.
    """
    steps = num_steps(config)
    metrics = config.bookkeeping.out / "metrics.jsonl"
    counts: dict[int, float] = {}
    deadline, done = time.monotonic() + POINT_LIMIT_S, 0
    with tqdm(total=steps, unit="step", disable=None, leave=False) as bar:
        while any(process.poll() is None for process in processes):
            now = metrics.read_bytes().count(b'"kind": "step"') if metrics.is_file() else 0
            bar.update(now - done)
            # Between two steps is when a step's line has come: the next one encodes for long before it sends.
            if count_bytes is not None and now > done and now >= WARM_UP:
                counts[now] = count_bytes()
            done = now
            if time.monotonic() > deadline:
                raise SystemExit(f"the point did not end within {POINT_LIMIT_S:g} s\n{said()}")
            time.sleep(LOOK_S)
    codes = [process.wait() for process in processes]
    status = json.loads((config.bookkeeping.out / "run.json").read_text())["status"] if not any(codes) else "failed"
    if status != "finished":
        raise SystemExit(f"the point ended with codes {codes}\n{said()}")
    if len(counts) < 2:  # steps too quick to look between them
        return None
    first, last = min(counts), max(counts)
    return (counts[last] - counts[first]) / (last - first)


def num_steps(config: RunConfig) -> int:
    """Of the point's epoch."""
    train = json.loads((config.bookkeeping.out / "splits.json").read_text())["train"]
    return len(train) // config.science.slides_per_step


def read_lines(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    text = (config.bookkeeping.out / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def read_metrics(config: RunConfig, point: Point, bytes_per_step: float | None, launcher: str) -> Measured:
    """What the run wrote about itself."""
    steps, ranks = read_lines(config, "step"), read_lines(config, "ranks")
    per_step = config.science.slides_per_step
    timed = steps[WARM_UP:]
    seconds = [per_step / line["slides_per_s"] for line in timed]
    tiles = [line["tiles_per_s"] * s for line, s in zip(timed, seconds, strict=True)]
    split = {name: by_rank(ranks[1:], name) for name in ("own_s", "data_s", "wait_s", "rest_s")}
    return Measured(
        losses=[line["loss"] for line in steps],
        grad_norms=[line["grad_norm"] for line in steps],
        step_s=statistics.fmean(seconds),
        slides_per_s=per_step * len(timed) / sum(seconds),
        tiles_per_s=sum(tiles) / sum(seconds),
        own_s=split["own_s"],
        data_s=split["data_s"],
        wait_s=split["wait_s"],
        together_s=[rest - wait for rest, wait in zip(split["rest_s"], split["wait_s"], strict=True)],
        imbalance_tiles=max(max(line["tiles"]) - statistics.fmean(line["tiles"]) for line in ranks),
        bytes_per_step=bytes_per_step,
        bytes_formula=ring_bytes(collectives(config, point)) if point.nodes > 1 else 0.0,
        launcher=launcher,
    )


def by_rank(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Mean of a number of each rank over lines, by their steps."""
    steps = [line["steps"] for line in lines]
    columns = zip(*(line[name] for line in lines), strict=True)
    return [sum(v * n for v, n in zip(column, steps, strict=True)) / sum(steps) for column in columns]


def collectives(config: RunConfig, point: Point) -> tuple[Collective, ...]:
    """What a rank calls in a step."""
    sizes = [1000] * config.science.slides_per_step  # bytes depend on how many slides there are
    return step_collectives(config, build_planned_model(config), sizes, len(sizes), point.ranks)


def ring_bytes(calls: Sequence[Collective]) -> float:
    """Bytes that leave a node in a step where each collective goes round all ranks once: one rank of a node sends to the next.

    A ring all-reduce of b bytes sends 2 (n - 1) / n b from each rank, an all-gather of b bytes of each (n - 1) b, and a
    reduce-scatter of b bytes (n - 1) / n b.
    """
    total = 0.0
    for call in calls:
        others = call.ranks - 1
        if call.name == "all_reduce":
            total += 2 * others / call.ranks * call.bytes
        elif call.name == "reduce_scatter_tensor":
            total += others / call.ranks * call.bytes
        else:
            total += others * call.bytes
    return total


def save_point(out: Path, point: Point, settings: Settings, measured: Measured) -> None:
    """A file of its own, so that jobs of one study may share a folder."""
    data = {"point": asdict(point), "settings": asdict(settings), "measured": asdict(measured)}
    replace_file(out / "points" / point.name / "point.json", json.dumps(data, indent=1))


def read_point(out: Path, point: Point, settings: Settings) -> Measured | None:
    """What was measured before with these settings; None if nothing was."""
    return read_all(out, settings, point.mode).get(point)


def read_all(out: Path, settings: Settings, mode: str) -> Results:
    """All points of a folder that were measured with these settings, those of other commands too."""
    found = {}
    for path in out.glob("points/*/point.json"):
        data = json.loads(path.read_text())
        point = Point(**data["point"])
        if data["settings"] == json.loads(json.dumps(asdict(settings))) and point.mode == mode:
            found[point] = Measured(**data["measured"])
    return dict(sorted(found.items(), key=lambda item: (item[0].kind, item[0].ranks, item[0].nodes)))


def bases(found: Results) -> dict[Point, Point]:
    """For each point the one of its kind with the fewest ranks, of these on the fewest nodes."""
    first: dict[tuple[str, str, str], Point] = {}
    for point in found:
        base = first.get(point.kind)
        if base is None or (point.ranks, point.nodes) < (base.ranks, base.nodes):
            first[point.kind] = point
    return {point: first[point.kind] for point in found}


def efficiency(found: Results, point: Point, base: Point) -> float:
    """Tiles per second and rank, of those of the base."""
    return (found[point].tiles_per_s / point.ranks) / (found[base].tiles_per_s / base.ranks)


def loss_difference(found: Results) -> float | None:
    """Largest relative difference of the first losses of points of an encoder; None with nothing to compare.

    A step of weak scaling has the slides of several steps of fewer ranks, and weights do not change: its loss is their mean.
    """
    differences = []
    by_encoder: dict[str, list[Point]] = {}
    for point in found:
        by_encoder.setdefault(point.encoder, []).append(point)
    for points in by_encoder.values():
        base = min(points, key=lambda point: (point.ranks, point.nodes, point.kept != "auto"))
        for point in points:
            times = point.ranks // base.ranks if point.mode == "weak" else 1
            if point == base or (point.mode == "weak" and point.ranks % base.ranks):
                continue
            whole = len(found[base].losses) // times
            expected = [statistics.fmean(found[base].losses[i * times : (i + 1) * times]) for i in range(whole)]
            pairs = list(zip(expected, found[point].losses, strict=False))[:NUM_LOSSES]
            differences += [abs(a - b) / abs(a) for a, b in pairs]
    return max(differences, default=None)


def report(out: Path, found: Results, settings: Settings, words: Sequence[str] | None) -> dict[str, Any]:
    """Table, JSON and figure; what the last line says."""
    base = bases(found)
    rows = [row(point, measured, efficiency(found, point, base[point])) for point, measured in found.items()]
    print()
    table = table_of(rows)
    print(table)
    four, one = (
        next(
            (p for p in found if (p.nodes, p.ranks_per_node, p.encoder, p.kept) == (nodes, 1, *best_kind(found))), None
        )
        for nodes in (4, 1)
    )
    result = {
        "points": rows,
        "max_loss_difference": loss_difference(found),
        "imbalance_tiles": round(max(measured.imbalance_tiles for measured in found.values()), 3),
        "efficiency_4_nodes": None if four is None or one is None else round(efficiency(found, four, one), 4),
    }
    mode = next(iter(found)).mode
    whole = {
        **origin(__file__, words, torch=torch.__version__, cores_used=cores_of_a_machine()),
        "settings": asdict(settings),
        "result": result,
        "points": [{"point": asdict(point), "measured": asdict(measured)} for point, measured in found.items()],
    }
    replace_file(out / f"{mode}.json", json.dumps(whole, indent=1) + "\n")
    replace_file(out / f"{mode}.md", table + "\n")
    draw(out / f"{mode}.png", found)
    print(f"\nwritten: {out / mode}.json, .md, .png")
    return result


def best_kind(found: Results) -> tuple[str, str]:
    """Encoder and kept share that the last line is about: sleep where it was run, graphs kept by memory."""
    kinds = {(point.encoder, point.kept) for point in found}
    return min(kinds, key=lambda kind: (kind[0] != "sleep", kind[1] != "auto", kind))


def row(point: Point, measured: Measured, share: float) -> dict[str, Any]:
    """A line of the table."""
    return {
        "encoder": point.encoder,
        "kept": point.kept,
        "nodes": point.nodes,
        "ranks_per_node": point.ranks_per_node,
        "step_s": round(measured.step_s, 4),
        "slides_per_s": round(measured.slides_per_s, 4),
        "tiles_per_s": round(measured.tiles_per_s, 1),
        "efficiency": round(share, 4),
        **{
            name: round(statistics.fmean(getattr(measured, f"{name}_s")) / measured.step_s, 4)
            for name in ("own", "data", "wait", "together")
        },
        "imbalance_tiles": round(measured.imbalance_tiles, 3),
        "bytes_per_step": None if measured.bytes_per_step is None else round(measured.bytes_per_step),
        "bytes_formula": round(measured.bytes_formula),
    }


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; shares of a step are means over ranks."""
    names = list(rows[0])
    cells = [names] + [["-" if value is None else str(value) for value in line.values()] for line in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    lines = ["| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def draw(path: Path, found: Results) -> None:
    """Slides and tiles per second, efficiency, what ranks do, bytes, balance."""
    base = bases(found)
    kinds = list(dict.fromkeys(point.kind for point in found))
    with drawing(path, 13.0, 7.5) as figure:
        axes = figure.subplots(2, 3)
        lines = {
            "Slides per second": lambda p: found[p].slides_per_s,
            "Tiles per second": lambda p: found[p].tiles_per_s,
            "Efficiency": lambda p: efficiency(found, p, base[p]),
        }
        for axis, (title, value) in zip(axes[0], lines.items(), strict=True):
            for number, kind in enumerate(kinds):
                points = [point for point in found if point.kind == kind]
                label, colour = f"{kind[1]}, kept {kind[2]}", PALETTE[number % len(PALETTE)]
                axis.plot([p.ranks for p in points], [value(p) for p in points], "o", color=colour, label=label)
                first = base[points[0]]
                ideal = [1.0 if title == "Efficiency" else value(first) * p.ranks / first.ranks for p in points]
                axis.plot([p.ranks for p in points], ideal, "--", color=colour, linewidth=1)
            axis.set(title=title, xlabel="ranks (dashed: ideal)")
            axis.set_xscale("log", base=2)
            if title == "Efficiency":
                axis.set_ylim(0, 1.1 * max(1.0, axis.dataLim.y1))
            else:  # what is ideal is then a straight line
                axis.set_yscale("log", base=2)
                axis.yaxis.set_major_formatter("{x:g}")
            ticks = sorted({point.ranks for point in found})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.grid(axis="y")
        axes[0][0].legend()
        draw_split(axes[1][0], found)
        places = range(len(found))
        names = [short_label(point) for point in found]
        measured = list(found.values())
        axes[1][1].bar(
            [p - 0.2 for p in places], [(m.bytes_per_step or 0) / 1e3 for m in measured], 0.4, color=PALETTE[0]
        )
        axes[1][1].bar([p + 0.2 for p in places], [m.bytes_formula / 1e3 for m in measured], 0.4, color=PALETTE[4])
        axes[1][1].set(
            title="Kilobytes per step and node", xlabel="left: on the link (none: not counted), right: formula"
        )
        axes[1][2].bar(places, [m.imbalance_tiles for m in measured], 0.6, color=PALETTE[2])
        axes[1][2].set(title="Largest minus mean tiles of a rank", xlabel="per step")
        for axis in axes[1][1:]:
            axis.set_xticks(list(places), names, rotation=60, ha="right", fontsize=8)
            axis.grid(axis="y")


def draw_split(axis: Any, found: Results) -> None:
    """A bar for each rank of each point, as shares of the step; of points with many ranks, the first 16."""
    parts = {"own_s": "own", "data_s": "data", "wait_s": "wait", "together_s": "together"}
    place, ticks = 0.0, []
    for point, measured in found.items():
        shown_ranks = range(min(point.ranks, 16))
        ticks.append((place + (len(shown_ranks) - 1) / 2, short_label(point)))
        for rank in shown_ranks:
            bottom = 0.0
            for number, name in enumerate(parts):
                share = getattr(measured, name)[rank] / measured.step_s
                axis.bar(place, share, 0.9, bottom=bottom, color=PALETTE[number])
                bottom += share
            place += 1
        place += 1
    for number, label in enumerate(parts.values()):
        axis.bar(0, 0, color=PALETTE[number], label=label)
    axis.set_xticks(*zip(*ticks, strict=True), rotation=60, ha="right", fontsize=8)
    axis.set(title="Share of a step, by rank", ylim=(0, 1.25))
    axis.legend(ncols=4, fontsize=8, loc="upper center")


def short_label(point: Point) -> str:
    """Under a bar."""
    return f"{point.encoder} {'' if point.kept == 'auto' else 'kept 0 '}{point.nodes}x{point.ranks_per_node}"


def log_to_mlflow(out: Path, found: Results, settings: Settings, result: Mapping[str, Any]) -> None:
    """One parent run with a child per point. A point that is there already is completed, not doubled."""
    mode = next(iter(found)).mode
    folder = out / f"mlflow-{mode}"
    folder.mkdir(exist_ok=True)
    parent = Tracker(folder, EXPERIMENT, f"scaling, {mode}")
    if parent.wait_open(60.0) is None:
        parent.finish("FAILED", 0.0)
        print("MLflow did not answer; the JSON has everything, and the same command logs it later", file=sys.stderr)
        return
    parent.describe(asdict(settings), {"mode": mode})
    with tracking_at(tracking_uri(folder)):
        for point, measured in found.items():
            run = out / "points" / point.name / "run"
            child = Tracker(run, EXPERIMENT, point.name, parent=parent.run_id)
            child.describe(asdict(point) | {"ranks": point.ranks}, {"launcher": measured.launcher})
            if b'"kind": "metrics"' not in (run / "metrics.jsonl").read_bytes():
                numbers_of = {k: v for k, v in row(point, measured, 1.0).items() if isinstance(v, int | float)}
                del numbers_of["efficiency"]  # of the study, not of the point
                child.log({f"point/{name}": value for name, value in numbers_of.items()}, 0)
            child.finish("FINISHED")
    numbers_of = {key: value for key, value in result.items() if isinstance(value, int | float)}
    parent.log({f"scaling/{name}": value for name, value in numbers_of.items()}, len(found))
    for suffix in ("json", "md", "png"):
        parent.artefact(out / f"{mode}.{suffix}")
    parent.finish("FINISHED")


@contextmanager
def tracking_at(uri: str) -> Iterator[None]:
    """Trackers made inside use this store, that of the parent run."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


if __name__ == "__main__":
    sys.exit(main())

"""How far off is `gigamil simulate`, where it can be compared with trainings?

A machine file is made from `gigamil bench calibrate` on 1 and 2 ranks of this machine. Then trainings are predicted, before
they are run: on 1 and 2 ranks (the fit itself, not counted), on 4 and 8, with other numbers of tiles, chunk sizes, kept shares,
groups and ZeRO stages, with one rank slowed to 1.2, and on 2 nodes x 2 ranks (network namespaces) whose links are limited
to several rates. The seconds of all steps but the first are compared, and every collective of a step, exactly: its
name, operation and bytes.

The encoder sleeps (gigamil.testing.sleep) 6 ms a tile forward and twice that backward, which is slow on purpose: 8 ranks
share the cores of this machine for everything but the encoder, and with so slow a one the encoder is most of a step, as on
a cluster of GPUs. Tiles, decoding, collectives and optimiser are real. 1 MB of parameters makes the gradient matter on a slow link.

Expected: volumes and calls are exact; times within some per cent, worst on 8 ranks, where what Python does in a step waits
for a core, and on the slowest link, whose bursts tbf lets through. Accepted: median 10 %, worst 20 %; more is printed as it is.
The machine has to be quiet: sleeps end on time whatever runs beside, but the fixed part of a step does not.

    python benchmarks/simulator.py [--quick | --tiny] [--out FILE]

About 10 minutes on 2 cores. The last line is JSON: median_error and worst_error of the predicted points (relative), how many
points those are, whether all collectives were predicted exactly, and why there are no nodes, if there are none.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from options import add_sizes
from origin import origin
from tqdm import tqdm

from gigamil.config.load import absolute_paths, load_config, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.parallel.topology import detect_topology
from gigamil.partition.schedule import epoch_order, plan_steps
from gigamil.pipeline import split_cohort
from gigamil.registry import import_plugins
from gigamil.scaling.calibrate import calibrate
from gigamil.scaling.machine import Link, Machine
from gigamil.scaling.simulate import find_cohort, step_seconds
from gigamil.scaling.traffic import step_collectives
from gigamil.testing.nodes import PORT, Nodes, rank_environment, wait_for_all, why_no_nodes
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.testing.traffic import Call, calls_of_steps, count_traffic
from gigamil.train.engine import make_ranks, skip_kernel_build, start_distributed
from gigamil.train.loop import Trainer
from gigamil.train.plan import build_planned_model

PLUGIN = "gigamil.testing.sleep"
TILE_PX = 32
BALLAST = 250_000  # numbers: 1 MB
SIZES = (50, 180, 96, 420, 260, 140, 330, 64)  # tiles of the training slides, times `Point.tiles`
TCP_SHARE = 1448 / 1514  # of the bytes on an Ethernet link, those that are not headers
SLOW = 1.2
LIMIT_S = 500.0  # of the points of one world together
Counts = dict[str, int]  # "name operation bytes" -> calls


@dataclass(frozen=True)
class Point:
    """One training, predicted and measured.

    Attributes:
        name: what differs from the others.
        ranks, nodes: in all; nodes 1 is this machine without namespaces.
        is_fit: on as many ranks as the machine file was made with: not counted as predicted.
        tiles: factor of SIZES.
        execution, science: keys that differ.
        slow: one rank takes so many times as long.
        bits_s: limit of each node's link; 0 without one.
    """

    name: str
    ranks: int
    nodes: int = 1
    is_fit: bool = False
    tiles: float = 1.0
    execution: dict[str, Any] = field(default_factory=dict)
    science: dict[str, Any] = field(default_factory=dict)
    slow: float = 1.0
    bits_s: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        points: trainings.
        seconds_per_tile: of the encoder's forward.
        quick: of the calibration.
    """

    points: tuple[Point, ...]
    seconds_per_tile: float = 0.006
    quick: bool = False


def replayed() -> dict[str, Any]:
    """No graph is kept."""
    return {"memory": "replay"}


FIT = (Point("1 rank", 1, is_fit=True), Point("2 ranks", 2, is_fit=True))
BASE = (Point("4 ranks", 4), Point("8 ranks", 8))
MORE = (
    Point("2 ranks, half the tiles, replay", 2, tiles=0.5, execution=replayed()),
    Point("4 ranks, replay", 4, execution=replayed()),
    Point("4 ranks, half the tiles", 4, tiles=0.5),
    Point("4 ranks, chunks of 4", 4, execution={"chunk": 4}),
    Point("4 ranks, chunks of 48, replay", 4, execution={"chunk": 48} | replayed()),
    Point("4 ranks, groups of 2", 4, execution={"group_size": 2}),
    Point("4 ranks, ZeRO 0", 4, execution={"zero_stage": 0}),
    Point("4 ranks, ZeRO 3", 4, execution={"zero_stage": 3}),
    Point("4 ranks, one slow", 4, slow=SLOW),
    Point("8 ranks, twice the tiles", 8, tiles=2.0),
    Point("8 ranks, replay", 8, execution=replayed()),
    Point("8 ranks, 4 slides a step, groups of 4", 8, execution={"group_size": 4}, science={"slides_per_step": 4}),
    Point("8 ranks, one slow", 8, slow=SLOW),
)
LINKS = tuple(Point(f"2 x 2 ranks, {rate:g} Mbit/s", 4, nodes=2, bits_s=rate * 1e6) for rate in (20, 50, 200))
WHOLE = Sizes((*FIT, *BASE, *MORE, *LINKS))
QUICK = Sizes((*FIT, *BASE, MORE[8], LINKS[0]), quick=True)
TINY = Sizes((Point("1 rank", 1, is_fit=True, tiles=0.1), Point("2 ranks", 2, tiles=0.1)), 0.001, quick=True)


@dataclass(frozen=True)
class Outcome:
    """A point and what came of it.

    Attributes:
        predicted_s, measured_s: of a step, mean of all but the first.
        counts_differ: collectives that were not predicted so: "name operation bytes: predicted, counted".
    """

    point: Point
    predicted_s: float
    measured_s: float
    counts_differ: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative, with its sign: above 0 means predicted too slow."""
        return self.predicted_s / self.measured_s - 1

    def line(self) -> str:
        """For the table."""
        kind = "fit" if self.point.is_fit else "predicted"
        calls = "exact" if not self.counts_differ else f"{len(self.counts_differ)} kinds differ"
        return (
            f"{self.point.name:40} {kind:10} {1000 * self.predicted_s:9.1f} {1000 * self.measured_s:9.1f}"
            f" {100 * self.error:+7.1f} %  {calls}"
        )


def main(words: Sequence[str] | None = None) -> int:
    """Calibrate, predict, train, compare, print; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, WHOLE, QUICK, TINY, "six points")
    parser.add_argument("--out", type=Path, help="JSON with every step")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)  # this process is a rank on a node
    arguments = parser.parse_args(words)
    if arguments.rank_of is not None:
        return run_node_rank(arguments.rank_of)
    sizes: Sizes = arguments.sizes
    torch.set_num_threads(1)
    import_plugins([PLUGIN])
    reason = why_no_nodes()
    points = [point for point in sizes.points if point.nodes == 1 or reason is None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = [write_config(folder, point, sizes) for point in points]
        machine = calibrate(configs[0], ranks=2, quick=sizes.quick, plugins=[PLUGIN])
        predicted = [predict(point, config, machine) for point, config in zip(points, configs, strict=True)]
        measured = run_all(folder, points, configs)
    outcomes = [
        Outcome(point, mean(seconds), mean(found["seconds"]), differences(point, counts, found["counts"]))
        for point, (seconds, counts), found in zip(points, predicted, measured, strict=True)
    ]
    print(
        "\npoint                                    kind       predicted  measured     error  collectives    (ms a step)"
    )
    for outcome in outcomes:
        print(outcome.line())
    result = summary(outcomes) | {"no_nodes": reason}
    if arguments.out is not None:
        raw = {
            **origin(__file__, words, torch=torch.__version__),
            "result": result,
            "machine_file": machine.model_dump(mode="json"),
            "points": [asdict(outcome) | {"error": outcome.error} for outcome in outcomes],
        }
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of the last line, of the points that were predicted and not fitted."""
    errors = [abs(outcome.error) for outcome in outcomes if not outcome.point.is_fit]
    return {
        "median_error": round(statistics.median(errors), 4),
        "worst_error": round(max(errors), 4),
        "points": len(errors),
        "collectives_exact": not any(outcome.counts_differ for outcome in outcomes),
    }


def mean(seconds: Sequence[float]) -> float:
    """Of a step; the first one warms up, and waits for its tiles."""
    return statistics.fmean(seconds[1:])


def differences(point: Point, predicted: Counts, counted: Counts) -> tuple[str, ...]:
    """Collectives whose number is not as predicted. One rank alone sends nothing, whatever it calls."""
    if point.ranks == 1:
        return ()
    names = sorted(predicted.keys() | counted.keys())
    pairs = [(name, predicted.get(name, 0), counted.get(name, 0)) for name in names]
    return tuple(f"{name}: {a} predicted, {b} counted" for name, a, b in pairs if a != b)


def write_config(folder: Path, point: Point, sizes: Sizes) -> RunConfig:
    """A cohort of the point's size, if it is not there yet, and the configuration to train on it."""
    cohort = folder / f"cohort{point.tiles:g}"
    table = cohort / "slides.csv"
    if not table.is_file():
        cohort.mkdir()
        rows = [["slide_id", "path", "patient_id", "label", "split"]]
        train = [("train", max(1, round(size * point.tiles))) for size in SIZES]
        for number, (split, size) in enumerate([*train, ("val", 1), ("val", 1), ("test", 1), ("test", 1)]):
            rows.append([f"s{number}", f"s{number}.tiff", f"p{number}", "ab"[number % 2], split])
            make_shards(
                cohort / "shards", f"s{number}", noise_jpegs(size, TILE_PX, number), tile_px=TILE_PX, tile_mpp=1.0
            )
        with table.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    options = {"seconds_per_tile": sizes.seconds_per_tile, "dim": 32, "ballast": BALLAST}
    plain = {"flips": False, "turns": False, "brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}
    data = {
        "cohort": {"table": table, "classes": ["a", "b"], "near_duplicates": "ignore"},
        "slides": {"tile_px": TILE_PX, "tile_mpp": 1.0},
        "science": {
            "encoder": {"name": "sleep", "options": options},
            "aggregator": {"options": {"hidden": 16}},
            "augment": plain,
            "epochs": 1,
            "slides_per_step": 2,
        }
        | point.science,
        "execution": {
            "ranks": point.ranks,
            "chunk": 16,
            "memory": "keep",
            "device": "cpu",
            "threads": 1,
            "timeout_s": 240,
        }
        | point.execution,
        "bookkeeping": {
            "out": tempfile.mkdtemp(dir=folder),
            "shards": cohort / "shards",
            "mlflow": False,
            "progress": False,
            "checkpoint_minutes": 1e6,
            "ranks_every": 1000,
            "system_metrics_s": None,
        },
    }
    config = absolute_paths(RunConfig.model_validate(data))
    split_cohort(config)
    return config


def predict(point: Point, config: RunConfig, machine: Machine) -> tuple[list[float], Counts]:
    """Seconds of each step, and the collectives of one."""
    changes: dict[str, Any] = {"ranks_per_node": point.ranks // point.nodes}
    if point.nodes > 1:  # which share this machine's cores, and have links of the rate that they are given
        link = Link(latency_s=machine.links.inside.latency_s, bytes_s=point.bits_s / 8 * TCP_SHARE)
        changes |= {
            "cores_per_node": max(1, machine.cores_per_node // point.nodes),
            "links": machine.links.model_copy(update={"between": link}),
        }
    seconds = step_seconds(config, machine.model_copy(update=changes), point.nodes, slow_rank=point.slow)
    sizes, per_step = find_cohort(config).sizes, config.science.slides_per_step
    group_size = config.execution.group_size or point.ranks
    order = epoch_order(len(sizes), config.science.seed, 0)
    step = plan_steps(order, sizes, per_step, point.ranks // group_size, group_size)[1]
    calls = step_collectives(config, build_planned_model(config), step.group_sizes(0), per_step, point.ranks)
    # The agreement is before the step, and not counted with it.
    counts = Counter(f"{call.name} {call.operation} {call.bytes}" for call in calls if call.purpose != "agreement")
    return seconds, dict(counts)


def run_all(folder: Path, points: Sequence[Point], configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Train all points: those of a world one after another in the same processes."""
    found: dict[int, dict[str, Any]] = {}
    worlds = sorted({(point.nodes, point.ranks) for point in points})
    with tqdm(total=len(points), desc="points", unit="point", disable=None, leave=False) as bar:
        for nodes, ranks in worlds:
            mine = [number for number, point in enumerate(points) if (point.nodes, point.ranks) == (nodes, ranks)]
            chosen, there = [points[number] for number in mine], [slowed(points[n], configs[n]) for n in mine]
            if nodes == 1:
                results = run_on_ranks(run_points, ranks, there, timeout_s=LIMIT_S)[0]
            else:
                results = run_on_nodes(folder, chosen, there)
            found |= dict(zip(mine, results, strict=True))
            bar.update(len(mine))
    return [found[number] for number in range(len(points))]


def slowed(point: Point, config: RunConfig) -> RunConfig:
    """What is trained; what is predicted knows of the slow rank otherwise."""
    if point.slow == 1:
        return config
    encoder = config.science.encoder
    options = encoder.options | {"slow_rank": 1, "slow_times": point.slow}
    science = config.science.model_copy(update={"encoder": encoder.model_copy(update={"options": options})})
    return config.model_copy(update={"science": science})


def run_points(rank: int, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """On each rank: train; seconds of the steps, and collectives of the second one."""
    skip_kernel_build()
    import_plugins([PLUGIN])
    with count_traffic() as calls:  # all along: DeepSpeed keeps functions of torch.distributed from its start on
        return train_points(rank, configs, calls)


def train_points(
    rank: int, configs: Sequence[RunConfig], calls: list[Call], gates: Path | None = None
) -> list[dict[str, Any]]:
    """As `run_points`, where collectives are counted already.

    Args:
        calls: to which each collective is appended.
        gates: folder in which the process that started the ranks says that a point may begin; None: they begin at once.
    """
    torch.set_num_threads(1)
    found = []
    for number, config in enumerate(configs):
        if gates is not None and rank == 0:
            pass_gate(gates, number)
        dist.barrier()
        trainer = Trainer(config, make_ranks(detect_topology(config.execution.group_size)), torch.device("cpu"))
        steps = calls_of_steps(trainer, calls)
        dist.barrier()
        trainer.fit()
        counts = Counter(f"{call.name} {call.operation} {call.sent}" for call in steps[1])
        found.append({"seconds": read_seconds(config) if rank == 0 else [], "counts": dict(counts)})
    return found


def read_seconds(config: RunConfig) -> list[float]:
    """Of each step, as the training noted it."""
    lines = map(json.loads, (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines())
    rates = [line["slides_per_s"] for line in lines if line["kind"] == "step"]
    whole, rest = divmod(len(SIZES), config.science.slides_per_step)
    slides = [config.science.slides_per_step] * whole + ([rest] if rest else [])
    return [number / rate for number, rate in zip(slides, rates, strict=True)]


def pass_gate(gates: Path, number: int) -> None:
    """Say that the points before are done, and wait until this one may begin."""
    (gates / f"ready{number}").touch()
    deadline = time.monotonic() + LIMIT_S
    while not (gates / f"go{number}").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody opened gate {number}")
        time.sleep(0.05)


def run_on_nodes(folder: Path, points: Sequence[Point], configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """As `run_points`, on nodes whose links are limited for each point.

    Raises:
        RuntimeError: a rank ended with an error, or not in time; with the last words of the nodes.
    """
    count, ranks = points[0].nodes, points[0].ranks
    gates = folder / "nodes"
    gates.mkdir()
    for number, config in enumerate(configs):
        (gates / f"config{number}.yaml").write_text(to_yaml(config))
    deadline = time.monotonic() + LIMIT_S
    with ExitStack() as stack:
        nodes = stack.enter_context(Nodes(count, gates / "logs"))
        processes = [start_rank(nodes, gates, rank, ranks // count, ranks) for rank in range(ranks)]
        for number, point in enumerate(points):
            while not (gates / f"ready{number}").exists():
                if any(process.poll() for process in processes) or time.monotonic() > deadline:
                    raise RuntimeError(f"the nodes did not come to '{point.name}'\n{said(gates)}")
                time.sleep(0.05)
            for node in range(count):
                nodes.limit(node, point.bits_s)
            (gates / f"go{number}").touch()
        codes = wait_for_all(nodes, processes, deadline - time.monotonic())
        if any(codes):
            raise RuntimeError(f"ranks ended with {codes}\n{said(gates)}")
    found: list[dict[str, Any]] = json.loads((gates / "found.json").read_text())
    return found


def said(gates: Path) -> str:
    """The end of what each rank has printed."""
    logs = sorted((gates / "logs").glob("*.log"))
    return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


def start_rank(nodes: Nodes, gates: Path, rank: int, per_node: int, ranks: int) -> "subprocess.Popen[bytes]":
    """One rank, as a launcher on its node would start it."""
    names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node}
    names |= {"MASTER_PORT": PORT}
    env = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": nodes.address(0)}
    root = str(Path(__file__).resolve().parents[1])
    env |= rank_environment(nodes.folder) | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return nodes.run(rank // per_node, [sys.executable, __file__, "--rank-of", str(gates)], env)


def run_node_rank(gates: Path) -> int:
    """In a process on a node: join the others, train all points; rank 0 leaves what it found."""
    import_plugins([PLUGIN])
    paths = sorted(gates.glob("config*.yaml"), key=lambda path: int(path.stem.removeprefix("config")))
    configs, topology = [load_config(path) for path in paths], detect_topology()
    with count_traffic() as calls:  # DeepSpeed starts in here
        start_distributed(topology, torch.device("cpu"), configs[0].execution.timeout_s)
        found = train_points(topology.rank, configs, calls, gates)
    if topology.rank == 0:
        (gates / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

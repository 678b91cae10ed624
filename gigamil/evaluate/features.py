"""Every tile of every slide through a frozen encoder, once: the first stage of two. One HDF5 file per slide.

`python -m gigamil.evaluate.features` is one rank of it. Ranks share out slides and need nothing of each other.
Shapes: N tiles of a slide, n tiles of a call, D embedding.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gigamil.config.load import load_config, to_yaml
from gigamil.config.schema import RunConfig
from gigamil.data.augment import to_float
from gigamil.data.features import features_folder, features_path
from gigamil.data.h5 import Attribute, read_features_header, trident_attributes, write_features
from gigamil.data.images import ChunkFeed
from gigamil.data.pipeline import StepLoader, StepTiles
from gigamil.errors import GigamilError, Interrupted, ShardError, SlideError
from gigamil.files import replace_file
from gigamil.lock import folder_lock
from gigamil.memory.budget import memory_budget
from gigamil.models.encoder import TileEncoder
from gigamil.models.probe import refuse_tile_mixing
from gigamil.parallel.topology import Topology, detect_topology
from gigamil.partition.schedule import plan_steps
from gigamil.partition.spans import chunk_ranges
from gigamil.registry import import_plugins
from gigamil.shards.cache import ShardCache
from gigamil.shards.manifest import SlideManifest
from gigamil.shards.read import ShardSet
from gigamil.train.agree import StopSignals
from gigamil.train.cohort import open_source
from gigamil.train.launch import launch_ranks, report_outcome, restore_devices
from gigamil.train.prepare import set_batchnorm
from gigamil.train.stale import Kind, encoder_attributes, encoder_of_features, kind_of_features, note_time
from gigamil.train.worker import choose_device

_log = logging.getLogger("gigamil")


@dataclass(frozen=True)
class FeaturesReport:
    """What `cache_features` did.

    Attributes:
        folder: of the files.
        num_slides, num_written: files there now, and those of them that were written.
        num_tiles, num_encoded: tiles of all files, and of those written.
        dim: D.
        seconds: for everything, start of the ranks included.
    """

    folder: Path
    num_slides: int
    num_written: int
    num_tiles: int
    num_encoded: int
    dim: int
    seconds: float

    def text(self) -> str:
        """For people, in a line."""
        rate = f", {self.num_encoded / self.seconds:.0f} tiles/s" if self.num_encoded else ""
        return (
            f"{self.num_slides} slides ({self.num_written} encoded now, {self.num_slides - self.num_written} there "
            f"before): {self.num_tiles} tiles of {self.dim} numbers in '{self.folder}'; {self.seconds:.1f} s{rate}"
        )


def cache_features(
    config: RunConfig, folder: Path | None = None, *, kind: Kind | None = None, plugins: Sequence[str] = ()
) -> FeaturesReport:
    """Encode every tile of every tiled slide with the configured encoder, as it is, and write its features.

    The encoder is in evaluation mode, tiles are not augmented, and `science.precision` holds as in training. A slide whose
    file was made of the same tiles by the same encoder is skipped, so that the same call continues what was stopped. A
    slide whose tiles are damaged does not stop the others.

    Args:
        config: which tiles (`bookkeeping.shards`, or the slides themselves with `data.source: slides`), and
            `science.encoder`; its weights are those of `science.warm_start` if that is set. On `execution.ranks` processes.
        folder: for the files; default `data.features`, or `<out>/features`.
        kind: of the numbers in the files; default that of the files there, else float32. float16 halves their size and
            keeps 3 digits.
        plugins: modules that register encoders.
    Raises:
        ShardError: there are no tiles; or slides could not be encoded, which are listed: the others are done.
        ConfigError: no such encoder, or it does not take such tiles.
        EnvironmentFault: another command is writing to the folder.
    Cost: one encoder forward per tile; memory for the features of one slide on each rank.
    """
    start = time.monotonic()
    import_plugins(plugins)
    folder = features_folder(config) if folder is None else folder
    shards = ShardSet(config.bookkeeping.shard_root)
    if not shards.slide_ids:
        raise ShardError(f"no slide in '{shards.root}' has a tile. Run `gigamil tile` first.")
    shards.check_tiles(shards.slide_ids, config.slides.tile_px, config.slides.tile_mpp)
    with folder_lock(folder, "gigamil features"):
        for leftover in folder.glob(".*.tmp"):  # of a killed run: nobody else writes here now
            leftover.unlink()
        before = _stamps(folder)
        kind = kind_of_features(folder) if kind is None else kind
        failures: list[str] = []
        if config.execution.ranks == 1:
            topology = Topology()
            failures = encode_share(config, folder, topology, kind, choose_device(config.execution.device, topology))
        elif _unfinished(config, shards, folder, kind, encoder_of_features(config)):  # starting ranks takes seconds
            failures = _launch(config, folder, kind, plugins)
        after = _stamps(folder)
    if failures:
        lines = "\n".join(f"  {line}" for line in failures)
        number = len(shards.slide_ids)
        raise ShardError(f"{len(failures)} of {number} slides could not be encoded; the others are done:\n{lines}")
    written = [slide_id for slide_id in shards.slide_ids if after[slide_id] != before.get(slide_id)]
    sizes = {slide_id: shards.manifest(slide_id).num_tiles for slide_id in shards.slide_ids}
    seconds = time.monotonic() - start
    num_encoded = sum(sizes[slide_id] for slide_id in written)
    if num_encoded:
        note_time(folder, num_encoded, seconds, config.execution.ranks)
    return FeaturesReport(
        folder=folder,
        num_slides=len(sizes),
        num_written=len(written),
        num_tiles=sum(sizes.values()),
        num_encoded=num_encoded,
        dim=read_features_header(features_path(folder, shards.slide_ids[0])).dim,
        seconds=seconds,
    )


def encode_share(
    config: RunConfig,
    folder: Path,
    topology: Topology,
    kind: Kind,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Encode the slides of one rank; what is done already is skipped.

    Args:
        topology: rank r of W; ranks get about equal numbers of tiles.
        should_stop: asked between encoder calls.
    Returns:
        A line for each slide that could not be encoded. It is no error yet: other ranks are still at work.
    Raises:
        Interrupted: `should_stop` said so; slides in work are not written.
    """
    shards = ShardSet(config.bookkeeping.shard_root, ShardCache.of(config.execution))
    encoder = encoder_of_features(config)
    if config.science.encoder.weights is None and config.science.warm_start is None and topology.rank == 0:
        _log.warning("science.encoder.weights is null: these are features of an encoder with random weights")
    attributes = _unfinished(config, shards, folder, kind, encoder)
    todo = [slide_id for slide_id in _share(shards, topology) if slide_id in attributes]
    if not todo:
        return []
    refuse_tile_mixing(encoder, config.slides.tile_px)
    set_batchnorm(encoder, config.execution)
    encoder.to(device)
    sizes = [shards.manifest(slide_id).num_tiles for slide_id in todo]
    source, execution = open_source(config, shards, todo, device), config.execution
    hold_bytes = memory_budget(execution.tile_cache, torch.device("cpu"), topology.local_size, default=0.25)
    loader = StepLoader(
        source, todo, config.slides.tile_px, Topology(), execution.prefetch, hold_bytes, execution.decode_workers
    )
    failures: list[str] = []
    with _progress(config, topology, sum(sizes), len(todo)) as (advance, say):
        for plan, tiles in loader.iterate(plan_steps(range(len(todo)), sizes, 1, 1, 1)):
            slide_id, start = todo[plan.slides[0]], time.perf_counter()
            try:
                if isinstance(tiles, Exception):
                    raise tiles
                features_ND = _encode(config, encoder, tiles, device, advance, should_stop)
                index = shards.index(slide_id)
                coords_N2_px0 = np.stack([index.x_px0, index.y_px0], axis=1)
                path = features_path(folder, slide_id)
                write_features(path, features_ND.astype(kind), coords_N2_px0, attributes[slide_id])
            except (ShardError, SlideError, ValueError) as error:  # damaged tiles; an embedding that is not finite
                failures.append(f"slide '{slide_id}': {error}")
                _log.warning("%s", failures[-1])
                continue
            say(f"{slide_id:<40} {plan.sizes[0]:>8} tiles {time.perf_counter() - start:>7.1f} s")
    return failures


@torch.no_grad()
def _encode(
    config: RunConfig,
    encoder: TileEncoder,
    tiles: StepTiles,
    device: torch.device,
    advance: Callable[[int], object],
    should_stop: Callable[[], bool],
) -> np.ndarray:
    """Embeddings of a slide's tiles, float32 (N, D)."""
    embedding_ND = np.empty((tiles.num_tiles, encoder.dim), dtype=np.float32)
    ranges = list(chunk_ranges(tiles.num_tiles, config.execution.tiles_per_call))
    is_narrow = config.science.precision == "bfloat16"
    with ChunkFeed(tiles.images, device, cache_bytes=0) as feed:
        for number, (start, stop) in enumerate(ranges):
            if should_stop():
                raise Interrupted("stopped by a signal; the same command continues with the slides that are left")
            upcoming = ranges[number + 1] if number + 1 < len(ranges) else None
            image_nCHW = to_float(feed.get(start, stop, upcoming))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_narrow):
                embedding_nD = encoder(image_nCHW, None)
            embedding_ND[start:stop] = embedding_nD.float().cpu().numpy()
            advance(stop - start)
    return embedding_ND


def _slide_attributes(manifest: SlideManifest) -> dict[str, Attribute]:
    return trident_attributes(manifest) | {
        "bounds_x_px0": manifest.bounds_x_px0,
        "bounds_y_px0": manifest.bounds_y_px0,
        "tiles_sha256": manifest.index.sha256,
    }


def _unfinished(
    config: RunConfig, shards: ShardSet, folder: Path, kind: Kind, encoder: TileEncoder
) -> dict[str, dict[str, Attribute]]:
    """Slides that have no such features yet, and the attributes that their files will have."""
    made_by = encoder_attributes(config, encoder, kind)
    wanted = {slide_id: made_by | _slide_attributes(shards.manifest(slide_id)) for slide_id in shards.slide_ids}
    return {
        slide_id: attributes
        for slide_id, attributes in wanted.items()
        if not _is_finished(features_path(folder, slide_id), attributes)
    }


def _is_finished(path: Path, wanted: dict[str, Attribute]) -> bool:
    """Whether a file was made of the same tiles by the same encoder."""
    try:
        return path.is_file() and read_features_header(path).attrs == wanted
    except ShardError:  # damaged: it is written anew
        return False


def _share(shards: ShardSet, topology: Topology) -> list[str]:
    """Slides of a rank: the largest go first, each to the rank that has the fewest tiles."""
    sizes = {slide_id: shards.manifest(slide_id).num_tiles for slide_id in shards.slide_ids}
    loads = [0] * topology.world_size
    mine = []
    for slide_id in sorted(sizes, key=lambda slide_id: (-sizes[slide_id], slide_id)):
        rank = loads.index(min(loads))
        loads[rank] += sizes[slide_id]
        if rank == topology.rank:
            mine.append(slide_id)
    return mine


def _stamps(folder: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


@contextmanager
def _progress(
    config: RunConfig, topology: Topology, num_tiles: int, num_slides: int
) -> Iterator[tuple[Callable[[int], object], Callable[[str], None]]]:
    """A bar on a terminal, of the first rank's tiles; elsewhere a line per slide."""
    wanted, is_terminal = config.bookkeeping.progress, sys.stderr.isatty()
    of_ranks = "" if topology.world_size == 1 else f" (rank 0 of {topology.world_size})"
    hidden = not (wanted and is_terminal and topology.rank == 0)
    done = 0

    def say(line: str) -> None:
        nonlocal done
        done += 1
        if wanted and not is_terminal:
            rank = "" if topology.world_size == 1 else f"rank {topology.rank}: "
            print(f"{rank}[{done}/{num_slides}] {line}", flush=True)

    with tqdm(total=num_tiles, desc=f"features{of_ranks}", unit="tile", disable=hidden) as bar:
        yield bar.update, say


def _launch(config: RunConfig, folder: Path, kind: Kind, plugins: Sequence[str]) -> list[str]:
    """Encode on all ranks; lines of the slides that could not be encoded."""
    path = config.bookkeeping.out / "logs" / "features.yaml"
    replace_file(path, to_yaml(config))
    with tempfile.TemporaryDirectory(prefix="gigamil-") as failed:
        words = [str(path), "--to", str(folder), "--kind", kind, "--failed", failed]
        for plugin in plugins:
            words += ["--plugin", plugin]
        continues = "with the slides that are left"
        launch_ranks("gigamil.evaluate.features", words, config.execution, logs=None, continues=continues)
        lists = [json.loads(part.read_text(encoding="utf-8")) for part in Path(failed).iterdir()]
    return sorted(line for lines in lists for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Encode on this rank; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gigamil.evaluate.features", description=__doc__)
    parser.add_argument("config", help="YAML of the run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the features")
    parser.add_argument("--kind", choices=("float32", "float16"), default="float32")
    parser.add_argument(
        "--failed", type=Path, required=True, help="folder for a list of slides that could not be encoded"
    )
    parser.add_argument("--plugin", action="append", default=[], help="module that registers your encoders")
    arguments = parser.parse_args(argv)
    restore_devices()
    logging.basicConfig(level=logging.WARNING, format="gigamil: %(message)s", stream=sys.stderr)
    topology = detect_topology()
    try:
        with report_outcome(topology.rank), StopSignals() as stop:
            config = load_config(arguments.config)
            import_plugins(arguments.plugin)
            device = choose_device(config.execution.device, topology)
            torch.set_num_threads(config.execution.threads or int(os.environ.get("OMP_NUM_THREADS", "1")))
            failures = encode_share(config, arguments.to, topology, arguments.kind, device, lambda: stop.asked)
            # An exit code here would stop the other ranks: the command that started them raises.
            (arguments.failed / f"{topology.rank}.json").write_text(json.dumps(failures), encoding="utf-8")
    except GigamilError as error:
        return error.exit_code  # the command that started the ranks prints the message
    return 0


if __name__ == "__main__":
    sys.exit(main())

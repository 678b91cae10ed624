"""Where tiles come from is not what is learned: training on slide files, on shards of the same pixels in a folder and on a
web server, and on the cached features of a frozen encoder.

Bounds on features: an encoder call on other tiles rounds otherwise in float32, and so do sums over ranks; eight steps of
AdamW. The pixels of a slide file and of their copies in shards are equal, and so are all losses.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gigamil.config.schema import RunConfig, Slides
from gigamil.evaluate.features import cache_features
from gigamil.models.encoder import SmallCNN, encoders
from gigamil.parallel.topology import Topology
from gigamil.partition.curve import hilbert_sort
from gigamil.pipeline import split_cohort
from gigamil.shards.build import build_slide
from gigamil.shards.job import SlideJob
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import CLASSES, SPLITS, TILE_PX, tiny_run
from gigamil.testing.slides import write_pyramid_tiff
from gigamil.testing.web import Server
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

BOUND, NORM_BOUND = 5e-6, 1e-4
PLAIN = {"flips": False, "turns": False, "brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}
AGGREGATORS: dict[str, dict[str, Any]] = {
    "gated_attention": {"hidden": 8},
    "transformer": {"width": 16, "heads": 2},  # looks at positions
}
Pairs = dict[str, tuple[RunConfig, RunConfig]]


@encoders.register("quiet_cnn")
def quiet_cnn() -> SmallCNN:
    """A fixed random network that leaves torch's generator as it was: heads then start alike with it and without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SmallCNN(width=4)


def features_pair(folder: Path, name: str, execution: dict[str, Any]) -> tuple[RunConfig, RunConfig]:
    """A run end to end with a fixed encoder, and the run on its features of the same tiles."""
    science = {
        "encoder": {"name": "quiet_cnn", "freeze_blocks": 4},
        "aggregator": {"name": name, "options": AGGREGATORS[name]},
        "augment": PLAIN,
        "precision": "bfloat16" if name == "transformer" else "float32",
    }
    whole = tiny_run(folder, science=science, execution=execution)
    cache_features(whole.model_copy(update={"execution": whole.execution.model_copy(update={"ranks": 1})}))
    data = {"source": "features", "features": folder / "run" / "features"}
    out = {"out": folder / "cached"}
    return whole, tiny_run(folder, science=science, execution=execution, data=data, bookkeeping=out)


def slides_pair(folder: Path) -> tuple[RunConfig, RunConfig]:
    """A run on shards, and one on the slide files, whose own JPEG tiles the shards hold; with augmentation."""
    table, runs = folder / "slides.csv", []
    settings = Slides(tile_px=TILE_PX, tile_mpp=0.5, min_tissue=0.2, min_tissue_area_um2=100.0)
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "path", "patient_id", "label", "split"])
        for number, split in enumerate(SPLITS):
            path = folder / f"s{number}.tiff"
            noise = np.random.default_rng(number).integers(60, 190, (24, 32, 3), dtype=np.uint8)
            image = np.full((10 * TILE_PX, 12 * TILE_PX, 3), 245, np.uint8)
            image[TILE_PX * 2 : TILE_PX * 8, TILE_PX * 2 : TILE_PX * 10] = np.kron(noise, np.ones((8, 8, 1), np.uint8))
            write_pyramid_tiff(path, image, 0.5, tile=TILE_PX, quality=90)
            writer.writerow([f"s{number}", path, f"p{number}", CLASSES[number % 2], split])
            for kind in ("shards", "slides"):
                build_slide(SlideJob(f"s{number}", path, None, settings, folder / kind, hilbert_sort, kind == "shards"))
    for kind in ("shards", "slides"):
        data: dict[str, Any] = {
            "cohort": {"table": table, "classes": CLASSES},
            "slides": settings.model_dump(),
            "data": {"source": kind},
            "science": {"encoder": {"name": "small_cnn", "options": {"width": 4}}, "epochs": 1, "slides_per_step": 2},
            "execution": {"chunk": 16, "device": "cpu", "threads": 1, "timeout_s": 60, "decode_workers": 2},
            "bookkeeping": {"out": folder / f"run-{kind}", "shards": folder / kind, "mlflow": False, "progress": False},
        }
        runs.append(RunConfig.model_validate(data))
        split_cohort(runs[-1])
    return runs[0], runs[1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Runs that are to be equal."""
    found = {name: features_pair(tmp_path_factory.mktemp(name), name, {"zero_stage": 1}) for name in AGGREGATORS}
    return found | {"slides": slides_pair(tmp_path_factory.mktemp("slides"))}


@pytest.fixture(scope="module")
def names(pairs: Pairs) -> dict[str, tuple[set[str], set[str]]]:
    """Names of the parameters of each pair, after training all of them on one rank."""
    found = run_on_ranks(train, 1, 1, [config for pair in pairs.values() for config in pair])[0]
    return dict(zip(pairs, zip(found[::2], found[1::2], strict=True), strict=True))


def train(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[set[str]]:
    """Train each of them; the names of their parameters."""
    skip_kernel_build()
    ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
    found = []
    for config in configs:
        trainer = Trainer(config, ranks, torch.device("cpu"))
        trainer.fit()
        found.append(set(trainer.engine.state().parameters))
    return found


def measured(config: RunConfig) -> tuple[list[float], list[float]]:
    """Losses of steps and validations, and the gradient's norms."""
    lines = [json.loads(line) for line in (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] if line["kind"] == "step" else line["val_loss"] for line in lines]
    return losses, [line["grad_norm"] for line in lines if line["kind"] == "step"]


def assert_alike(whole: RunConfig, cached: RunConfig) -> None:
    losses, norms = measured(whole)
    assert len(set(losses)) == len(losses) == 10  # eight steps and two validations: the head does learn
    found, found_norms = measured(cached)
    assert found == pytest.approx(losses, rel=BOUND)
    assert found_norms == pytest.approx(norms, rel=NORM_BOUND)  # AdamW would hide a factor


@pytest.mark.parametrize("name", AGGREGATORS)
def test_training_on_features_is_training_with_the_encoder_fixed(
    pairs: Pairs, names: dict[str, tuple[set[str], set[str]]], name: str
) -> None:
    assert_alike(*pairs[name])
    whole, cached = names[name]
    assert cached == {parameter for parameter in whole if not parameter.startswith("encoder.")}


def test_so_it_is_on_two_ranks_and_with_partitioned_parameters(tmp_path: Path) -> None:
    pair = features_pair(tmp_path, "gated_attention", {"ranks": 2, "zero_stage": 3})
    run_on_ranks(train, 2, 2, list(pair))
    assert_alike(*pair)


def test_training_from_slide_files_is_training_on_shards_of_their_tiles(
    pairs: Pairs, names: dict[str, tuple[set[str], set[str]]]
) -> None:
    shards, slides = pairs["slides"]
    manifests = [ShardSet(config.bookkeeping.shard_root).manifest("s0") for config in (shards, slides)]
    assert [(m.stored, m.way) for m in manifests] == [(True, "raw"), (False, "raw")]
    assert manifests[0].num_raw == manifests[0].num_tiles == manifests[1].num_tiles > 20
    assert measured(slides) == measured(shards)
    assert names["slides"][0] == names["slides"][1]
    record = json.loads((slides.bookkeeping.out / "run.json").read_text())
    assert (record["source"], record["decoder"]) == ("slides", None)  # OpenSlide decodes


@pytest.mark.parametrize(
    "cached", [pytest.param(False, id="read there", marks=pytest.mark.slow), pytest.param(True, id="copied here")]
)
def test_training_from_a_web_server_is_training_from_a_folder(tmp_path: Path, cached: bool) -> None:
    here = tiny_run(tmp_path, execution={"ranks": 2, "decode_workers": 1})
    shards = ShardSet(here.bookkeeping.shard_root)
    tiles = [shards.manifest(slide_id).num_tiles for slide_id in shards.slide_ids]
    table = pa.table({"slide_id": shards.slide_ids, "tiles": tiles})  # a web server lists nothing
    pq.write_table(table, here.bookkeeping.shard_root / "cohort.parquet")
    cache = {"shard_cache": tmp_path / "cache", "shard_cache_gb": 1.0} if cached else {}
    with Server(here.bookkeeping.shard_root) as server:
        web = {"out": tmp_path / "web", "shards": server.url}
        there = tiny_run(tmp_path, execution={"ranks": 2, "decode_workers": 1} | cache, bookkeeping=web)
        run_on_ranks(train, 2, 2, [here, there])
        num_reads = sum(name.endswith(".tar") for name, _ in server.requests)
    assert measured(there) == measured(here)
    # Ten slides of one tar each, twice by two ranks; where they are copied, by the first that wants one.
    assert num_reads == 10 if cached else num_reads > 20
    assert (tmp_path / "cache").is_dir() is cached

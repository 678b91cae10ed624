"""On real tissue, does training the encoder end to end beat a frozen one, sampling, and iterative coupling?

Slides are mosaics of real H&E tiles of lung, 64 px a side: normal tissue with a nest of tumour tiles. The question is which tumour,
adenocarcinoma or squamous cell carcinoma, so that "cream or not" says nothing. A patient is a set of source fields that no other
patient has, and has one slide. Every regime sees the same slides, split and seeds, and starts from the same random weights (there
are no pretrained ones: `frozen` is random features). `streamed` is a dense ResNet up to its second layer, in place of the CNN of the
others. Evidence about the engineering, never a clinical result.

    python benchmarks/reproduce/lung.py --tiles FOLDER [--slides 96] [--seeds 1] [--epochs 12] [--regimes ...] [--out DIR]

FOLDER holds lung_tiles.tar and tiles.csv. Runs that are done are not done again. Writes <out>/comparison/ (table, intervals, curves); the
last line is JSON: AUC of each regime (mean over seeds), ci: {regime: [low, high]}, minus_frozen, seeds, ...
"""

import argparse
import csv
import io
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.evaluate.comparison import compare_runs, comparison_text
from gigamil.evaluate.features import cache_features
from gigamil.evaluate.pooled import Member, is_evaluated, write_study
from gigamil.pipeline import evaluate_model, split_cohort, train_model
from gigamil.testing.shards import make_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lung_mosaic import ADENO, NORMAL, SQUAMOUS, Tile, read_tiles

TILE_PX, TILE_MPP = 64, 1.75
CLASSES = ("adenocarcinoma", "squamous")
SPLITS = {"train": 0.5, "val": 0.2}  # of the slides of a class; the rest is test
REGIMES: dict[str, dict[str, Any]] = {
    "frozen": {"regime": "frozen"},
    "coupled": {"regime": {"name": "coupled", "rounds": 1, "tiles": 32, "tile_epochs": 3}},
    "sampled": {"regime": {"name": "sampled", "tiles": 12}},
    "end_to_end": {},
    "streamed": {"encoder": {"name": "resnet18", "dense": "layer2", "pool": 8}},
}


def write_cohort(folder: Path, tiles: Sequence[Tile], num_slides: int, seed: int) -> Path:
    """Shards of the mosaics, and the slide table with its split; what is there stays."""
    table = folder / "slides.csv"
    if table.is_file():
        return table
    fields: dict[str, dict[str, list[Tile]]] = {label: defaultdict(list) for label in (NORMAL, ADENO, SQUAMOUS)}
    for tile in tiles:
        fields[tile.label][tile.field].append(tile)
    rng = np.random.default_rng(seed)
    half = num_slides // 2
    dealt = {label: _dealt(fields[label], half, rng) for label in (ADENO, SQUAMOUS)}
    normal = _dealt(fields[NORMAL], 2 * half, rng)
    rows = []
    for number in range(2 * half):
        name = CLASSES[number % 2]
        tumour = dealt[ADENO if name == CLASSES[0] else SQUAMOUS][number // 2]
        slide_id = f"lung-{number:03d}"
        chosen = [normal[number][i] for i in rng.permutation(len(normal[number]))]
        # The nest lies in the middle of the normal tissue.
        middle = len(chosen) // 2
        jpegs = [_small(tile.jpeg) for tile in [*chosen[:middle], *tumour, *chosen[middle:]]]
        make_shards(folder / "shards", slide_id, jpegs, tile_px=TILE_PX, tile_mpp=TILE_MPP)
        share = (number // 2) / half
        side = "train" if share < SPLITS["train"] else "val" if share < sum(SPLITS.values()) else "test"
        rows.append([slide_id, f"{slide_id}.tiff", f"patient-{number:03d}", name, side])
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["slide_id", "path", "patient_id", "label", "split"], *rows])
    return table


def _dealt(fields: dict[str, list[Tile]], count: int, rng: np.random.Generator) -> list[list[Tile]]:
    """Whole fields, dealt to so many slides."""
    hands: list[list[Tile]] = [[] for _ in range(count)]
    names = sorted(fields)
    for number, position in enumerate(rng.permutation(len(names))):
        hands[number % count] += fields[names[position]]
    if not all(hands):
        raise SystemExit(f"{len(names)} fields are too few for {count} slides: take fewer --slides")
    return hands


def _small(jpeg: bytes) -> bytes:
    with Image.open(io.BytesIO(jpeg)) as image:
        pixels = np.asarray(image.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.BOX))
    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=92)
    return data


def run_config(table: Path, out: Path, regime: str, seed: int, epochs: int) -> RunConfig:
    """The same for all regimes but for what the regime is."""
    science = {
        "seed": seed,
        "encoder": {"name": "small_cnn", "options": {"width": 16}},
        "aggregator": {"options": {"hidden": 64}},
        "epochs": epochs,
        "slides_per_step": 4,
        "optim": {"lr_encoder": 1e-3, "lr_head": 1e-3, "warmup_steps": 5},
    } | REGIMES[regime]
    return absolute_paths(
        RunConfig.model_validate(
            {
                "cohort": {"table": table, "classes": CLASSES, "near_duplicates": "ignore"},
                "slides": {"tile_px": TILE_PX, "tile_mpp": TILE_MPP},
                "science": science,
                "execution": {"ranks": 1, "device": "auto", "chunk": 64},
                "bookkeeping": {"out": out, "shards": table.parent / "shards", "mlflow": False, "progress": False},
            }
        )
    )


def run(config: RunConfig) -> None:
    """Split, train, evaluate; what is done is not done again."""
    if is_evaluated(config.bookkeeping.out):
        return
    if config.data.source == "features":
        cache_features(config)
    split_cohort(config)
    train_model(config)
    evaluate_model(config)


def main() -> None:
    """Run all regimes and seeds, compare them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiles", type=Path, required=True, metavar="FOLDER", help="of lung_tiles.tar and tiles.csv")
    parser.add_argument("--slides", type=int, default=96, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="(%(default)s)")
    parser.add_argument(
        "--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES), metavar="NAME", help="(all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lung"), help="(%(default)s)")
    arguments = parser.parse_args()
    start = time.monotonic()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    cohort = out / f"cohort_{arguments.slides}"
    cohort.mkdir(exist_ok=True)
    table = write_cohort(cohort, read_tiles(arguments.tiles), arguments.slides, 0)
    seconds = {}
    for regime in arguments.regimes:
        begin = time.monotonic()
        members = [Member(0, seed, f"seed{seed}") for seed in range(arguments.seeds)]
        for member in members:
            run(run_config(table, out / regime / member.folder, regime, member.seed, arguments.epochs))
            print(f"{regime}, seed {member.seed}: done after {time.monotonic() - start:.0f} s", flush=True)
        write_study(out / regime, members)
        seconds[regime] = round(time.monotonic() - begin, 1)
    facts: dict[str, Any] = {}
    found = compare_runs([out / regime for regime in arguments.regimes], out / "comparison")
    print(comparison_text(found))
    for regime, one in zip(arguments.regimes, found["runs"], strict=True):
        facts[regime] = one["scores"]["metrics"]["auc"]["value"]
    facts["ci"] = {
        regime: one["scores"]["metrics"]["auc"]["ci"]
        for regime, one in zip(arguments.regimes, found["runs"], strict=True)
    }
    facts["minus_first"] = {
        regime: one["minus_first"]["metrics"]["auc"]["ci"] if one["minus_first"] else None
        for regime, one in zip(arguments.regimes, found["runs"], strict=True)
    }
    facts |= {"seeds": arguments.seeds, "slides": arguments.slides, "epochs": arguments.epochs, "run_seconds": seconds}
    print(f"written: {out / 'comparison' / 'comparison.html'}")
    print(json.dumps(facts | {"minutes": round((time.monotonic() - start) / 60, 1)}))


if __name__ == "__main__":
    main()

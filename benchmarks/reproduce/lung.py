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
import torch
from PIL import Image

from gigamil.config.load import absolute_paths
from gigamil.config.schema import Augment, RunConfig
from gigamil.data.augment import augment_block, to_float
from gigamil.evaluate.comparison import compare_runs, comparison_text
from gigamil.evaluate.features import cache_features
from gigamil.evaluate.pooled import Member, is_evaluated, write_study
from gigamil.pipeline import evaluate_model, split_cohort, train_model
from gigamil.testing.shards import make_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lung_mosaic import ADENO, NORMAL, SQUAMOUS, Tile, read_tiles

TILE_PX, TILE_MPP = 64, 1.75
import os

NUM_NORMAL, NUM_TUMOUR = eval(os.environ.get("NT", "(36, 4)"))  # tiles of a slide
SLIDES_PER_PATIENT = int(os.environ.get("SPP", "2"))
STAINING = Augment(
    brightness=0.1, contrast=0.1, saturation=0.3, stain=float(os.environ.get("ST", "0.4"))
)  # of each slide
CLASSES = ("adenocarcinoma", "squamous")
SPLITS = {"train": 0.5, "val": 0.2}  # of the slides of a class; the rest is test
REGIMES: dict[str, dict[str, Any]] = {
    "frozen": {"regime": "frozen", "epochs": 60},
    "coupled": {
        "regime": {
            "name": "coupled",
            "rounds": int(os.environ.get("RO", "2")),
            "tiles": 32,
            "tile_epochs": int(os.environ.get("TE", "4")),
        },
        "epochs": 60,
    },
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
    patients = half // SLIDES_PER_PATIENT  # of a class
    dealt = {label: _dealt(fields[label], patients, rng) for label in (ADENO, SQUAMOUS)}
    normal = _dealt(fields[NORMAL], 2 * patients, rng)
    rows = []
    for number in range(2 * patients * SLIDES_PER_PATIENT):
        patient = number // SLIDES_PER_PATIENT
        name = CLASSES[patient % 2]
        tumour = dealt[ADENO if name == CLASSES[0] else SQUAMOUS][patient // 2]
        slide_id = f"lung-{number:03d}"
        jpegs = slide_tiles(normal[patient], tumour, number, rng)
        make_shards(folder / "shards", slide_id, jpegs, tile_px=TILE_PX, tile_mpp=TILE_MPP)
        share = (patient // 2) / patients
        side = "train" if share < SPLITS["train"] else "val" if share < sum(SPLITS.values()) else "test"
        rows.append([slide_id, f"{slide_id}.tiff", f"patient-{patient:03d}", name, side])
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


def slide_tiles(normal: Sequence[Tile], tumour: Sequence[Tile], number: int, rng: np.random.Generator) -> list[bytes]:
    """JPEGs of a slide in the order of its tiles: a nest of tumour in the middle of normal tissue, all stained alike."""
    around = [_pixels(normal[i]) for i in rng.choice(len(normal), NUM_NORMAL)]
    nest = [_pixels(tumour[i]) for i in rng.choice(len(tumour), NUM_TUMOUR, replace=len(tumour) < NUM_TUMOUR)]
    image_nHW3 = np.stack([*around[: NUM_NORMAL // 2], *nest, *around[NUM_NORMAL // 2 :]])
    turned = [np.rot90(image if rng.random() < 0.5 else image[::-1], rng.integers(4)) for image in image_nHW3]
    key_1 = torch.tensor([number])
    stained = [augment_block(to_float(torch.from_numpy(image.copy())[None]), key_1, STAINING) for image in turned]
    return [simplejpeg.encode_jpeg(_bytes(image_1CHW), quality=92) for image_1CHW in stained]


def _pixels(tile: Tile) -> np.ndarray:
    with Image.open(io.BytesIO(tile.jpeg)) as image:
        return np.asarray(image.convert("RGB").resize((TILE_PX, TILE_PX), Image.Resampling.BOX))


def _bytes(image_1CHW: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray((image_1CHW[0].permute(1, 2, 0) * 255).round().byte().numpy())


def run_config(table: Path, out: Path, regime: str, seed: int, epochs: int) -> RunConfig:
    """The same for all regimes but for what the regime is."""
    science = {
        "seed": seed,
        "encoder": {"name": "small_cnn", "options": {"width": 16}},
        "aggregator": {"options": {"hidden": 64}},
        "epochs": epochs,
        "slides_per_step": 4,
        "optim": {
            "lr_encoder": float(os.environ.get("LR", "1e-3")),
            "lr_head": float(os.environ.get("LR", "1e-3")),
            "warmup_steps": 5,
        },
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

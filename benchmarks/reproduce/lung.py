"""On real tissue, does training the encoder end to end beat a frozen one, sampling, and iterative coupling?

Slides are mosaics of real H&E tiles of lung: normal tissue with a nest of tumour tiles in it. The question is which tumour,
adenocarcinoma or squamous cell carcinoma, so that "cream or not" says nothing; and every slide is stained in a way of its own, so
that colour says little. A patient is a set of source fields that no other patient has, and has two slides. Every regime sees the
same slides, split and seeds.

All encoders begin with the same weights, which have learned without labels to tell the source fields of the training patients apart
(exemplar CNN, Dosovitskiy et al. 2014, arXiv:1406.6909): what a pretrained encoder is to a user, for want of one, and as weak as a
few epochs make it. `streamed` is a dense encoder, which sees across the borders of tiles, and has such weights of its own. Evidence
about the engineering, never a clinical result.

    python benchmarks/reproduce/lung.py [--tiles FOLDER] [--slides 240] [--seeds 1] [--encoder small_cnn] [--tile-px 64] [--out DIR]

FOLDER holds lung_tiles.tar and tiles.csv. Runs that are done are not done again; another setting needs another DIR. Writes
lung.json and comparison/ (table, intervals, curves against tiles and seconds) into DIR; the last line is JSON: AUC of each regime
on the test slides (mean over seeds), ci: {regime: [low, high]}, minus_frozen: {regime: interval of the difference}, seeds, ...
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
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from gigamil import keyed
from gigamil.config.load import absolute_paths
from gigamil.config.schema import Augment, Encoder, RunConfig
from gigamil.data.augment import augment_block, augment_tiles, to_float
from gigamil.evaluate.comparison import compare_runs, comparison_text
from gigamil.evaluate.features import cache_features
from gigamil.evaluate.pooled import Member, is_evaluated, write_study
from gigamil.models.encoder import build_encoder
from gigamil.models.networks import FrozenStatistics
from gigamil.pipeline import evaluate_model, split_cohort, train_model
from gigamil.testing.shards import make_shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lung_mosaic import ADENO, NORMAL, SQUAMOUS, Tile, read_tiles, source_of
from options import need_file, real_data
from origin import origin

FIELD_UM = 112.0  # side of a source tile, nominal: the source states none
NUM_NORMAL, NUM_TUMOUR = 36, 4  # tiles of a slide
SLIDES_PER_PATIENT = 2
STAINING = Augment(brightness=0.1, contrast=0.1, saturation=0.3, stain=0.3)  # of a slide
PRETRAINING = Augment(brightness=0.2, contrast=0.2, saturation=0.4, stain=0.3)
CLASSES = ("adenocarcinoma", "squamous")
SPLITS = {"train": 0.5, "val": 0.2}  # of the patients of a class; the rest is test
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of tiles, and dense
    "small_cnn": ({"name": "small_cnn"}, {"name": "small_dense_cnn", "options": {"pool_kind": "mean"}}),
    "resnet18": ({"name": "resnet18"}, {"name": "resnet18", "dense": "layer2"}),
}
REGIMES: dict[str, dict[str, Any]] = {
    "frozen": {"regime": "frozen"},
    "coupled": {"regime": {"name": "coupled", "rounds": 3, "tiles": 40, "tile_epochs": 8}},
    "sampled": {"regime": {"name": "sampled", "tiles": 12}},
    "end_to_end": {},
    "streamed": {},
}
FROZEN_EPOCHS = 3  # times the epochs of the others, for classifiers of features, which cost next to nothing


def write_cohort(folder: Path, tiles: Sequence[Tile], num_slides: int, tile_px: int, seed: int = 0) -> Path:
    """Shards of the mosaics, the slide table with its split, and the fields of the training patients; what is there stays."""
    table = folder / "slides.csv"
    if table.is_file():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    fields: dict[str, dict[str, list[Tile]]] = {label: defaultdict(list) for label in (NORMAL, ADENO, SQUAMOUS)}
    for tile in tiles:
        fields[tile.label][tile.field].append(tile)
    rng = np.random.default_rng(seed)
    patients = num_slides // 2 // SLIDES_PER_PATIENT  # of a class
    tumour = {name: deal(fields[label], patients, rng) for name, label in zip(CLASSES, (ADENO, SQUAMOUS), strict=True)}
    normal = deal(fields[NORMAL], 2 * patients, rng)
    rows, seen = [], set()
    for number in range(2 * patients * SLIDES_PER_PATIENT):
        patient = number // SLIDES_PER_PATIENT
        name, rank = CLASSES[patient % 2], patient // 2
        side = (
            "train"
            if rank < SPLITS["train"] * patients
            else "val"
            if rank < sum(SPLITS.values()) * patients
            else "test"
        )
        own = normal[patient], tumour[name][rank]
        if side == "train":
            seen |= {tile.field for part in own for tile in part}
        slide_id = f"lung-{number:03d}"
        make_shards(
            folder / "shards",
            slide_id,
            slide_tiles(*own, number, tile_px, rng),
            tile_px=tile_px,
            tile_mpp=FIELD_UM / tile_px,
        )
        rows.append([slide_id, f"{slide_id}.tiff", f"patient-{patient:03d}", name, side])
    (folder / "fields.json").write_text(json.dumps(sorted(seen)), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["slide_id", "path", "patient_id", "label", "split"], *rows])
    return table


def deal(fields: dict[str, list[Tile]], count: int, rng: np.random.Generator) -> list[list[Tile]]:
    """Whole fields, dealt to so many patients."""
    hands: list[list[Tile]] = [[] for _ in range(count)]
    names = sorted(fields)
    for number, position in enumerate(rng.permutation(len(names))):
        hands[number % count] += fields[names[position]]
    if not all(hands):
        raise SystemExit(f"{len(names)} fields are too few for {count} patients: take fewer --slides")
    return hands


def slide_tiles(
    normal: Sequence[Tile], tumour: Sequence[Tile], number: int, tile_px: int, rng: np.random.Generator
) -> list[bytes]:
    """JPEGs of a slide in the order of its tiles: a nest of tumour in the middle of normal tissue, all stained alike."""
    around = [normal[i] for i in rng.choice(len(normal), NUM_NORMAL)]
    nest = [tumour[i] for i in rng.choice(len(tumour), NUM_TUMOUR)]
    half = NUM_NORMAL // 2
    image_nHW3 = [pixels(tile, tile_px) for tile in [*around[:half], *nest, *around[half:]]]
    turned = [np.rot90(image if rng.random() < 0.5 else image[::-1], rng.integers(4)).copy() for image in image_nHW3]
    stained = augment_block(to_float(torch.from_numpy(np.stack(turned))), torch.tensor([number]), STAINING)
    return [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray((image_CHW.permute(1, 2, 0) * 255).round().byte().numpy()), quality=92
        )
        for image_CHW in stained
    ]


def pixels(tile: Tile, tile_px: int) -> np.ndarray:
    """A source tile in the size of the slides'."""
    with Image.open(io.BytesIO(tile.jpeg)) as image:
        return np.asarray(image.convert("RGB").resize((tile_px, tile_px), Image.Resampling.BOX))


def pretrain(
    part: dict[str, Any], tiles: Sequence[Tile], fields: set[str], tile_px: int, epochs: int, path: Path
) -> None:
    """Weights of an encoder that tells the given fields apart, with no label of a slide; what is there stays."""
    if path.is_file():
        return
    shown = [tile for tile in tiles if tile.field in fields]
    names = sorted({tile.field for tile in shown})
    label_N = torch.tensor([names.index(tile.field) for tile in shown])
    image_NHWC = torch.from_numpy(np.stack([pixels(tile, tile_px) for tile in shown]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(Encoder.model_validate(part))
        head = nn.Linear(encoder.dim, len(names))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3)
    steps = epochs * -(-len(shown) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    encoder.train()
    for epoch in range(epochs):
        for rows in torch.randperm(len(shown), generator=generator).split(64):
            key_n = keyed.fold(torch.tensor([epoch]), rows)
            image_nCHW = augment_tiles(to_float(image_NHWC[rows]), key_n, PRETRAINING)
            loss = functional.cross_entropy(head(encoder(image_nCHW, None)), label_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    print(f"{path.stem}: tells {len(names)} fields apart after {epochs} epochs, loss {loss.item():.2f}", flush=True)
    backbone = encoder.backbone
    save_file((backbone.network if isinstance(backbone, FrozenStatistics) else backbone).state_dict(), path)


def encoder_of(arguments: argparse.Namespace, regime: str) -> dict[str, Any]:
    """The encoder of a regime, one number per tile."""
    of_tiles, dense = ENCODERS[arguments.encoder]
    if regime != "streamed":
        return of_tiles
    cells = arguments.tile_px // (16 if arguments.encoder == "small_cnn" else 8)
    if arguments.encoder == "small_cnn":
        return dense | {"options": dense["options"] | {"pool": cells}}
    return dense | {"pool": cells}


def run_config(arguments: argparse.Namespace, table: Path, out: Path, regime: str, seed: int) -> RunConfig:
    """The same for all regimes but for what the regime is."""
    weights = table.parent / f"{'dense' if regime == 'streamed' else 'tiles'}_{arguments.encoder}.safetensors"
    science = REGIMES[regime] | {
        "seed": seed,
        "encoder": encoder_of(arguments, regime) | {"weights": weights},
        "aggregator": {"options": {"hidden": 64}},
        "epochs": arguments.epochs * (FROZEN_EPOCHS if regime in ("frozen", "coupled") else 1),
        "slides_per_step": 4,
        "optim": {"lr_encoder": arguments.lr, "lr_head": 1e-3, "warmup_steps": 5},
    }
    return absolute_paths(
        RunConfig.model_validate(
            {
                "cohort": {"table": table, "classes": CLASSES, "near_duplicates": "ignore"},
                "slides": {"tile_px": arguments.tile_px, "tile_mpp": FIELD_UM / arguments.tile_px},
                "science": science,
                "execution": {"ranks": 1, "device": "auto", "chunk": 64},
                "bookkeeping": {"out": out, "shards": table.parent / "shards", "mlflow": False, "progress": False},
            }
        )
    )


def refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    """Leave with a message where the folder has runs of other settings, else note these."""
    path = out / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    other = [f"{name} {before.get(name)}" for name, value in settings.items() if before.get(name) != value]
    if other:
        raise SystemExit(f"'{out}' has runs with {', '.join(other)}: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def run(config: RunConfig) -> None:
    """Split, train, evaluate; what is done is not done again."""
    if is_evaluated(config.bookkeeping.out):
        return
    if config.data.source == "features":
        cache_features(config)
    split_cohort(config)
    train_model(config)
    evaluate_model(config)


def main(words: Sequence[str] | None = None) -> int:
    """Run all regimes and seeds, compare them; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    tiles_folder = real_data("lung_tiles")
    parser.add_argument(
        "--tiles", type=Path, default=tiles_folder, metavar="FOLDER", help="of lung_tiles.tar, tiles.csv"
    )
    parser.add_argument("--slides", type=int, default=240, help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of the end-to-end regimes (%(default)s)")
    parser.add_argument("--pretrain", type=int, default=4, metavar="EPOCHS", help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the encoder (%(default)s)")
    parser.add_argument("--encoder", choices=list(ENCODERS), default="small_cnn", help="(%(default)s)")
    parser.add_argument("--tile-px", type=int, default=64, help="64 to 224 (%(default)s)")
    parser.add_argument(
        "--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES), metavar="NAME", help="two at least (all)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/lung"), help="(%(default)s)")
    arguments = parser.parse_args(words)
    need_file(arguments.tiles / "lung_tiles.tar", "--tiles")
    if len(arguments.regimes) < 2:
        parser.error("--regimes: two at least, to be compared")
    start = time.monotonic()
    out = arguments.out.resolve()
    names = ("slides", "epochs", "pretrain", "lr", "encoder", "tile_px")
    refuse_other_settings(out, {name: getattr(arguments, name) for name in names} | source_of(arguments.tiles))
    cohort = out / f"cohort_{arguments.slides}_{arguments.tile_px}"
    tiles = read_tiles(arguments.tiles)
    table = write_cohort(cohort, tiles, arguments.slides, arguments.tile_px)
    fields = set(json.loads((cohort / "fields.json").read_text(encoding="utf-8")))
    for kind, regime in (("tiles", "end_to_end"), ("dense", "streamed")):
        if any((name == "streamed") == (kind == "dense") for name in arguments.regimes):
            path = cohort / f"{kind}_{arguments.encoder}.safetensors"
            pretrain(encoder_of(arguments, regime), tiles, fields, arguments.tile_px, arguments.pretrain, path)
    for regime in arguments.regimes:
        members = [Member(0, seed, f"seed{seed}") for seed in range(arguments.seeds)]
        for member in members:
            run(run_config(arguments, table, out / regime / member.folder, regime, member.seed))
            print(f"{regime}, seed {member.seed}: done after {time.monotonic() - start:.0f} s", flush=True)
        write_study(out / regime, members)
    found = compare_runs([out / regime for regime in arguments.regimes], out / "comparison")
    print(comparison_text(found))
    by_regime = dict(zip(arguments.regimes, found["runs"], strict=True))
    facts: dict[str, Any] = {regime: one["scores"]["metrics"]["auc"]["value"] for regime, one in by_regime.items()}
    facts["ci"] = {regime: one["scores"]["metrics"]["auc"]["ci"] for regime, one in by_regime.items()}
    facts[f"minus_{arguments.regimes[0]}"] = {
        regime: one["minus_first"]["metrics"]["auc"]["ci"] for regime, one in by_regime.items() if one["minus_first"]
    }
    facts |= {name: getattr(arguments, name) for name in ("seeds", "slides", "epochs", "encoder", "tile_px")}
    facts["minutes"] = round((time.monotonic() - start) / 60, 1)
    runs = [{key: value for key, value in one.items() if key != "folder"} for one in found["runs"]]
    whole = facts | {"runs": runs, **origin(__file__, words, torch=torch.__version__)}
    (out / "lung.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"written: {out / 'comparison' / 'comparison.html'}")
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

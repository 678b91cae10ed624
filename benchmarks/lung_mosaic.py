"""Does the whole pipeline learn from real tissue, and does its attention find the tumour?

Slides are mosaics of real H&E tiles of lung: an irregular piece of tissue made of normal tiles on a white ground. In a
positive slide 2 to 6 % of the tiles, in one to three nests, are tumour (adenocarcinoma or squamous cell carcinoma, one
kind per patient). A patient is a set of source fields that no other patient has, so no field is on both sides of the
split and patients may be resampled for the interval. The slides then go through tile, train on several ranks, evaluate.

Expected: an AUC near 1 and attention on the tumour tiles. The tile classes differ in colour (normal tiles have a cream
ground), so this is easy, and `auc_colour`, a score of colour alone that learns nothing, says how easy: it is evidence
that the engineering works, and no clinical result.

    python benchmarks/lung_mosaic.py --tiles FOLDER [--out DIR] [--ranks 2] [--slides 64] [--dense] [--build-only]

FOLDER holds lung_tiles.tar (JPEG tiles of 224 x 224 pixels) and tiles.csv (path, label, group_id = source field).
The last line is JSON: auc, auc_ci, slides, tiles, ranks, tumour_hit, ...
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from scipy import ndimage

from gigamil.config import schema
from gigamil.evaluate.attention import attention_path, lesion_hit, read_attention
from gigamil.metrics.classification import auc
from gigamil.pipeline import run_pipeline
from gigamil.shards.read import ShardSet
from gigamil.testing.tiff import write_pyramid_tiff

CELL_PX = 224  # side of a source tile, and of a cell of the mosaic
MOSAIC_MPP = 0.5  # nominal: the source states none
NUM_CELLS = (14, 26)  # cells per side: 3136 to 5824 pixels
COVER = (0.35, 0.6)  # share of the slide that is tissue
TUMOUR_SHARE = (0.02, 0.06)  # share of the tissue tiles of a positive slide
GLASS = 244  # grey level of the ground
OUTLINE_PX = 16  # resolution at which the outline of the tissue is drawn
CLASSES = ("normal", "tumour")
NORMAL, ADENO, SQUAMOUS = "lung_n", "lung_aca", "lung_scc"
SPLIT_SHARES = {"train": 0.5, "val": 0.15}  # of the patients of a class; the rest is test

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Tile:
    """One source tile."""

    field: str
    label: str
    jpeg: bytes


@dataclass(frozen=True)
class SlidePlan:
    """What a slide is drawn from: the tiles of its patient's own fields."""

    slide_id: str
    patient_id: str
    label: str
    split: str
    seed: tuple[int, int]
    normal: tuple[Tile, ...]
    tumour: tuple[Tile, ...]


@dataclass(frozen=True)
class Drawn:
    """Facts of a drawn slide."""

    slide_id: str
    num_tiles: int
    boxes_um: tuple[Box, ...]
    bluest: float


def read_tiles(folder: Path) -> list[Tile]:
    """Every tile that tiles.csv lists, with its JPEG bytes from lung_tiles.tar."""
    with tarfile.open(folder / "lung_tiles.tar") as tar:
        jpegs = {member.name: _bytes_of(tar, member) for member in tar if member.isfile()}
    with (folder / "tiles.csv").open(newline="", encoding="utf-8") as handle:
        return [
            Tile(f"{row['label']}-{row['group_id']}", row["label"], jpegs[row["path"]])
            for row in csv.DictReader(handle)
        ]


def source_of(folder: Path) -> dict[str, str | int]:
    """What tells one set of source tiles from another, without reading all of it."""
    return {
        "tiles_csv_sha256": hashlib.sha256((folder / "tiles.csv").read_bytes()).hexdigest(),
        "tiles_tar_bytes": (folder / "lung_tiles.tar").stat().st_size,
    }


def plan_slides(tiles: Sequence[Tile], num_slides: int, seed: int) -> list[SlidePlan]:
    """Deal the source fields to patients, the patients to splits, and name the slides.

    Of every three patients the first has two slides; every other patient is positive.
    """
    patients = [3 * (slide // 4) + (0, 0, 1, 2)[slide % 4] for slide in range(num_slides)]
    num_patients = patients[-1] + 1
    rng = np.random.default_rng(seed)
    positives = list(range(1, num_patients, 2))
    normal = _deal(tiles, NORMAL, list(range(num_patients)), rng)
    tumour = _deal(tiles, ADENO, positives[0::2], rng) | _deal(tiles, SQUAMOUS, positives[1::2], rng)
    splits = _split(list(range(0, num_patients, 2)), rng) | _split(positives, rng)
    return [
        SlidePlan(
            slide_id=f"mosaic-{slide:03d}",
            patient_id=f"patient-{patient:03d}",
            label=CLASSES[patient % 2],
            split=splits[patient],
            seed=(seed, slide),
            normal=normal[patient],
            tumour=tumour.get(patient, ()),
        )
        for slide, patient in enumerate(patients)
    ]


def check_fields(plans: Sequence[SlidePlan]) -> dict[str, int]:
    """Count the source fields of each split; a field that two patients share is an error."""
    owner: dict[str, str] = {}
    fields: dict[str, set[str]] = defaultdict(set)
    for plan in plans:
        for tile in (*plan.normal, *plan.tumour):
            if owner.setdefault(tile.field, plan.patient_id) != plan.patient_id:
                raise ValueError(f"field {tile.field} belongs to {owner[tile.field]} and to {plan.patient_id}")
            fields[plan.split].add(tile.field)
    return {split: len(names) for split, names in fields.items()}


def draw_slide(plan: SlidePlan) -> tuple[np.ndarray, Drawn]:
    """Draw one mosaic: uint8 (H, W, 3) and the facts about it. A function of the plan alone."""
    rng = np.random.default_rng(plan.seed)
    rows, cols = rng.integers(NUM_CELLS[0], NUM_CELLS[1], size=2, endpoint=True)
    tissue_hw = _tissue_outline(rows, cols, rng)
    share_rc = tissue_hw.reshape(rows, CELL_PX // OUTLINE_PX, cols, CELL_PX // OUTLINE_PX).mean(axis=(1, 3))
    tumour_rc = _nests(share_rc, rng) if plan.tumour else np.zeros_like(share_rc, dtype=bool)

    image_HW3 = np.full((rows * CELL_PX, cols * CELL_PX, 3), GLASS, dtype=np.uint8)
    bluest = -255.0
    for row, col in np.argwhere(share_rc > 0):
        choice = plan.tumour if tumour_rc[row, col] else plan.normal
        tile_HW3 = _any_way_up(simplejpeg.decode_jpeg(choice[rng.integers(len(choice))].jpeg), rng)
        y, x = row * CELL_PX, col * CELL_PX
        cell_hw = tissue_hw[
            y // OUTLINE_PX : (y + CELL_PX) // OUTLINE_PX, x // OUTLINE_PX : (x + CELL_PX) // OUTLINE_PX
        ]
        inside_HW = cell_hw.repeat(OUTLINE_PX, axis=0).repeat(OUTLINE_PX, axis=1)
        image_HW3[y : y + CELL_PX, x : x + CELL_PX][inside_HW] = tile_HW3[inside_HW]
        if cell_hw.all():
            red, _, blue = tile_HW3.mean(axis=(0, 1))
            bluest = max(bluest, float(blue - red))
    boxes = tuple(_box_um(row, col) for row, col in np.argwhere(tumour_rc))
    return image_HW3, Drawn(plan.slide_id, int(np.count_nonzero(share_rc)), boxes, bluest)


def build(tiles_folder: Path, out: Path, num_slides: int, seed: int, workers: int) -> dict[str, Any]:
    """Write the slides, slides.csv and mosaic.json; the latter appears last and lets a second run skip the drawing."""
    wanted = {"slides": num_slides, "seed": seed, **source_of(tiles_folder)}
    done = out / "mosaic.json"
    if done.is_file():
        mosaic: dict[str, Any] = json.loads(done.read_text())
        if mosaic["wanted"] == wanted:
            print(f"slides of an earlier run are used: {out}")
            return mosaic
    (out / "slides").mkdir(parents=True, exist_ok=True)
    plans = plan_slides(read_tiles(tiles_folder), num_slides, seed)
    fields = check_fields(plans)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        drawn = {facts.slide_id: facts for facts in pool.map(_write_slide, plans, [out] * len(plans))}
    _write_table(out / "slides.csv", plans)
    mosaic = {
        "wanted": wanted,
        "fields": fields,
        "cells": {name: facts.num_tiles for name, facts in drawn.items()},
        "tumour_um": {name: facts.boxes_um for name, facts in drawn.items() if facts.boxes_um},
        "bluest": {name: facts.bluest for name, facts in drawn.items()},
    }
    done.write_text(json.dumps(mosaic, indent=1) + "\n")
    _print_cohort(plans, mosaic)
    return mosaic


def run_config(out: Path, ranks: int, tile_px: int, epochs: int, dense: bool = False) -> schema.RunConfig:
    """The run: one stored tile of `tile_px` pixels covers one source tile; strong colour jitter, as colour is a cue.

    Args:
        dense: stream a small network over the whole slide, with the head of StreamingCLAM, in place of tiles one by one.
    """
    encoder, aggregator, name = schema.Encoder(name="small_cnn"), schema.Aggregator(), "run"
    rate, slides_per_step = 1e-3, 4
    if dense:
        encoder = schema.Encoder(name="small_dense_cnn", options={"pool": tile_px // 16})
        aggregator = schema.Aggregator(name="clam_sb", options={"width": 64, "hidden": 64, "k": 1})
        # A slide is recoloured as a whole, so colour says less, and the instances of CLAM mislead it at first.
        name, rate, slides_per_step = "run_dense", 2e-3, 2
    return schema.RunConfig(
        cohort=schema.Cohort(table=out / "slides.csv", classes=CLASSES),
        slides=schema.Slides(tile_px=tile_px, tile_mpp=MOSAIC_MPP * CELL_PX / tile_px, min_tissue=0.2),
        science=schema.Science(
            encoder=encoder,
            aggregator=aggregator,
            augment=schema.Augment(brightness=0.2, contrast=0.2, saturation=0.3, stain=0.2),
            optim=schema.Optim(lr_encoder=rate, lr_head=rate, warmup_steps=16),
            epochs=epochs,
            slides_per_step=slides_per_step,
        ),
        execution=schema.Execution(ranks=ranks),
        bookkeeping=schema.Bookkeeping(out=out / name, experiment="lung_mosaic", name="lung_mosaic"),
    )


def tumour_attention(
    run: Path, rows: Sequence[Mapping[str, str]], tumour_um: Mapping[str, Sequence[Box]]
) -> dict[str, float]:
    """Over held-out positive slides: mean share of the 1 % most attended tiles on tumour, and that share by chance."""
    hits, chance = [], []
    for row in rows:
        if row["split"] == "test" and row["label"] == CLASSES[1]:
            attention = read_attention(attention_path(run, row["slide_id"]))
            hits.append(lesion_hit(attention, tumour_um[row["slide_id"]]))
            chance.append(lesion_hit(attention, tumour_um[row["slide_id"]], fraction=1.0))
    return {"tumour_hit": float(np.mean(hits)), "tumour_hit_by_chance": float(np.mean(chance))}


def colour_auc(rows: Sequence[Mapping[str, str]], bluest: Mapping[str, float]) -> float | None:
    """AUC on the held-out slides of the bluest tile's mean blue minus red: colour alone, nothing learned."""
    held_out = [row for row in rows if row["split"] == "test"]
    label_N = np.array([CLASSES.index(row["label"]) for row in held_out])
    score_N = np.array([bluest[row["slide_id"]] for row in held_out])
    ranked_N = np.argsort(np.argsort(score_N)) / len(score_N)
    return auc(label_N, np.stack([1 - ranked_N, ranked_N], axis=1))


def main(words: Sequence[str] | None = None) -> None:
    """Build the slides, run the pipeline, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, required=True, help="folder with lung_tiles.tar and tiles.csv")
    parser.add_argument("--out", type=Path, default=Path("runs/lung_mosaic"), help="folder for slides and the run")
    parser.add_argument("--ranks", type=int, default=2, help="DeepSpeed ranks on this machine")
    parser.add_argument("--slides", type=int, default=64, help="slides to build")
    parser.add_argument("--epochs", type=int, help="epochs of training; default 15, or 20 with --dense")
    parser.add_argument("--tile-px", type=int, default=64, help="side to which a source tile is reduced")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mosaics")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw slides")
    parser.add_argument(
        "--dense", action="store_true", help="a network over the whole slide, and CLAM (docs/streaming.md)"
    )
    parser.add_argument("--build-only", action="store_true", help="write the slides and stop")
    args = parser.parse_args(words)

    start = time.monotonic()
    out = args.out.resolve()
    mosaic = build(args.tiles, out, args.slides, args.seed, args.workers)
    if args.build_only:
        return
    epochs = args.epochs or (20 if args.dense else 15)
    config = run_config(out, args.ranks, args.tile_px, epochs, args.dense)
    result = run_pipeline(config)
    shards = ShardSet(config.bookkeeping.shard_root)
    with (out / "slides.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    summary = {
        "auc": result["auc"],
        "auc_ci": result["auc_ci"],
        "auc_colour": colour_auc(rows, mosaic["bluest"]),
        **tumour_attention(config.bookkeeping.out, rows, mosaic["tumour_um"]),
        "slides": len(rows),
        "held_out": sum(row["split"] == "test" for row in rows),
        "tiles": sum(shards.manifest(row["slide_id"]).num_tiles for row in rows),
        "fields": mosaic["fields"],
        "ranks": args.ranks,
        "seconds": round(time.monotonic() - start, 1),
        "out": str(out),
    }
    for name, value in summary.items():
        print(f"{name:<22}{value}")
    print(json.dumps(summary))


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(member)
    assert handle is not None, "only regular files are asked for"
    return handle.read()


def _deal(
    tiles: Sequence[Tile], label: str, patients: Sequence[int], rng: np.random.Generator
) -> dict[int, tuple[Tile, ...]]:
    """Deal the fields of one label to the patients like cards; each patient gets all tiles of its fields."""
    by_field: dict[str, list[Tile]] = defaultdict(list)
    for tile in tiles:
        if tile.label == label:
            by_field[tile.field].append(tile)
    if len(by_field) < len(patients):
        raise SystemExit(
            f"{len(patients)} patients need a field of {label} each, there are {len(by_field)}: fewer --slides"
        )
    hands: dict[int, list[Tile]] = {patient: [] for patient in patients}
    for number, name in enumerate(rng.permutation(sorted(by_field))):
        hands[patients[number % len(patients)]] += by_field[name]
    return {patient: tuple(hand) for patient, hand in hands.items()}


def _split(patients: Sequence[int], rng: np.random.Generator) -> dict[int, str]:
    """Patients of one class to train, val and test."""
    splits: dict[int, str] = {}
    rest = [int(patient) for patient in rng.permutation(patients)]
    for name, share in SPLIT_SHARES.items():
        count = max(1, round(share * len(patients)))
        splits |= dict.fromkeys(rest[:count], name)
        rest = rest[count:]
    return splits | dict.fromkeys(rest, "test")


def _tissue_outline(rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Where there is tissue, one value per OUTLINE_PX pixels: a hill with smooth noise, cut at the wanted cover."""
    height, width = rows * CELL_PX // OUTLINE_PX, cols * CELL_PX // OUTLINE_PX
    y_h1, x_1w = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    noise_hw = sum(
        weight * ndimage.zoom(rng.standard_normal((size, size)), (height / size, width / size), order=3)
        for size, weight in ((4, 0.30), (9, 0.12), (40, 0.03))
    )
    # The fourth power leaves the middle to the noise and keeps the rim free of tissue.
    hill_hw = noise_hw - 1.5 * (x_1w**4 + y_h1**4) - 0.4 * (x_1w**2 + y_h1**2)
    return hill_hw > np.quantile(hill_hw, 1 - rng.uniform(*COVER))


def _nests(share_rc: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cells that become tumour: one to three compact nests inside the tissue."""
    whole_rc = share_rc == 1
    num_tissue = np.count_nonzero(share_rc)
    wanted = max(3, round(rng.uniform(*TUMOUR_SHARE) * num_tissue))
    cells = np.argwhere(whole_rc)
    centres = cells[rng.choice(len(cells), size=rng.integers(1, 4), replace=False)]
    distance = np.min(np.hypot(*(cells[:, None, :] - centres[None]).transpose(2, 0, 1)), axis=1)
    nearest = cells[np.argsort(distance + rng.uniform(0, 0.8, len(cells)), kind="stable")[:wanted]]
    tumour_rc = np.zeros_like(whole_rc)
    tumour_rc[tuple(nearest.T)] = True
    return tumour_rc


def _any_way_up(tile_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turned = np.rot90(tile_HW3, rng.integers(4))
    return turned[:, ::-1] if rng.integers(2) else turned


def _box_um(row: int, col: int) -> Box:
    side = CELL_PX * MOSAIC_MPP
    return (float(col * side), float(row * side), float((col + 1) * side), float((row + 1) * side))


def _write_slide(plan: SlidePlan, out: Path) -> Drawn:
    image_HW3, drawn = draw_slide(plan)
    write_pyramid_tiff(out / "slides" / f"{plan.slide_id}.tiff", image_HW3, MOSAIC_MPP)
    return drawn


def _write_table(path: Path, plans: Sequence[SlidePlan]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(["slide_id", "path", "patient_id", "label", "split"])
        for plan in plans:
            table.writerow([plan.slide_id, f"slides/{plan.slide_id}.tiff", plan.patient_id, plan.label, plan.split])


def _print_cohort(plans: Sequence[SlidePlan], mosaic: Mapping[str, Any]) -> None:
    print(f"{'split':<8}{'normal':>8}{'tumour':>8}{'patients':>10}{'fields':>8}{'tiles':>8}")
    for split in ("train", "val", "test"):
        members = [plan for plan in plans if plan.split == split]
        label = Counter(plan.label for plan in members)
        patients = len({plan.patient_id for plan in members})
        tiles = sum(mosaic["cells"][plan.slide_id] for plan in members)
        counts = f"{label['normal']:>8}{label['tumour']:>8}{patients:>10}"
        print(f"{split:<8}{counts}{mosaic['fields'].get(split, 0):>8}{tiles:>8}")


if __name__ == "__main__":
    main()

"""A run small enough to be trained many times in tests: shards without slide files, and the configuration for them."""

import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.pipeline import split_cohort
from gigamil.testing.shards import make_shards, noise_jpegs

TILE_PX = 32
CLASSES = ("dark", "light")
# Unequal slides, one of a single tile; two classes in turn; every split has both.
SIZES = (23, 17, 30, 1, 12, 26, 8, 19, 21, 14, 10, 16)
SPLITS = ("train", "train", "train", "train", "train", "train", "train", "train", "val", "val", "test", "test")


def tiny_run(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Write a cohort of twelve slides of noise, its shards and its split, and return a configuration to train on it.

    Args:
        folder: gets `cohort/` (shared by every run made here) and `run/`.
        sections: keys to change, for example `execution={"ranks": 2}`.
    """
    table = folder / "cohort" / "slides.csv"
    shards = folder / "cohort" / "shards"
    if not table.is_file():
        _write_cohort(table, shards)
    data: dict[str, Any] = {
        "cohort": {"table": table, "classes": CLASSES},
        "slides": {"tile_px": TILE_PX, "tile_mpp": 1.0},
        "science": {
            "encoder": {"name": "small_cnn", "options": {"width": 4, "dropout": 0.1}},
            "aggregator": {"options": {"hidden": 8}},
            "epochs": 2,
            "slides_per_step": 2,
            "optim": {"lr_encoder": 1e-3, "lr_head": 1e-3, "warmup_steps": 2},
        },
        "execution": {"ranks": 1, "chunk": 8, "device": "cpu", "threads": 1, "timeout_s": 60},
        "bookkeeping": {"out": folder / "run", "shards": shards, "mlflow": False, "progress": False},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    config = absolute_paths(RunConfig.model_validate(data))
    split_cohort(config)
    return config


def noise_run(
    folder: Path,
    encoder: str,
    options: dict[str, Any] | None = None,
    *,
    tile_px: int,
    size: int,
    execution: dict[str, Any],
    **science: Any,
) -> RunConfig:
    """Eight equal slides of noise, two in a step, and a configuration to train on them for an epoch of two steps.

    Args:
        folder: gets `cohort/` (shared by every run made here) and a new run folder.
        encoder, options: its name, and its keyword arguments.
        tile_px, size: side of a tile, and tiles of a slide.
        execution: keys to change.
        science: likewise.
    """
    table, shards = folder / "cohort" / "slides.csv", folder / "cohort" / "shards"
    if not table.is_file():
        table.parent.mkdir(parents=True)
        rows = [["slide_id", "path", "patient_id", "label", "split"]]
        for number, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
            rows.append([f"s{number}", f"s{number}.tiff", f"p{number}", CLASSES[number % 2], split])
            jpegs = noise_jpegs(size, tile_px, seed=number)
            make_shards(shards, f"s{number}", jpegs, tile_px=tile_px, tile_mpp=1.0)
        with table.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    data = {
        "cohort": {"table": table, "classes": CLASSES},
        "slides": {"tile_px": tile_px, "tile_mpp": 1.0},
        "science": {"encoder": {"name": encoder, "options": options or {}}, "epochs": 1, "slides_per_step": 2}
        | science,
        "execution": {"chunk": 16, "device": "cpu", "threads": 1, "timeout_s": 240} | execution,
        "bookkeeping": {"out": tempfile.mkdtemp(dir=folder), "shards": shards, "mlflow": False, "progress": False},
    }
    config = absolute_paths(RunConfig.model_validate(data))
    split_cohort(config)
    return config


def _write_cohort(table: Path, shards: Path) -> None:
    generator = np.random.default_rng(0)
    table.parent.mkdir(parents=True)
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "path", "patient_id", "label", "split"])
        for number, (size, split) in enumerate(zip(SIZES, SPLITS, strict=True)):
            label = CLASSES[number % 2]
            writer.writerow([f"s{number:02d}", f"s{number:02d}.tiff", f"p{number:02d}", label, split])
            low, high = (0, 160) if label == "dark" else (96, 256)
            tiles = generator.integers(low, high, (size, TILE_PX, TILE_PX, 3), dtype=np.uint8)
            jpegs = [simplejpeg.encode_jpeg(tile, quality=90) for tile in tiles]
            make_shards(shards, f"s{number:02d}", jpegs, tile_px=TILE_PX, tile_mpp=1.0)

"""A run folder with predictions and attention over real shards, small enough for every test."""

from pathlib import Path

import numpy as np
import pytest

from gigamil.evaluate.attention import Attention, attention_path, write_attention
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs

CLASSES = ("normal", "tumour")
TILE_PX, TILE_MPP = 16, 1.0
NUM_TILES = 30


def some_predictions(num_slides: int = 12) -> Predictions:
    """Slides s00, s01, ...: two per patient, thirds in train, val and test; s05 is predicted wrongly."""
    numbers = range(num_slides)
    label = np.array([number // 3 % 2 for number in numbers])
    tumour = np.where(label == 1, 0.9, 0.2) - 0.005 * np.arange(num_slides)
    tumour[5] = 0.1
    return Predictions(
        slide_ids=tuple(f"s{number:02d}" for number in numbers),
        patient_ids=tuple(f"p{number // 2}" for number in numbers),
        labels=tuple(CLASSES[k] for k in label),
        splits=tuple(("train", "val", "test")[number % 3] for number in numbers),
        classes=CLASSES,
        probs_NK=np.stack([1 - tumour, tumour], axis=1),
    )


def some_attention(shards: ShardSet, slide_id: str) -> Attention:
    """Attention that grows with the tile number."""
    index = shards.index(slide_id)
    weight = np.arange(1, len(index) + 1, dtype=np.float32)
    size = TILE_PX * TILE_MPP, TILE_PX * TILE_MPP
    return Attention(slide_id, index.number, index.x_um, index.y_um, weight / weight.sum(), size, size)


@pytest.fixture
def predictions() -> Predictions:
    return some_predictions()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards of every slide, made once; no test may change them."""
    root = tmp_path_factory.mktemp("shards")
    for seed, slide_id in enumerate(some_predictions().slide_ids):
        make_shards(root, slide_id, noise_jpegs(NUM_TILES, TILE_PX, seed), tile_px=TILE_PX, tile_mpp=TILE_MPP)
    return ShardSet(root)


@pytest.fixture
def run(tmp_path: Path, predictions: Predictions, shards: ShardSet) -> Path:
    folder = tmp_path / "run"
    write_predictions(folder / FILE_NAME, predictions)
    for slide_id in predictions.slide_ids:
        write_attention(attention_path(folder, slide_id), some_attention(shards, slide_id))
    return folder

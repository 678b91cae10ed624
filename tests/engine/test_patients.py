"""All slides of a patient as one bag: the same training, to the bit, as on slides whose tiles were joined beforehand."""

import csv
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.errors import CohortError, ConfigError
from gigamil.evaluate.attention import attention_path, read_attention
from gigamil.evaluate.features import cache_features
from gigamil.evaluate.pooled import read_pooled
from gigamil.evaluate.predictions import read_predictions
from gigamil.parallel.topology import Topology
from gigamil.pipeline import evaluate_model, split_cohort, train_model
from gigamil.testing.faults import step_losses
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

TILE_PX = 32
PARTS = ((5, 9), (7,), (3, 4, 8), (11, 2), (6, 6), (1, 13), (9,), (4, 5))  # tiles of the slides of each patient
SPLITS = ("train",) * 4 + ("val",) * 2 + ("test",) * 2
CLASSES = ("dark", "light")


def _config(folder: Path, *, joined: bool, out: str, labels: Sequence[str] | None = None, **changes: Any) -> RunConfig:
    """A cohort of slides, or of one slide per patient that has all their tiles."""
    cohort = folder / ("joined" if joined else "slides")
    table = cohort / "slides.csv"
    rows = []
    for number, parts in enumerate(PARTS):
        jpegs = [noise_jpegs(size, TILE_PX, seed=10 * number + part) for part, size in enumerate(parts)]
        label, patient = CLASSES[number % 2], f"p{number}"
        slides = {patient: list(chain(*jpegs))} if joined else {f"{patient}-{i}": own for i, own in enumerate(jpegs)}
        for slide_id, own in slides.items():
            if not (cohort / "shards" / slide_id).is_dir():
                make_shards(cohort / "shards", slide_id, own, tile_px=TILE_PX, tile_mpp=1.0)
            rows.append([slide_id, f"{slide_id}.tiff", patient, label, SPLITS[number]])
    for row, label in enumerate(labels or ()):
        rows[row][3] = label
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["slide_id", "path", "patient_id", "label", "split"], *rows])
    science = {
        "bag": "slide" if joined else "patient",
        "encoder": {"name": "small_cnn", "options": {"width": 4, "dropout": 0.1}},
        "aggregator": {"options": {"hidden": 8}},
        "epochs": 2,
        "slides_per_step": 2,
        "optim": {"lr_encoder": 1e-2, "lr_head": 1e-2, "warmup_steps": 1},
    }
    config = RunConfig.model_validate(
        {
            "cohort": {"table": table, "classes": CLASSES},
            "slides": {"tile_px": TILE_PX, "tile_mpp": 1.0},
            "science": science | changes.pop("science", {}),
            "execution": {"ranks": 1, "chunk": 4, "device": "cpu", "threads": 1, "timeout_s": 60} | changes,
            "bookkeeping": {"out": folder / out, "shards": cohort / "shards", "mlflow": False, "progress": False},
        }
    )
    config = absolute_paths(config)
    if config.data.source == "features":
        cache_features(config)
    split_cohort(config)
    return config


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_bag_of_a_patient_is_a_slide_with_all_tiles(tmp_path: Path, ranks: int) -> None:
    configs = [_config(tmp_path, joined=joined, out=f"run{joined}", ranks=ranks) for joined in (True, False)]
    for config in configs:
        train_model(config)
    assert step_losses(configs[1]) == step_losses(configs[0])
    wanted, found = (evaluate_model(config) for config in configs)
    assert found["unit"] == "patient"
    assert found["splits"] == wanted["splits"], "patients are scored, not slides"
    whole, parts = (read_predictions(config.bookkeeping.out / "predictions.csv") for config in configs)
    prob_of = dict(zip(whole.slide_ids, whole.probs_NK, strict=True))
    assert len(parts) == sum(len(own) for own, split in zip(PARTS, SPLITS, strict=True) if split != "train")
    for slide_id, patient, probs_K in zip(parts.slide_ids, parts.patient_ids, parts.probs_NK, strict=True):
        np.testing.assert_array_equal(probs_K, prob_of[patient], err_msg=slide_id)
    whole_N = read_attention(attention_path(configs[0].bookkeeping.out, "p5")).attention_N.astype(np.float64)
    first = 0
    for slide_id, size in (("p5-0", 1), ("p5-1", 13)):
        own_N, attention = (
            whole_N[first : first + size],
            read_attention(attention_path(configs[1].bookkeeping.out, slide_id)),
        )
        np.testing.assert_allclose(attention.attention_N, own_N / own_N.sum(), rtol=1e-5)
        assert attention.number_N.tolist() == list(range(size))
        first += size
    assert len(read_pooled(configs[1].bookkeeping.out).slide_ids) == 2, "studies and comparisons count patients"


@pytest.mark.slow
def test_features_and_regions_of_a_patient(tmp_path: Path) -> None:
    frozen = _config(tmp_path, joined=False, out="frozen", science={"regime": "frozen"})
    train_model(frozen)
    assert evaluate_model(frozen)["unit"] == "patient"
    regions = {"regime": {"name": "sampled", "tiles": 4, "how": "regions"}}
    train_model(_config(tmp_path, joined=False, out="regions", science=regions))


def test_slides_of_a_patient_have_one_label(tmp_path: Path) -> None:
    config = _config(tmp_path, joined=False, out="run", labels=["dark", "light"])
    with pytest.raises(CohortError, match=r"1 patients do not agree.*\n *patient 'p0': slides p0-0, p0-1"):
        train_model(config)


def test_what_takes_slides_one_by_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="science.bag=patient with science.regime=coupled"):
        RunConfig.model_validate({"science": {"bag": "patient", "regime": "coupled"}})
    dense = {"encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 2}}}
    config = _config(tmp_path, joined=False, out="dense", science=dense)
    (words,) = run_on_ranks(_refusal, 1, config)
    assert "science.bag=patient with a dense encoder" in words


def _refusal(rank: int, config: RunConfig) -> str:
    skip_kernel_build()
    with pytest.raises(ConfigError) as refused:
        Trainer(config, make_ranks(Topology()), torch.device("cpu"))
    return str(refused.value)


@pytest.mark.slow
def test_mean_of_slides(tmp_path: Path) -> None:
    config = _config(tmp_path, joined=False, out="run", science={"bag": "slide"})
    train_model(config)
    found = evaluate_model(config)
    assert found["unit"] == "slide"
    assert found["splits"]["test"]["num_slides"] == 3
    assert found["patients"]["test"]["num_slides"] == 2
    part = read_predictions(config.bookkeeping.out / "predictions.csv").labelled("test")
    brier = np.mean(
        [
            np.mean(part.probs_NK[rows, 0]) ** 2 if label == 1 else np.mean(part.probs_NK[rows, 1]) ** 2
            for rows, label in (([0], 0), ([1, 2], 1))
        ]
    )
    assert found["patients"]["test"]["metrics"]["brier"]["value"] == pytest.approx(brier)
    report = (config.bookkeeping.out / "report.html").read_text()
    assert "by patient" in report.lower()

"""A dense encoder in real runs: slide files and shards of the same pixels, blocks of any size, what is refused."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from gigamil.config.schema import RunConfig, Slides
from gigamil.errors import ConfigError
from gigamil.models.encoder import encoders
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import build_model
from gigamil.parallel.topology import Topology
from gigamil.partition.curve import hilbert_sort
from gigamil.pipeline import split_cohort
from gigamil.shards.build import build_slide
from gigamil.shards.job import SlideJob
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import CLASSES
from gigamil.testing.slides import write_pyramid_tiff
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import SlideSet
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.plan import plan_run
from gigamil.train.prepare import prepare_model

CELL_PX = 32
SPLITS = ("train",) * 4 + ("val",) * 2
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "Dropout": lambda: nn.Dropout(0.1),
    "SqueezeExcitation": lambda: SqueezeExcitation(4, 2),
}
REMEDIES = {
    "GroupNorm": r"looks at the whole image.* Use BatchNorm on stored statistics or LayerNorm",
    "BatchNorm2d": r"put it into evaluation mode.* gigamil\.models\.FrozenStatistics",
    "Dropout": r"draws at random.* set its p to 0",
    "SqueezeExcitation": r"looks at the whole image.* cut the network off before it",
}


class OwnNetwork(nn.Module):
    """As a user writes it, with a layer in it that may not be local."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(3, 4, CELL_PX, CELL_PX), LAYERS[layer]())
        self.dim, self.cell_px = 4, CELL_PX

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        return self.network(image_nCHW)


encoders.register("own_dense")(OwnNetwork)


@encoders.register("own_dense_frozen")
def own_dense_frozen(layer: str) -> FrozenStatistics:
    own = OwnNetwork(layer)
    return FrozenStatistics(own.network, own.dim, cell_px=own.cell_px)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six slides that are tissue from edge to edge, tiled once with their pixels and once without."""
    folder = tmp_path_factory.mktemp("dense")
    settings = Slides(tile_px=CELL_PX, tile_mpp=0.5, min_tissue=0.2, min_tissue_area_um2=100.0)
    with (folder / "slides.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "path", "patient_id", "label", "split"])
        for number, split in enumerate(SPLITS):
            path = folder / f"s{number}.tiff"
            noise = np.random.default_rng(number).integers((140, 40, 120), (200, 100, 180), (20, 24, 3), dtype=np.uint8)
            write_pyramid_tiff(path, np.kron(noise, np.ones((8, 8, 1), np.uint8)), 0.5, tile=CELL_PX, quality=90)
            writer.writerow([f"s{number}", path, f"p{number}", CLASSES[number % 2], split])
            for kind in ("shards", "slides"):
                build_slide(SlideJob(f"s{number}", path, None, settings, folder / kind, hilbert_sort, kind == "shards"))
    return folder


def run(cohort: Path, name: str, source: str, **execution: Any) -> RunConfig:
    """Two steps of a small network; slides are turned and recoloured."""
    config = RunConfig.model_validate(
        {
            "cohort": {"table": cohort / "slides.csv", "classes": CLASSES},
            "slides": {"tile_px": CELL_PX, "tile_mpp": 0.5, "min_tissue": 0.2, "min_tissue_area_um2": 100.0},
            "data": {"source": source},
            "science": {
                "encoder": {"name": "small_dense_cnn", "options": {"width": 4, "pool": 2}},
                "aggregator": {"options": {"hidden": 8}},
                "epochs": 1,
                "slides_per_step": 2,
            },
            "execution": {"chunk": 16, "device": "cpu", "threads": 1, "timeout_s": 100, "ranks": 2} | execution,
            "bookkeeping": {
                "out": cohort / name,
                "shards": cohort / source,
                "mlflow": False,
                "progress": False,
            },
        }
    )
    split_cohort(config)
    return config


def train(rank: int, num_ranks: int, configs: list[RunConfig]) -> None:
    skip_kernel_build()
    ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
    for config in configs:
        Trainer(config, ranks, torch.device("cpu")).fit()


def losses(config: RunConfig) -> list[float]:
    """Of two steps and a validation."""
    lines = [json.loads(line) for line in (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] if line["kind"] == "step" else line["val_loss"] for line in lines]
    assert len(set(found)) == len(found) == 3
    assert np.isfinite(found).all()
    return found


def test_sources_and_sizes_of_blocks_train_alike(cohort: Path) -> None:
    tiles = ShardSet(cohort / "shards").manifest("s0")
    assert (tiles.num_tiles, tiles.num_raw) == (30, 30)  # all is tissue, and the bytes are the file's own
    shards, slides = run(cohort, "a", "shards"), run(cohort, "b", "slides")
    small, large = run(cohort, "c", "shards", chunk=1), run(cohort, "d", "slides", chunk=256)  # a tile, and a slide
    chosen = run(cohort, "e", "shards", chunk=None)
    run_on_ranks(train, 2, 2, [shards, slides, small, large, chosen])
    assert losses(slides) == losses(shards)  # equal pixels: there is no glass
    # Blocks of other sizes are summed in another order, in float32.
    assert losses(small) == pytest.approx(losses(shards), rel=2e-5)
    for blocks in (large, chosen):
        assert losses(blocks) == pytest.approx(losses(shards), rel=2e-5)
    store = CheckpointStore(chosen.bookkeeping.out / "checkpoints", 2)
    assert store.read(store.find())[1]["chunk"] > 16  # as large as memory lets them be


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["own_dense", "own_dense_frozen"])
def test_a_network_that_is_not_local_is_refused_before_anything_is_trained(name: str, layer: str) -> None:
    config = RunConfig.model_validate(
        {
            "science": {"encoder": {"name": name, "options": {"layer": layer}}},
            "slides": {"tile_px": CELL_PX, "tile_mpp": 1.0},
        }
    )
    slides, model = SlideSet(("a",), (5,), torch.tensor([0])), build_model(config.science, 2).train()

    def prepare() -> None:
        prepare_model(model, config, slides, slides, Topology(), torch.device("cpu"))

    plan = partial(plan_run, config, tiles=5)
    if name == "own_dense_frozen" and layer == "BatchNorm2d":  # the remedy
        prepare()
        assert plan().blocks is not None
        return
    words = rf"science\.encoder cannot be run block by block: layer '1' \({layer}\) .*{REMEDIES[layer]}"
    for check in (prepare, plan):
        with pytest.raises(ConfigError, match=words):
            check()

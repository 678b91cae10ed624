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

from gigamil.config.schema import Encoder, RunConfig, Slides
from gigamil.errors import ConfigError
from gigamil.memory.peak import LiveBytes
from gigamil.models.encoder import encoders
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.shared_slide import SharedSlide
from gigamil.parallel.topology import Topology
from gigamil.partition.curve import hilbert_sort
from gigamil.pipeline import split_cohort
from gigamil.shards.build import build_slide
from gigamil.shards.job import SlideJob
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import CLASSES
from gigamil.testing.slides import write_pyramid_tiff
from gigamil.train import loop
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import SlideSet
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.plan import best_chunk, plan_run
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


@encoders.register("own_dense_folding")
def own_dense_folding() -> FrozenStatistics:
    return FrozenStatistics(nn.Sequential(nn.Conv2d(3, 4, CELL_PX, CELL_PX), nn.BatchNorm2d(4)), 4, cell_px=CELL_PX)


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


def train(rank: int, num_ranks: int, configs: list[RunConfig], folding: RunConfig) -> None:
    """Train; go on from the end of the last run, whose blocks need not be chosen again; and choose some for `folding`."""
    skip_kernel_build()
    ranks, cpu = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks)), torch.device("cpu")
    for config in configs:
        Trainer(config, ranks, cpu).fit()
    chosen: list[tuple[bool, int]] = []

    def watched(config: RunConfig, model: SlideModel, *words: Any) -> int:
        found = best_chunk(config, model, *words)
        chosen.append(("forward" in vars(model.encoder.network[0]), found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "best_chunk", watched)
        Trainer(configs[-1], ranks, cpu).fit()
        assert not chosen
        Trainer(folding, ranks, cpu).fit()
    assert chosen == [(True, 64)]  # as it will run; and a slide of 5 x 6 tiles is not more than a block of 8 x 8


def losses(config: RunConfig) -> list[float]:
    """Of two steps and a validation."""
    lines = [json.loads(line) for line in (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] if line["kind"] == "step" else line["val_loss"] for line in lines]
    assert len(set(found)) == len(found) == 3
    assert np.isfinite(found).all()
    return found


def chunk_of(config: RunConfig) -> int:
    """Tiles per encoder call, as the checkpoint says."""
    return CheckpointStore(config.bookkeeping.out / "checkpoints", 2).facts("latest")["chunk"]


def test_sources_and_sizes_of_blocks_train_alike(cohort: Path) -> None:
    tiles = ShardSet(cohort / "shards").manifest("s0")
    assert (tiles.num_tiles, tiles.num_raw) == (30, 30)  # all is tissue, and the bytes are the file's own
    shards, slides = run(cohort, "a", "shards"), run(cohort, "b", "slides")
    small, large = run(cohort, "c", "shards", chunk=1), run(cohort, "d", "slides", chunk=256)  # a tile, and a slide
    chosen = run(cohort, "e", "shards", chunk=None)
    budget = int(1.1 * plan_run(run(cohort, "plan", "shards")).graph)
    within = run(cohort, "f", "shards", chunk=None, memory_budget=budget)
    assert plan_run(within).chunk == 16
    folding = run(cohort, "g", "shards", chunk=None)
    science = folding.science.model_copy(update={"encoder": Encoder(name="own_dense_folding")})
    folding = folding.model_copy(update={"science": science})
    run_on_ranks(train, 2, 2, [shards, slides, small, large, chosen, within], folding)
    assert losses(slides) == losses(shards)  # equal pixels: there is no glass
    # Blocks of other sizes are summed in another order, in float32.
    assert losses(small) == pytest.approx(losses(shards), rel=2e-5)
    for blocks in (large, chosen, within):
        assert losses(blocks) == pytest.approx(losses(shards), rel=2e-5)
    assert chunk_of(chosen) == plan_run(chosen).chunk > 16  # as large as memory lets them be
    assert chunk_of(within) == 16  # as large as the budget lets them be


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


def test_a_plan_of_ranks_that_exchange_rows_counts_what_they_keep_of_a_slide(cohort: Path) -> None:
    config = run(cohort, "exchange", "shards", halo="exchange", ranks=1, memory="keep")
    model = build_model(config.science, 2).train()
    network = ShardedNetwork(model.encoder.network, None)
    with LiveBytes() as live:
        slide = SharedSlide(network, (0, 5 * CELL_PX), [np.arange(30)], 0, None)
        graph = model.encode(torch.zeros((1, 3, 5 * CELL_PX, 6 * CELL_PX)), None, slide)
        kept = live.now
        assert len(graph) == 30
    plans = {ranks: plan_run(config, ranks=ranks, device_memory=10**9) for ranks in (1, 2)}
    assert plans[1].graph == pytest.approx(kept, rel=0.1)
    assert plans[2].graph == pytest.approx(kept * 3 / 5, rel=0.1)  # of five rows of tiles one of the ranks has three
    for plan in plans.values():
        assert (plan.num_chunks, plan.num_kept, plan.shared.factor) == (2, 2, 1.0)
        assert plan.blocks is None
        assert plan.fits
        assert "it fits" in plan.text()
    small = plan_run(config, device_memory=plans[1].peak - 1000)
    assert not small.fits
    assert [words.split(":")[0] for words in small.remedies] == ["execution.memory replay", "execution.halo read"]


@pytest.mark.parametrize(("memory", "group_size", "num_kept"), [("auto", 2, 0), ("auto", 1, 1), ("replay", 1, 0)])
def test_a_plan_keeps_the_graphs_of_shared_slides_as_training_does(
    cohort: Path, memory: str, group_size: int, num_kept: int
) -> None:
    config = run(cohort, "exchange", "shards", halo="exchange", memory=memory, group_size=group_size)
    assert plan_run(config).num_kept == num_kept


def test_whether_slides_of_unknown_size_fit_is_not_said_where_glass_is_computed(cohort: Path) -> None:
    config = run(cohort, "exchange", "shards", halo="exchange")
    text = plan_run(config, tiles=60, device_memory=10**6).text()
    assert "whether a run fits is told once they are tiled" in text
    assert "available" not in text
    tiles = config.science.model_copy(update={"encoder": Encoder(name="small_cnn")})
    with pytest.raises(ConfigError, match=r"execution\.halo=exchange is for dense encoders"):
        plan_run(config.model_copy(update={"science": tiles}))

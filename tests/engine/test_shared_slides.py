"""`execution.halo: exchange` trains as `read` does: the same losses, on one rank and on more; and what it cannot run with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.models.slide_model import build_model
from gigamil.parallel.topology import Topology
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import TILE_PX, tiny_run
from gigamil.train.cohort import SlideSet
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.prepare import prepare_model

DENSE = {"name": "small_dense_cnn", "options": {"width": 4, "pool": TILE_PX // 16}}
BOUND = 1e-5  # float32: an image of rows rounds otherwise than blocks; epochs of AdamW


def config(folder: Path, halo: str, precision: str = "float32", **execution: Any) -> RunConfig:
    return tiny_run(
        folder,
        science={"encoder": DENSE, "precision": precision},
        execution={"halo": halo, "chunk": 4} | execution,
        bookkeeping={"out": folder / f"{halo}-{precision}"},
    )


def train(rank: int, num_ranks: int, configs: list[RunConfig]) -> None:
    skip_kernel_build()
    for one in configs:
        ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
        Trainer(one, ranks, torch.device("cpu")).fit()


def losses(run: RunConfig) -> list[float]:
    lines = (run.bookkeeping.out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ranks_that_exchange_rows_train_as_those_that_read_blocks(tmp_path: Path, num_ranks: int) -> None:
    narrow = {"precision": "bfloat16", "memory": "keep"}
    runs = [config(tmp_path, "read"), config(tmp_path, "exchange"), config(tmp_path, "exchange", **narrow)]
    run_on_ranks(train, num_ranks, num_ranks, runs, timeout_s=120)
    read, exchanged, in_bfloat16 = map(losses, runs)
    assert len(read) >= 3
    assert exchanged == pytest.approx(read, rel=BOUND)
    assert in_bfloat16 == pytest.approx(read, rel=0.05)
    assert in_bfloat16 != read


def test_exchange_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"layer by layer: set execution\.compile to false"):
        config(tmp_path, "exchange", compile=True)
    with pytest.raises(ValidationError, match=r"execution\.activation_checkpointing to none"):
        config(tmp_path, "exchange", activation_checkpointing="blocks")
    tiles = tiny_run(tmp_path, execution={"halo": "exchange"})
    model, none = build_model(tiles.science, 2), SlideSet((), (), torch.zeros(0))
    dense = config(tmp_path, "read", compile=True)
    with pytest.raises(ConfigError, match=r"execution\.compile makes a program for one size of image"):
        prepare_model(build_model(dense.science, 2), dense, none, none, Topology(), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"is for dense encoders.*Set science\.encoder\.dense"):
        prepare_model(model, tiles, none, none, Topology(), torch.device("cpu"))

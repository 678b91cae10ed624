"""Nothing under `execution` changes results: the first losses of a training run for other ranks, chunks, stages, ...

Float32, through DeepSpeed. Chunking and sharing tiles out reorder sums, so losses agree to rounding (1e-6); what only
changes when something is computed or read agrees bit for bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gigamil.config.schema import RunConfig
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

NUM_LOSSES = 5
TO_ROUNDING = 1e-6

SAME_SUMS: dict[str, dict[str, Any]] = {
    "keep": {"memory": "keep"},
    "replay": {"memory": "replay"},
    "no prefetch": {"prefetch": 0},
    "timeout": {"timeout_s": 50},
    "two chunks kept, the rest replayed": {"memory_budget": 5e5},
    "tiles decoded again": {"tile_cache": 0, "memory": "replay"},
    "no threads that decode": {"decode_workers": 0},
    "several threads that decode": {"decode_workers": 3},
    "chunks decoded by several threads": {"decode_workers": 3, "tile_cache": 0},
    "another decoder": {"decoder": "pillow"},
}
OTHER_SUMS: dict[str, dict[str, Any]] = {
    "chunk 5": {"chunk": 5},
    "zero 0": {"zero_stage": 0},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "two threads": {"threads": 2},
}
# With a network that has BatchNorm and blocks.
SAME_ENCODER_SUMS: dict[str, dict[str, Any]] = {
    "blocks recomputed": {"activation_checkpointing": "blocks"},
    "blocks recomputed, replay": {"activation_checkpointing": "cpu", "memory": "replay"},
    "moments in main memory": {"offload": True},
    "zero 3": {"zero_stage": 3},
}
OTHER_ENCODER_SUMS: dict[str, dict[str, Any]] = {
    "BatchNorm as it is": {"fold_batchnorm": False},
}


def _train(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[list[float]]:
    from gigamil.parallel.topology import Topology

    skip_kernel_build()
    losses = []
    for config in configs:
        torch.set_num_threads(config.execution.threads or 1)
        topology = Topology(num_ranks, rank, rank, num_ranks, config.execution.group_size or num_ranks)
        trainer = Trainer(config, make_ranks(topology), torch.device("cpu"))
        trainer.fit()
        if config.execution.memory_budget:
            assert trainer.progress.num_keep == 2  # of up to seven
        lines = map(json.loads, (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["kind"] == "step"])
    return losses


def _losses(
    folder: Path, num_ranks: int, variants: dict[str, dict[str, Any]], **science: Any
) -> dict[str, list[float]]:
    configs = []
    for name, execution in variants.items():
        out = folder / f"{num_ranks} ranks, {name}"
        execution = {"ranks": num_ranks} | execution
        book = {"out": out, "ranks_every": 1}  # spans by speed follow it
        configs.append(tiny_run(folder, execution=execution, bookkeeping=book, science={"epochs": 2} | science))
    found = run_on_ranks(_train, num_ranks, num_ranks, configs, timeout_s=240)
    assert all(len(losses) == 8 for losses in found[0])
    return dict(zip(variants, found[0], strict=True))


@pytest.mark.timeout(600)  # three worlds, up to eleven short trainings in each
def test_losses_do_not_depend_on_how_a_run_is_executed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    same = SAME_SUMS | {
        "shard cache": {"shard_cache": cache},
        "full shard cache": {"shard_cache": cache, "shard_cache_gb": 1e-5},
    }
    one = _losses(tmp_path, 1, {"base": {}, **same, **OTHER_SUMS})
    for name in same:
        assert one[name] == one["base"], name
    assert len(list(cache.glob("*.tar"))) > 0
    worlds = {(1, name): one[name] for name in ("base", *OTHER_SUMS)}
    two = _losses(
        tmp_path,
        2,
        {
            "base": {},
            "keep": {"memory": "keep"},
            "replay": {"memory": "replay"},
            "groups": {"group_size": 1},
            "by speed": {"balance": "speed"},
            "zero 3": {"zero_stage": 3},
        },
    )
    assert two["keep"] == two["base"] == two["replay"]
    others = {"groups": {"group_size": 1}, "by speed": {"balance": "speed"}, "zero 0": {"zero_stage": 0}}
    three = _losses(tmp_path, 3, {"base": {}} | others)
    worlds |= {(2, name): losses for name, losses in two.items()} | {
        (3, name): losses for name, losses in three.items()
    }
    for world, losses in worlds.items():
        assert losses[:NUM_LOSSES] == pytest.approx(one["base"][:NUM_LOSSES], rel=TO_ROUNDING, abs=0), world


def test_losses_do_not_depend_on_how_the_encoder_is_computed(tmp_path: Path) -> None:
    network = {"name": "timm/test_resnet"}
    found = _losses(tmp_path, 1, {"base": {}, **SAME_ENCODER_SUMS, **OTHER_ENCODER_SUMS}, encoder=network)
    for name in SAME_ENCODER_SUMS:
        assert found[name] == found["base"], name
    for name in OTHER_ENCODER_SUMS:
        assert found[name] != found["base"], f"{name} computes nothing in another way"
        assert found[name][:NUM_LOSSES] == pytest.approx(found["base"][:NUM_LOSSES], rel=TO_ROUNDING, abs=0), name


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_losses_of_a_compiled_encoder(tmp_path: Path) -> None:
    found = _losses(tmp_path, 1, {"base": {}, "compiled": {"compile": True}})
    assert found["compiled"] != found["base"], "nothing was compiled"
    assert found["compiled"][:NUM_LOSSES] == pytest.approx(found["base"][:NUM_LOSSES], rel=TO_ROUNDING, abs=0)

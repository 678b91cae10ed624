"""What a trainer does with losses that are not finite, damaged tiles, another configuration, a full folder."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError, TrainingError
from gigamil.parallel.topology import Topology
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.loss import cross_entropy, losses


def _trainer(rank: int, num_ranks: int, config: RunConfig) -> Trainer:
    skip_kernel_build()
    ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
    return Trainer(config, ranks, torch.device("cpu"))


def _nan_training(rank: int, num_ranks: int, config: RunConfig, always: bool) -> tuple[str, bool]:
    """The error, and whether the weights are those of the start."""
    calls = 0

    @losses.register("broken")
    def broken(logits_BK: Tensor, label_B: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss_B = cross_entropy(logits_BK, label_B)
        if always or calls == 2:
            loss_B = loss_B * torch.tensor([1.0] + [torch.nan] * (len(loss_B) - 1))
        return loss_B

    trainer = _trainer(rank, num_ranks, config)
    before = {name: values.clone() for name, values in trainer.engine.state().parameters.items()}
    try:
        trainer.fit()
        message = ""
    except TrainingError as error:
        message = str(error)
    after = trainer.engine.state().parameters
    return message, all(torch.equal(before[name], after[name]) for name in before)


def test_three_losses_in_a_row_that_are_not_finite_stop_all_ranks_with_unchanged_weights(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"loss": "broken"})
    for message, unchanged in run_on_ranks(_nan_training, 2, 2, config, True):
        assert "not finite in 3 steps in a row, last for slides ['s0" in message
        assert unchanged
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "not finite" in record["error"]


def test_one_loss_that_is_not_finite_is_skipped_by_all_ranks_and_training_goes_on(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"loss": "broken"})
    for message, unchanged in run_on_ranks(_nan_training, 2, 2, config, False):
        assert message == ""
        assert not unchanged
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert len(skipped) == 1
    assert skipped[0]["step"] == 2
    assert len(skipped[0]["slides"]) == 1


def _infinite_gradient(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[tuple[str, bool]]:
    """At each ZeRO stage: the error, and whether the weights are those of the start."""

    @losses.register("finite_loss_infinite_gradient")
    def steep(logits_BK: Tensor, label_B: Tensor) -> Tensor:
        # sqrt(0) is 0 and its derivative is not finite
        return cross_entropy(logits_BK, label_B) + (logits_BK[:, 0] - logits_BK[:, 0]).sqrt()

    found = []
    for config in configs:
        trainer = _trainer(rank, num_ranks, config)
        before = trainer.engine.state().parameters
        with pytest.raises(TrainingError) as caught:
            trainer.fit()
        after = trainer.engine.state().parameters
        found.append((str(caught.value), all(torch.equal(before[name], after[name]) for name in before)))
    return found


def test_a_gradient_that_is_not_finite_changes_no_weight_at_any_stage(tmp_path: Path) -> None:
    configs = [
        tiny_run(
            tmp_path,
            execution={"ranks": 2, "zero_stage": stage},
            science={"loss": "finite_loss_infinite_gradient"},
            bookkeeping={"out": tmp_path / f"stage{stage}"},
        )
        for stage in range(4)
    ]
    for found in run_on_ranks(_infinite_gradient, 2, 2, configs):
        for message, unchanged in found:
            assert "loss or gradient not finite in 3 steps in a row" in message
            assert unchanged


def _raise_in_reduction(rank: int, num_ranks: int, config: RunConfig) -> list[str]:
    """What the failing rank's engine reduced."""
    trainer = _trainer(rank, num_ranks, config)
    reduced: list[str] = []
    optimizer = trainer.engine._engine.optimizer
    optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: reduced.append("flush")
    with pytest.raises(MemoryError), trainer.engine.one_reduction():
        raise MemoryError
    gc.collect()
    return reduced


def test_after_an_error_a_rank_starts_no_reduction_that_the_others_would_not_join(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"zero_stage": 1})
    assert run_on_ranks(_raise_in_reduction, 1, 1, config) == [[]]


def _fit_error(rank: int, num_ranks: int, config: RunConfig) -> str:
    with pytest.raises(TrainingError) as caught:
        _trainer(rank, num_ranks, config).fit()
    return str(caught.value)


def test_a_damaged_tile_ends_all_ranks_with_the_message_of_the_rank_that_read_it(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2})
    shards = ShardSet(config.bookkeeping.shard_root)
    index = shards.index("s02")
    tar = shards.folder("s02") / shards.manifest("s02").tars[0].name
    data = bytearray(tar.read_bytes())
    data[int(index.offset[-1]) + 50] ^= 0xFF  # the last tile: only the last rank reads it
    tar.write_bytes(data)
    messages = run_on_ranks(_fit_error, 2, 2, config)
    assert messages[0] == messages[1]
    assert "slide 's02'" in messages[0]
    assert "tile 29" in messages[0]
    assert messages[0].startswith("rank ")


def _refit(rank: int, num_ranks: int, config: RunConfig, other: RunConfig) -> str:
    _trainer(rank, num_ranks, config).fit()
    with pytest.raises(ConfigError) as caught:
        _trainer(rank, num_ranks, other)
    return str(caught.value)


def test_a_run_folder_of_another_configuration_is_refused_with_the_key_that_differs(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, science={"epochs": 1})
    other = config.model_copy(update={"science": config.science.model_copy(update={"seed": 7})})
    [message] = run_on_ranks(_refit, 1, 1, config, other)
    assert "different: science.seed" in message
    assert "bookkeeping.out" in message

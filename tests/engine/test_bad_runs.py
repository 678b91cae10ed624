"""What a trainer does with losses that are not finite, damaged tiles, another configuration, a full folder."""

import gc
import json
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.data.decode import decode_tiles
from gigamil.errors import BagError, ConfigError, TrainingError
from gigamil.models.encoder import encoders
from gigamil.parallel.topology import Topology
from gigamil.shards.read import ShardSet
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train import plan
from gigamil.train.engine import _set_timeout, make_ranks, skip_kernel_build
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
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"task": {"loss": "broken"}})
    for message, unchanged in run_on_ranks(_nan_training, 2, 2, config, True):
        assert "not finite in 3 steps in a row, last for slides ['s0" in message
        assert unchanged
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "not finite" in record["error"]


def test_one_loss_that_is_not_finite_is_skipped_by_all_ranks_and_training_goes_on(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"task": {"loss": "broken"}})
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
            science={"task": {"loss": "finite_loss_infinite_gradient"}},
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


def test_a_damaged_tile_met_in_the_middle_of_a_step_ends_all_ranks_too(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2, "tile_cache": 0})  # tiles are decoded chunk by chunk
    shards = ShardSet(config.bookkeeping.shard_root)
    index = shards.index("s02")
    tar = shards.folder("s02") / shards.manifest("s02").tars[0].name
    data = bytearray(tar.read_bytes())
    data[int(index.offset[-1]) + 50] ^= 0xFF
    tar.write_bytes(data)
    for message in run_on_ranks(_fit_error, 2, 2, config):
        assert "slide 's02'" in message
        assert "tile 29 is not what was written: its crc32 differs" in message


def test_a_damaged_tile_of_a_validation_slide_ends_all_ranks_with_one_message(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2, "tile_cache": 0})
    shards = ShardSet(config.bookkeeping.shard_root)
    tar = shards.folder("s08") / shards.manifest("s08").tars[0].name
    data = bytearray(tar.read_bytes())
    data[int(shards.index("s08").offset[-1]) + 50] ^= 0xFF  # the last tile: only one rank reads it
    tar.write_bytes(data)
    messages = run_on_ranks(_fit_error, 2, 2, config)
    assert messages[0] == messages[1]
    assert re.match(r"rank [01]: ShardError: slide 's08'.* tile 20 is not what was written", messages[0])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == f"TrainingError: {messages[0]}"


def _slow_commit(rank: int, num_ranks: int, config: RunConfig) -> list[str]:
    """Generations after a commit that takes longer than a collective waits."""
    trainer = _trainer(rank, num_ranks, config)
    commit = trainer._store.commit

    def slowly(*args: object, **kwargs: object) -> Path:
        time.sleep(5)
        return commit(*args, **kwargs)

    trainer._store.commit = slowly
    _set_timeout(3, dist.group.WORLD)
    trainer._save(best=False)
    _set_timeout(60, dist.group.WORLD)
    return [path.name for path in trainer._store.folder.glob("0*")]


def test_a_checkpoint_may_take_longer_than_ranks_wait_for_each_other(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2})
    assert run_on_ranks(_slow_commit, 2, 2, config) == [["000001-step-00000000"]] * 2


def _infinite_tile(rank: int, num_ranks: int, config: RunConfig) -> str:
    @encoders.register("fails_on_light")
    class FailsOnLight(torch.nn.Module):
        """The embedding of a light tile is infinite."""

        dim = 4

        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)

        def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
            mean_nC = image_nCHW.mean(dim=(2, 3))
            return self.linear(mean_nC) / (mean_nC.amin(1, keepdim=True) < 1.2)

    return _fit_error(rank, num_ranks, config)


def test_an_embedding_that_is_not_finite_is_named_by_slide_and_tile(tmp_path: Path) -> None:
    augment = {"brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}
    config = tiny_run(
        tmp_path,
        execution={"ranks": 2},
        science={"encoder": {"name": "fails_on_light", "mean": (0, 0, 0), "std": (0.5, 0.5, 0.5)}, "augment": augment},
    )
    messages = run_on_ranks(_infinite_tile, 2, 2, config)
    assert messages[0] == messages[1]
    found = re.search(r"the embedding of tile (\d+) of slide '(s\d\d)' is not", messages[0])
    assert found is not None
    shards = ShardSet(config.bookkeeping.shard_root)
    tile = decode_tiles(shards.read_span(found[2], int(found[1]), int(found[1]) + 1), config.slides.tile_px)
    assert tile.mean(axis=(1, 2)).min() / 255 > 0.6


def _small_bags(rank: int, num_ranks: int, config: RunConfig) -> str:
    with pytest.raises(BagError) as caught:
        _trainer(rank, num_ranks, config)
    return str(caught.value)


def test_slides_with_fewer_tiles_than_k_are_refused_before_training(tmp_path: Path) -> None:
    aggregator = {"name": "topk_mean", "options": {"k": 9}}
    config = tiny_run(tmp_path, science={"aggregator": aggregator})
    (message,) = run_on_ranks(_small_bags, 1, 1, config)
    assert message.startswith("2 slides have fewer than the 9 tiles that")
    assert "for example 's03' with 1" in message


def _refusal(rank: int, num_ranks: int, config: RunConfig, free_bytes: int | None = None) -> str:
    @encoders.register("centred")
    class Centred(torch.nn.Module):
        """Subtracts the mean over the tiles of a chunk."""

        def __init__(self) -> None:
            super().__init__()
            self.dim = 3
            self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), _LessTheMean())

        def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
            return self.body(image_nCHW).mean(dim=(2, 3))

    if free_bytes is not None:
        plan.free_device_memory = lambda device, local_ranks: free_bytes
    with pytest.raises(ConfigError) as caught:
        _trainer(rank, num_ranks, config)
    return str(caught.value)


class _LessTheMean(torch.nn.Module):
    def forward(self, values_nCHW: Tensor) -> Tensor:
        return values_nCHW - values_nCHW.mean(0)


def test_an_encoder_that_mixes_the_tiles_of_a_chunk_is_refused_by_the_layers_name(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"encoder": {"name": "centred"}})
    for message in run_on_ranks(_refusal, 2, 2, config):
        assert message.startswith("layer 'encoder.backbone.body.1' (_LessTheMean) mixes the tiles of a chunk")


def test_keep_that_cannot_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, execution={"ranks": 2, "memory": "keep"})
    for message in run_on_ranks(_refusal, 2, 2, config, 20_000_000):
        assert re.match(
            r"execution.memory=keep: the graphs of 2\d tiles take .* on a rank with all else, and 20 MB are", message
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_wholly_frozen_encoder_stays_as_it_is_and_the_head_learns(tmp_path: Path) -> None:
    encoder = {"name": "small_cnn", "options": {"width": 4}, "freeze_blocks": 4}
    config = tiny_run(tmp_path, execution={"ranks": 2}, science={"encoder": encoder})
    for changed in run_on_ranks(_changed_parameters, 2, 2, config):
        assert changed
        assert not [name for name in changed if name.startswith("encoder.")]


def _changed_parameters(rank: int, num_ranks: int, config: RunConfig) -> list[str]:
    trainer = _trainer(rank, num_ranks, config)
    before = {name: values.clone() for name, values in trainer.engine.state().parameters.items()}
    trainer.fit()
    after = trainer.engine.state().parameters
    return [name for name in before if not torch.equal(before[name], after[name])]

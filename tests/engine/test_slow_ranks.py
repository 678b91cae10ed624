"""A rank that is slow is named, and gets fewer tiles where `execution.balance` says so; losses stay what they are."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from gigamil.config.schema import RunConfig
from gigamil.parallel.topology import Topology
from gigamil.registry import import_plugins
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer

SLOW_TIMES = 3.0
SLEEP = {"name": "sleep", "options": {"seconds_per_tile": 2e-3, "slow_rank": 1, "slow_times": SLOW_TIMES}}


def _train(rank: int, num_ranks: int, configs: list[RunConfig]) -> list[list[str]]:
    """Warnings of each run."""
    skip_kernel_build()
    import_plugins(["gigamil.testing.sleep"])
    found = []
    for config in configs:
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("gigamil").addHandler(handler)
        Trainer(config, make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks)), torch.device("cpu")).fit()
        logging.getLogger("gigamil").removeHandler(handler)
        found.append([record.getMessage() for record in records])
    return found


def _run(folder: Path, out: str, **execution: Any) -> RunConfig:
    return tiny_run(
        folder,
        execution={"ranks": 2, "chunk": 4} | execution,
        bookkeeping={"out": folder / out, "ranks_every": 2},
        science={"encoder": SLEEP, "epochs": 3},
    )


def _lines(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (config.bookkeeping.out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_slow_rank_is_named_once_and_gets_fewer_tiles(tmp_path: Path) -> None:
    even, speed = _run(tmp_path, "even", prefetch=0), _run(tmp_path, "speed", balance="speed", prefetch=0)
    ahead = _run(tmp_path, "ahead", balance="speed", prefetch=1)
    warnings = run_on_ranks(_train, 2, 2, [even, speed, ahead])
    assert warnings[1] == [[], [], []]  # rank 0 speaks
    for said in warnings[0]:
        (line,) = [words for words in said if "per tile" in words]
        assert line.startswith("rank 1 takes ")
        assert 2 < float(line.split()[3]) < 4
    before = _lines(even, "ranks")
    assert [line["step"] for line in before] == [2, 4, 6, 8, 10, 12]
    for line in before:
        fast, slow = (own / tiles for own, tiles in zip(line["own_s"], line["tiles"], strict=True))
        assert slow > 2 * fast
        assert line["wait_s"][1] < line["wait_s"][0]
        assert abs(line["tiles"][0] - line["tiles"][1]) <= 1
        assert (line["steps"], line["shares"]) == (2, None)
    for config in (speed, ahead):
        after = _lines(config, "ranks")
        fast, slow = after[-1]["shares"]
        assert 2 < fast / slow < 4
        assert 2 < after[-1]["tiles"][0] / after[-1]["tiles"][1] < 4
    # Half of the tiles times 3 against a quarter of them times 3.
    last = [sum(line["slowest_rank_s"] for line in _lines(config, "ranks")[2:]) for config in (even, speed)]
    assert last[1] < 0.75 * last[0]
    losses = [[line["loss"] for line in _lines(config, "step")] for config in (even, speed, ahead)]
    assert len(losses[0]) == 12
    for found in losses[1:]:
        assert found[:5] == pytest.approx(losses[0][:5], rel=1e-6, abs=0)
        assert found != losses[0], "spans were the same"


@pytest.mark.parametrize(
    ("execution", "words"),
    [
        ({"halo": "exchange"}, "execution.balance=speed needs ranks that compute alone"),
        ({"group_size": 1}, "with execution.group_size=1 there is"),
    ],
)
def test_where_nothing_can_be_balanced_it_is_refused(execution: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({"execution": {"balance": "speed"} | execution})

"""Iterative coupling: phases one after the other, each from the one before; the best classifier on validation slides is kept."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gigamil import coupling
from gigamil.config.schema import RunConfig
from gigamil.coupling import phase_config, phases, train_coupled
from gigamil.errors import ConfigError, Interrupted
from gigamil.parallel.topology import Topology
from gigamil.pipeline import evaluate_model, train_model
from gigamil.testing.faults import StopAfter
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import tiny_run
from gigamil.train.agree import StopSignals
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import make_ranks, skip_kernel_build
from gigamil.train.loop import Trainer
from gigamil.train.stale import encoder_of_features
from gigamil.train.step import Ranks


def coupled(folder: Path, regime: dict[str, Any] | None = None, ranks: int = 2, **science: Any) -> RunConfig:
    return tiny_run(
        folder,
        science={
            "epochs": 2,
            "bootstrap": 100,
            "regime": {"name": "coupled", "rounds": 1, "tiles": 8, "confidence": 2.0} | (regime or {}),
            **science,
        },
        execution={"ranks": ranks, "chunk": 4},
        bookkeeping={"mlflow": True},
    )


def test_phases_are_a_chain() -> None:
    names = [phase.folder for phase in phases(2)]
    assert names == ["round1_bags", "round1_tiles", "round2_bags", "round2_tiles", "round3_bags"]
    assert [None if phase.before is None else phase.before.folder for phase in phases(2)] == [None, *names[:-1]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_round_on_each_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    config = coupled(tmp_path, ranks=ranks)
    out = config.bookkeeping.out
    facts = train_model(config)
    assert facts["status"] == "finished"
    first, tiles, last = (out / phase.folder for phase in phases(1))

    # The student began as the encoder that made the first features, and has learned.
    start = encoder_of_features(phase_config(config, phases(1)[0])).state_dict()
    taught = CheckpointStore(tiles / "checkpoints").load_parameters("best")
    moved = [name for name, value in start.items() if not torch.equal(value, taught[f"encoder.{name}"])]
    assert moved
    # The features of the second classifier are the student's.
    again = encoder_of_features(phase_config(config, phases(1)[2])).state_dict()
    assert all(torch.equal(value, taught[f"encoder.{name}"]) for name, value in again.items())

    lines = [json.loads(line) for line in (tiles / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses
    assert all(loss >= 0 for loss in losses)
    spent = [line["tile_forwards"] for line in lines if line["kind"] == "step"]
    sizes = [line["tiles_seen"] for line in lines if line["kind"] == "step"]
    assert spent == [2 * seen for seen in sizes]  # teacher and student

    values = facts["rounds"]
    assert len(values) == 2  # type: ignore[arg-type]
    best = first if facts["best_round"] == 1 else last
    kept = CheckpointStore(out / "checkpoints").load_parameters("best")
    head = CheckpointStore(best / "checkpoints").load_parameters("best")
    assert all(torch.equal(value, kept[name]) for name, value in head.items())
    encoder = start if best == first else again
    assert all(torch.equal(value, kept[f"encoder.{name}"]) for name, value in encoder.items())

    joined = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    forwards = [line["tile_forwards"] for line in joined if "tile_forwards" in line]
    assert forwards == sorted(forwards)
    assert facts["spent"]["tile_forwards"] == forwards[-1]  # type: ignore[index]

    evaluation = evaluate_model(config)  # on tiles, by the joined model
    own = evaluate_model(phase_config(config, phases(1)[0 if best == first else 2]))  # on features
    for name, estimate in evaluation["splits"]["val"]["metrics"].items():
        wanted = own["splits"]["val"]["metrics"][name]["value"]
        assert estimate["value"] == (None if wanted is None else pytest.approx(wanted, abs=1e-4))

    before = {path: path.stat().st_mtime_ns for path in out.glob("round*/metrics.jsonl")}
    assert len(before) == 3
    assert train_model(config)["best_round"] == facts["best_round"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_an_interrupted_chain_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, done = coupled(tmp_path), []
    train = coupling.train_model

    def stopped(own: RunConfig, **named: Any) -> dict[str, object]:
        if own.bookkeeping.name == "round1_tiles" and len(done) < 2:
            done.append("stopped")
            raise KeyboardInterrupt
        done.append(own.bookkeeping.name)
        return train(own, **named)

    monkeypatch.setattr(coupling, "train_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_coupled(config)
    assert json.loads((config.bookkeeping.out / "run.json").read_text())["status"] == "interrupted"
    train_coupled(config)
    assert done == ["round1_bags", "stopped", "round1_tiles", "round2_bags"]


def _teach(rank: int, num_ranks: int, jobs: list[tuple[RunConfig, int | None]]) -> None:
    skip_kernel_build()
    for config, stop_after in jobs:
        topology = Topology(num_ranks, rank, rank, num_ranks, num_ranks)
        stop = StopSignals() if stop_after is None else StopAfter(stop_after)
        trainer = Trainer(config, make_ranks(topology), torch.device("cpu"), stop)
        if isinstance(stop, StopAfter):
            stop.trainer = trainer
        with nullcontext() if stop_after is None else pytest.raises(Interrupted):
            trainer.fit()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_teaching_that_is_stopped_in_an_epoch_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = coupled(tmp_path, {"tile_epochs": 2})
    own = phase_config(config, phases(1)[1])
    out = own.bookkeeping.out
    train_up_to_tiles(config, monkeypatch)
    ends = []
    for name, stops in (("whole", (None,)), ("stopped", (3, None))):
        run_on_ranks(_teach, 2, 2, [(own, stop) for stop in stops], timeout_s=200)
        store = CheckpointStore(out / "checkpoints")
        assert store.facts("latest")["teacher_sha256"]
        ends.append(store.load("latest")[0].parameters)
        shutil.move(out, tmp_path / name)
        out.mkdir()
        shutil.copyfile(config.bookkeeping.out / "splits.json", out / "splits.json")
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.slow
def test_another_teacher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = coupled(tmp_path)
    own = phase_config(config, phases(1)[1])
    train_up_to_tiles(config, monkeypatch)
    run_on_ranks(_teach, 1, 1, [(own, 2)], timeout_s=200)
    first = own.science.warm_start
    assert first is not None
    store = CheckpointStore(first / "checkpoints")
    state = store.load("best")[0]
    state.parameters["head.bias"] += 1.0
    store.commit(state, store.facts("best"), step=99, best=True)
    (words,) = run_on_ranks(_refusal, 1, 1, own, timeout_s=200)
    assert "was taught by another model than that of science.warm_start" in words


def _refusal(rank: int, num_ranks: int, config: RunConfig) -> str:
    skip_kernel_build()
    with pytest.raises(ConfigError) as refused:
        Trainer(config, make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks)), torch.device("cpu"))
    return str(refused.value)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    config = coupled(tmp_path)
    (config.bookkeeping.out / "run.json").write_text("{}")
    train_coupled_once(config)
    with pytest.raises(ConfigError, match=r"different: science.regime.tiles"):
        train_coupled(coupled(tmp_path, {"tiles": 9}))
    path = config.bookkeeping.out / "run.json"
    facts = json.loads(path.read_text())
    del facts["coupling"]["science"]["science"]["bag"]  # of a version that did not know it
    path.write_text(json.dumps(facts))
    train_coupled_once(config)


def test_what_cannot_be_taught_is_refused_before_anything_is_encoded(tmp_path: Path) -> None:
    config = coupled(tmp_path, aggregator={"name": "topk_mean"})
    with pytest.raises(ConfigError, match="by a classifier that can look at one alone"):
        train_coupled(config)
    assert not list(config.bookkeeping.out.glob("round*"))


def train_up_to_tiles(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first classifier, and no further."""
    train = coupling.train_model
    monkeypatch.setattr(
        coupling,
        "train_model",
        lambda phase, **named: train(phase, **named) if "bags" in phase.bookkeeping.name else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        train_coupled(config)


def train_coupled_once(config: RunConfig) -> None:
    """As far as the record of what it is."""
    with pytest.raises(RuntimeError, match="far enough"):
        train_coupled(config, say=_enough)


def _enough(_: str) -> None:
    raise RuntimeError("far enough")


@pytest.mark.parametrize(
    ("science", "words"),
    [
        ({"regime": {"name": "coupled"}}, "is a chain of runs"),
        ({"regime": {"name": "taught"}}, "which science.warm_start has to name"),
    ],
)
def test_what_is_no_single_run_is_refused_by_ranks(tmp_path: Path, science: dict[str, Any], words: str) -> None:
    config = tiny_run(tmp_path, science=science)
    with pytest.raises(ConfigError, match=words):
        Trainer(config, Ranks(Topology()), torch.device("cpu"))

"""Calibration piece by piece, with encoders so small that figures mean nothing; whole in tests/cli/test_simulate.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.scaling import calibrate as module
from gigamil.scaling.cost import collective_seconds
from gigamil.scaling.machine import find_speed
from gigamil.scaling.traffic import Collective
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.runs import TILE_PX, tiny_run
from gigamil.train.engine import skip_kernel_build
from gigamil.train.plan import build_planned_model
from gigamil.train.step import Ranks

CPU = torch.device("cpu")


def config(**sections: Any) -> RunConfig:
    encoder = {"name": "small_cnn", "options": {"width": 4}}
    data = {"slides": {"tile_px": TILE_PX}, "science": {"encoder": encoder}, "execution": {"device": "cpu"}}
    return RunConfig.model_validate(data | sections)


def model(settings: RunConfig) -> SlideModel:
    return build_planned_model(settings)


def test_a_call_is_timed_and_leaves_no_gradient() -> None:
    built = model(config())
    call, busy = module.measure_call(config(), built, CPU, 3, 2)
    assert call["tiles"] == 3
    assert call["forward_s"] > 0
    assert call["backward_s"] > 0
    assert 0.1 < busy < 64
    assert all(parameter.grad is None for parameter in built.parameters())


def test_tiles_are_augmented_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    augmented: list[int] = []

    def note(image: torch.Tensor, *_: object, **named: object) -> torch.Tensor:
        assert named == {"settings": config().science.augment}
        augmented.append(len(image))
        return image

    monkeypatch.setattr(module, "augment_tiles", note)
    module.measure_call(config(), model(config()), CPU, 3, 1)
    assert augmented == [3] * 4  # forward alone, and both, each with a round that warms up


def _measure_step(rank: int, settings: RunConfig) -> tuple[float, float, int, int]:
    skip_kernel_build()
    return module.measure_step(settings, model(settings), Ranks(Topology()), CPU, 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_is_timed_with_all_that_its_optimiser_updates(stage: int) -> None:
    settings = config(execution={"device": "cpu", "zero_stage": stage})
    wanted = sum(parameter.nbytes for parameter in model(settings).parameters() if parameter.requires_grad)
    step_s, spread, tiles, updated = run_on_ranks(_measure_step, 1, settings)[0]
    assert step_s > 0
    assert spread >= 0
    assert (tiles, updated) == (settings.science.slides_per_step, wanted)


def test_decoding_takes_the_runs_own_tiles_if_there_are_any(tmp_path: Path) -> None:
    rate, words = module.measure_decode(tiny_run(tmp_path), CPU, 2)
    assert rate > 0
    assert words == "the run's own tiles"
    elsewhere = config(bookkeeping={"out": tmp_path / "none"})
    rate, words = module.measure_decode(elsewhere, CPU, 2)
    assert rate > 0
    assert words == "drawn tiles, without reading"


def test_a_drawn_tile_is_about_as_long_as_one_of_tissue() -> None:
    assert 8_000 < len(module._drawn_tile(224, 0)) < 30_000
    assert module._drawn_tile(32, 1) != module._drawn_tile(32, 2)


def test_head_and_optimiser_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UPDATED", 1000)
    assert module.measure_head(model(config()), CPU, True, 1) >= 0
    assert module.measure_update(config(), CPU, 2) > 0


def test_encoders_without_tiles_of_their_own_are_refused() -> None:
    dense = config(science={"encoder": {"name": "resnet18", "dense": "layer1"}})
    with pytest.raises(ConfigError, match="science.encoder.dense to null"):
        module.measure_alone(dense, Ranks(Topology()), CPU, True)


def test_larger_calls_never_take_less() -> None:
    sizes = [(1, 0.3, 0.1), (2, 0.2, 0.4), (4, 0.5, 0.3)]
    calls = [{"tiles": tiles, "forward_s": forward, "backward_s": backward} for tiles, forward, backward in sizes]
    found = [(call["forward_s"], call["backward_s"]) for call in module._growing(calls)]
    assert found == [(0.2, 0.1), (0.2, 0.3), (0.5, 0.3)]


@pytest.mark.parametrize("ranks", [2, 8])
def test_what_was_measured_becomes_a_machine(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setattr(module, "num_cores", lambda: 2)
    alone = {
        "name": "here",
        "device_bytes": 8e9,
        "calls": [
            {"tiles": 1, "forward_s": 0.1, "backward_s": 0.2},
            {"tiles": 4, "forward_s": 0.3, "backward_s": 0.5},
        ],
        "saved_bytes": 1e6,
        "busy_cores": 1.0,
        "noise": 0.01,
        "decode_mpx_s": 100.0,
        "decoded": "drawn tiles",
        "head_s": 1e-6,
        "update_s_per_gb": 1.0,
        "fixed_s": 0.01,
    }
    together = {"sizes": [8, 10**6, 10**8], "seconds": [1e-4, 1.1e-3, 0.1001]}
    machine = module._machine(config(), "cpu", ranks, alone, together)
    assert machine.measured
    assert machine.device_bytes == 8e9 / ranks  # its share of main memory
    assert find_speed(machine, config()) == machine.encoders[0]
    assert machine.links.between is None
    assert machine.largest is not None
    assert (machine.largest.nodes, machine.largest.ranks, machine.largest.tiles) == (1, ranks, 4)
    for size, seconds in zip(together["sizes"], together["seconds"], strict=True):
        call = Collective("all_reduce", "sum", int(size), ranks, "gradients")
        assert sum(collective_seconds(call, machine)) == pytest.approx(seconds, rel=0.05)
    alone_on_a_gpu = module._machine(config(), "cuda", 1, alone, None)
    assert alone_on_a_gpu.device_bytes == 8e9
    assert "assumed" in alone_on_a_gpu.links.source

"""The GPU benchmark runs on a CPU without a figure; its roof is the formula's."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_step
from benchmarks.gpu_step import SMOKE, Outcome, Problem, count, draw, roof


def test_smoke_run_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_step.main(["--cpu-smoke"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["smoke"] is True
    assert result["figures"] is None
    for errors in result["gradient_errors"].values():
        assert all(errors[name] < gpu_step.BOUND for name in ("replay", "keep", "part"))
        assert all(errors[f"bfloat16 {name}"] < gpu_step.BOUND_BFLOAT16 for name in ("replay", "keep", "part"))
        assert errors["bfloat16 to float32"] > gpu_step.BOUND


@pytest.mark.parametrize(
    ("engine", "message"), [("PlainEngine", "resnet18, replay"), ("AutocastEngine", "resnet18, bfloat16 replay")]
)
def test_a_wrong_gradient_is_refused(engine: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(getattr(gpu_step, engine)):  # type: ignore[misc]
        def backward(self, scalar: torch.Tensor) -> None:
            super().backward(1.01 * scalar)

    monkeypatch.setattr(gpu_step, engine, Wrong)
    with pytest.raises(SystemExit, match=f"{message}: its gradient is .* off"):
        gpu_step.check(SMOKE.encoders[0], SMOKE, torch.device("cpu"))


def test_peaks_are_taken_while_there_is_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Problem] = weakref.WeakSet()
    counts: list[int] = []
    right = gpu_step.peak_of

    class Counted(Problem):
        def __init__(self, *words: Any, **named: Any) -> None:
            super().__init__(*words, **named)
            alive.add(self)

    def peak_of(function: Callable[[], object], device: torch.device) -> int:
        counts.append(len(alive))
        return right(function, device)

    monkeypatch.setattr(gpu_step, "Problem", Counted)
    monkeypatch.setattr(gpu_step, "peak_of", peak_of)
    gpu_step.measure(SMOKE.encoders[0], SMOKE, torch.device("cpu"), {})
    assert counts == [1] * 5  # replay, keep, auto; two lengths
    assert not alive  # no reference cycle keeps a model for the next encoder


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU .*--cpu-smoke"):
        gpu_step.main([])


def test_counts_are_those_of_the_literature() -> None:
    """ResNet-18 at 224: 1.82 G multiply-adds and 2.5 M outputs of convolutions (timm's tables)."""
    model = Problem(gpu_step.Encoder("resnet18", 1), 1, 224, torch.device("cpu"), plain=True).model
    flops, activations = count(model, 224, torch.device("cpu"))
    assert flops == pytest.approx(2 * 1.82e9, rel=0.01)
    assert activations == pytest.approx(2.48e6, rel=0.01)


def test_roof_is_the_lower_one() -> None:
    ceilings = {"flops": 790e12, "bytes": 4.3e12}
    assert roof(int(3.64e9), 2_480_000, ceilings) == pytest.approx(72e3, rel=0.01)  # compute
    assert roof(int(8.22e9), 11_100_000, ceilings) == pytest.approx(24e3, rel=0.01)  # memory
    assert roof(int(123e9), 0, ceilings) == pytest.approx(2.14e3, rel=0.01)


def test_figure(tmp_path: Path) -> None:
    arms = ("plain", "replay", "keep", "auto")
    outcome = Outcome("resnet18", 2, 4, {}, 1, 1, {arm: [9.0, 10.0] for arm in arms}, 20.0, {"keep": 0.475})
    path = tmp_path / "figure.png"
    draw([outcome], path, "title")
    assert path.stat().st_size > 1000


def test_plan_is_asked_for_the_timed_step() -> None:
    encoder = gpu_step.Encoder("small_cnn", 4)
    peaks = gpu_step.planned(encoder, 16, 32, torch.device("cpu"), ("replay", "keep"))
    assert 0 < peaks["replay"] < peaks["keep"]

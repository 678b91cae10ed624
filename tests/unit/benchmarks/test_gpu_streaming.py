"""The GPU benchmark of streaming runs on a CPU without a figure, and refuses a wrong gradient."""

import json

import numpy as np
import pytest
import torch

from benchmarks import gpu_streaming
from benchmarks.gpu_streaming import TINY, SmallerBlocks, blocks, check, make_problem, measure

CPU = torch.device("cpu")


def test_tiny_run_claims_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_streaming.main(["--tiny"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["smoke"] is True
    assert result["figures"] is None
    errors = result["gradient_errors"]
    assert max(errors["float64"], errors["float64 folded"]) < gpu_streaming.BOUND_FLOAT64
    assert gpu_streaming.BOUND_FLOAT32 < errors["bfloat16"] < 2 * errors["bfloat16 whole"]


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(*words: object) -> dict[str, torch.Tensor]:
        return {name: 1.01 * gradient for name, gradient in blocks(*words).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_streaming, "blocks", scaled)
    with pytest.raises(SystemExit, match=r"blocks, float64: its gradient is .* off"):
        check(TINY, CPU)


def test_shares_are_of_what_is_computed_and_of_the_slide() -> None:
    problem = make_problem("thin", np.zeros((16, 16, 3), np.uint8), 128)
    found = measure(problem, 16, 1, CPU, roof=1e9)
    assert found is not None
    assert found.block_px == 64
    assert found.planned_pixels > 1
    assert found.share_of_roof == pytest.approx(4 * found.planned_pixels * 128**2 / (1e9 * found.median))
    assert found.useful_share == pytest.approx(3 * 128**2 / (1e9 * found.median))


def test_blocks_without_memory_have_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: object, **named: object) -> dict[str, torch.Tensor]:
        raise SmallerBlocks("injected")

    monkeypatch.setattr(gpu_streaming, "blocks", refused)
    assert measure(make_problem("thin", np.zeros((16, 16, 3), np.uint8), 128), 16, 1, CPU, roof=1e9) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU .*--tiny"):
        gpu_streaming.main([])

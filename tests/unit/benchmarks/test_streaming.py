"""The comparison of streaming with the whole image runs, checks each arm's gradient, and knows its pixels beforehand."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import streaming
from benchmarks.streaming import Texture, blocks, cells_of, make_problem, planned_pixels, scheme_over_gigamil
from gigamil.data.blocks import BlockImages
from gigamil.partition.blocks import block_ranges


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.slow
def test_all_arms_and_peaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert streaming.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    goals = ("read_over_whole_planned", "tissue_over_full", "peak_over_whole_256", "peak_over_whole_512_extrapolated")
    assert all(isinstance(result[name], float) for name in goals)
    assert result["scheme_over_gigamil_backward"] > 1
    assert 0 < result["bf16_drift"] < 2 * result["bf16_drift_whole"]
    assert result["gradient_error_float64"] < streaming.BOUND_FLOAT64
    raw = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit", "machine", "settings", "errors", "user_s", "peak_bytes"} <= raw.keys()
    assert raw["user_s"].keys() == {"whole", "blocks", "tissue", "exchange"}
    assert raw["peak_bytes"]["whole"].keys() == {"128", "256"}
    assert raw["peak_bytes"]["blocks"].keys() == {"256", "512"}


def test_a_wrong_gradient_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(*words: object) -> streaming.Gradients:
        return {name: gradient / 2 for name, gradient in blocks(*words).items()}  # type: ignore[arg-type]

    np.save(tmp_path / "texture.npy", noise(64))
    monkeypatch.setattr(streaming, "blocks", halved)
    monkeypatch.setattr(streaming, "compare", None)  # would fail if it were called
    with pytest.raises(SystemExit, match=r"blocks: its gradient is .* off, so its figures mean nothing"):
        streaming.measure(streaming.TINY, tmp_path / "texture.npy")


def test_too_little_memory_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "free_memory", lambda: 4 * 10**9)
    with pytest.raises(SystemExit, match=r"resnet18 on 4096 px takes 21 GB of memory, and 4 GB are free\. .*--quick"):
        streaming.measure(streaming.Sizes(), Path("not read"))


def test_an_arm_that_ends_within_a_tick_takes_one() -> None:
    assert streaming.user_since(streaming.user_time()) == streaming.TICK_S


def test_a_slide_repeats_its_image() -> None:
    base_HW3 = noise(20)
    slide_HW3 = np.tile(base_HW3, (4, 4, 1))
    for top, left, height, width in ((0, 0, 80, 80), (3, 19, 2, 2), (20, 41, 39, 20), (25, 5, 10, 60)):
        block_HW3 = Texture(base_HW3, cells_of(5)).read_block("", top, left, height, width)
        assert np.array_equal(block_HW3, slide_HW3[top : top + height, left : left + width])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_planned_pixels_are_those_that_are_read(share: float) -> None:
    problem, chunk = make_problem("thin", noise(48), 160, share), 4
    grid, size = problem.grid, len(problem.grid.cell_N2)
    assert size == round(share * 100)
    source = Texture(problem.base_HW3, grid)
    images = BlockImages([("slide", 0, size)], source, problem.geometry, problem.encoder.cell_px)
    ranges = block_ranges(np.zeros(size, np.int64), grid.cell_N2, chunk)
    read = sum(images.read(start, stop)[0, :, :, 0].numel() for start, stop in ranges)
    assert planned_pixels(problem, chunk) == read / 160**2


def test_tissue_costs_more_where_it_touches_more_blocks() -> None:
    problem = make_problem("thin", noise(16), 128)
    found = streaming.planned_elsewhere(problem, 16)
    assert len(found) == 64
    inside, between = (replace(problem, grid=cells_of(8, 0.2, centre)) for centre in ((0.25, 0.25), (0.5, 0.5)))
    assert planned_pixels(inside, 16) < planned_pixels(between, 16)
    assert found[0] < found[-1] < 1


def test_the_scheme_moves_on_by_the_reference_s_border_arithmetic() -> None:
    """ResNet-18 up to layer4: blocks of 2048 px read 256 px before and 186 behind; what is lost is streaming.py's."""
    problem = make_problem("resnet18", noise(16), 256)
    read_px = 256 + 2048 + 186
    assert scheme_over_gigamil(problem, 64) == (2048 / ((read_px - 410 - 409) // 32 * 32)) ** 2
    assert scheme_over_gigamil(problem, 64, 490) == (2048 / ((read_px - 980) // 32 * 32)) ** 2
    assert scheme_over_gigamil(problem, 1) is None


def test_smaller_blocks_than_were_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(streaming.Engine):
        def encode(self, image_nCHW: torch.Tensor, *words: torch.Tensor | None) -> torch.Tensor:
            if image_nCHW.shape[2] > 64:
                raise torch.OutOfMemoryError("injected")
            return super().encode(image_nCHW, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(streaming, "Engine", Small)
    problem = make_problem("thin", noise(16), 128)
    assert blocks(problem, 1)
    with pytest.raises(streaming.SmallerBlocks, match="no memory for blocks of 16 cells; 8 fit"):
        blocks(problem, 16)

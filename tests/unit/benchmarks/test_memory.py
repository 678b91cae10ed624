"""The memory benchmark runs; what it counts of the head is what the head saves."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.memory import INDEX_BYTES, draw_tiles, formula, make_model, naive, replay
from gigamil.models.bag import Bag, Pooled


def test_rows_and_slope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--largest", "64", "--chunk", "16", "--width", "4", "--hidden", "8", "--out", str(tmp_path / "out.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SIZES", (32,))
        assert memory.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gradient of replay against naive: ")
    result = json.loads(lines[-1])
    assert result["largest_n"] == 64
    assert "slope_over_formula" in result
    raw = json.loads((tmp_path / "out.json").read_text())
    assert raw["command"].startswith("python benchmarks/memory.py --largest 64 ")
    assert {"commit", "settings", "machine"} <= raw.keys()
    rows = raw["rows"]
    assert {(row["arm"], row["num_tiles"]) for row in rows} == {
        (a, n) for a in ("naive", "replay") for n in (16, 32, 64)
    }
    assert all(row["peak_bytes"] >= row["base_bytes"] > 0 for row in rows)


def test_a_wrong_gradient_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.check(4, 8) < 1e-4
    right = memory.replay

    def forgets_a_tile(*words: object) -> None:
        model, optimizer, num_tiles, chunk, read = words
        right(model, optimizer, num_tiles - 1, chunk, read)  # type: ignore[arg-type, operator]

    monkeypatch.setattr(memory, "replay", forgets_a_tile)
    monkeypatch.setattr(memory, "_fresh", None)  # would fail if it were called
    with pytest.raises(SystemExit, match=r"replay: its gradient is .* off, so its figures mean nothing"):
        memory.main(["--largest", "64", "--width", "4", "--hidden", "8"])


def test_tiles_are_the_same_each_time() -> None:
    assert torch.equal(draw_tiles("slide", 8, 16), draw_tiles("slide", 8, 16))
    assert not torch.equal(draw_tiles("slide", 8, 16), draw_tiles("slide", 16, 24))


class Squares(nn.Module):
    """A head that saves one tensor of the embeddings' size."""

    out_dim = None

    def forward(self, bag: Bag) -> Pooled:
        return Pooled(bag.segment_sum(bag.embedding_nD.exp())[:, :2])


def test_the_formula_counts_what_the_head_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GatedAttention", lambda dim, hidden: Squares())
    dim = make_model(4, 8).encoder.dim
    assert formula(4, 8) == {"embedding": 4 * dim, "gradient": 4 * dim, "head": 4 * dim, "index": INDEX_BYTES}


@pytest.mark.parametrize("run", [naive, replay])
def test_both_arms_take_a_step(run: object) -> None:
    model = make_model(4, 8)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run(model, torch.optim.SGD(model.parameters(), lr=1e-3), 40, 16)  # type: ignore[operator]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

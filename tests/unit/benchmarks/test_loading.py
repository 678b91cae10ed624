"""The comparison of loaders runs, and refuses loaders that deliver other tiles."""

import json
from pathlib import Path

import pytest

from benchmarks import loading
from benchmarks.loading import TINY, Figure, check, cut_tiles, least_over, over, write


def test_all_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loading.main(["--tiny", "--out", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loading_over_decode_limit"] > 0
    assert result["loading_over_webdataset"] == min(result["over_webdataset_by_workers"].values())
    assert 0 <= result["data_wait_frac"] <= 1
    raw = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "commit"} <= raw.keys()
    assert {"cpu", "platform", "torch", "webdataset", "date"} <= raw["machine"].keys()
    names = ["limit", "gigamil 0", "webdataset 0", "gigamil 1", "webdataset 1"]
    assert [arm["arm"] for arm in raw["arms"]] == names
    assert all(len(arm["cpu_s"]) == TINY.rounds and min(arm["cpu_s"]) > 0 for arm in raw["arms"])


def test_loaders_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path, cut_tiles(TINY), TINY)
    check(shards, TINY)
    real = loading.through_webdataset
    monkeypatch.setattr(loading, "through_webdataset", lambda *words: (batch[1:] for batch in real(*words)))
    with pytest.raises(AssertionError, match="do not deliver the same tiles"):
        check(shards, TINY)


def test_ratios() -> None:
    assert over([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    assert least_over([2.0, 9.0], [4.0, 3.0]) == 2 / 3
    line = Figure("arm", 100, [1.0, 2.0, 4.0], [1.0, 0.5, 1.0]).line(Figure("limit", 100, [1.0], [0.25]))
    assert line.split() == ["arm", "50", "200", "5000.0", "0.500"]

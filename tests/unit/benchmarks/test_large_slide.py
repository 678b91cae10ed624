"""The step over a large slide file runs; the file is whole, or not there."""

import json
from pathlib import Path

import openslide
import pytest

from benchmarks import large_slide
from benchmarks.large_slide import TINY, Row, growth, paint, sides_up_to


@pytest.mark.slow
def test_a_tiny_slide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert large_slide.main(["--tiny", "--folder", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["side"] == 2 * TINY.base
    assert result["tiles"] > 900  # of 1,024: lanes of glass are no tissue
    assert result["seconds"] > 0
    assert result["peak_mb"] > 1
    assert {"loss", "bytes_per_tile", "ranks", "command", "commit", "machine"} <= result.keys()


def test_the_file_is_painted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, *words: object, **named: object) -> None:
        path.write_bytes(b"II")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(large_slide, "write_pyramid_tiff", interrupted)
        with pytest.raises(KeyboardInterrupt):
            paint(tmp_path, 1024, TINY)
    path = paint(tmp_path, 1024, TINY)
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (1024, 1024)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
    monkeypatch.setattr(large_slide, "write_pyramid_tiff", None)  # would fail if it were called
    assert paint(tmp_path, 1024, TINY) == path


def test_sides() -> None:
    assert sides_up_to(65536, 4096) == [4096, 8192, 16384, 32768, 65536]
    with pytest.raises(SystemExit, match="--side 5000: must be 4096 or twice"):
        sides_up_to(5000, 4096)


def test_growth_is_from_a_quarter_of_the_side_on() -> None:
    rows = [Row(side, side // 64, 1.0, peak, 0.7) for side, peak in ((1024, 5.0), (2048, 40.0), (8192, 42.0))]
    assert growth(rows, 2) == pytest.approx(2e6 * 2 / (8192 // 64 - 2048 // 64))

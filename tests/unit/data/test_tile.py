"""Before tiling: which slides are one file under two ids. What is tiled is tested in tests/cli/test_tile.py."""

from pathlib import Path

import pytest

from gigamil.data.cohort import SlideRow
from gigamil.data.tile import _copies
from gigamil.errors import SlideError
from gigamil.shards.job import fingerprint

MARGIN = b"\xff" * (1 << 16)  # what a fingerprint reads at either end


def rows(*paths: Path) -> list[SlideRow]:
    return [SlideRow(path.stem, path, path.stem, None, None, None, None) for path in paths]


def put(path: Path, middle: bytes) -> Path:
    """A file between white margins, as an uncompressed slide is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MARGIN + middle + MARGIN)
    return path


def test_equal_ends_are_no_copy(tmp_path: Path) -> None:
    """Each copy is of the earlier row that it equals, though all four have one fingerprint."""
    paths = [
        put(tmp_path / f"{name}.tiff", middle) for name, middle in zip("abcd", (b"1", b"2", b"2", b"1"), strict=True)
    ]
    assert len({fingerprint(path) for path in paths}) == 1
    assert _copies(rows(*paths)) == {"c": "b", "d": "a"}


def test_a_path_under_two_ids_is_a_copy_that_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "a.tiff", b"1")
    (tmp_path / "link.tiff").symlink_to(path)
    monkeypatch.setattr("gigamil.data.tile.filecmp.cmp", None)
    assert _copies(rows(path, tmp_path / "link.tiff")) == {"link": "a"}


def test_folders_are_told_apart_by_their_fingerprint(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / "dicom" / name / "1.dcm", b"1")
        put(tmp_path / "mirax" / name / "Data0000.dat", b"1")
        put(tmp_path / "mirax" / f"{name}.mrxs", b"1")
    assert _copies(rows(tmp_path / "dicom" / "a", tmp_path / "dicom" / "b")) == {"b": "a"}
    assert _copies(rows(tmp_path / "mirax" / "a.mrxs", tmp_path / "mirax" / "b.mrxs")) == {"b": "a"}


def test_files_that_are_missing_are_no_copies(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tiff", b"1")
    (tmp_path / "dangling.tiff").symlink_to(tmp_path / "gone.tiff")
    assert _copies(rows(tmp_path / "gone.tiff", path, tmp_path / "dangling.tiff")) == {}


@pytest.mark.parametrize("error", [OSError("away"), SlideError("away")])
def test_files_that_go_while_they_are_compared_are_no_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def cmp(*_: object, shallow: bool) -> bool:
        assert not shallow
        raise error

    monkeypatch.setattr("gigamil.data.tile.filecmp.cmp", cmp)
    assert _copies(rows(put(tmp_path / "a.tiff", b"1"), put(tmp_path / "b.tiff", b"1"))) == {}

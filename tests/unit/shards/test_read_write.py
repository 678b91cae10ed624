"""Tiles survive the round trip, a span reads its bytes only, and every kind of damage is named."""

import bz2
import contextlib
import gc
import gzip
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander, tar_file_iterator

from gigamil.errors import BagError, ShardError
from gigamil.shards.cohort_table import SlideOutcome, write_cohort
from gigamil.shards.format import INDEX, MANIFEST, REMOVED, STAGING, slide_folder
from gigamil.shards.index import SlideIndex, write_index
from gigamil.shards.manifest import digest_file
from gigamil.shards.read import ShardSet, _checked_index, _usual_header
from gigamil.shards.write import clear_leftovers
from gigamil.testing.shards import make_shards, noise_jpegs, staged_slide

DOTTED = "TCGA-83-5908-01Z-00-DX1.381c8f82-61a0-4e9d-982d-1ad0af7bead9"
JPEGS = noise_jpegs(10, 16)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    make_shards(tmp_path, DOTTED, JPEGS, tile_px=16, tiles_per_tar=4)
    return ShardSet(tmp_path)


def tar_path(shards: ShardSet, number: int = 0) -> Path:
    return shards.folder(DOTTED) / shards.manifest(DOTTED).tars[number].name


def members(shards: ShardSet, number: int) -> list[str]:
    with tarfile.open(tar_path(shards, number)) as tar:
        return tar.getnames()


def test_every_span_across_tars(shards: ShardSet) -> None:
    assert [len(members(shards, number)) for number in range(3)] == [4, 4, 2]
    for start in range(11):
        for stop in range(start, 11):
            assert shards.read_span(DOTTED, start, stop) == JPEGS[start:stop]


def test_a_span_reads_its_own_bytes_only(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = os.pread

    def watched(handle: int, length: int, offset: int) -> bytes:
        reads.append((offset, length))
        return real(handle, length, offset)

    index = shards.index(DOTTED)
    monkeypatch.setattr(os, "pread", watched)
    shards.read_span(DOTTED, 2, 6)
    assert [offset for offset, _ in reads] == [index.offset[2] - 512, index.offset[4] - 512]
    assert sum(length for _, length in reads) <= sum(index.length[2:6]) + 4 * 1024


def test_webdataset_sees_one_sample_per_tile_of_a_dotted_id(shards: ShardSet) -> None:
    """In the base name, the dot of the id would end the key and merge the slide into one sample."""
    # On our own handles: webdataset leaves those that it opens to the garbage collector.
    with contextlib.ExitStack() as stack:
        paths = [tar_path(shards, number) for number in range(3)]
        sources = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in paths]
        samples = list(group_by_keys(tar_file_expander(sources)))
    assert [sample["__key__"] for sample in samples] == [f"{DOTTED}/{n:06d}" for n in range(10)]
    assert [sample["jpg"] for sample in samples] == JPEGS


def test_webdataset_reads_the_tars_by_its_own_means(shards: ShardSet) -> None:
    urls = [str(tar_path(shards, number)) for number in range(3)]
    with warnings.catch_warnings():  # it leaves files and tars to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).to_tuple("__key__", "jpg"))
        decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg"))
        gc.collect()
    assert samples == [(f"{DOTTED}/{n:06d}", jpeg) for n, jpeg in enumerate(JPEGS)]
    assert np.stack([image for (image,) in decoded]).shape == (10, 16, 16, 3)


def test_a_span_is_what_webdataset_finds_in_these_bytes(shards: ShardSet) -> None:
    """The reader compares headers with the index and slices; the iterator of webdataset parses the same bytes."""
    for number, (start, stop) in enumerate([(0, 4), (4, 8), (8, 10)]):
        with tar_path(shards, number).open("rb") as tar:
            assert [tile["data"] for tile in tar_file_iterator(tar)] == shards.read_span(DOTTED, start, stop)


def test_same_tiles_give_same_bytes(tmp_path: Path) -> None:
    for root in ("a", "b"):
        make_shards(tmp_path / root, "s", JPEGS, tile_px=16, tiles_per_tar=4)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_ids_that_webdataset_would_skip_or_ustar_would_split(tmp_path: Path) -> None:
    for slide_id in ("__x__", "a" * 128):
        make_shards(tmp_path, slide_id, JPEGS[:2], tile_px=16)
        assert ShardSet(tmp_path).read_span(slide_id, 0, 2) == JPEGS[:2]


def test_index_and_positions(shards: ShardSet) -> None:
    index = shards.index(DOTTED)
    assert index.tar.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert index.number.tolist() == list(range(10))
    assert shards.positions_um(DOTTED)[5].tolist() == [8.0, 8.0]  # column 1, row 1 of tiles of 8 micron
    assert shards.manifest(DOTTED).tile_um == 8.0


def test_slides_without_a_tile_are_not_listed(tmp_path: Path) -> None:
    make_shards(tmp_path, "empty", [], tile_px=16)
    make_shards(tmp_path, "full", JPEGS, tile_px=16)
    shards = ShardSet(tmp_path)
    assert shards.slide_ids == ("full",)
    assert shards.read_span("empty", 0, 0) == []
    assert shards.manifest("empty").why_empty.startswith("1.000 mm2 of tissue, but no tile of 8 um holds enough of it")


def test_slides_without_a_tile_are_refused_with_the_reason(tmp_path: Path) -> None:
    for slide_id in ("full", "none", "specks"):
        make_shards(tmp_path, slide_id, JPEGS if slide_id == "full" else [], tile_px=16)
    path = slide_folder(tmp_path, "none") / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_dropped": 7}))
    shards = ShardSet(tmp_path)
    for slide_ids, words in [
        (
            ["full", "none", "specks"],
            "2 slides .* 'none': all 7 tiles with tissue were dropped by slides.max_pen or sl.*",
        ),
        (
            ["specks"],
            r"1 slides .* 'specks': 1\.000 mm2 of tissue, but .*; lower slides.min_tissue \(0\.25\) or .*tile_px",
        ),
    ]:
        with pytest.raises(BagError, match=rf"^{words}\. Run `gigamil split` again to leave them out\.$"):
            shards.check_tiles(slide_ids, 16, 0.5)


def test_a_pickled_copy_reads_the_same(shards: ShardSet) -> None:
    shards.read_span(DOTTED, 0, 1)
    assert pickle.loads(pickle.dumps(shards)).read_span(DOTTED, 3, 5) == JPEGS[3:5]  # noqa: S301 (our own bytes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_span_outside_the_slide(shards: ShardSet, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=r"has tiles 0\.\.9"):
        shards.read_span(DOTTED, start, stop)


def damage(path: Path, offset: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def test_one_wrong_byte_of_a_tile_is_found_by_its_reader(shards: ShardSet) -> None:
    index = shards.index(DOTTED)
    damage(tar_path(shards), int(index.offset[2]) + 50, b"\x00\x00\x00")
    with pytest.raises(
        ShardError, match=rf"slide '{DOTTED}', 'tiles-00000.tar': tile 2 .* crc32 differs.*gigamil tile"
    ):
        shards.read_span(DOTTED, 0, 4)
    assert shards.read_span(DOTTED, 3, 10) == JPEGS[3:]


def test_unverified_reading_takes_the_bytes_as_they_are(shards: ShardSet) -> None:
    damage(tar_path(shards), int(shards.index(DOTTED).offset[2]) + 50, b"\x00\x00\x00")
    assert len(shards.read_span(DOTTED, 0, 4, verify=False)) == 4


@pytest.mark.parametrize("tile", [0, 1, 3])
def test_damaged_tar_header(shards: ShardSet, tile: int) -> None:
    """tarfile takes a damaged header for the end of the archive: without counting, the bag would shrink silently."""
    damage(tar_path(shards), int(shards.index(DOTTED).offset[tile]) - 400, b"\xff\xff")
    with pytest.raises(ShardError, match=rf"header of tile {tile} is damaged|not a readable tar"):
        shards.read_span(DOTTED, 0, 4)


def test_the_header_that_is_expected_is_the_one_that_is_written(shards: ShardSet) -> None:
    """Others are understood too, by a slower way: tars of webdataset's own writer name another owner and time."""
    data = tar_path(shards).read_bytes()
    assert data[:512] == _usual_header(f"{DOTTED}/000000.jpg".encode(), len(JPEGS[0]))
    assert other_member(mtime=1_700_000_000, uname="bigdata") != _usual_header(
        f"{DOTTED}/000001.jpg".encode(), len(JPEGS[1])
    )
    damage(
        tar_path(shards), int(shards.index(DOTTED).offset[1]) - 512, other_member(mtime=1_700_000_000, uname="bigdata")
    )
    assert shards.read_span(DOTTED, 0, 10) == JPEGS


def other_member(**fields: object) -> bytes:
    """The header of tile 1, but for some fields."""
    member = tarfile.TarInfo(f"{DOTTED}/000001.jpg")
    member.size = len(JPEGS[1])
    for name, value in fields.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT if fields.get("type") == tarfile.GNUTYPE_SPARSE else tarfile.USTAR_FORMAT)[
        :512
    ]


PAX = tarfile.TarInfo(f"{DOTTED}/000001.jpg")
PAX.pax_headers = {"path": "/etc/passwd"}
HOSTILE = {
    "climbs": (other_member(name="../../etc/cron.d/x"), r"holds '\.\./\.\./etc/cron\.d/x' where the index has"),
    "climbs in the middle": (other_member(name=f"{DOTTED}/../../b.jpg"), r"where the index has"),
    "absolute": (other_member(name="/etc/passwd"), "holds '/etc/passwd' where the index has"),
    "escape codes": (other_member(name="\x1b[2J\n\x07"), r"holds '\\x1b\[2J\\n\\x07' where"),
    "no utf-8": (other_member(name="a").replace(b"a", b"\xff", 1), "damaged"),
    "duplicate": (other_member(name=f"{DOTTED}/000000.jpg"), "000000.jpg' where the index has"),
    "prefix": (other_member(name="x" * 90 + "/" + "y" * 90), "holds 'xxx"),
    "hard link": (other_member(type=tarfile.LNKTYPE, linkname="/etc/passwd"), "tile 1 is a hard link"),
    "symbolic link": (other_member(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "tile 1 is a symbolic link"),
    "character device": (other_member(type=tarfile.CHRTYPE), "tile 1 is a device"),
    "block device": (other_member(type=tarfile.BLKTYPE), "tile 1 is a device"),
    "folder": (other_member(type=tarfile.DIRTYPE), "tile 1 is a folder"),
    "fifo": (other_member(type=tarfile.FIFOTYPE), "tile 1 is a fifo"),
    "sparse": (other_member(type=tarfile.GNUTYPE_SPARSE), "damaged, or no USTAR header"),
    "PAX override": (PAX.tobuf(tarfile.PAX_FORMAT)[:512], "tile 1 is a PAX header"),
    "PAX for all": (other_member(type=tarfile.XGLTYPE), "tile 1 is a PAX header"),
    "GNU name": (other_member(type=tarfile.GNUTYPE_LONGNAME), "tile 1 is a GNU long name"),
    "unknown": (other_member(type=b"Z"), "tile 1 is a member of kind b'Z'"),
    "other size": (other_member(size=7), "has 7 bytes, expected"),
    "huge": (other_member(size=8**11 - 1), "has 8589934591 bytes, expected"),
    "gzip": (gzip.compress(bytes(10**6)).ljust(512, b"\0")[:512], "damaged, or no USTAR header"),
    "bzip2": (bz2.compress(bytes(10**6)).ljust(512, b"\0")[:512], "damaged, or no USTAR header"),
    "end of the archive": (bytes(512), "damaged, or no USTAR header"),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_members_other_than_the_tiles_are_refused(shards: ShardSet, tmp_path: Path, kind: str) -> None:
    header, words = HOSTILE[kind]
    damage(tar_path(shards), int(shards.index(DOTTED).offset[1]) - 512, header)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ShardError, match=rf"slide '{DOTTED}', 'tiles-00000\.tar': .*{words}") as caught:
        shards.read_span(DOTTED, 0, 4)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    assert shards.read_span(DOTTED, 2, 4) == JPEGS[2:4]


def test_a_nul_in_a_name_ends_it_for_no_one(shards: ShardSet) -> None:
    """tarfile stops at the first NUL: two readers would see two names."""
    name = f"{DOTTED}/000001.jpg".encode()
    header = bytearray(other_member())
    header[len(name) : len(name) + 4] = b"\0../"
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    damage(tar_path(shards), int(shards.index(DOTTED).offset[1]) - 512, bytes(header))
    with pytest.raises(ShardError, match="where the index has"):
        shards.read_span(DOTTED, 0, 2)


@pytest.mark.parametrize(
    ("column", "value"),
    [("offset", -5), ("offset", 0), ("offset", 10**15), ("length", -1), ("length", 10**15), ("tar", 9), ("tar", -1)],
)
def test_an_index_that_points_elsewhere_is_refused_and_costs_nothing(shards: ShardSet, column: str, value: int) -> None:
    """Its digest fits: it was written so."""
    folder, index = shards.folder(DOTTED), shards.index(DOTTED)
    columns = {name: getattr(index, name).copy() for name in index.__dataclass_fields__}
    columns[column][2] = value
    write_index(folder / INDEX, SlideIndex(**columns))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["index"] = digest_file(folder / INDEX).model_dump()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for start, stop in [(2, 3), (1, 4), (0, 10)]:
        with pytest.raises(ShardError, match=rf"slide '{DOTTED}', '(tiles-00000\.tar|index\.parquet)'"):
            ShardSet(shards.root).read_span(DOTTED, start, stop)


def test_truncated_tar(shards: ShardSet) -> None:
    path = tar_path(shards)
    os.truncate(path, int(shards.index(DOTTED).offset[3]) + 5)
    assert shards.read_span(DOTTED, 0, 3) == JPEGS[:3]
    with pytest.raises(ShardError, match="tiles-00000.tar': is cut short"):
        shards.read_span(DOTTED, 0, 4)


def test_missing_tar(shards: ShardSet) -> None:
    tar_path(shards, 1).unlink()
    with pytest.raises(ShardError, match="tiles-00001.tar': cannot be read"):
        shards.read_span(DOTTED, 3, 5)


def test_tiles_of_another_slide_under_this_name(shards: ShardSet, tmp_path: Path) -> None:
    make_shards(tmp_path, "other" + DOTTED[5:], JPEGS, tile_px=16, tiles_per_tar=4)
    (slide_folder(tmp_path, "other" + DOTTED[5:]) / "tiles-00000.tar").replace(tar_path(shards))
    with pytest.raises(ShardError, match="holds 'other.*' where the index has 'TCGA"):
        shards.read_span(DOTTED, 0, 2)


def test_wrong_digest_of_index_and_tar(shards: ShardSet) -> None:
    shards.verify(DOTTED)
    damage(tar_path(shards, 2), 3, b"x")
    with pytest.raises(ShardError, match=r"tiles-00002.tar': is not what was written: \d+ bytes with sha256"):
        shards.verify(DOTTED)
    damage(shards.folder(DOTTED) / "index.parquet", 30, b"xxx")
    _checked_index.cache_clear()
    with pytest.raises(ShardError, match=r"index.parquet': is not what was written"):
        ShardSet(shards.root).index(DOTTED)


def test_damaged_manifest(shards: ShardSet) -> None:
    path = shards.folder(DOTTED) / "manifest.json"
    text = path.read_text()
    for broken, words in [
        (text[:100], "not a manifest of format version 2"),
        (text.replace('"format_version": 2', '"format_version": 3'), "format_version"),
        (text.replace('"num_tiles": 10,', ""), "num_tiles"),
        (text.replace(f'"slide_id": "{DOTTED}"', '"slide_id": "other"'), "manifest of slide 'other'"),
    ]:
        path.write_text(broken)
        with pytest.raises(ShardError, match=words):
            ShardSet(shards.root).manifest(DOTTED)
    path.unlink()
    with pytest.raises(ShardError, match="Run `gigamil tile` first"):
        ShardSet(shards.root).slide_ids  # noqa: B018 (reads the manifests)


def test_no_shards_at_all(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no shards in"):
        ShardSet(tmp_path)


def test_shards_of_another_scale_are_refused(shards: ShardSet) -> None:
    shards.check_tiles([DOTTED], 16, 0.5)
    with pytest.raises(ShardError, match=r"16 px at 0.5 um per pixel, configured 32 at 0.5"):
        shards.check_tiles([DOTTED], 32, 0.5)


def test_thumbnail_and_mask(shards: ShardSet) -> None:
    image_HW3, mpp = shards.thumbnail(DOTTED)
    mask_HW = shards.mask(DOTTED)
    assert image_HW3.dtype == np.uint8
    assert image_HW3.shape == (32, 32, 3)
    assert mpp == 1.0
    assert mask_HW.shape == (32, 32)
    assert mask_HW.all()


def test_staging_is_deleted_on_error_and_final_never_half_there(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with staged_slide(tmp_path, "s") as folder:
            (folder / "tiles-00000.tar").write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert list(tmp_path.rglob("*.tar")) == []
    assert not slide_folder(tmp_path, "s").exists()


def test_leftovers_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    make_shards(tmp_path, "s", JPEGS, tile_px=16)
    others = [tmp_path / name / "a.svs" for name in ("staging", "removed")]
    for path in (tmp_path / STAGING / "killed" / "x", tmp_path / REMOVED / "killed" / "x", *others):
        path.parent.mkdir(parents=True)
        path.touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["removed", "slides", "staging"]
    assert all(path.exists() for path in others)


def test_new_shards_replace_old_ones(tmp_path: Path) -> None:
    make_shards(tmp_path, "s", JPEGS, tile_px=16, tiles_per_tar=4)
    make_shards(tmp_path, "s", JPEGS[:3], tile_px=16, tiles_per_tar=4)
    shards = ShardSet(tmp_path)
    assert shards.read_span("s", 0, 3) == JPEGS[:3]
    assert len(list(shards.folder("s").glob("*.tar"))) == 1
    assert not any((tmp_path / REMOVED).iterdir())


def test_old_shards_come_back_where_new_ones_cannot_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path, "s", JPEGS, tile_px=16)
    real = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if path.parent.name == STAGING:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="Input/output error"):
        make_shards(tmp_path, "s", JPEGS[:3], tile_px=16)
    assert ShardSet(tmp_path).read_span("s", 0, 10) == JPEGS


@pytest.mark.parametrize("slide_ids", [None, ["other", "s"]])
def test_old_shards_come_back_after_a_kill_between_two_renames(tmp_path: Path, slide_ids: list[str] | None) -> None:
    def move_to_removed(root: Path) -> Path:
        (tmp_path / REMOVED).mkdir(exist_ok=True)
        return slide_folder(root, "s").rename(tmp_path / REMOVED / "s")

    make_shards(tmp_path, "s", JPEGS, tile_px=16)
    move_to_removed(tmp_path)
    clear_leftovers(tmp_path, slide_ids)
    assert ShardSet(tmp_path).read_span("s", 0, 10) == JPEGS
    # Not in the place of new ones, and not those of which a part is deleted already.
    make_shards(tmp_path / "a", "s", JPEGS[:3], tile_px=16)
    move_to_removed(tmp_path / "a")
    clear_leftovers(tmp_path, slide_ids)
    assert ShardSet(tmp_path).manifest("s").num_tiles == 10
    (move_to_removed(tmp_path) / MANIFEST).unlink()
    clear_leftovers(tmp_path, slide_ids)
    assert list(tmp_path.rglob("*.tar")) == []


@pytest.mark.parametrize(
    "name", ["../other/tiles-00000.tar", "/etc/passwd", "..", ".hidden", "", "a/b", "a\\\\b", "a\\n"]
)
def test_a_manifest_cannot_name_a_file_elsewhere(shards: ShardSet, name: str) -> None:
    path = shards.folder(DOTTED) / "manifest.json"
    path.write_text(path.read_text().replace('"tiles-00001.tar"', f'"{name}"'))
    with pytest.raises(ShardError, match=r"tars\.1\.name: String should match pattern"):
        ShardSet(shards.root).read_span(DOTTED, 0, 10)


def test_shards_of_other_settings_are_told_apart(tmp_path: Path) -> None:
    make_shards(tmp_path, "a", noise_jpegs(3, 32), tile_px=32)
    folder = slide_folder(tmp_path, "a")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["settings"] = {"min_tissue": 0.25, "tile_px": 32}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shards = ShardSet(tmp_path)
    assert shards.made_with("a", {"min_tissue": 0.25, "tile_px": 32, "max_failed": 3})
    assert not shards.made_with("a", {"min_tissue": 0.5, "tile_px": 32})


@pytest.mark.parametrize(("key", "recorded"), [("masks", "mask_file_sha256"), ("coords", "coords_file_sha256")])
def test_shards_with_a_mask_or_positions_of_ones_own_are_told_from_those_without(
    tmp_path: Path, key: str, recorded: str
) -> None:
    make_shards(tmp_path, "a", JPEGS, tile_px=16)
    assert ShardSet(tmp_path).made_with("a", {key: None})
    assert not ShardSet(tmp_path).made_with("a", {key: Path("folder")})
    path = slide_folder(tmp_path, "a") / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["settings"] = {recorded: "0" * 64}
    path.write_text(json.dumps(manifest))
    assert not ShardSet(tmp_path).made_with("a", {key: None})
    assert ShardSet(tmp_path).made_with("a", {key: Path("folder")})


def test_old_shards_of_a_slide_that_failed_since_are_not_those_that_are_wanted(tmp_path: Path) -> None:
    """Its new mask may be unreadable, for example: the manifest cannot tell."""
    for slide_id in ("a", "b"):
        make_shards(tmp_path, slide_id, JPEGS, tile_px=16)
    write_cohort(tmp_path, [SlideOutcome("a", "p", "cached", ""), SlideOutcome("b", "q", "failed", "no such file")])
    assert [ShardSet(tmp_path).made_with(slide_id, {}) for slide_id in ("a", "b")] == [True, False]

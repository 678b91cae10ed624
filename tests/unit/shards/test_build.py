"""One slide file becomes shards that hold its pixels at the right places, or an error that says why not."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest
from PIL import Image

from gigamil.config.schema import Slides
from gigamil.data.coords import export_coords, read_positions
from gigamil.data.decode import decode_tiles
from gigamil.errors import ShardError, SlideError
from gigamil.partition.curve import hilbert_index, hilbert_sort
from gigamil.shards.build import build_slide, finish_slide, prepare_slide, store_part
from gigamil.shards.job import SlideJob, fingerprint, finished_slide, slide_bytes
from gigamil.shards.read import ShardSet
from gigamil.testing.slides import write_pyramid_tiff

SETTINGS = Slides(tile_px=32, tile_mpp=1.0, min_tissue=0.5, min_tissue_area_um2=1000.0)


def draw(
    path: Path,
    *,
    tissue: tuple[int, int, int, int] | None = (64, 96, 448, 416),
    mpp: float | tuple[float, float] | None = 1.0,
    tile: int = 256,
) -> Path:
    """A slide of 512 x 512 pixels: glass with a textured rectangle (x0, y0, x1, y1) of tissue."""
    image = np.full((512, 512, 3), 245, np.uint8)
    if tissue:
        x0, y0, x1, y1 = tissue
        row, col = np.mgrid[y0:y1, x0:x1]
        image[y0:y1, x0:x1] = np.stack([180 + row // 8, 60 + col // 4, np.full_like(row, 150)], axis=2)
    write_pyramid_tiff(path, image, mpp, tile=tile)
    return path


@pytest.fixture
def job(tmp_path: Path) -> SlideJob:
    return SlideJob("slide.1", draw(tmp_path / "slide.tiff"), None, SETTINGS, tmp_path / "shards", hilbert_sort)


def with_slides(job: SlideJob, **changes: object) -> SlideJob:
    return replace(job, slides=job.slides.model_copy(update=changes))


def test_tiles_hold_the_pixels_of_their_places_in_hilbert_order(job: SlideJob) -> None:
    manifest = build_slide(job)
    shards = ShardSet(job.root)
    assert shards.slide_ids == ("slide.1",)
    assert (manifest.num_x, manifest.num_y, manifest.mpp_x, manifest.mpp_source) == (16, 16, 1.0, "file")
    assert manifest.num_tiles == 12 * 10  # columns 2..13, rows 3..12
    assert manifest.tissue_area_mm2 == pytest.approx(0.384 * 0.320, rel=0.1)
    index = shards.index("slide.1")
    col, row = index.x_px0 // 32, index.y_px0 // 32
    assert (np.diff(hilbert_index(col, row, 4)) > 0).all()
    assert (index.x_um == col * 32.0).all()
    assert (index.tissue >= 0.5).all()
    tiles_nHW3 = decode_tiles(shards.read_span("slide.1", 0, manifest.num_tiles), 32).astype(float)
    inner = (col > 2) & (col < 13) & (row > 3) & (row < 12)
    np.testing.assert_allclose(tiles_nHW3[inner, :, :, 0].mean((1, 2)), 180 + 4 * row[inner] + 1.5, atol=2)
    np.testing.assert_allclose(tiles_nHW3[inner, :, :, 1].mean((1, 2)), 60 + 8 * col[inner] + 3.5, atol=2)
    thumbnail_HW3, thumbnail_mpp = shards.thumbnail("slide.1")
    assert (thumbnail_HW3.shape, thumbnail_mpp) == ((64, 64, 3), 8.0)
    assert shards.mask("slide.1")[20:45, 16:48].all()
    shards.verify("slide.1")


def test_rebuilding_gives_equal_bytes(job: SlideJob, tmp_path: Path) -> None:
    build_slide(job)
    again = replace(job, root=tmp_path / "again")
    build_slide(again)
    files = sorted(path.relative_to(job.root) for path in job.root.rglob("*") if path.is_file())
    assert [file.name for file in files] == [
        "index.parquet",
        "manifest.json",
        "mask.png",
        "overview.jpg",
        "thumbnail.jpg",
        "tiles-00000.tar",
        "tissue.geojson",
    ]
    for file in files:
        assert (job.root / file).read_bytes() == (again.root / file).read_bytes(), file


def test_finished_until_settings_source_or_files_change(job: SlideJob) -> None:
    assert finished_slide(job) is None
    manifest = build_slide(job)
    assert finished_slide(job) == manifest
    for changed in (
        replace(job, mpp=0.9),
        with_slides(job, jpeg_quality=95),
    ):
        assert finished_slide(changed) is None
    same = with_slides(job, max_failed=7)
    assert finished_slide(same) == manifest
    moved = replace(job, path=job.path.with_name("archived.tiff"))
    assert finished_slide(moved) == manifest
    tar = ShardSet(job.root).folder(job.slide_id) / "tiles-00000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 1)
    assert finished_slide(job) is None
    os.truncate(tar, size)
    draw(job.path, tissue=(64, 96, 448, 417))
    assert finished_slide(job) is None


def test_new_settings_replace_the_old_shards(job: SlideJob) -> None:
    build_slide(job)
    larger = with_slides(job, tile_px=64)
    build_slide(larger)
    assert ShardSet(job.root).manifest(job.slide_id).tile_px == 64
    assert sorted(path.name for path in job.root.iterdir() if any(path.iterdir())) == ["slides"]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_failed_rebuild_leaves_the_old_shards_as_they_were(job: SlideJob, monkeypatch: pytest.MonkeyPatch) -> None:
    build_slide(job)
    before = contents(job.root)
    finer = with_slides(job, tile_mpp=0.1)
    with pytest.raises(SlideError, match=r"over 4 times slides.tile_mpp=0.1"):  # a typo
        build_slide(finer)
    larger = with_slides(job, tile_px=64)

    def disk_full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            build_slide(larger)
    assert contents(job.root) == before
    with pytest.raises(ShardError, match=r"32 px at 1 um per pixel, configured 64 at 1"):
        ShardSet(job.root).check_tiles([job.slide_id], 64, 1.0)
    job.path.write_bytes(b"not a slide any more")
    with pytest.raises(SlideError, match="not a slide that OpenSlide can open"):
        build_slide(job)
    assert contents(job.root) == before


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_source_that_cannot_be_read_is_like_one_that_is_gone(
    job: SlideJob, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    manifest = build_slide(job)

    asked = []

    def refuse(path: Path, *args: object, **options: object) -> object:
        if path == job.path:
            asked.append(path)
            raise error
        return real(path, *args, **options)

    for module, method in ((Path, "stat"), (os, "open")):
        real = getattr(module, method)
        with monkeypatch.context() as patch:
            patch.setattr(module, method, refuse)
            assert finished_slide(job) == manifest
    assert len(asked) == 2


def test_no_tissue_and_zero_tiles_say_why(job: SlideJob, tmp_path: Path) -> None:
    draw(job.path, tissue=None)
    manifest = build_slide(job)
    assert manifest.num_tiles == 0
    assert manifest.why_empty.startswith("no tissue found")
    assert finished_slide(job) == manifest
    strict = SETTINGS.model_copy(update={"min_tissue": 1.0})
    thin = SlideJob(
        "thin", draw(tmp_path / "thin.tiff", tissue=(68, 120, 444, 136)), None, strict, job.root, hilbert_sort
    )
    manifest = build_slide(thin)
    assert manifest.tars == ()
    assert "mm2 of tissue, but no tile of 32 um holds enough of it; lower slides.min_tissue (1.0)" in manifest.why_empty
    assert ShardSet(job.root).slide_ids == ()


@pytest.mark.parametrize(
    ("file_mpp", "table_mpp", "default_mpp", "words"),
    [
        (None, None, None, "no mpp in the file"),
        (1.0, 500.0, None, "mpp 500 in the slide table cannot be true"),
        (5.0, None, None, "its mpp 5 (file) is over 4 times slides.tile_mpp=1"),
    ],
)
def test_mpp_that_is_missing_absurd_or_too_coarse(
    tmp_path: Path, file_mpp: float | None, table_mpp: float | None, default_mpp: float | None, words: str
) -> None:
    path = draw(tmp_path / "slide.tiff", mpp=file_mpp)
    settings = SETTINGS.model_copy(update={"default_mpp": default_mpp})
    with pytest.raises(SlideError) as caught:
        build_slide(SlideJob("s", path, table_mpp, settings, tmp_path / "shards", hilbert_sort))
    assert words in str(caught.value)


def test_mpp_of_the_table_wins_and_the_default_fills_in(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    settings = SETTINGS.model_copy(update={"default_mpp": 2.0})
    table = build_slide(SlideJob("table", draw(tmp_path / "1.tiff"), 0.5, settings, root, hilbert_sort))
    default = build_slide(SlideJob("default", draw(tmp_path / "2.tiff", mpp=None), None, settings, root, hilbert_sort))
    assert (table.mpp_x, table.mpp_source, table.num_x) == (0.5, "table", 8)
    assert (default.mpp_x, default.mpp_source, default.num_x) == (2.0, "default", 32)


def test_damage_in_the_middle_of_the_file(job: SlideJob) -> None:
    data = bytearray(job.path.read_bytes())
    data[3000:9000] = bytes(6000)  # inside the first level's tiles; the directories stay whole
    job.path.write_bytes(data)
    with pytest.raises(SlideError, match="damaged or truncated"):
        build_slide(job)
    assert list(job.root.rglob("*.tar")) == []


def test_memory_is_bounded_by_tile_and_thumbnail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.full((4096, 4096, 3), (200, 120, 160), np.uint8)
    write_pyramid_tiff(tmp_path / "large.tiff", image, 0.5, levels=5)
    areas = []
    real = openslide.OpenSlide.read_region

    def watched(self: openslide.OpenSlide, location: tuple[int, int], level: int, size: tuple[int, int]) -> object:
        areas.append(size[0] * size[1])
        return real(self, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", watched)
    settings = Slides(tile_px=256, tile_mpp=1.0)
    manifest = build_slide(
        SlideJob("large", tmp_path / "large.tiff", None, settings, tmp_path / "shards", hilbert_sort)
    )
    assert manifest.num_tiles == 64
    # A part of the thumbnail, or a tile and its margin from a level up to twice as fine: 2 % of this slide's pixels.
    assert max(areas) <= (2 * (256 + 32)) ** 2


def test_bytes_do_not_depend_on_how_a_slide_is_cut_into_pieces(job: SlideJob, tmp_path: Path) -> None:
    """Parts in any order; the tars differ in number only."""
    many = replace(job, tiles_per_tar=50)
    manifest = build_slide(many)
    again = replace(many, root=tmp_path / "again")
    prepared = prepare_slide(again)
    parts = {part.number: store_part(part) for part in reversed(prepared.parts())}
    assert finish_slide(prepared, [parts[number] for number in sorted(parts)]) == manifest
    assert {path.relative_to(job.root): data for path, data in contents(job.root).items()} == {
        path.relative_to(again.root): data for path, data in contents(again.root).items()
    }
    assert [tar.name for tar in manifest.tars] == ["tiles-00000.tar", "tiles-00001.tar", "tiles-00002.tar"]
    one = replace(job, root=tmp_path / "one")
    build_slide(one)
    assert ShardSet(job.root).read_span("slide.1", 0, 120) == ShardSet(one.root).read_span("slide.1", 0, 120)


def test_tiles_of_the_file_are_copied_where_they_fit(tmp_path: Path) -> None:
    """At the file's own mpp, which is not quite the wanted one, and not quite square."""
    path = draw(tmp_path / "slide.tiff", mpp=(1.01, 0.99), tile=32)
    job = SlideJob("s", path, None, SETTINGS, tmp_path / "shards", hilbert_sort)
    manifest = build_slide(job)
    assert (manifest.way, manifest.way_reason, manifest.num_raw, manifest.num_tiles) == ("raw", "", 120, 120)
    assert (manifest.tile_mpp, manifest.pixel_mpp_x, manifest.pixel_mpp_y) == (1.0, 1.01, 0.99)
    assert (manifest.tile_width_um, manifest.tile_height_um) == (32 * 1.01, 32 * 0.99)
    shards = ShardSet(job.root)
    index = shards.index("s")
    assert (index.x_px0 % 32 == 0).all()
    np.testing.assert_allclose(index.y_um, index.y_px0 * 0.99)
    tiles_nHW3 = decode_tiles(shards.read_span("s", 0, 120), 32)
    with openslide.OpenSlide(path) as handle:
        for tile_HW3, x, y in zip(tiles_nHW3, index.x_px0.tolist(), index.y_px0.tolist(), strict=True):
            theirs = np.asarray(handle.read_region((x, y), 0, (32, 32)).convert("RGB")).astype(int)
            assert np.abs(tile_HW3.astype(int) - theirs).max() <= 2


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"raw_tolerance": None}, "slides.raw_tolerance is null"),
        ({"raw_tolerance": 0.005}, "no level within 0.005"),
        ({"stride_px": 16}, "slides.stride_px is not tile_px"),
        ({"tile_px": 64}, "tiles of 32 x 32 px in the file, 64 px wanted"),
    ],
)
def test_why_tiles_are_not_copied(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    path = draw(tmp_path / "slide.tiff", mpp=1.01, tile=32)
    manifest = build_slide(
        with_slides(SlideJob("s", path, None, SETTINGS, tmp_path / "shards", hilbert_sort), **changes)
    )
    assert (manifest.way, manifest.num_raw, manifest.pixel_mpp_x) == ("resampled", 0, 1.0)
    assert why in manifest.way_reason


def test_tiles_overlap_by_the_stride(job: SlideJob) -> None:
    manifest = build_slide(with_slides(job, stride_px=16))
    assert (manifest.stride_px, manifest.num_x) == (16, 31)
    index = ShardSet(job.root).index("slide.1")
    assert manifest.num_tiles > 3.5 * 120
    assert set((index.x_px0 % 32).tolist()) == {0, 16}


def test_pen_marks_are_measured_and_dropped_on_request(job: SlideJob, tmp_path: Path) -> None:
    with openslide.OpenSlide(job.path) as handle:
        image = np.array(handle.read_region((0, 0), 0, handle.dimensions).convert("RGB"))
    image[96:160, 64:448] = (20, 40, 190)  # a broad blue stroke over the first two rows of tiles
    write_pyramid_tiff(job.path, image, 1.0)
    kept = build_slide(job)
    index = ShardSet(job.root).index("slide.1")
    assert (index.pen[index.y_px0 == 96] > 0.9).all()
    assert (index.pen[index.y_px0 > 200] == 0).all()
    dropped = build_slide(replace(with_slides(job, max_pen=0.5), root=tmp_path / "dropped"))
    index = ShardSet(tmp_path / "dropped").index("slide.1")
    assert (index.pen <= 0.5).all()
    assert kept.num_tiles - dropped.num_tiles == dropped.num_dropped == 24
    assert index.number.tolist() == list(range(dropped.num_tiles))


def test_tiles_that_are_not_sharp_are_dropped_on_request(job: SlideJob, tmp_path: Path) -> None:
    """Numbers are those of the candidates; tars that lose all their tiles are not written."""
    image = np.full((512, 512, 3), 245, np.uint8)
    image[64:448, 64:448] = (200, 100, 160)
    checks = (np.indices((384, 128)).sum(0) // 4 % 2).astype(bool)
    image[64:448, 320:448][checks] = (140, 60, 120)
    write_pyramid_tiff(job.path, image, 1.0, quality=95)
    build_slide(job)
    assert np.isnan(ShardSet(job.root).index("slide.1").sharpness).all()
    sharp = replace(with_slides(job, min_sharpness=50.0), root=tmp_path / "sharp", tiles_per_tar=8)
    manifest = build_slide(sharp)
    shards = ShardSet(sharp.root)
    index = shards.index("slide.1")
    assert (manifest.num_tiles, manifest.num_dropped) == (len(index), 144 - len(index))
    assert (index.sharpness >= 50).all()
    assert 40 <= len(index) <= 72
    assert (index.x_px0 >= 288).all()
    assert (np.diff(index.number) > 0).all()
    assert index.number[-1] >= len(index)
    assert 0 < len(manifest.tars) < 18
    assert index.tar.max() == len(manifest.tars) - 1
    assert len(shards.read_span("slide.1", 0, len(index))) == len(index)
    shards.verify("slide.1")
    blurred = build_slide(replace(with_slides(job, min_sharpness=1e9), root=tmp_path / "blurred"))
    assert (blurred.num_tiles, blurred.tars) == (0, ())
    assert blurred.why_empty == "all 144 tiles with tissue were dropped by slides.max_pen or slides.min_sharpness"


def test_a_given_mask_wins_and_a_new_one_means_new_tiles(job: SlideJob, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    job = with_slides(job, masks=masks)
    with pytest.raises(SlideError, match=r"slide 'slide\.1': no mask in"):
        build_slide(job)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(masks / "slide.1.png")
    job = replace(job)  # a job looks for its mask once
    assert build_slide(job).num_tiles == 4
    assert finished_slide(job) is not None
    mask[8:16, 16:24] = 255
    Image.fromarray(mask).save(masks / "slide.1.png")
    job = replace(job)
    assert finished_slide(job) is None
    assert build_slide(job).num_tiles == 8
    (masks / "slide.1.png").unlink()
    assert finished_slide(replace(job)) is None


def test_a_mask_that_is_replaced_while_its_slide_is_tiled(job: SlideJob, tmp_path: Path) -> None:
    """The tiles are those of the old mask, and so count as stale. The pieces are made in several processes."""
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(masks / "slide.1.png")
    job = with_slides(job, masks=masks)
    prepared = pickle.loads(pickle.dumps(prepare_slide(job)))  # noqa: S301 (our own bytes)
    mask[8:16, 16:24] = 255
    Image.fromarray(mask).save(masks / "slide.1.png")
    manifest = finish_slide(prepared, [store_part(part) for part in prepared.parts()])
    assert manifest.num_tiles == 4
    assert finished_slide(replace(job)) is None


def test_why_there_is_no_tile_with_a_mask_or_positions_of_ones_own(job: SlideJob, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "masks" / "slide.1.png")
    masked = build_slide(with_slides(job, masks=tmp_path / "masks"))
    assert masked.why_empty.startswith("its mask in slides.masks shows no tissue")
    build_slide(job)
    with h5py.File(export_coords(ShardSet(job.root), tmp_path / "coords", "trident")[0], "r+") as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        file.create_dataset("coords", data=np.zeros((0, 2), np.int64)).attrs.update(attributes)
    given = build_slide(replace(with_slides(job, coords=tmp_path / "coords"), read_positions=read_positions))
    assert given.num_tiles == 0
    assert given.why_empty.startswith("its file in slides.coords names no position")


def test_tiles_at_positions_that_another_tool_chose(job: SlideJob, tmp_path: Path) -> None:
    """Out as TRIDENT's file and in again: the same tiles. Elsewhere: the pixels of there, whatever their tissue."""
    build_slide(job)
    path = export_coords(ShardSet(job.root), tmp_path / "coords", "trident")[0]
    given = replace(
        with_slides(job, coords=tmp_path / "coords"), root=tmp_path / "given", read_positions=read_positions
    )
    manifest = build_slide(given)
    assert (manifest.num_tiles, manifest.way, manifest.way_reason) == (120, "resampled", "positions of slides.coords")
    found = []
    for root in (job.root, given.root):
        shards = ShardSet(root)
        places = map(tuple, shards.positions_um("slide.1").tolist())
        found.append(dict(zip(places, shards.read_span("slide.1", 0, 120), strict=True)))
    assert found[0] == found[1]
    assert finished_slide(given) == manifest
    with h5py.File(path, "r+") as file:
        file["coords"][:2] = [[3, 5], [500, 501]]
    given = replace(given)
    assert finished_slide(given) is None
    build_slide(given)
    index = ShardSet(given.root).index("slide.1")
    assert {(3, 5), (500, 501)} <= set(zip(index.x_px0.tolist(), index.y_px0.tolist(), strict=True))
    assert index.tissue.min() == 0
    path.unlink()
    with pytest.raises(SlideError, match="must hold one file of its coordinates"):
        build_slide(replace(given))


def test_positions_without_pixels(job: SlideJob, tmp_path: Path) -> None:
    full = build_slide(job)
    positions = replace(job, root=tmp_path / "positions", stored=False)
    manifest = build_slide(positions)
    assert (manifest.stored, manifest.tars, manifest.num_tiles) == (False, (), full.num_tiles)
    one, other = ShardSet(job.root), ShardSet(positions.root)
    np.testing.assert_array_equal(one.positions_um("slide.1"), other.positions_um("slide.1"))
    assert finished_slide(replace(job, root=positions.root)) is None  # pixels are wanted now
    assert finished_slide(replace(job, stored=False)) == full  # and here there are more than wanted


def test_pictures_are_those_of_the_slide(job: SlideJob) -> None:
    manifest = build_slide(job)
    folder = ShardSet(job.root).folder("slide.1")
    with Image.open(folder / "overview.jpg") as overview:
        assert max(overview.size) >= 1000
        colours = np.asarray(overview).astype(int)
    blue = (colours[..., 2] - colours[..., 0] > 80).mean()
    assert 0.01 < blue < 0.2  # frames of the tiles
    features = json.loads((folder / "tissue.geojson").read_text())["features"]
    assert [feature["geometry"]["type"] for feature in features] == ["Polygon"]
    assert {file.name for file in manifest.files} | {"manifest.json"} == {path.name for path in folder.iterdir()}


def test_no_stray_text_of_the_slide_reaches_a_file(tmp_path: Path) -> None:
    """Names, dates and free text in the file's tags stay there, also where its tiles are copied."""
    path = tmp_path / "slide.svs"
    image = np.full((256, 256, 3), (200, 110, 160), np.uint8)
    secrets = ["SMITH^JOHN", "1950-01-31", "=cmd|' /C calc'!A0", "<script>alert(1)</script>"]
    text = "Aperio Image Library\r\n256x256|MPP = 1.0|AppMag = 10|Title = " + "|User = ".join(secrets)
    write_pyramid_tiff(path, image, None, tile=32, levels=1, description=text)
    manifest = build_slide(SlideJob("s", path, None, SETTINGS, tmp_path / "shards", hilbert_sort))
    assert (manifest.vendor, manifest.way) == ("aperio", "raw")
    for file, data in contents(tmp_path / "shards").items():
        assert [secret for secret in secrets if secret.encode() in data] == [], file


def test_a_fingerprint_covers_the_files_of_a_slide(tmp_path: Path) -> None:
    """Of MIRAX, the file that is named may be equal for all slides; its pixels are in the folder beside it."""
    for name, pixels in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / f"{name}.mrxs").write_bytes(b"index")
        (tmp_path / name).mkdir()
        (tmp_path / name / "Data0000.dat").write_bytes(pixels)
    digests = [fingerprint(tmp_path / f"{name}.mrxs") for name in "abc"]
    assert digests[0] == digests[2] != digests[1]
    assert slide_bytes(tmp_path / "a.mrxs") == 6
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert slide_bytes(tmp_path / "gone.svs") is None


def test_a_file_that_changes_while_it_is_tiled(job: SlideJob) -> None:
    prepared = prepare_slide(job)
    parts = [store_part(part) for part in prepared.parts()]
    draw(job.path, tissue=(64, 96, 448, 410))
    with pytest.raises(SlideError, match="changed while it was tiled"):
        finish_slide(prepared, parts)
    assert not job.folder.exists()


@pytest.mark.timeout(30)
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.svs")
    with pytest.raises(SlideError, match="not a regular file"):
        build_slide(SlideJob("s", tmp_path / "pipe.svs", None, SETTINGS, tmp_path / "shards", hilbert_sort))


def test_links_in_the_shard_folder_are_refused(job: SlideJob, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    job.folder.parent.mkdir(parents=True)
    job.folder.symlink_to(elsewhere)
    with pytest.raises(ShardError, match=r"slide\.1' is a symbolic link to '.*elsewhere'"):
        build_slide(job)
    assert finished_slide(job) is None
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_a_file_that_was_replaced_by_a_link_is_not_finished(job: SlideJob, tmp_path: Path) -> None:
    for name in ("tiles-00000.tar", "manifest.json"):
        build_slide(job)
        assert finished_slide(job) is not None
        (job.folder / name).rename(tmp_path / name)
        (job.folder / name).symlink_to(tmp_path / name)
        assert finished_slide(job) is None


def test_a_child_of_tile_is_small(tmp_path: Path) -> None:
    """Neither torch nor pandas, which webdataset and pyarrow would bring; and the room that they would take."""
    code = """
import sys, psutil
import gigamil.shards.pieces, gigamil.partition.curve, gigamil.data.coords
print(*[name for name in ("torch", "pandas", "webdataset", "sklearn", "matplotlib", "h5py") if name in sys.modules])
print(psutil.Process().memory_info().rss)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules, rss = found.split("\n")[:2]
    assert modules == ""
    assert int(rss) < 200e6

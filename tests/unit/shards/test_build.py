"""One slide file becomes shards that hold its pixels at the right places, or an error that says why not."""

import os
from pathlib import Path

import numpy as np
import openslide
import pytest

from gigamil.config.schema import Slides
from gigamil.data.decode import decode_tiles
from gigamil.errors import ShardError, SlideError
from gigamil.partition.curve import hilbert_index, hilbert_sort
from gigamil.shards.build import SlideJob, build_slide, finished_slide
from gigamil.shards.read import ShardSet
from gigamil.testing.slides import write_pyramid_tiff

SETTINGS = Slides(tile_px=32, tile_mpp=1.0, min_tissue=0.5, min_tissue_area_um2=1000.0)


def draw(path: Path, *, tissue: tuple[int, int, int, int] | None = (64, 96, 448, 416), mpp: float | None = 1.0) -> Path:
    """A slide of 512 x 512 pixels: glass with a textured rectangle (x0, y0, x1, y1) of tissue."""
    image = np.full((512, 512, 3), 245, np.uint8)
    if tissue:
        x0, y0, x1, y1 = tissue
        row, col = np.mgrid[y0:y1, x0:x1]
        image[y0:y1, x0:x1] = np.stack([180 + row // 8, 60 + col // 4, np.full_like(row, 150)], axis=2)
    write_pyramid_tiff(path, image, mpp)
    return path


@pytest.fixture
def job(tmp_path: Path) -> SlideJob:
    return SlideJob("slide.1", draw(tmp_path / "slide.tiff"), None, SETTINGS, tmp_path / "shards")


def test_tiles_hold_the_pixels_of_their_places_in_hilbert_order(job: SlideJob) -> None:
    manifest = build_slide(job, hilbert_sort)
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
    build_slide(job, hilbert_sort)
    again = SlideJob(job.slide_id, job.path, job.mpp, job.slides, tmp_path / "again")
    build_slide(again, hilbert_sort)
    files = sorted(path.relative_to(job.root) for path in job.root.rglob("*") if path.is_file())
    assert [file.name for file in files] == [
        "index.parquet",
        "manifest.json",
        "mask.png",
        "thumbnail.jpg",
        "tiles-00000.tar",
    ]
    for file in files:
        assert (job.root / file).read_bytes() == (again.root / file).read_bytes(), file


def test_finished_until_settings_source_or_files_change(job: SlideJob) -> None:
    assert finished_slide(job) is None
    manifest = build_slide(job, hilbert_sort)
    assert finished_slide(job) == manifest
    for changed in (
        SlideJob(job.slide_id, job.path, 0.9, job.slides, job.root),
        SlideJob(job.slide_id, job.path, None, job.slides.model_copy(update={"jpeg_quality": 95}), job.root),
    ):
        assert finished_slide(changed) is None
    same = SlideJob(job.slide_id, job.path, None, job.slides.model_copy(update={"max_failed": 7}), job.root)
    assert finished_slide(same) == manifest
    moved = SlideJob(job.slide_id, job.path.with_name("archived.tiff"), None, job.slides, job.root)
    assert finished_slide(moved) == manifest
    tar = ShardSet(job.root).folder(job.slide_id) / "tiles-00000.tar"
    size = tar.stat().st_size
    os.truncate(tar, size - 1)
    assert finished_slide(job) is None
    os.truncate(tar, size)
    draw(job.path, tissue=(64, 96, 448, 417))
    assert finished_slide(job) is None


def test_new_settings_replace_the_old_shards(job: SlideJob) -> None:
    build_slide(job, hilbert_sort)
    larger = SlideJob(job.slide_id, job.path, None, job.slides.model_copy(update={"tile_px": 64}), job.root)
    build_slide(larger, hilbert_sort)
    assert ShardSet(job.root).manifest(job.slide_id).tile_px == 64
    assert sorted(path.name for path in job.root.iterdir() if any(path.iterdir())) == ["slides"]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_failed_rebuild_leaves_the_old_shards_as_they_were(job: SlideJob, monkeypatch: pytest.MonkeyPatch) -> None:
    build_slide(job, hilbert_sort)
    before = contents(job.root)
    finer = SlideJob(job.slide_id, job.path, None, job.slides.model_copy(update={"tile_mpp": 0.1}), job.root)
    with pytest.raises(SlideError, match=r"over 4 times slides.tile_mpp=0.1"):  # a typo
        build_slide(finer, hilbert_sort)
    larger = SlideJob(job.slide_id, job.path, None, job.slides.model_copy(update={"tile_px": 64}), job.root)

    def disk_full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space left"):
            build_slide(larger, hilbert_sort)
    assert contents(job.root) == before
    with pytest.raises(ShardError, match=r"32 px at 1 um per pixel, configured 64 at 1"):
        ShardSet(job.root).check_tiles([job.slide_id], 64, 1.0)
    job.path.write_bytes(b"not a slide any more")
    with pytest.raises(SlideError, match="not a slide that OpenSlide can open"):
        build_slide(job, hilbert_sort)
    assert contents(job.root) == before


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_source_that_cannot_be_read_is_like_one_that_is_gone(
    job: SlideJob, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    manifest = build_slide(job, hilbert_sort)

    def refuse(path: Path, *args: object, **options: object) -> object:
        if path == job.path:
            raise error
        return real(path, *args, **options)

    for method in ("stat", "open"):
        real = getattr(Path, method)
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            assert finished_slide(job) == manifest


def test_no_tissue_and_zero_tiles_say_why(job: SlideJob, tmp_path: Path) -> None:
    draw(job.path, tissue=None)
    manifest = build_slide(job, hilbert_sort)
    assert manifest.num_tiles == 0
    assert manifest.why_empty.startswith("no tissue found")
    assert finished_slide(job) == manifest
    strict = SETTINGS.model_copy(update={"min_tissue": 1.0})
    thin = SlideJob("thin", draw(tmp_path / "thin.tiff", tissue=(68, 120, 444, 136)), None, strict, job.root)
    manifest = build_slide(thin, hilbert_sort)
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
        build_slide(SlideJob("s", path, table_mpp, settings, tmp_path / "shards"), hilbert_sort)
    assert words in str(caught.value)


def test_mpp_of_the_table_wins_and_the_default_fills_in(tmp_path: Path) -> None:
    root = tmp_path / "shards"
    settings = SETTINGS.model_copy(update={"default_mpp": 2.0})
    table = build_slide(SlideJob("table", draw(tmp_path / "1.tiff"), 0.5, settings, root), hilbert_sort)
    default = build_slide(SlideJob("default", draw(tmp_path / "2.tiff", mpp=None), None, settings, root), hilbert_sort)
    assert (table.mpp_x, table.mpp_source, table.num_x) == (0.5, "table", 8)
    assert (default.mpp_x, default.mpp_source, default.num_x) == (2.0, "default", 32)


def test_damage_in_the_middle_of_the_file(job: SlideJob) -> None:
    data = bytearray(job.path.read_bytes())
    data[3000:9000] = bytes(6000)  # inside the first level's tiles; the directories stay whole
    job.path.write_bytes(data)
    with pytest.raises(SlideError, match="damaged or truncated"):
        build_slide(job, hilbert_sort)
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
        SlideJob("large", tmp_path / "large.tiff", None, settings, tmp_path / "shards"), hilbert_sort
    )
    assert manifest.num_tiles == 64
    # A part of the thumbnail, or a tile and its margin from a level up to twice as fine: 2 % of this slide's pixels.
    assert max(areas) <= (2 * (256 + 32)) ** 2

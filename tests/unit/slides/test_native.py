"""Copying the JPEG tiles of a slide file, and reading through them: always the pixels that OpenSlide shows."""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from PIL import Image

from gigamil.errors import SlideError
from gigamil.slides import NotNative, native_tiles, open_slide, reader, tiff
from gigamil.slides.native import NativeTiles
from gigamil.slides.tiff import clean_jpeg, is_sound

from .conftest import MakeSlide, plain, ramps

TILE = 64
APERIO = "Aperio Image Library v1\r\n100x100 (64x64) JPEG/RGB Q=30|AppMag = 20|MPP = 0.5|User = Jane Roe"


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Ramps with noise, in which every tile differs from every other and JPEG has something to lose."""
    noise = np.random.default_rng(seed).normal(0, 25, (height // 2 + 1, width // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)
    return np.clip(ramps(height, width) + noise[:height, :width], 0, 255).astype(np.uint8)


def pillow(jpeg: bytes) -> np.ndarray:
    with Image.open(BytesIO(jpeg), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def from_openslide(path: Path, tiles: NativeTiles, col: int, row: int) -> np.ndarray:
    with openslide.OpenSlide(path) as handle:
        down, side = handle.level_downsamples[tiles.level], tiles.tile_px
        at = round(col * side * down), round(row * side * down)
        return np.asarray(handle.read_region(at, tiles.level, (side, side)).convert("RGB")).astype(int)


def largest_difference(path: Path, tiles: NativeTiles) -> tuple[int, int]:
    """(tiles that were copied, largest difference of a grey level to OpenSlide, by Pillow and by simplejpeg)."""
    copied, worst = 0, 0
    for row in range(tiles.num_y):
        for col in range(tiles.num_x):
            jpeg = tiles.jpeg(col, row)
            if jpeg is None:
                continue
            copied += 1
            truth = from_openslide(path, tiles, col, row)
            for pixels in (pillow(jpeg), simplejpeg.decode_jpeg(jpeg, "RGB")):
                worst = max(worst, int(np.abs(pixels - truth).max()))
    return copied, worst


@pytest.mark.parametrize("shared_tables", [False, True])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(("subsampling", "rgb"), [("420", False), ("422", False), ("444", False), ("444", True)])
def test_copied_tiles_are_what_openslide_shows(
    make_slide: MakeSlide, subsampling: str, rgb: bool, shared_tables: bool, big: bool
) -> None:
    path = make_slide(
        textured(260, 330), 0.5, tile=TILE, subsampling=subsampling, rgb=rgb, shared_tables=shared_tables, big=big
    )
    with open_slide(path) as slide, native_tiles(slide, TILE, 0.5, 0.02) as tiles:
        assert (tiles.level, tiles.num_x, tiles.num_y, tiles.tile_px) == (0, 6, 5, TILE)
        assert largest_difference(path, tiles) == (5 * 4, 0)  # the last column and row hang over


def test_tiles_of_a_reduced_level_of_an_svs(make_slide: MakeSlide) -> None:
    path = make_slide(
        textured(512, 640), None, "slide.svs", tile=TILE, rgb=True, shared_tables=True, description=APERIO
    )
    with open_slide(path) as slide:
        assert slide.info.vendor == "aperio"
        tiles = native_tiles(slide, TILE, 1.01, 0.02)
        assert (tiles.level, tiles.mpp_x, tiles.mpp_y, tiles.num_x, tiles.num_y) == (1, 1.0, 1.0, 5, 4)
        assert largest_difference(path, tiles) == (20, 0)


def test_tiles_that_openslide_shows_a_little_shifted_are_not_taken_for_others(make_slide: MakeSlide) -> None:
    """8193 pixels halve to 4096: OpenSlide shows column 5 of level 1 off by 0.02 pixels, 4 grey levels at an edge."""
    image = np.full((128, 8193, 3), 240, np.uint8)
    image[:, 640:768] = textured(128, 128)
    image[::8, 640:768] = 20  # the largest tiles of level 1, in bytes, are those that are shifted
    path = make_slide(image, 0.5, tile=TILE, subsampling="444")
    with open_slide(path) as slide, native_tiles(slide, TILE, 1.0, 0.02) as tiles:
        assert tiles.level == 1
        assert tiles.jpeg(5, 0) is not None


def test_a_copied_tile_is_what_read_um_gives(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(textured(256, 256), (0.5, 0.49), tile=TILE)) as slide:
        tiles = native_tiles(slide, TILE, 0.5, 0.02)
        jpeg = tiles.jpeg(2, 1)
        assert jpeg is not None
        side_x, side_y = TILE * tiles.mpp_x, TILE * tiles.mpp_y
        read = slide.read_um(2 * side_x, side_y, side_x, side_y, TILE, TILE)
    assert (pillow(jpeg) == read).all()


def test_tiles_of_a_reduced_level_are_what_read_um_gives_from_that_level(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(textured(513, 641), 0.5, tile=TILE)) as slide:  # not divisible by two
        tiles = native_tiles(slide, TILE, 1.0, 0.02)
        assert (tiles.level, tiles.mpp_x > 1.0) == (1, True)
        jpeg = tiles.jpeg(3, 2)
        assert jpeg is not None
        side_x, side_y = TILE * tiles.mpp_x, TILE * tiles.mpp_y
        read = slide.read_um(3 * side_x, 2 * side_y, side_x, side_y, TILE, TILE, level=tiles.level)
        finer = slide.read_um(3 * side_x, 2 * side_y, side_x, side_y, TILE, TILE)
    assert (pillow(jpeg) == read).all()
    assert (finer != read).any()


@pytest.mark.parametrize(
    ("tile_px", "tile_mpp", "tolerance", "options", "why"),
    [
        (TILE, 0.5, 0.009, {}, r"no level within 0\.009 of 0\.5 um/px; the nearest has 0\.495/0\.5"),
        (TILE, 0.6, 0.02, {}, r"no level within 0\.02 of 0\.6"),
        (256, 0.5, 0.02, {}, "tiles of 64 x 64 px in the file, 256 px wanted"),
    ],
)
def test_what_cannot_be_copied_says_why(
    make_slide: MakeSlide, tile_px: int, tile_mpp: float, tolerance: float, options: dict[str, object], why: str
) -> None:
    path = make_slide(textured(200, 200), (0.495, 0.5), tile=TILE, **options)
    with open_slide(path) as slide, pytest.raises(NotNative, match=why):
        native_tiles(slide, tile_px, tile_mpp, tolerance)


@pytest.mark.parametrize(
    ("tag", "value", "why"),
    [(259, 5, "not JPEG"), (262, 5, "neither RGB nor YCbCr"), (277, 4, "three interleaved samples")],
)
def test_other_encodings_are_not_copied(make_slide: MakeSlide, tag: int, value: int, why: str) -> None:
    path = make_slide(textured(200, 200), 0.5, tile=TILE, levels=1)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags[tag].overwrite(value)
    with pytest.raises(tiff.NotTiled, match=why):
        tiff.JpegTiles(path, ((200, 200),)).level(0)


def test_only_the_plainest_formats_are_trusted(make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_slide(textured(200, 200), 0.5, tile=TILE)
    monkeypatch.setattr(reader, "TILED_VENDORS", ("aperio",))
    with (
        open_slide(path) as slide,
        pytest.raises(NotNative, match="format generic-tiff: tiles are copied from SVS and"),
    ):
        native_tiles(slide, TILE, 0.5, 0.02)


def test_tiles_that_openslide_shows_otherwise_are_not_copied(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a layout had been understood wrongly: here, tiles that lie one further on."""
    path = make_slide(textured(200, 200), 0.5, tile=TILE)
    right = tiff._read_level

    def shifted(pages: list[tifffile.TiffPage]) -> tiff.TileLevel:
        level = right(pages)
        level.offsets[:], level.lengths[:] = np.roll(level.offsets, 1), np.roll(level.lengths, 1)
        return level

    with open_slide(path) as slide:
        truth = slide.read_um(0.0, 0.0, 50.0, 50.0, 100, 100)
    monkeypatch.setattr(tiff, "_read_level", shifted)
    with open_slide(path) as slide:
        with pytest.raises(NotNative, match="not the pixels that OpenSlide shows"):
            native_tiles(slide, TILE, 0.5, 0.02)
        assert (slide.read_um(0.0, 0.0, 50.0, 50.0, 100, 100) == truth).all()


def test_a_level_whose_check_was_broken_off_is_checked_again(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_slide(make_slide(textured(200, 200), 0.5, tile=TILE)) as slide:
        with monkeypatch.context() as patch:
            patch.setattr(slide, "_read_backend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                slide.tiles(0)
        checked: list[int] = []
        monkeypatch.setattr(slide, "_check_tiles", checked.append)
        slide.tiles(0)
        slide.tiles(0)
    assert checked == [0]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_colours_that_are_converted_are_not_copied(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(textured(200, 200), 0.5, tile=TILE)) as slide:
        slide._to_srgb = reader._srgb_transform(Path("x"), srgb_profile())
        with pytest.raises(NotNative, match=r"slides\.icc=apply"):
            native_tiles(slide, TILE, 0.5, 0.02)


def srgb_profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# ---- single tiles ----


def tile_place(path: Path, index: int) -> tuple[int, int]:
    with tifffile.TiffFile(path) as file:
        return file.pages.first.dataoffsets[index], file.pages.first.databytecounts[index]


def test_missing_and_damaged_tiles_are_left_to_openslide(make_slide: MakeSlide) -> None:
    path = make_slide(textured(256, 256), 0.5, tile=TILE, levels=1)
    offset, length = tile_place(path, 5)
    with path.open("r+b") as file:
        file.seek(offset + length // 2)
        file.write(b"\xff\xd9" + bytes(40))  # ends in the middle
    with tifffile.TiffFile(path, mode="r+b") as file:
        lengths = list(file.pages.first.databytecounts)
        lengths[11], lengths[15] = 0, 1 << 30
        file.pages.first.tags[325].overwrite(lengths)
    with open_slide(path) as slide:
        tiles = native_tiles(slide, TILE, 0.5, 0.02)
        there = [index for index in range(16) if tiles.jpeg(index % 4, index // 4) is not None]
        assert there == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14]
        for col, row in ((1, 1), (3, 3)):
            with pytest.raises(SlideError, match="damaged or truncated"):
                slide.read_um(col * 32.0, row * 32.0, 32.0, 32.0, 64, 64)
        jpeg = tiles.jpeg(0, 0)  # next to a damaged one
        assert jpeg is not None
        assert (slide.read_um(0.0, 0.0, 32.0, 32.0, 64, 64) == pillow(jpeg)).all()


def test_no_text_of_the_file_is_copied(make_slide: MakeSlide) -> None:
    """Comments, EXIF, other segments, and what stands behind the end of the picture."""
    tile = simplejpeg.encode_jpeg(textured(TILE, TILE), colorspace="RGB")
    secret = b"Jane Roe"
    segments = b"".join(
        bytes([0xFF, marker]) + struct.pack(">H", len(secret) + 2) + secret for marker in (0xFE, 0xE1, 0xE2, 0xED, 0xEF)
    )
    planted = tile[:2] + segments + tile[2:] + secret
    assert planted.count(secret) == 6
    clean = clean_jpeg(planted, b"", TILE, TILE, rgb=False)
    assert clean is not None
    assert secret not in clean
    assert (pillow(clean) == pillow(tile)).all()
    assert clean == clean_jpeg(clean, b"", TILE, TILE, rgb=False)


def test_the_colour_space_is_that_of_the_tiff_whatever_the_tile_says() -> None:
    buffer = BytesIO()
    Image.fromarray(textured(TILE, TILE)).save(buffer, "JPEG", keep_rgb=True, quality=95, subsampling=0)
    as_rgb, as_ycc = (clean_jpeg(buffer.getvalue(), b"", TILE, TILE, rgb=rgb) for rgb in (True, False))
    assert as_rgb is not None
    assert as_ycc is not None
    assert (pillow(as_rgb) == pillow(buffer.getvalue())).all()
    assert (simplejpeg.decode_jpeg(as_rgb) == pillow(as_rgb)).all()
    ycc = Image.fromarray(pillow(as_rgb).astype(np.uint8)).tobytes()
    expected = np.asarray(Image.frombytes("YCbCr", (TILE, TILE), ycc).convert("RGB")).astype(int)
    assert np.abs(pillow(as_ycc) - expected).max() <= 1
    assert np.abs(simplejpeg.decode_jpeg(as_ycc).astype(int) - expected).max() <= 1


def test_progressive_tiles_are_copied() -> None:
    buffer = BytesIO()
    Image.fromarray(textured(TILE, TILE)).save(buffer, "JPEG", progressive=True)
    clean = clean_jpeg(buffer.getvalue(), b"", TILE, TILE, rgb=False)
    assert clean is not None
    assert is_sound(clean)
    assert (pillow(clean) == pillow(buffer.getvalue())).all()


def jpeg_of(image: Image.Image, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_frame(**changes: int) -> bytes:
    """A tile with other values in its frame header: at 4 precision, 5 height, 7 width, 11 sampling, -1 its marker."""
    jpeg = bytearray(jpeg_of(Image.fromarray(textured(TILE, TILE))))
    frame = jpeg.index(b"\xff\xc0")
    for at, value in changes.items():
        jpeg[frame + int(at.removeprefix("at"))] = value
    return bytes(jpeg)


@pytest.mark.parametrize(
    "tile",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xdb\xff\xff",
        b"\xff\xd8\xff\xfe\x00\x01\x00",
        jpeg_of(Image.new("L", (TILE, TILE), 99)),
        jpeg_of(Image.new("CMYK", (TILE, TILE))),
        jpeg_of(Image.new("RGB", (TILE, TILE + 16))),
        with_frame(at4=12),
        with_frame(at5=255, at6=255, at7=255, at8=255),  # 65535 x 65535
        with_frame(at11=0x41),  # colour at a quarter
        with_frame(at1=0xC9),  # arithmetic codes
        jpeg_of(Image.fromarray(textured(TILE, TILE)))[:-2],  # no end
        jpeg_of(Image.fromarray(textured(TILE, TILE))).replace(b"\xff\xc0", b"\xff\xdc"),  # height given later
    ],
)
def test_odd_tiles_are_not_copied(tile: bytes) -> None:
    assert clean_jpeg(tile, b"", TILE, TILE, rgb=False) is None


def test_a_flood_of_scans_is_not_copied() -> None:
    jpeg = jpeg_of(Image.fromarray(textured(TILE, TILE)), progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    flood = jpeg[:scan] + jpeg[scan:-2] * 5000 + jpeg[-2:]
    assert clean_jpeg(flood, b"", TILE, TILE, rgb=False) is None


# ---- reading through the tiles ----


@pytest.mark.parametrize("mpp_y", [0.5, 0.48])
@pytest.mark.parametrize("mpp", [0.5, 0.52, 0.75, 1.0, 1.9])
def test_reading_is_the_same_with_and_without_openslide(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, mpp: float, mpp_y: float
) -> None:
    path = make_slide(textured(512, 640), (0.5, mpp_y), tile=TILE)
    regions = [(0.0, 0.0), (31.0, 17.3), (250.0, 200.0), (-20.0, -9.0), (100.5, 64.5)]
    side = 48 * mpp
    with open_slide(path) as slide:
        ours = [slide.read_um(x, y, side, side, 48, 48) for x, y in regions]
        assert slide.tiles(0) is not None
    monkeypatch.setattr(reader, "TILED_VENDORS", ())
    with open_slide(path) as slide:
        theirs = [slide.read_um(x, y, side, side, 48, 48) for x, y in regions]
    for one, two in zip(ours, theirs, strict=True):
        assert (one == two).all()


def test_memory_of_decoded_tiles_is_bounded(make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_slide(textured(512, 512), 0.5, tile=TILE)
    with open_slide(path) as slide:
        whole = slide.thumbnail(0.5)
    monkeypatch.setattr(tiff, "CACHE_BYTES", 3 * TILE * TILE * 3)
    with open_slide(path) as slide:
        assert (slide.thumbnail(0.5) == whole).all()
        tiles = slide.tiles(0)
        assert tiles._slots.nbytes == 3 * TILE * TILE * 3
        assert sorted(tiles._slot_of.values()) == [0, 1, 2]


def test_plain_background_keeps_its_value(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(200, 200), 0.5, tile=TILE)) as slide:
        assert np.ptp(slide.read_um(10.0, 10.0, 64.0, 64.0, 128, 128), axis=(0, 1)).max() <= 1

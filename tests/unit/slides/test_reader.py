"""Opening slides, their mpp, and reading in micron."""

import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image, ImageCms

from gigamil.errors import SlideError
from gigamil.slides import reader
from gigamil.slides.backend import shown
from gigamil.slides.reader import MppError, open_slide

from .conftest import MakeSlide, plain, ramps


def test_reads_pixels_where_they_lie(make_slide: MakeSlide) -> None:
    image = ramps(400, 600)
    with open_slide(make_slide(image, 0.5)) as slide:
        region = slide.read_um(50.0, 100.0, 64.0, 32.0, 128, 64)
    assert region.shape == (64, 128, 3)
    assert region.dtype == np.uint8
    assert np.abs(region.astype(int) - image[200:264, 100:228]).max() <= 6  # JPEG


@pytest.mark.parametrize("mpp", [0.7, 1.0, 1.3, 2.0, 3.1])
def test_resampled_regions_keep_their_place(make_slide: MakeSlide, mpp: float) -> None:
    """Through every level, on ramps where a shift by a level-0 pixel changes red by 255 / 1023."""
    with open_slide(make_slide(ramps(1001, 1023), 0.5)) as slide:
        thumbnail = slide.thumbnail(mpp).astype(float)
    col, row = 100, 80
    centre_x, centre_y = (col + 0.5) * mpp / 0.5 - 0.5, (row + 0.5) * mpp / 0.5 - 0.5
    assert thumbnail[row, col, 0] == pytest.approx(centre_x * 255 / 1022, abs=2.5)
    assert thumbnail[row, col, 1] == pytest.approx(centre_y * 255 / 1000, abs=2.5)


def test_neighbouring_regions_meet_without_a_seam(make_slide: MakeSlide) -> None:
    rng = np.random.default_rng(0)
    with open_slide(make_slide(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8), 0.48)) as slide:
        whole = slide.read_um(20.0, 20.0, 128.0, 64.0, 128, 64)
        halves = [slide.read_um(20.0 + 64.0 * k, 20.0, 64.0, 64.0, 64, 64) for k in (0, 1)]
    assert np.abs(whole.astype(int) - np.concatenate(halves, axis=1)).max() <= 1


def test_large_regions_are_read_in_parts(make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_slide(make_slide(ramps(600, 800), 0.5, levels=1)) as slide:
        whole = slide.thumbnail(1.7)
        monkeypatch.setattr(reader, "MAX_READ_PX", 5_000)
        parts = slide.thumbnail(1.7)
    assert np.abs(whole.astype(int) - parts).max() <= 1


def test_unequal_mpp_is_resampled_to_squares(make_slide: MakeSlide) -> None:
    image = plain(200, 400, (255, 255, 255))
    image[100:120, 200:240] = 0  # 20 x 20 um at (100, 100) um
    with open_slide(make_slide(image, (0.5, 1.0))) as slide:
        assert (slide.info.mpp_x, slide.info.mpp_y) == pytest.approx((0.5, 1.0))
        thumbnail = slide.thumbnail(1.0)
        inside = slide.read_um(101.0, 101.0, 18.0, 18.0, 18, 18)
    assert thumbnail.shape == (200, 200, 3)
    assert inside.max() < 25
    dark_rows, dark_cols = np.nonzero(thumbnail[..., 0] < 128)
    assert (dark_rows.min(), dark_rows.max(), dark_cols.min(), dark_cols.max()) == (100, 119, 100, 119)


def test_outside_the_slide_is_white(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(100, 100, (0, 0, 0)), 1.0)) as slide:
        corner = slide.read_um(-20.0, -20.0, 40.0, 40.0, 40, 40)
        far = slide.read_um(80.0, 80.0, 40.0, 40.0, 40, 40)
        away = slide.read_um(-500.0, 900.0, 40.0, 40.0, 40, 40)
    assert corner[:16, :16].min() > 250
    assert corner[24:, 24:].max() < 10
    assert far[24:, 24:].min() > 250
    assert far[:16, :16].max() < 10
    assert (away == 255).all()


def test_thumbnail_pixels_are_squares_of_the_asked_size(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(101, 203, (0, 0, 0)), 0.5)) as slide:
        thumbnail = slide.thumbnail(8.0)
    assert thumbnail.shape == (7, 13, 3)  # 50.5 um and 101.5 um, rounded up


def test_what_is_known_of_a_slide(make_slide: MakeSlide) -> None:
    path = make_slide(plain(300, 500), 0.25, levels=3)
    with open_slide(path) as slide:
        info = slide.info
    assert (info.path, info.vendor, info.width, info.height) == (path, "generic-tiff", 500, 300)
    assert info.level_dimensions == ((500, 300), (250, 150), (125, 75))
    assert info.level_downsamples == (1.0, 2.0, 4.0)
    assert (info.width_um, info.height_um) == pytest.approx((125.0, 75.0))
    assert (info.mpp_source, info.objective, info.bounds_x, info.bounds_y) == ("file", None, 0, 0)


def test_mpp_of_the_table_wins_then_the_file_then_the_default(make_slide: MakeSlide) -> None:
    with_mpp = make_slide(plain(64, 64), 0.5, "with.tiff")
    without = make_slide(plain(64, 64), None, "without.tiff")
    for path, options, expected in [
        (with_mpp, {"mpp": 0.25, "default_mpp": 2.0}, (0.25, "table")),
        (with_mpp, {"default_mpp": 2.0}, (0.5, "file")),
        (without, {"default_mpp": 2.0}, (2.0, "default")),
    ]:
        with open_slide(path, **options) as slide:
            assert (slide.info.mpp_x, slide.info.mpp_source) == (pytest.approx(expected[0]), expected[1])


def test_missing_mpp_is_refused(make_slide: MakeSlide) -> None:
    with pytest.raises(MppError, match=r"no mpp in the file.*mpp column.*slides\.default_mpp"):
        open_slide(make_slide(plain(64, 64), None))


@pytest.mark.parametrize("mpp", [0.0, math.nan, -1.0, 1000.0, math.inf, 0.049])
def test_absurd_mpp_is_refused_wherever_it_comes_from(make_slide: MakeSlide, mpp: float) -> None:
    with pytest.raises(
        MppError, match=r"slide\.tiff': mpp .* in the slide table cannot be true.*Correct the mpp column"
    ):
        open_slide(make_slide(plain(64, 64), 0.5), mpp=mpp)
    with pytest.raises(MppError, match="default_mpp cannot be true"):
        open_slide(make_slide(plain(64, 64), None), default_mpp=mpp)


@pytest.mark.parametrize("mpp", [1000.0, 0.01, (0.5, 400.0)])
def test_absurd_mpp_in_the_file_is_refused_even_with_a_default(make_slide: MakeSlide, mpp: float) -> None:
    path = make_slide(plain(64, 64), mpp)
    with pytest.raises(MppError, match="in the file cannot be true.*mpp column of the slide table"):
        open_slide(path, default_mpp=0.5)
    with open_slide(path, mpp=0.5) as slide:
        assert slide.info.mpp_x == 0.5


def aperio(mpp: str, objective: str = "20", note: str = "") -> str:
    """The description that makes OpenSlide see an SVS."""
    return f"Aperio Image Library v1\r\n64x64 (64x64) JPEG/RGB Q=30|AppMag = {objective}|MPP = {mpp}{note}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "mpp 0 in the file cannot be true"),
        ("0.0000", "mpp 0 in the file cannot be true"),
        ("nan", "no mpp in the file"),  # OpenSlide drops what is no number
        ("inf", "mpp inf in the file cannot be true"),
        ("-0.25", "mpp -0.25 in the file cannot be true"),
        ("250", "mpp 250 in the file cannot be true"),
        ("1e-9", "mpp 1e-09 in the file cannot be true"),
        ("", "no mpp in the file"),
        ("0.5 um", "no mpp in the file"),
    ],
)
def test_a_wrong_mpp_of_an_svs_is_refused_and_the_table_cures_it(make_slide: MakeSlide, text: str, why: str) -> None:
    path = make_slide(plain(128, 128), None, "slide.svs", tile=64, description=aperio(text))
    with pytest.raises(MppError, match=rf"slide\.svs': {why}.*mpp column of the slide table"):
        open_slide(path)
    with open_slide(path, mpp=0.25) as slide:
        assert (slide.info.vendor, slide.info.mpp_x, slide.info.mpp_source) == ("aperio", 0.25, "table")


def test_a_decimal_comma_is_never_cut_off(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(128, 128), None, "slide.svs", tile=64, description=aperio("0,499"))) as slide:
        assert slide.info.mpp_x == 0.499  # OpenSlide reads it so
    with pytest.raises(MppError, match=r"mpp '0,499' in the file is no number.*mpp column"):
        reader._number(slide.info.path, "0,499")


@pytest.mark.parametrize("side", [1_000_001, 2**31 - 1])
def test_a_slide_that_claims_to_be_huge_costs_nothing(make_slide: MakeSlide, side: int) -> None:
    path = make_slide(plain(128, 128), 0.5, levels=1)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags[256].overwrite(side, dtype="I")
    with pytest.raises(SlideError, match=rf"slide\.tiff': (it claims {side} x 128 pixels, which no slide|.*damaged)"):
        open_slide(path)


# ---- what leaves the reader ----


def test_no_free_text_leaves_the_reader(make_slide: MakeSlide) -> None:
    note = "|User = Jane Roe|Filename = S24-001 ROE|ScanScope ID = Ward 7|Title = ROE, Jane"
    path = make_slide(ramps(128, 128), None, "s.svs", tile=64, description=aperio("0.5", "20 Jane Roe", note))
    with openslide.OpenSlide(path) as handle:
        assert "Jane Roe" in handle.properties["openslide.comment"]  # it is there to be found
    with open_slide(path) as slide:
        slide.thumbnail(2.0)
        text = repr(asdict(slide.info)) + repr(slide._backend.header)
    assert not any(secret in text for secret in ("Jane", "ROE", "Ward", "S24"))
    assert slide.info.objective is None  # a number, or nothing


def test_label_and_macro_images_are_never_opened(make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("associated images were looked at")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    with open_slide(make_slide(ramps(128, 128), 0.5)) as slide:
        slide.thumbnail(2.0)
        slide.read_um(0.0, 0.0, 32.0, 32.0, 64, 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain µm", "plain µm"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\u202eevil\u2028", r"\u202eevil\u2028"),
        ("\udcff.svs", r"\udcff.svs"),
        ("x" * 500, "x" * 120 + "..."),
    ],
)
def test_text_from_files_is_escaped_and_cut_in_messages(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_a_path_is_escaped_but_never_cut() -> None:
    assert shown(Path("x" * 200, "a\nb.svs")) == "x" * 200 + r"/a\nb.svs"


def test_a_file_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J\nok.svs"
    path.write_text("not a slide")
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert str(caught.value).isprintable()
    assert r"a\x1b[2J\nok.svs" in str(caught.value)


# ---- colour profiles ----


def inverted_profile() -> bytes:
    """sRGB with red and blue exchanged: a profile whose application cannot be missed."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[:] = profile.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")
    return bytes(profile)


def with_profile(path: Path, profile: bytes) -> Path:
    """Put an ICC profile into a TIFF, over a description of the same length."""
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags[270]
        tag_at, data_at = tag.offset, tag.valueoffset
    data = bytearray(path.read_bytes())
    data[data_at : data_at + len(profile)] = profile
    data[tag_at : tag_at + 4] = (34675).to_bytes(2, "little") + (7).to_bytes(2, "little")
    path.write_bytes(data)
    return path


def slide_with_profile(make_slide: MakeSlide, profile: bytes) -> Path:
    return with_profile(make_slide(ramps(256, 256), 0.5, tile=64, description="x" * (len(profile) - 1)), profile)


def test_a_colour_profile_is_recorded_and_applied_on_request(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slide_with_profile(make_slide, inverted_profile())
    with open_slide(path) as slide, open_slide(path, icc="apply") as applied:
        assert slide.info.icc_sha256 == applied.info.icc_sha256 is not None
        assert (slide.icc_applied, applied.icc_applied) == (False, True)
        assert slide.tiles(0) is not None
        as_is, to_srgb = (s.read_um(10.0, 10.0, 64.0, 64.0, 128, 128) for s in (slide, applied))
        thumbnails = [s.thumbnail(2.0) for s in (slide, applied)]
    transform = reader._srgb_transform(path, inverted_profile())
    expected = np.asarray(ImageCms.applyTransform(Image.fromarray(as_is), transform))
    assert (to_srgb == expected).all()
    assert np.abs(to_srgb.astype(int) - as_is).max() > 50
    assert np.abs(thumbnails[0].astype(int) - thumbnails[1]).max() > 50
    monkeypatch.setattr(reader, "TILED_VENDORS", ())
    with open_slide(path, icc="apply") as applied:
        assert (applied.read_um(10.0, 10.0, 64.0, 64.0, 128, 128) == to_srgb).all()
        assert (applied.thumbnail(2.0) == thumbnails[1]).all()


def test_a_slide_without_a_profile_stays_as_it_is(make_slide: MakeSlide) -> None:
    path = make_slide(ramps(128, 128), 0.5)
    with open_slide(path) as slide, open_slide(path, icc="apply") as applied:
        assert (applied.info.icc_sha256, applied.icc_applied) == (None, False)
        assert (slide.thumbnail(1.0) == applied.thumbnail(1.0)).all()


def test_a_damaged_profile_is_refused_only_where_it_is_wanted(make_slide: MakeSlide) -> None:
    path = slide_with_profile(make_slide, b"no profile" * 30)
    with open_slide(path) as slide:
        assert slide.info.icc_sha256 is not None
    with pytest.raises(SlideError, match=r"slide\.tiff': its ICC profile \(300 bytes\) cannot be applied.*icc=ignore"):
        open_slide(path, icc="apply")


# ---- the order of reading ----


@pytest.mark.parametrize("tiled", [True, False])
def test_the_result_does_not_depend_on_the_order_of_reading(
    make_slide: MakeSlide, monkeypatch: pytest.MonkeyPatch, tiled: bool
) -> None:
    """Also at a downsample that is no whole number, with mpp_x != mpp_y, and after a read that failed."""
    path = make_slide(ramps(501, 703), (0.5, 0.47), tile=64)
    monkeypatch.setattr(reader, "TILED_VENDORS", reader.TILED_VENDORS if tiled else ())
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        last = page.dataoffsets[-1]
    with path.open("r+b") as damaged:
        damaged.seek(last)
        damaged.write(bytes(64))
    places = [(x * 31.0, y * 29.0, mpp) for x in range(5) for y in range(4) for mpp in (0.5, 0.9, 1.3)]

    def read(order: list[int], fail: bool) -> dict[int, bytes]:
        found = {}
        with open_slide(path) as slide:
            for index in order:
                if fail:
                    with pytest.raises(SlideError):
                        slide.read_um(slide.info.width_um - 20, slide.info.height_um - 20, 20.0, 20.0, 40, 40)
                x_um, y_um, mpp = places[index]
                found[index] = slide.read_um(x_um, y_um, 48 * mpp, 48 * mpp, 48, 48).tobytes()
        return found

    forward = list(range(len(places)))
    shuffled = np.random.default_rng(0).permutation(len(places)).tolist()
    assert read(forward, False) == read(shuffled, False) == read(forward[::-1], True)


def test_a_closed_slide_stays_closed(make_slide: MakeSlide) -> None:
    slide = open_slide(make_slide(ramps(128, 128), 0.5))
    slide.close()
    slide.close()  # twice does no harm
    with pytest.raises(ValueError, match=r"slide\.tiff' is closed"):
        slide.read_um(0.0, 0.0, 16.0, 16.0, 16, 16)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"absent\.svs': no such file or folder"):
        open_slide(tmp_path / "absent.svs")


def test_a_text_file_named_svs(tmp_path: Path) -> None:
    path = tmp_path / "notes.svs"
    path.write_text("not a slide")
    with pytest.raises(SlideError, match=r"notes\.svs': not a slide that OpenSlide can open.*11 bytes"):
        open_slide(path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8, 0.97])
def test_a_truncated_pyramid_never_passes(make_slide: MakeSlide, share: float) -> None:
    path = make_slide(ramps(700, 900), 0.5)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(SlideError, match=r"slide\.tiff'.*truncated"), open_slide(path) as slide:
        for mpp in (0.5, 1.0, 2.0):
            slide.read_um(0.0, 0.0, slide.info.width_um, slide.info.height_um, *(int(900 / mpp), int(700 / mpp)))


def test_a_damaged_tile_fails_alone_and_the_slide_stays_readable(make_slide: MakeSlide) -> None:
    path = make_slide(ramps(256, 768), 1.0, levels=1)
    with path.open("r+b") as file:
        file.seek(8)  # the first tile starts behind the header
        file.write(bytes(400))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"level 0, .* cannot be read: .*damaged or truncated"):
                slide.read_um(0.0, 0.0, 64.0, 64.0, 64, 64)
            good = slide.read_um(600.0, 100.0, 64.0, 64.0, 64, 64)
            assert np.abs(good.astype(int) - ramps(256, 768)[100:164, 600:664]).max() <= 6


def test_a_folder_without_a_slide(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(SlideError, match="a folder without a file that OpenSlide can open"):
        open_slide(tmp_path)


def test_a_folder_of_several_slides(make_slide: MakeSlide) -> None:
    folder = make_slide(plain(64, 64), 0.5, "a.tiff").parent
    with open_slide(folder) as slide:
        assert slide.info.path == folder
    make_slide(plain(64, 64), 0.5, "b.tiff")
    with pytest.raises(SlideError, match=r"holds several slides \('a\.tiff' and 'b\.tiff' differ\)"):
        open_slide(folder)


@pytest.mark.parametrize(
    ("scale", "level"),
    [(0.5, 0), (1.0, 0), (2.0, 0), (2.5, 0), (4.0, 1), (8.0, 1), (9.0, 1), (16.0, 2), (33.0, 2), (64.0, 3)],
)
def test_the_level_is_fine_enough_and_not_wasteful(make_slide: MakeSlide, scale: float, level: int) -> None:
    """Levels 4 times apart: one up to twice as fine as wanted, else the next finer."""
    with open_slide(make_slide(plain(64, 64), 0.5, levels=1)) as slide:
        levels = tuple((1600 // 4**k, 1600 // 4**k) for k in range(4))
        slide.info = replace(slide.info, width=1600, height=1600, level_dimensions=levels)
        assert slide._level_for(scale, scale) == level


def test_halved_levels_are_reduced_from_one_finer(make_slide: MakeSlide) -> None:
    with open_slide(make_slide(plain(512, 512), 0.5, levels=4)) as slide:
        assert [slide._level_for(scale, scale) for scale in (1.0, 1.99, 2.0, 4.0, 8.0, 50.0)] == [0, 0, 0, 1, 2, 3]
        assert slide._level_for(8.0, 2.0) == 0

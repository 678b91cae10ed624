"""PNG, JPEG and striped TIFF as slides of one level."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from gigamil.errors import SlideError
from gigamil.slides import MppError, SlidePool, TileGrid, choose_tiles, find_tissue, open_slide, plain

from .conftest import PINK, ramps

RAMPS = ramps(300, 400)


def save(path: Path, image: np.ndarray | Image.Image, **options: Any) -> Path:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options", "vendor", "tolerance"),
    [
        ("a.png", {}, "png", 0),
        ("a.jpg", {"quality": 97, "subsampling": 0}, "jpeg", 5),
        ("a.JPEG", {"quality": 97, "subsampling": 0, "progressive": True}, "jpeg", 5),
        ("a.tif", {}, "tiff", 0),
        ("a.tiff", {"compression": "tiff_lzw"}, "tiff", 0),
        ("b.tiff", {"compression": "tiff_adobe_deflate"}, "tiff", 0),
        ("c.tiff", {"compression": "jpeg", "quality": 97}, "tiff", 8),
    ],
)
def test_an_image_is_a_slide_of_one_level(
    tmp_path: Path, name: str, options: dict[str, Any], vendor: str, tolerance: int
) -> None:
    path = save(tmp_path / name, RAMPS, **options)
    with open_slide(path, mpp=0.5) as slide:
        assert (slide.info.vendor, slide.info.level_dimensions, slide.info.mpp_source) == (
            vendor,
            ((400, 300),),
            "table",
        )
        whole = slide.read_um(0.0, 0.0, 200.0, 150.0, 400, 300)
        tile = slide.read_um(30.0, 40.0, 32.0, 32.0, 64, 64)
        edge = slide.read_um(190.0, 140.0, 20.0, 20.0, 40, 40)
    assert np.abs(whole.astype(int) - RAMPS).max() <= tolerance
    assert (tile == whole[80:144, 60:124]).all()
    assert (edge[:20, :20] == whole[280:, 380:]).all()
    assert (edge[20:] == 255).all()


@pytest.mark.parametrize(
    ("name", "dpi", "mpp"),
    [("a.png", 50_800, 0.5), ("a.jpg", 50_800, 0.5), ("a.tif", 101_600, 0.25), ("b.tif", (50_800, 25_400), 0.5)],
)
def test_a_resolution_that_can_be_meant_is_the_mpp(tmp_path: Path, name: str, dpi: Any, mpp: float) -> None:
    path = save(tmp_path / name, RAMPS, dpi=dpi if isinstance(dpi, tuple) else (dpi, dpi))
    with open_slide(path) as slide:
        assert slide.info.mpp_x == pytest.approx(mpp, rel=1e-4)
        assert slide.info.mpp_y == pytest.approx(1.0 if isinstance(dpi, tuple) else mpp, rel=1e-4)
        assert slide.info.mpp_source == "file"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("dpi", [72, 96, 300, 600, 1200, None])
def test_a_resolution_for_paper_is_no_mpp(tmp_path: Path, name: str, dpi: int | None) -> None:
    path = save(tmp_path / name, RAMPS, **({} if dpi is None else {"dpi": (dpi, dpi)}))
    note = rf" \(its resolution of {dpi} dpi is one for paper\)" if dpi else ""
    with pytest.raises(MppError, match=rf"{name}': no mpp in the file{note}, so .*mpp column.*default_mpp"):
        open_slide(path)
    with open_slide(path, default_mpp=0.5) as slide:
        assert (slide.info.mpp_x, slide.info.mpp_source) == (0.5, "default")


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("cmyk.jpg", Image.fromarray(RAMPS).convert("CMYK")),
        ("cmyk.tif", Image.fromarray(RAMPS).convert("CMYK")),
        ("ycc.tif", Image.fromarray(RAMPS).convert("YCbCr")),
        ("rgba.png", Image.fromarray(RAMPS).convert("RGBA")),
    ],
)
def test_other_colour_spaces_become_rgb(tmp_path: Path, name: str, image: Image.Image) -> None:
    with open_slide(save(tmp_path / name, image), mpp=0.5) as slide:
        found = slide.read_um(0.0, 0.0, 200.0, 150.0, 400, 300)
    assert np.abs(found.astype(int) - RAMPS).max() <= 12


def test_grey_palette_and_transparent_images(tmp_path: Path) -> None:
    grey = Image.fromarray(RAMPS[..., 0])
    hole = Image.fromarray(RAMPS).convert("RGBA")
    hole.paste((0, 0, 0, 0), (0, 0, 50, 50))
    for name, image in (("l.png", grey), ("l.jpg", grey), ("p.png", grey.convert("P")), ("la.png", grey.convert("LA"))):
        with open_slide(save(tmp_path / name, image), mpp=0.5) as slide:
            found = slide.read_um(0.0, 0.0, 200.0, 150.0, 400, 300)
        assert np.abs(found[..., 0].astype(int) - RAMPS[..., 0]).max() <= 4
        assert (found[..., 0] == found[..., 2]).all()
    with open_slide(save(tmp_path / "hole.png", hole), mpp=0.5) as slide:
        found = slide.read_um(0.0, 0.0, 200.0, 150.0, 400, 300)
    assert (found[:50, :50] == 255).all()
    assert (found[50:] == RAMPS[50:]).all()


@pytest.mark.parametrize("name", ["i16.png", "i16.tif", "float.tif"])
def test_pixels_without_8_bit_colours_are_refused(tmp_path: Path, name: str) -> None:
    values = RAMPS[..., 0].astype(np.uint16) * 100
    path = save(tmp_path / name, values.astype(np.float32) if name == "float.tif" else values)
    with pytest.raises(SlideError, match=rf"{name}': .* has no 8-bit colours. Convert it to 8-bit RGB"):
        open_slide(path, mpp=0.5)


# ---- what is refused, from the header alone ----


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )
    return path


def jpeg_header(path: Path, width: int, height: int) -> Path:
    """A JPEG whose frame claims a size."""
    data = bytearray(save(path, RAMPS).read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return path


def tiff_header(path: Path, width: int, height: int) -> Path:
    save(path, RAMPS)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages.first.tags[256].overwrite(width, dtype="I")
        file.pages.first.tags[257].overwrite(height, dtype="I")
    return path


@pytest.mark.parametrize("size", [(8000, 5001), (65535, 65535), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize(("name", "write"), [("a.png", png_header), ("a.jpg", jpeg_header), ("a.tif", tiff_header)])
def test_too_large_images_are_refused_before_they_are_decoded(
    tmp_path: Path, name: str, write: Any, size: tuple[int, int]
) -> None:
    path = write(tmp_path / name, *(min(side, 65535) if name == "a.jpg" else side for side in size))
    with pytest.raises(
        SlideError, match=rf"{name}': .*(too many for a plain image.*40 million.*tiled pyramid|damaged)"
    ):
        open_slide(path, mpp=0.5)


def test_the_bomb_guard_of_pillow_stays_on() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_bomb_of_text_in_a_png(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * 3_000_000, zip=True)
    path = save(tmp_path / "a.png", RAMPS, pnginfo=info)
    assert path.stat().st_size < 1_000_000
    with pytest.raises(SlideError, match=r"a\.png'.*damaged"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_a_truncated_image_never_passes(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SlideError, match=rf"{name}'.*(truncated|damaged)"), open_slide(path, mpp=0.5) as slide:
        slide.read_um(0.0, 0.0, 50.0, 50.0, 100, 100)


def test_pages_are_not_chosen_for_the_user(tmp_path: Path) -> None:
    page = Image.fromarray(RAMPS)
    for name in ("pages.tif", "frames.png"):
        path = save(tmp_path / name, page, save_all=True, append_images=[page.transpose(Image.Transpose.ROTATE_180)])
        with pytest.raises(SlideError, match=rf"{name}': a plain image of several pages or frames"):
            open_slide(path, mpp=0.5)


def test_an_image_under_the_name_of_a_slide_format_is_no_slide(tmp_path: Path) -> None:
    """The .mrxs file itself is a JPEG; with its data folder gone only that is left, and it shows the label."""
    jpeg = save(tmp_path / "a.jpg", RAMPS).read_bytes()
    for name in ("a.mrxs", "a.svs", "a.bin"):
        path = tmp_path / name
        path.write_bytes(jpeg)
        with pytest.raises(SlideError, match="not a slide that OpenSlide can open"):
            open_slide(path, mpp=0.5)


def test_an_image_in_a_folder_of_dicom_files_is_not_a_second_slide(tmp_path: Path) -> None:
    save(tmp_path / "overview.jpg", RAMPS)
    with pytest.raises(SlideError, match="a folder without a file that OpenSlide can open"):
        open_slide(tmp_path, mpp=0.5)


# ---- what else a slide can do ----


def test_tissue_and_tiles_of_an_image(tmp_path: Path) -> None:
    image = np.full((600, 800, 3), 245, np.uint8)
    image[100:400, 200:600] = PINK
    with open_slide(save(tmp_path / "a.png", image), mpp=0.5) as slide:
        grid = TileGrid.square(slide.info.width_um, slide.info.height_um, 100, 0.5)
        chosen, _ = choose_tiles(grid, find_tissue(slide, min_area_um2=100.0), 0.5)
    assert [grid.col_row(int(index)) for index in chosen] == [(c, r) for r in range(1, 4) for c in range(2, 6)]


def test_the_profile_of_an_image_is_recorded_and_applied(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", RAMPS, icc_profile=profile)
    with open_slide(path, mpp=0.5) as slide, open_slide(path, mpp=0.5, icc="apply") as applied:
        assert slide.info.icc_sha256 == applied.info.icc_sha256 is not None
        assert (slide.icc_applied, applied.icc_applied) == (False, True)
        one, two = (s.read_um(0.0, 0.0, 200.0, 150.0, 400, 300) for s in (slide, applied))
    assert np.abs(one.astype(int) - two).max() <= 2  # from sRGB to sRGB


def test_text_in_a_plain_image_stays_in_it(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Jane Roe")
    with open_slide(save(tmp_path / "a.png", RAMPS, pnginfo=info), mpp=0.5) as slide:
        slide.thumbnail(4.0)
        assert "Jane" not in repr(vars(slide)) + repr(slide.info) + repr(vars(slide._backend))


def test_a_pool_forgets_decoded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path / f"{number}.png", RAMPS) for number in range(4)]
    monkeypatch.setattr("gigamil.slides.pool.MAX_HELD_BYTES", RAMPS.nbytes)
    pool = SlidePool(8)
    slides = []
    for path in paths:
        slide = pool.get(path, mpp=0.5)
        assert slide.held_bytes == 0
        slide.thumbnail(4.0)
        assert slide.held_bytes == RAMPS.nbytes
        slides.append(slide)
    assert [slide.held_bytes > 0 for slide in slides] == [False, False, True, True]
    pool.close()
    assert not any(slide.held_bytes for slide in slides)


def test_the_image_is_decoded_once_and_not_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []
    decode = plain.PlainImage._decode

    def counted(self: plain.PlainImage) -> np.ndarray:
        calls.append(self._path)
        return decode(self)

    monkeypatch.setattr(plain.PlainImage, "_decode", counted)
    with open_slide(save(tmp_path / "a.png", RAMPS), mpp=0.5) as slide:
        assert not calls
        for _ in range(3):
            slide.thumbnail(4.0)
    assert len(calls) == 1

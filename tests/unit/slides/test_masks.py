"""Masks from files: what comes back is what was meant, and what does not fit is refused by name."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from gigamil.errors import SlideError
from gigamil.slides import find_tissue, open_slide
from gigamil.slides.masks import MAX_TEXT_BYTES, load_mask, mask_file, write_mask_geojson
from gigamil.slides.reader import SlideInfo
from gigamil.slides.tissue import TissueMask
from gigamil.testing.slides import write_pyramid_tiff

from .conftest import plain

SQUARE = [[400, 200], [1200, 200], [1200, 1000], [400, 1000], [400, 200]]  # pixels 25..74 x 12.5..62.5 of 8 um


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> SlideInfo:
    """A slide of 3200 x 1600 pixels at 0.5 um: 200 x 100 mask pixels of 8 um."""
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    write_pyramid_tiff(path, plain(1600, 3200), 0.5)
    with open_slide(path) as slide:
        return slide.info


def blobs(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Tissue-like pieces with holes, some of them cut by the edge."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((rows, cols)), 4)
    return (noise > 0.02) & (noise < 0.12)


def feature(geometry: object) -> dict[str, object]:
    return {"type": "Feature", "geometry": geometry, "properties": {}}


def geojson(path: Path, geometry: object) -> Path:
    path.write_text(json.dumps(feature(geometry)))
    return path


def asap(path: Path, body: str, head: str = "") -> Path:
    path.write_text(
        f'<?xml version="1.0"?>{head}<ASAP_Annotations><Annotations>{body}</Annotations></ASAP_Annotations>'
    )
    return path


def annotation(points: list[list[int]], kind: str = "Polygon") -> str:
    written = "".join(f'<Coordinate Order="{n}" X="{x}" Y="{y}" />' for n, (x, y) in enumerate(points))
    return f'<Annotation Name="a" Type="{kind}" PartOfGroup="g"><Coordinates>{written}</Coordinates></Annotation>'


@pytest.mark.parametrize("mpp", [8.0, 7.3])
@pytest.mark.parametrize("seed", range(3))
def test_geojson_gives_the_mask_back(tmp_path: Path, info: SlideInfo, mpp: float, seed: int) -> None:
    """All pixels whose centres lie on the slide; 7.3 um leaves a column that hangs over, and mpp_x is not mpp_y."""
    info = replace(info, mpp_x=0.5, mpp_y=0.51, bounds_x=100, bounds_y=40)
    mask = TissueMask(blobs(*info.shape_at(mpp), seed), mpp)
    write_mask_geojson(tmp_path / "s.geojson", mask, info)
    found = load_mask(tmp_path / "s.geojson", info, mpp)
    rows, cols = int(info.height_um / mpp + 0.5), int(info.width_um / mpp + 0.5)
    np.testing.assert_array_equal(found.mask_HW[:rows, :cols], mask.mask_HW[:rows, :cols])
    assert (found.mask_HW == mask.mask_HW).mean() >= 0.99
    assert found.mpp == mpp


def test_the_outline_encloses_the_area_of_the_mask(tmp_path: Path, info: SlideInfo) -> None:
    """Where 2 x 2 pixels are not all alike the outline may be off by 1/8 of a pixel, by 1/4 where they touch at a corner."""
    mask_HW = blobs(100, 200)
    write_mask_geojson(tmp_path / "s.geojson", TissueMask(mask_HW, 8.0), info)
    area = 0.0
    for found in json.loads((tmp_path / "s.geojson").read_text())["features"]:
        assert found["properties"]["objectType"] == "annotation"
        for ring in found["geometry"]["coordinates"]:  # outer rings turn the other way than holes
            assert ring[0] == ring[-1]
            x, y = np.array(ring).T / 16
            area += 0.5 * float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
    corners = np.pad(mask_HW, 1).astype(int)
    num_in_4 = corners[1:, 1:] + corners[:-1, 1:] + corners[1:, :-1] + corners[:-1, :-1]
    touching = (num_in_4 == 2) & (corners[1:, 1:] == corners[:-1, :-1])
    bound = ((num_in_4 % 2 == 1).sum() + 2 * touching.sum()) / 8
    assert abs(area - mask_HW.sum()) <= bound


def test_export_is_what_qupath_reads(tmp_path: Path, info: SlideInfo) -> None:
    """A ring of 20 x 10 mask pixels around a hole, counted from the bounds; the same bytes every time."""
    mask_HW = np.zeros((100, 200), bool)
    mask_HW[10:30, 20:60] = True
    mask_HW[15:25, 30:50] = False
    mask_HW[90:, 190:] = True
    for name in ("a.geojson", "b.geojson"):
        write_mask_geojson(tmp_path / name, TissueMask(mask_HW, 8.0), replace(info, bounds_x=16, bounds_y=-16))
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()
    corner, ring = sorted(json.loads((tmp_path / "a.geojson").read_text())["features"], key=lambda f: -len(str(f)))[
        ::-1
    ]
    outer, hole = (np.array(points) for points in ring["geometry"]["coordinates"])
    assert (outer.min(axis=0).tolist(), outer.max(axis=0).tolist()) == ([20 * 16 - 16, 10 * 16 + 16], [944, 496])
    assert (hole.min(axis=0).tolist(), hole.max(axis=0).tolist()) == ([30 * 16 - 16, 15 * 16 + 16], [784, 416])
    assert len(outer) == 9  # four sides, four cut corners, and the first point again
    assert np.array(corner["geometry"]["coordinates"][0]).max(axis=0).tolist() == [3200 - 16, 1600 + 16]
    assert ring["type"] == "Feature"
    assert ring["properties"]["classification"]["name"] == "Tissue"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_outlines_of_noise_never_touch(tmp_path: Path, info: SlideInfo, share: float) -> None:
    """One polygon per 4-connected piece, also where pixels meet at a corner only; all points differ."""
    mask_HW = np.random.default_rng(0).random((100, 200)) < share
    write_mask_geojson(tmp_path / "s.geojson", TissueMask(mask_HW, 8.0), info)
    polygons = [
        found["geometry"]["coordinates"] for found in json.loads((tmp_path / "s.geojson").read_text())["features"]
    ]
    points = [tuple(point) for rings in polygons for ring in rings for point in ring[1:]]
    assert len(polygons) == ndimage.label(mask_HW)[1]
    assert len(points) == len(set(points))
    np.testing.assert_array_equal(load_mask(tmp_path / "s.geojson", info, 8.0).mask_HW, mask_HW)


@pytest.mark.parametrize("strip_px", [1, 203, 4000])
def test_strips_make_no_difference_to_outlines(
    tmp_path: Path, info: SlideInfo, monkeypatch: pytest.MonkeyPatch, strip_px: int
) -> None:
    mask = TissueMask(np.random.default_rng(0).random((100, 200)) < 0.5, 8.0)
    write_mask_geojson(tmp_path / "whole.geojson", mask, info)
    monkeypatch.setattr("gigamil.slides.masks.STRIP_PX", strip_px)
    write_mask_geojson(tmp_path / "strips.geojson", mask, info)
    assert (tmp_path / "strips.geojson").read_bytes() == (tmp_path / "whole.geojson").read_bytes()


def test_an_empty_mask_is_an_empty_collection(tmp_path: Path, info: SlideInfo) -> None:
    write_mask_geojson(tmp_path / "s.geojson", TissueMask(np.zeros((100, 200), bool), 8.0), info)
    assert json.loads((tmp_path / "s.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
    assert not load_mask(tmp_path / "s.geojson", info, 8.0).mask_HW.any()


def test_polygons_of_geojson_are_united_and_have_holes(tmp_path: Path, info: SlideInfo) -> None:
    hole = [[560, 360], [560, 680], [880, 680], [880, 360], [560, 360]]
    other = [[[[x + 320, y] for x, y in SQUARE]]]
    for geometries in (
        feature({"type": "MultiPolygon", "coordinates": [[SQUARE, hole], *other]}),
        [
            feature({"type": "Polygon", "coordinates": [SQUARE, hole]}),
            feature({"type": "Polygon", "coordinates": other[0]}),
        ],
        {
            "type": "GeometryCollection",
            "geometries": [{"type": "MultiPolygon", "coordinates": [[SQUARE, hole], *other]}],
        },
    ):
        (tmp_path / "s.geojson").write_text(json.dumps(geometries))
        mask_HW = load_mask(tmp_path / "s.geojson", info, 8.0).mask_HW
        expected = np.zeros((100, 200), bool)
        expected[12:62, 25:75] = True
        expected[22:42, 35:55] = False  # centres at 22.5 to 41.5: the hole ends at 42.5
        expected[12:62, 45:95] = True  # the other square covers a part of the hole
        np.testing.assert_array_equal(mask_HW, expected)


def test_asap_counts_from_the_corner_of_level_0(tmp_path: Path, info: SlideInfo) -> None:
    body = annotation(SQUARE) + annotation([[1600, 0], [3200, 0], [3200, 1600], [1600, 1600]], "Rectangle")
    path = asap(tmp_path / "s.xml", body)
    mask_HW = load_mask(path, replace(info, bounds_x=160, bounds_y=160), 8.0).mask_HW
    expected = np.zeros((100, 200), bool)
    expected[12:62, 25:75] = True
    expected[:, 100:] = True
    np.testing.assert_array_equal(mask_HW, expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_png_of_the_mask_grid_comes_back_exactly(tmp_path: Path, info: SlideInfo, mode: str) -> None:
    mask_HW = blobs(100, 200)
    Image.fromarray(mask_HW.astype(np.uint8) * (1 if mode == "L" else 255)).convert(mode).save(tmp_path / "s.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "s.png", info, 8.0).mask_HW, mask_HW)


def test_png_of_another_scale_is_resampled_by_area(tmp_path: Path, info: SlideInfo) -> None:
    mask_HW = blobs(100, 200)
    Image.fromarray(mask_HW.repeat(3, axis=0).repeat(3, axis=1)).save(tmp_path / "s.png")
    np.testing.assert_array_equal(load_mask(tmp_path / "s.png", info, 8.0).mask_HW, mask_HW)
    fine = np.zeros((200, 400), bool)
    fine[20:100, 41:101] = True  # half of column 20, all of 21 to 49, half of column 50
    Image.fromarray(fine).save(tmp_path / "s.png")
    found = load_mask(tmp_path / "s.png", info, 8.0)
    assert (found.mask_HW.shape, found.mask_HW.sum()) == ((100, 200), 40 * 31)  # a half counts
    assert found.mask_HW[10:50, 20:51].all()


@pytest.mark.parametrize(("cols", "rows", "fits"), [(40, 20, True), (41, 20, True), (40, 21, True), (40, 24, False),
                                                    (20, 40, False), (400, 204, False)])  # fmt: skip
def test_png_must_have_the_proportions_of_the_slide(
    tmp_path: Path, info: SlideInfo, cols: int, rows: int, fits: bool
) -> None:
    Image.fromarray(np.ones((rows, cols), bool)).save(tmp_path / "s.png")
    if fits:
        assert load_mask(tmp_path / "s.png", info, 8.0).mask_HW.mean() > 0.95
    else:
        with pytest.raises(SlideError, match=rf"{cols} x {rows} pixels do not have the proportions.*200 x 100 pixels"):
            load_mask(tmp_path / "s.png", info, 8.0)


def test_a_coarse_slide_gets_a_mask_of_its_own_mpp(tmp_path: Path, info: SlideInfo) -> None:
    path = geojson(tmp_path / "s.geojson", {"type": "Polygon", "coordinates": [SQUARE]})
    mask = load_mask(path, replace(info, mpp_x=16.0, mpp_y=16.0), 8.0)
    assert (mask.mpp, mask.mask_HW.shape, mask.mask_HW.sum()) == (16.0, (1600, 3200), 800 * 800)


def test_wrong_pngs_are_refused(tmp_path: Path, info: SlideInfo) -> None:
    path = tmp_path / "s.png"
    path.write_bytes(b"not a PNG")
    with pytest.raises(SlideError, match=r"mask .*s\.png': cannot be read as PNG"):
        load_mask(path, info, 8.0)
    Image.fromarray(plain(100, 200, (200, 0, 0))).save(path)
    with pytest.raises(SlideError, match="has colours"):
        load_mask(path, info, 8.0)
    Image.new("LA", (200, 100)).save(path)
    with pytest.raises(SlideError, match="is of mode LA"):
        load_mask(path, info, 8.0)
    Image.new("1", (200, 100)).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SlideError, match="cannot be read as PNG"):
        load_mask(path, info, 8.0)
    Image.new("L", (200, 100)).save(tmp_path / "s.jpg")
    (tmp_path / "s.jpg").rename(path)
    with pytest.raises(SlideError, match="cannot be read as PNG"):
        load_mask(path, info, 8.0)


def test_a_png_whose_comments_explode_is_refused(tmp_path: Path, info: SlideInfo) -> None:
    comments = PngInfo()
    comments.add_text("comment", "0" * 20_000_000, zip=True)
    Image.new("1", (200, 100)).save(tmp_path / "s.png", pnginfo=comments)
    assert (tmp_path / "s.png").stat().st_size < 50_000
    with pytest.raises(SlideError, match="cannot be read as PNG"):
        load_mask(tmp_path / "s.png", info, 8.0)


def test_a_png_that_claims_to_be_huge_is_not_decoded(tmp_path: Path, info: SlideInfo) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for side in (65535, 10_000, 8001):
        header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        (tmp_path / "s.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        )
        with pytest.raises(SlideError, match=r"s\.png': .*too many.*slides\.tissue_mpp=8"):
            load_mask(tmp_path / "s.png", info, 8.0)


def test_a_mask_of_a_very_large_slide_is_read(tmp_path: Path, info: SlideInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `gigamil tile` wrote itself; Pillow warns of such a picture, and refuses it at twice the size."""
    monkeypatch.setattr("gigamil.slides.masks.MAX_PNG_VALUES", 4000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    mask_HW = blobs(100, 200)
    path = tmp_path / "s.png"
    Image.fromarray(mask_HW).save(path)
    np.testing.assert_array_equal(load_mask(path, info, 8.0).mask_HW, mask_HW)
    with pytest.raises(SlideError, match=r"200 x 100 pixels of mode 1 are too many"):
        load_mask(path, info, 4.0)
    Image.fromarray(mask_HW).convert("RGB").save(path)
    with pytest.raises(SlideError, match=r"200 x 100 pixels of mode RGB are too many"):
        load_mask(path, info, 8.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"type": "Topology"}', "holds 'Topology'"),
        ('{"type": "Point", "coordinates": [1, 2]}', "holds 'Point'.*Only Polygon"),
        ('{"type": "\\u001b[31m\\n=cmd()"}', r"holds '\\x1b\[31m\\n=cmd"),
        ("7", "holds int"),
        ("[[]]", "holds list"),
        ('{"type": "FeatureCollection"}', "without its list"),
        ('{"type": "Polygon", "coordinates": []}', "a ring has fewer"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}', "fewer than three points"),
        ('{"type": "Polygon", "coordinates": [[[[1, 2], [3, 4], [5, 2]]]]}', "nested too deep: those of a MultiPolygon"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 4], [5]]]}', "not a list of rings"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, NaN], [5, 6]]]}', "not finite"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, 1e999], [5, 6]]]}', "not finite"),
        ('{"type": "Polygon", "coordinates": {"a": 1}}', "not a list of rings"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [9000, 4], [5, 6]]]}', "reaches 181% of a side beyond the slide"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3, -400], [5, 6]]]}', "reaches 25% .* level-0 pixels"),
    ],
)  # fmt: skip
def test_wrong_geojson_is_refused(tmp_path: Path, info: SlideInfo, text: str, message: str) -> None:
    (tmp_path / "s.geojson").write_text(text)
    with pytest.raises(SlideError, match=rf"mask '.*s\.geojson': .*{message}"):
        load_mask(tmp_path / "s.geojson", info, 8.0)


@pytest.mark.parametrize(
    ("body", "head", "message"),
    [
        ("<Annotation", "", "is not XML as ASAP writes it"),
        (annotation(SQUARE, "Dot"), "", "holds a 'Dot'"),
        (annotation(SQUARE).replace("400", "4,5"), "", "not a list of rings"),
        (annotation(SQUARE).replace(' X="400"', ""), "", "one that is not finite"),
        (annotation(SQUARE[:2]), "", "fewer than three points"),
        ("&b;", '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>', "has a DOCTYPE"),
        ("&b;", '<!DOCTYPE x [<!ENTITY b SYSTEM "file:///etc/hostname">]>', "has a DOCTYPE"),
    ],
)
def test_wrong_xml_is_refused(tmp_path: Path, info: SlideInfo, body: str, head: str, message: str) -> None:
    path = asap(tmp_path / "s.xml", body, head)
    with pytest.raises(SlideError, match=rf"mask '.*s\.xml': .*{message}"):
        load_mask(path, info, 8.0)


def test_xml_of_another_program_is_refused(tmp_path: Path, info: SlideInfo) -> None:
    (tmp_path / "s.xml").write_text("<Annotations MicronsPerPixel='0.5'></Annotations>")
    with pytest.raises(SlideError, match="its root is 'Annotations', not 'ASAP_Annotations'"):
        load_mask(tmp_path / "s.xml", info, 8.0)


@pytest.mark.parametrize("suffix", [".geojson", ".xml"])
def test_text_files_are_bounded(tmp_path: Path, info: SlideInfo, suffix: str) -> None:
    path = tmp_path / f"s{suffix}"
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(SlideError, match="is larger than 16 MiB"):
        load_mask(path, info, 8.0)


def test_a_tangle_is_refused_before_it_takes_memory(tmp_path: Path, info: SlideInfo) -> None:
    zigzag = [[n % 3000, 1600 * (n % 2)] for n in range(50_000)]
    path = geojson(tmp_path / "s.geojson", {"type": "Polygon", "coordinates": [zigzag]})
    with pytest.raises(SlideError, match="a polygon of 50,000 points is too tangled"):
        load_mask(path, info, 8.0)


def test_the_mask_of_a_slide_is_found_or_its_absence_named(tmp_path: Path, info: SlideInfo) -> None:
    with pytest.raises(SlideError, match=r"slide 'a\.b': no mask in .*looked for a\.b\.png, a\.b\.geojson, a\.b\.xml"):
        mask_file(tmp_path, "a.b")
    (tmp_path / "a.png").touch()
    (tmp_path / "a.b.xml").touch()
    assert mask_file(tmp_path, "a.b") == tmp_path / "a.b.xml"
    (tmp_path / "a.b.geojson").touch()
    with pytest.raises(SlideError, match=r"several masks .*'a\.b\.geojson' and 'a\.b\.xml'"):
        mask_file(tmp_path, "a.b")
    with pytest.raises(SlideError, match=r"suffix '\.tif' is none of"):
        load_mask(tmp_path / "a.tif", info, 8.0)
    with pytest.raises(SlideError, match=r"gone\.xml': cannot be read"):
        load_mask(tmp_path / "gone.xml", info, 8.0)


@pytest.mark.real_data
def test_the_tissue_of_a_real_slide_goes_out_and_comes_back(tmp_path: Path, real_data: Path) -> None:
    with open_slide(real_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        mask, info = find_tissue(slide), slide.info
    write_mask_geojson(tmp_path / "s.geojson", mask, info)
    found = load_mask(tmp_path / "s.geojson", info, 8.0)
    assert (found.mask_HW == mask.mask_HW).mean() >= 0.99
    Image.fromarray(mask.mask_HW).save(tmp_path / "s.png")
    assert load_mask(tmp_path / "s.png", info, 8.0).sha256() == mask.sha256()

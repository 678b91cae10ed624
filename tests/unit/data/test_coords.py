"""Coordinates go out in the layouts of TRIDENT and CLAM, and come back to the pixel, or are refused by name."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest

from gigamil.cli import main
from gigamil.data.coords import export_coords, read_positions
from gigamil.data.h5 import Attribute, write_coords
from gigamil.errors import CohortError, SlideError
from gigamil.shards.read import ShardSet
from gigamil.slides.points import PointGrid, coords_file
from gigamil.slides.reader import SlideInfo
from gigamil.testing.shards import make_shards, noise_jpegs

INFO = SlideInfo(
    path=Path("a.svs"),
    vendor="test",
    width=160,
    height=160,
    level_dimensions=((160, 160),),
    level_downsamples=(1.0,),
    mpp_x=0.5,
    mpp_y=0.5,
    mpp_source="file",
    objective=None,
    bounds_x=0,
    bounds_y=0,
)
COORDS_N2 = np.array([[0, 0], [32, 5], [131, 140]])
TRIDENT: dict[str, Attribute] = {"patch_size": 32, "patch_size_level0": 32, "level0_width": 160, "level0_height": 160}


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Slides a and b.c of 5 x 5 tiles of 32 pixels."""
    for slide_id in ("a", "b.c"):
        make_shards(tmp_path / "shards", slide_id, noise_jpegs(25, 32), tile_px=32)
    return ShardSet(tmp_path / "shards")


@pytest.mark.parametrize(("layout", "suffix"), [("trident", "_patches"), ("clam", "")])
def test_round_trip(tmp_path: Path, shards: ShardSet, layout: str, suffix: str) -> None:
    files = export_coords(shards, tmp_path / "out", layout)  # type: ignore[arg-type]
    assert [str(file.relative_to(tmp_path / "out")) for file in files] == [
        f"patches/a{suffix}.h5",
        f"patches/b.c{suffix}.h5",
    ]
    for slide_id in ("a", "b.c"):
        path = coords_file(tmp_path / "out", slide_id)
        index = shards.index(slide_id)
        positions_N2 = read_positions(path, INFO, 32, 0.5)
        np.testing.assert_array_equal(positions_N2, np.stack([index.x_px0, index.y_px0], axis=1))


def test_attributes_are_those_that_the_tools_read(tmp_path: Path, shards: ShardSet) -> None:
    trident, clam = (export_coords(shards, tmp_path / name, name, ["a"])[0] for name in ("trident", "clam"))
    with h5py.File(trident) as file:
        attrs = file["coords"].attrs
        assert (attrs["patch_size"], attrs["patch_size_level0"], attrs["overlap"], attrs["name"]) == (32, 32, 0, "a")
        assert (attrs["level0_magnification"], attrs["target_magnification"]) == (20, 20)
        assert (attrs["level0_width"], attrs["level0_height"]) == (160, 160)
    with h5py.File(clam) as file:
        attrs = file["coords"].attrs
        assert (attrs["patch_size"], attrs["patch_level"]) == (32, 0)
        assert tuple(attrs["downsample"]) == (1.0, 1.0)
        assert tuple(attrs["level_dim"]) == (160, 160)
    assert str(tmp_path).encode() not in trident.read_bytes() + clam.read_bytes()


def test_a_level_of_clam_is_counted_in_level_0_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_coords(path, COORDS_N2, {"patch_size": 16, "patch_level": 1, "downsample": (2.0, 2.0)})
    np.testing.assert_array_equal(read_positions(path, INFO, 32, 0.5), COORDS_N2)


def test_no_position_is_no_error(tmp_path: Path) -> None:
    write_coords(tmp_path / "a.h5", COORDS_N2[:0], TRIDENT)
    assert read_positions(tmp_path / "a.h5", INFO, 32, 0.5).shape == (0, 2)


@pytest.mark.parametrize(
    ("coords", "attrs", "words"),
    [
        (COORDS_N2, {"name": "a"}, "does not say how large a tile is"),
        (COORDS_N2, TRIDENT | {"patch_size_level0": 64}, "has tiles of 32 x 32 um, configured are 16 um"),
        (COORDS_N2, TRIDENT | {"patch_size_level0": "big"}, "attributes that say no size of a tile"),
        (COORDS_N2, TRIDENT | {"patch_size_level0": -32}, "attributes that say no size of a tile"),
        (COORDS_N2, TRIDENT | {"patch_size_level0": float("nan")}, "attributes that say no size of a tile"),
        (COORDS_N2, TRIDENT | {"level0_width": 999}, "is of a slide of 999 x 160 pixels; this one has 160 x 160"),
        (COORDS_N2 + [29, 0], TRIDENT, "has 1 of 3 positions outside the slide of 160 x 160 pixels"),
        (COORDS_N2 - [1, 0], TRIDENT, "has 1 of 3 positions outside"),
        (COORDS_N2[[0, 1, 1, 2, 2]], TRIDENT, "names 2 positions more than once"),
    ],
    ids=range(9),
)
def test_coordinates_of_something_else(
    tmp_path: Path, coords: np.ndarray, attrs: dict[str, Attribute], words: str
) -> None:
    path = tmp_path / "a.h5"
    write_coords(path, coords, attrs)
    with pytest.raises(SlideError, match=words) as caught:
        read_positions(path, INFO, 32, 0.5)
    assert "slide 'a.svs'" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("coords", "words"),
    [
        (np.zeros((5, 3), np.int64), r"int64\(5, 3\); expected integers \(N, 2\)"),
        (np.zeros((5, 2), np.float64), "'coords' is float64"),
        (np.zeros(5, np.int64), r"int64\(5,\)"),
    ],
)
def test_wrong_shapes_and_kinds(tmp_path: Path, coords: np.ndarray, words: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = coords
    with pytest.raises(SlideError, match=words):
        read_positions(tmp_path / "a.h5", INFO, 32, 0.5)
    with pytest.raises(ValueError, match="expected integers"):
        write_coords(tmp_path / "b.h5", coords, {})


def test_an_absurd_number_of_tiles(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", (10**12, 2), np.int64, chunks=(1000, 2))
    with pytest.raises(SlideError, match="claims 1000000000000 tiles"):
        read_positions(tmp_path / "a.h5", INFO, 32, 0.5)


def test_one_file_a_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="must hold one file of its coordinates; it has: none of a.h5"):
        coords_file(tmp_path, "a")
    for name in ("a.h5", "a_patches.h5"):
        write_coords(tmp_path / name, COORDS_N2, TRIDENT)
    with pytest.raises(SlideError, match=r"a\.h5, .*a_patches\.h5"):
        coords_file(tmp_path, "a")
    assert coords_file(tmp_path, "a_patches") == tmp_path / "a_patches.h5"


def test_a_grid_of_points_is_the_positions(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, mpp_x=0.26, mpp_y=0.25, width=100_000, height=80_000)
    grid = PointGrid.of(info, 224, 0.5)
    x, y = np.array([0, 17, 99_999]), np.array([0, 79_999, 3])
    cells = grid.index(x, y)
    x_um, y_um = grid.position_um(cells)
    np.testing.assert_allclose(x_um / info.mpp_x, x, rtol=1e-12)
    np.testing.assert_allclose(y_um / info.mpp_y, y, rtol=1e-12)
    np.testing.assert_array_equal(grid.col_row(cells), [x, y])
    assert (grid.num_x, grid.num_y, grid.tile_width_um) == (100_000, 80_000, 112.0)


def test_the_verb(
    tmp_path: Path, shards: ShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("bookkeeping: {out: run, shards: shards}\n")
    assert main(["export-coords", "my.yaml", "--layout", "trident", "--to", "out"]) == 0
    assert capsys.readouterr().out == "coordinates of 2 slides in 'out/patches'\n"
    assert read_positions(Path("out/patches/a_patches.h5"), INFO, 32, 0.5).shape == (25, 2)
    with pytest.raises(CohortError, match="layout 'other' is unknown"):
        export_coords(shards, tmp_path, "other")  # type: ignore[arg-type]

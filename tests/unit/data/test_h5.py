"""Features and coordinates in HDF5: what is written is read, what a hostile or damaged file claims is refused."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from gigamil.data.h5 import read_features, read_features_header, trident_attributes, write_features
from gigamil.errors import ShardError
from gigamil.testing.shards import make_shards, noise_jpegs

FEATURES_ND = np.random.default_rng(0).normal(size=(500, 24)).astype(np.float32)
COORDS_N2 = np.stack([np.arange(500) % 25 * 448, np.arange(500) // 25 * 448], axis=1)


class TestFeatures:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_round_trip(self, tmp_path: Path, dtype: type) -> None:
        path = tmp_path / "deep" / "a.h5"
        attrs = {"encoder": "resnet18", "patch_size": 224, "mpp_x": 0.25, "name": "a", "downsample": (1.0, 1.0)}
        write_features(path, FEATURES_ND.astype(dtype), COORDS_N2, attrs)
        features, coords, found = read_features(path)
        assert features.dtype == dtype
        np.testing.assert_array_equal(features, FEATURES_ND.astype(dtype))
        np.testing.assert_array_equal(coords, COORDS_N2)
        assert coords.dtype == np.int64
        assert found == attrs
        assert read_features_header(path) == (500, 24, attrs)
        assert [file.name for file in path.parent.iterdir()] == ["a.h5"]

    def test_a_span_and_no_tile_at_all(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        write_features(path, FEATURES_ND, COORDS_N2, {})
        features, coords, _ = read_features(path, 7, 10)
        np.testing.assert_array_equal(features, FEATURES_ND[7:10])
        np.testing.assert_array_equal(coords, COORDS_N2[7:10])
        assert read_features(path, 3, 3).features_ND.shape == (0, 24)
        with pytest.raises(IndexError, match=r"has features 0\.\.499; asked for 499\.\.500"):
            read_features(path, 499, 501)
        write_features(path, FEATURES_ND[:0], COORDS_N2[:0], {})
        assert read_features(path).features_ND.shape == (0, 24)

    def test_layout_is_the_one_that_trident_reads(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        write_features(path, FEATURES_ND, COORDS_N2, {"encoder": "uni", "patch_size_level0": 448, "name": "a"})
        with h5py.File(path) as file:
            assert set(file) == {"features", "coords"}
            assert dict(file["features"].attrs) == {"encoder": "uni"}
            assert dict(file["coords"].attrs) == {"patch_size_level0": 448, "name": "a"}
            assert file["features"].chunks == (500, 24)

    def test_large_files_are_stored_in_blocks_of_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        write_features(path, np.zeros((3000, 1024), np.float32), np.zeros((3000, 2), np.int64), {})
        with h5py.File(path) as file:
            assert file["features"].chunks == (256, 1024)  # 1 MiB

    def test_equal_arguments_give_equal_bytes(self, tmp_path: Path) -> None:
        for name in "ab":
            write_features(tmp_path / name, FEATURES_ND, COORDS_N2, {"name": "x", "encoder": "y"})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_a_file_of_clam_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("features", data=FEATURES_ND, chunks=(1, 24), maxshape=(None, 24))
            file.create_dataset("coords", data=COORDS_N2.astype(np.int32), chunks=(1, 2), maxshape=(None, 2))
        features, coords, attrs = read_features(path)
        np.testing.assert_array_equal(features, FEATURES_ND)
        assert coords.dtype == np.int64
        assert attrs == {}

    @pytest.mark.parametrize(
        ("features", "coords", "words"),
        [
            (FEATURES_ND.astype(np.float64), COORDS_N2, "float64"),
            (FEATURES_ND[0], COORDS_N2, r"float32\(24,\)"),
            (FEATURES_ND, COORDS_N2[:-1], r"coords are int64\(499, 2\)"),
            (FEATURES_ND, COORDS_N2.astype(np.float32), "coords are float32"),
            (np.full_like(FEATURES_ND, np.nan), COORDS_N2, "NaN"),
        ],
    )
    def test_wrong_arrays_are_not_written(
        self, tmp_path: Path, features: np.ndarray, coords: np.ndarray, words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            write_features(tmp_path / "a.h5", features, coords, {})
        assert list(tmp_path.iterdir()) == []


def external_link(file: h5py.File) -> None:
    file["features"] = h5py.ExternalLink("/etc/passwd", "features")


def soft_link(file: h5py.File) -> None:
    file["features"] = h5py.SoftLink("/other")


def external_storage(file: h5py.File) -> None:
    file.create_dataset("features", (500, 24), np.float32, external=[("/etc/passwd", 0, 48000)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((500, 24), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "features", (500, 24))
    file.create_virtual_dataset("features", layout)


def many_claimed(file: h5py.File) -> None:
    file.create_dataset("features", (2_000_000_000, 24), np.float32, chunks=(100, 24))


def more_than_it_holds(file: h5py.File) -> None:
    file.create_dataset("features", (500, 100_000_000), np.float32, chunks=(1, 1000))


def compressed_bomb(file: h5py.File) -> None:
    file.create_dataset("features", data=np.zeros((500, 20_000), np.float32), chunks=(500, 20_000), compression=9)


def text(file: h5py.File) -> None:
    file.create_dataset("features", data=[b"a"] * 500)


def group(file: h5py.File) -> None:
    file.create_group("features")


def cube(file: h5py.File) -> None:
    file.create_dataset("features", data=FEATURES_ND[None])


def other_length(file: h5py.File) -> None:
    file.create_dataset("features", data=FEATURES_ND[:-1])


def not_finite(file: h5py.File) -> None:
    file.create_dataset("features", data=np.where(COORDS_N2[:, :1] == 448, np.inf, FEATURES_ND))


def nothing(file: h5py.File) -> None:
    file.create_dataset("feats", data=FEATURES_ND)


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (external_link, "'features' is a link to somewhere else"),
        (soft_link, "'features' is a link to somewhere else"),
        (external_storage, "'features' lies in other files"),
        (virtual, "'features' lies in other files"),
        (many_claimed, "claims 2000000000 tiles"),
        (more_than_it_holds, "claims 200000000000 bytes and holds 0"),
        (compressed_bomb, "claims 40000000 bytes and holds"),
        (text, "no array of numbers"),
        (group, "no array of numbers"),
        (cube, r"float32(1, 500, 24); expected float32 or float16 (N, D)"),
        (other_length, "'features' has 499 rows and 'coords' 500"),
        (not_finite, "NaN or infinity within tiles 0..499"),
        (nothing, "has no dataset 'features'; it has: coords, feats"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, plant: Callable[[h5py.File], None], words: str) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=COORDS_N2)
        plant(file)
    with pytest.raises(ShardError) as caught:
        read_features(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_features(path, FEATURES_ND, COORDS_N2, {"name": "a", "patch_size": 224})
    data = path.read_bytes()
    for size in range(0, len(data), 997):
        path.write_bytes(data[:size])
        with pytest.raises(ShardError):
            read_features(path)
    rng = np.random.default_rng(0)
    headers = 4096  # flips among the numbers themselves are numbers too
    for position, bit in zip(rng.integers(0, headers, 300), rng.integers(0, 8, 300), strict=True):
        mutant = bytearray(data)
        mutant[position] ^= 1 << bit
        path.write_bytes(mutant)
        try:
            read_features(path)
        except ShardError:
            continue


def test_missing_file_and_no_hdf5(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no file"):
        read_features(tmp_path / "none.h5")
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(ShardError, match="cannot be read as HDF5"):
        read_features(tmp_path / "a.h5")


def test_attributes_that_trident_needs(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, "a", noise_jpegs(4, 32), tile_px=32, tile_mpp=0.5)
    attrs = trident_attributes(manifest)
    trident = {"patch_size": 32, "patch_size_level0": 32, "overlap": 0, "name": "a"}
    trident |= {"level0_magnification": 20, "target_magnification": 20, "level0_width": 64, "level0_height": 64}
    assert attrs.items() >= trident.items()
    assert attrs.items() >= {"mpp_x": 0.5, "tile_px": 32, "target_mpp": 0.5}.items()

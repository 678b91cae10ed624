"""Cached features stand in for tiles: whose files they are does not matter, and what does not fit is said at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gigamil.data.features import FeatureSet, FeatureSource
from gigamil.data.h5 import Attribute, write_features
from gigamil.data.pipeline import StepLoader
from gigamil.errors import BagError, ShardError
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps

DIM = 6
TILE_PX, TILE_UM = 32, 16.0
TRIDENT = {"patch_size": TILE_PX, "patch_size_level0": 64, "name": "x", "level0_magnification": 40}
GIGAMIL = TRIDENT | {"mpp_x": 0.25, "mpp_y": 0.26, "encoder": "resnet18", "encoder_sha256": "ab"}


def write(
    folder: Path, slide_id: str, size: int, attrs: dict[str, Attribute] | None = None, dim: int = DIM, seed: int = 0
) -> np.ndarray:
    """The file of a slide whose tiles lie in a row; its features."""
    features_ND = np.random.default_rng(seed).normal(size=(size, dim)).astype(np.float32)
    coords_N2 = np.stack([np.arange(size) * 64, np.full(size, 128)], axis=1)
    write_features(folder / f"{slide_id}.h5", features_ND, coords_N2, TRIDENT if attrs is None else attrs)
    return features_ND


def opened(folder: Path, **mpp: float) -> FeatureSet:
    return FeatureSet(folder, TILE_UM, mpp)


@pytest.mark.parametrize(
    ("attrs", "table_mpp", "wanted"),
    [
        (GIGAMIL, 0.5, (0.25, 0.26)),  # the file knows
        (TRIDENT, 0.5, (0.5, 0.5)),  # else the slide table
        (TRIDENT, None, (0.25, 0.25)),  # else 64 px are the 16 um that are configured
        ({}, 0.5, (0.5, 0.5)),
    ],
)
def test_positions_are_in_micron(
    tmp_path: Path, attrs: dict[str, Attribute], table_mpp: float | None, wanted: tuple[float, float]
) -> None:
    write(tmp_path, "TCGA-1.a-b", 3, attrs)
    features = FeatureSet(tmp_path, TILE_UM, {"TCGA-1.a-b": table_mpp})
    assert features.slide_ids == ("TCGA-1.a-b",)
    manifest, index = features.manifest("TCGA-1.a-b"), features.index("TCGA-1.a-b")
    assert (manifest.num_tiles, manifest.dim, manifest.mpp_x, manifest.mpp_y) == (3, DIM, *wanted)
    np.testing.assert_allclose(index.x_um, np.arange(3) * 64 * wanted[0])
    np.testing.assert_allclose(index.y_um, np.full(3, 128 * wanted[1]))
    assert manifest.tile_um == ((64 * wanted[0], 64 * wanted[1]) if attrs else (TILE_UM, TILE_UM))
    assert manifest.stride_um == manifest.tile_um


def test_tiles_that_overlap_have_a_smaller_stride(tmp_path: Path) -> None:
    write(tmp_path, "a", 3, TRIDENT | {"overlap": 8})
    manifest = opened(tmp_path).manifest("a")
    assert (manifest.tile_um, manifest.stride_um) == ((16.0, 16.0), (12.0, 12.0))


def test_tiles_that_lie_apart_have_a_larger_stride(tmp_path: Path) -> None:
    """`trident_attributes` writes tile_px - stride_px, here 224 - 448."""
    write(tmp_path, "a", 3, {"patch_size": 224, "patch_size_level0": 224, "overlap": -224, "mpp_x": 0.5, "mpp_y": 0.5})
    manifest = opened(tmp_path).manifest("a")
    assert (manifest.tile_um, manifest.stride_um) == ((112.0, 112.0), (224.0, 224.0))


@pytest.mark.parametrize("overlap", ["8", float("nan"), float("-inf"), TILE_PX, TILE_PX + 1])
def test_an_overlap_that_cannot_be_is_passed_over(tmp_path: Path, overlap: Attribute) -> None:
    write(tmp_path, "a", 3, TRIDENT | {"overlap": overlap})
    assert opened(tmp_path).manifest("a").stride_um == (16.0, 16.0)


def test_positions_of_a_file_that_was_written_anew_are_read_anew(tmp_path: Path) -> None:
    for size in (3, 5):
        write(tmp_path, "a", size)
        index = opened(tmp_path).index("a")
        np.testing.assert_allclose(index.x_um, np.arange(size) * TILE_UM)
        assert opened(tmp_path).index("a") is index  # kept


def test_positions_of_a_file_that_is_gone(tmp_path: Path) -> None:
    write(tmp_path, "a", 3)
    features = opened(tmp_path)
    features.manifest("a")
    (tmp_path / "a.h5").unlink()
    with pytest.raises(ShardError, match="no file .*a.h5"):
        features.index("a")


def test_a_file_without_scale_is_refused_with_the_cure(tmp_path: Path) -> None:
    write(tmp_path, "a", 3, {})
    with pytest.raises(ShardError, match="'a'.*does not say how large a tile is.*column mpp"):
        opened(tmp_path).manifest("a")


def test_a_folder_without_features_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no features in .*gigamil features"):
        opened(tmp_path / "missing")


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    for slide_id in "abc":
        write(tmp_path, slide_id, 3)
    write(tmp_path, "wide", 3, TRIDENT | {"patch_size": 64})
    write(tmp_path, "other", 3, GIGAMIL)
    (tmp_path / "damaged.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:500])
    with pytest.raises(ShardError) as raised:
        opened(tmp_path).check_tiles(["a", "wide", "missing", "b", "damaged", "other"], TILE_PX, "small_cnn")
    text = str(raised.value)
    assert "4 of 6 slides have no fitting features" in text
    assert "'wide': features of tiles of 64 px; configured slides.tile_px 32" in text
    assert "'missing' has no features" in text
    assert "damaged.h5': cannot be read as HDF5" in text
    assert "'other': features of encoder 'resnet18'; configured science.encoder.name small_cnn" in text
    assert "gigamil features" in text
    opened(tmp_path).check_tiles("abc", TILE_PX, "small_cnn")  # of files by others only they know the encoder


@pytest.mark.parametrize(
    ("attrs", "table_mpp", "wanted"),
    [
        (TRIDENT, 0.18, ""),  # 64 px of 0.18 um are nominally the 16 um that are configured
        (TRIDENT, 0.35, ""),
        (TRIDENT, 0.5, "32 um"),
        (TRIDENT | {"target_magnification": 20}, None, ""),
        (TRIDENT | {"target_magnification": 10}, None, "32 um"),
        (TRIDENT | {"target_magnification": 10}, 0.25, ""),  # mpp is better than what is nominal
        (GIGAMIL | {"target_mpp": TILE_UM / TILE_PX}, None, ""),
        (GIGAMIL | {"target_mpp": 0.501}, None, "16.032 um"),
    ],
)
def test_tiles_of_another_physical_size_are_refused(
    tmp_path: Path, attrs: dict[str, Attribute], table_mpp: float | None, wanted: str
) -> None:
    write(tmp_path, "a", 3, attrs)
    features = FeatureSet(tmp_path, TILE_UM, {"a": table_mpp})
    if not wanted:
        features.check_tiles("a", TILE_PX)
        return
    text = f"'a': features of tiles of {wanted}; configured slides.tile_px . slides.tile_mpp is 16 um"
    with pytest.raises(ShardError, match=text):
        features.check_tiles("a", TILE_PX)


def test_features_of_two_encoders_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", 3, GIGAMIL)
    write(tmp_path, "b", 3, GIGAMIL | {"encoder_sha256": "cd"})
    write(tmp_path, "c", 3, GIGAMIL, dim=7)
    with pytest.raises(ShardError, match=r"made by 3 encoders.*\n.*'a': 6 .*ab\n.*'b': 6 .*cd\n.*'c': 7 "):
        opened(tmp_path).check_tiles("abc", TILE_PX, "resnet18")


def test_a_slide_without_a_tile_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", 3)
    write(tmp_path, "b", 0)
    with pytest.raises(BagError, match="1 slides have no tile .*'b'.*gigamil split"):
        opened(tmp_path).check_tiles("ab", TILE_PX)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("hold_bytes", [None, 0])
def test_a_loader_gives_each_rank_its_rows(tmp_path: Path, num_ranks: int, hold_bytes: int | None) -> None:
    sizes = (5, 1, 7)
    whole = torch.from_numpy(np.concatenate([write(tmp_path, f"s{i}", size, seed=i) for i, size in enumerate(sizes)]))
    features = opened(tmp_path)
    ids = ["s0", "s1", "s2"]
    (plan,) = plan_steps(range(3), sizes, 3, 1, num_ranks)
    found, x_um = [], []
    for rank in range(num_ranks):
        topology = Topology(num_ranks, rank, rank, num_ranks, num_ranks)
        tiles = StepLoader(FeatureSource(features, ids), ids, TILE_PX, topology, 0, hold_bytes).load(plan)
        assert tiles.images.shape == (DIM,)
        assert tiles.images.held == (hold_bytes is None)
        found.append(tiles.images.read(0, tiles.num_tiles))
        x_um.append(tiles.position_n2[:, 0])
    assert torch.equal(torch.cat(found), whole)
    assert torch.cat(x_um).tolist() == [number * TILE_UM for size in sizes for number in range(size)]


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    features_ND = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float16)
    write_features(tmp_path / "a.h5", features_ND, np.zeros((4, 2), dtype=np.int64), TRIDENT)
    rows = FeatureSource(opened(tmp_path), ["a"]).read_tiles("a", 1, 3)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, features_ND[1:3].astype(np.float32))


def test_a_digest_tells_other_features(tmp_path: Path) -> None:
    write(tmp_path, "a", 3)
    before = opened(tmp_path).digest("a")
    write(tmp_path, "a", 3)
    assert opened(tmp_path).digest("a") == before
    write(tmp_path, "a", 3, seed=1)
    assert opened(tmp_path).digest("a") != before

"""Planted leaks are refused, all at once: of a patient, an id, a file, a picture, however spelled or exported."""

import csv
import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from gigamil.config.schema import Cohort
from gigamil.data import leaks
from gigamil.data.cohort import CohortTable, SlideRow
from gigamil.data.leaks import HASH_FILE, MAX_DIFFERENT_BITS, file_leaks, picture_hash, picture_leaks, slide_prints
from gigamil.data.split import Splits, check_splits, load_splits, make_splits, save_splits, sources_digest, tile_leaks
from gigamil.errors import CohortError
from gigamil.shards.format import MANIFEST, THUMBNAIL
from gigamil.shards.manifest import digest_file
from gigamil.shards.read import ShardSet
from gigamil.slides.reader import open_slide
from gigamil.testing.shards import make_shards, noise_jpegs

IDS = [f"s{n}" for n in range(8)]


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Thumbnails: textured tissue of a random outline on glass."""

    def draw(seed: int) -> Image.Image:
        rng = np.random.default_rng(seed)
        coarse_HW, fine_HW = (gaussian_filter(rng.normal(size=(160, 220)), sigma) * sigma for sigma in (20, 2))
        grey_HW = np.where(coarse_HW > 0, 180 + 60 * fine_HW, 244)
        return Image.fromarray(np.clip(grey_HW, 0, 255).astype(np.uint8)).convert("RGB")

    return [draw(seed) for seed in range(len(IDS))]


def exported(picture: Image.Image, quality: int = 60) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def put(root: Path, slide_id: str, picture: Image.Image, source: str) -> None:
    """Shards of a slide with this thumbnail, of this file."""
    manifest = make_shards(root, slide_id, noise_jpegs(1, 16), tile_px=16)
    folder = root / "slides" / slide_id
    picture.save(folder / THUMBNAIL, quality=90)
    facts = json.loads(manifest.model_dump_json())
    facts |= {"thumbnail": digest_file(folder / THUMBNAIL).model_dump(), "source_fingerprint": source}
    (folder / MANIFEST).write_text(json.dumps(facts))


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    root = tmp_path_factory.mktemp("clean")
    for slide_id, picture in zip(IDS, pictures, strict=True):
        put(root, slide_id, picture, f"file of {slide_id}")
    return root


@pytest.fixture
def root(tmp_path: Path, clean: Path) -> Path:
    """Shards of eight slides without a leak, to plant one in."""
    shutil.copytree(clean, tmp_path / "shards")
    return tmp_path / "shards"


def table(**patients: str) -> CohortTable:
    """Eight slides of eight patients, but for those named."""
    rows = [SlideRow(s, Path(s), patients.get(s, f"p{s}"), "xy"[n % 2], None, None, None) for n, s in enumerate(IDS)]
    return CohortTable(tuple(rows), ("x", "y"))


def split(cohort: CohortTable | None = None) -> Splits:
    """s0-s3 train, s4-s7 test."""
    sha256 = (cohort or table()).sha256
    return Splits(tuple(IDS[:4]), (), tuple(IDS[4:]), (), ("x", "y"), sha256, "planted")


def refusal(splits: Splits, cohort: CohortTable, root: Path) -> str:
    with pytest.raises(CohortError) as caught:
        check_splits(splits, cohort, leaks=tile_leaks(splits, ShardSet(root)))
    return str(caught.value)


def test_no_leak_is_found_where_there_is_none(root: Path) -> None:
    assert tile_leaks(split(), ShardSet(root)) == []
    check_splits(split(), table())


def test_the_same_patient(root: Path) -> None:
    cohort = table(s0="p", s5="p")
    assert "patient 'p' is in train (s0) and test (s5): the score would be too good" in refusal(
        split(cohort), cohort, root
    )


@pytest.mark.parametrize(("one", "other"), [("TCGA-05", "tcga-05 "), ("Müller", "Mu\u0308ller"), ("A  1", "a 1")])
def test_the_same_patient_spelled_otherwise(root: Path, one: str, other: str) -> None:
    cohort = table(s0=one, s5=other)
    text = refusal(split(cohort), cohort, root)
    assert "1 problem(s)" in text
    assert "also spelled" in text
    assert "is in train (s0) and test (s5)" in text


def test_the_same_slide(root: Path) -> None:
    splits = dataclasses.replace(split(), test=(*split().test, "s1"))
    assert "slide 's1' is listed 2 times (train, test)" in refusal(splits, table(), root)


def test_the_same_slide_spelled_otherwise(root: Path, pictures: list[Image.Image]) -> None:
    put(root, "S1", pictures[1], "elsewhere")
    splits = dataclasses.replace(split(), test=(*split().test, "S1"))
    text = refusal(splits, table(), root)
    assert "slide 'S1', also spelled 's1', is listed 2 times (train, test)" in text
    assert "slides that the table lacks: S1" in text


def test_the_same_file(root: Path, pictures: list[Image.Image]) -> None:
    put(root, "s6", pictures[2], "file of s2")
    text = refusal(split(), table(), root)
    assert "the slides 's2' (train) and 's6' (test) are the same file" in text
    assert "1 problem(s)" in text  # not once more as look-alikes


def test_equal_ends_of_files_that_look_different_are_no_leak(root: Path, pictures: list[Image.Image]) -> None:
    """Uncompressed slides of one size with white margins have one fingerprint."""
    for slide_id in ("s0", "s2", "s5", "s6"):
        put(root, slide_id, pictures[IDS.index(slide_id)], "white margins")
    assert tile_leaks(split(), ShardSet(root)) == []
    put(root, "s6", exported(pictures[2]), "white margins")
    found = ["the slides 's2' (train) and 's6' (test) are the same file"]
    assert tile_leaks(split(), ShardSet(root), near_duplicates="ignore") == found
    assert tile_leaks(split(), ShardSet(root)) == found


def test_equal_files_are_a_leak_where_a_picture_is_missing() -> None:
    pictures = {"a": "f" * 64, "b": "0123456789abcdef" * 4}
    sides = {"train": ["a", "c"], "test": ["b"]}
    assert list(file_leaks(sides, leaks.SlidePrints(dict.fromkeys("ab", "one"), pictures))) == []
    found = list(file_leaks(sides, leaks.SlidePrints(dict.fromkeys("abc", "one"), pictures)))
    assert found == ["the slides 'c' (train) and 'b' (test) are the same file"]


@pytest.mark.parametrize("change", ["quality 40", "half size", "mirrored", "turned", "one degree", "one percent"])
def test_the_same_slide_exported_again(root: Path, pictures: list[Image.Image], change: str) -> None:
    picture = pictures[2]
    width, height = picture.size
    again = {
        "quality 40": exported(picture, 40),
        "half size": picture.resize((width // 2, height // 2)),
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "turned": picture.transpose(Image.Transpose.ROTATE_90),
        "one degree": picture.rotate(1, fillcolor=(245, 245, 245)),
        "one percent": picture.crop((width // 100, height // 100, width, height)),
    }[change]
    put(root, "s6", exported(again), "another file")
    text = refusal(split(), table(), root)
    assert "the slides 's2' (train) and 's6' (test) look the same (" in text
    assert "set cohort.near_duplicates=ignore" in text
    assert tile_leaks(split(), ShardSet(root), near_duplicates="ignore") == []


def test_copies_on_one_side_are_fine(root: Path, pictures: list[Image.Image]) -> None:
    put(root, "s5", exported(pictures[6]), "another file")
    put(root, "s7", pictures[6], "file of s6")
    assert tile_leaks(split(), ShardSet(root)) == []


def test_blank_slides_are_no_copies_of_each_other(root: Path) -> None:
    rng = np.random.default_rng(0)
    for slide_id in ("s1", "s5"):
        glass = rng.normal(244, 1.5, (90, 110, 3)).round().astype(np.uint8)
        put(root, slide_id, Image.fromarray(glass), f"file of {slide_id}")
    assert tile_leaks(split(), ShardSet(root)) == []
    assert picture_hash(np.full((50, 60, 3), 240, np.uint8)) == ""


def test_all_leaks_are_in_one_message(root: Path, pictures: list[Image.Image]) -> None:
    put(root, "s6", pictures[2], "file of s2")
    put(root, "s7", exported(pictures[3]), "another file")
    cohort = table(s0="p", s4="P ")
    splits = dataclasses.replace(split(cohort), test=(*split().test, "s1"))
    text = refusal(splits, cohort, root)
    assert "has 5 problem(s)" in text
    for words in (
        "patient 'P '",
        "slide 's1' is listed",
        "'s2' (train) and 's6' (test) are",
        "'s3' (train) and 's7' (test)",
    ):
        assert words in text


def test_a_loaded_split_is_checked_against_the_tiles_of_today(root: Path, pictures: list[Image.Image]) -> None:
    shards = ShardSet(root)
    splits = dataclasses.replace(split(), sources_sha256=sources_digest(shards, IDS))
    path = root.parent / "run" / "splits.json"
    save_splits(splits, path)
    assert load_splits(path, table(), shards) == splits
    put(root, "s3", pictures[3], "another file")
    with pytest.raises(CohortError, match="slide files are others than when the split was made"):
        load_splits(path, table(), ShardSet(root))


def test_thumbnails_are_decoded_once(root: Path, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = root.parent / HASH_FILE
    first = slide_prints(ShardSet(root), IDS, cache)
    hashed: list[np.ndarray] = []

    def count(picture_HW3: np.ndarray) -> str:
        hashed.append(picture_HW3)
        return picture_hash(picture_HW3)

    monkeypatch.setattr(leaks, "picture_hash", count)
    assert slide_prints(ShardSet(root), IDS, cache) == first
    assert len(hashed) == 0
    put(root, "s3", pictures[0], "file of s3")  # known by its content
    put(root, "s4", exported(pictures[4]), "file of s4")
    slide_prints(ShardSet(root), IDS, cache)
    assert len(hashed) == 1
    cache.write_text('{"a": 3}')
    assert slide_prints(ShardSet(root), IDS[:3], cache).picture == {s: first.picture[s] for s in IDS[:3]}
    assert len(hashed) == 4


def test_a_split_that_is_made_keeps_spellings_of_a_patient_together() -> None:
    rows = [
        SlideRow(f"s{n}-{k}", Path(), (f"P{n}", f"p{n} ")[k], "xy"[n % 2], None, None, None)
        for n in range(20)
        for k in (0, 1)
    ]
    cohort = CohortTable(tuple(rows), ("x", "y"))
    splits = make_splits(cohort, [row.slide_id for row in rows], Cohort())
    assert len(splits.test) == 12


class TestThreshold:
    """What MAX_DIFFERENT_BITS stands on."""

    def test_different_slides_are_far_apart(self, pictures: list[Image.Image]) -> None:
        signs = leaks._signs([picture_hash(np.asarray(picture)) for picture in pictures])
        different = leaks._different_bits(signs, signs)
        assert np.diag(different).max() == 0
        assert different[~np.eye(len(signs), dtype=bool)].min() > 1.5 * MAX_DIFFERENT_BITS

    @pytest.mark.real_data
    def test_a_real_slide_and_its_dicom_copy(self, real_data: Path, pictures: list[Image.Image]) -> None:
        folder = real_data / "wsi"
        hashes = []
        for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region.dicom"):
            with open_slide(folder / name) as slide:
                hashes.append(picture_hash(slide.thumbnail(8.0)))
        signs = leaks._signs(hashes)
        assert leaks._different_bits(signs[:1], signs[1:]).item() < MAX_DIFFERENT_BITS / 4  # 4 bits
        others = leaks._signs([picture_hash(np.asarray(picture)) for picture in pictures])
        assert leaks._different_bits(signs, others).min() > 1.5 * MAX_DIFFERENT_BITS

    @pytest.mark.real_data
    def test_fields_of_real_tissue_are_far_apart(self, real_data: Path) -> None:
        with (real_data / "lung_tiles" / "tiles.csv").open(newline="") as file:
            field_of = {row["path"]: row["group_id"] for row in csv.DictReader(file)}
        hashes: dict[str, str] = {}
        with tarfile.open(real_data / "lung_tiles" / "lung_tiles.tar") as tar:
            for member in tar:
                field = field_of.get(member.name)
                if field is not None and field not in hashes:
                    with Image.open(io.BytesIO(tar.extractfile(member).read())) as image:  # type: ignore[union-attr]
                        hashes[field] = picture_hash(np.asarray(image))
        signs = leaks._signs(list(hashes.values()))
        different = leaks._different_bits(signs, signs)[np.triu_indices(len(signs), 1)]
        assert len(different) == 69_751
        assert different.min() >= 2 * MAX_DIFFERENT_BITS

    def test_thousands_of_slides_are_compared_in_blocks(self) -> None:
        rng = np.random.default_rng(0)
        hashes = {f"s{n}": rng.bytes(32).hex() for n in range(2600)}
        hashes["s2599"] = hashes["s1500"]
        names = list(hashes)
        prints = leaks.SlidePrints(file={}, picture=hashes)
        found = list(picture_leaks({"train": names[:2500], "val": [], "test": names[2500:]}, prints))
        assert len(found) == 1
        assert "'s1500' (train) and 's2599' (test)" in found[0]

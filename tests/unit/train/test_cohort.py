"""What a run reads is checked before a rank starts: a slide that cannot be pooled never reaches a step."""

import shutil
from pathlib import Path

import pytest

from gigamil.config.load import load_config
from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.data.split import make_splits, save_splits
from gigamil.errors import BagError, CohortError, ShardError
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.cohort import load_training_data

SIZES = {"a1": 3, "a2": 1, "b1": 2, "b2": 4, "c1": 2, "c2": 5, "d1": 1, "d2": 2}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Eight slides of two classes, tiled and split."""
    rows = [f"{s},{s}.tif,{s},{'tumour' if s.endswith('2') else 'normal'}" for s in SIZES]
    (tmp_path / "slides.csv").write_text("\n".join(["slide_id,path,patient_id,label", *rows]) + "\n")
    for seed, (slide_id, size) in enumerate(SIZES.items()):
        make_shards(tmp_path / "shards", slide_id, noise_jpegs(size, 16, seed), tile_px=16)
    words = [f"cohort.table={tmp_path / 'slides.csv'}", f"bookkeeping.out={tmp_path}", "slides.tile_px=16"]
    config = load_config(None, [*words, "cohort.test_fraction=0.25", "cohort.val_fraction=0.25"])
    table = load_cohort(config.cohort, need_files=False)
    save_splits(make_splits(table, ShardSet(tmp_path / "shards").slide_ids, config.cohort), tmp_path / "splits.json")
    return config


def test_sizes_and_labels_are_those_of_the_slides(config: RunConfig) -> None:
    data = load_training_data(config)
    seen = []
    for split in ("train", "val", "test"):
        slides = data.slides(split)
        assert len(slides) == (4 if split == "train" else 2)
        assert slides.sizes == tuple(SIZES[slide_id] for slide_id in slides.slide_ids)
        assert slides.label_S.tolist() == [int(slide_id.endswith("2")) for slide_id in slides.slide_ids]
        seen += slides.slide_ids
    assert sorted(seen) == sorted(SIZES)


def test_a_slide_whose_tiles_are_gone_is_refused_before_it_could_be_pooled(config: RunConfig) -> None:
    slide_id = load_training_data(config).slides("val").slide_ids[0]
    shutil.rmtree(ShardSet(config.bookkeeping.shard_root).folder(slide_id))
    make_shards(config.bookkeeping.shard_root, slide_id, [], tile_px=16)  # tiled again, and no tissue was found
    with pytest.raises(BagError, match=f"1 slides have no tile in .*for example '{slide_id}'.*gigamil split"):
        load_training_data(config)


def test_another_tile_size_is_refused(config: RunConfig) -> None:
    other = config.model_copy(update={"slides": config.slides.model_copy(update={"tile_px": 32})})
    with pytest.raises(ShardError, match="8 slides in .* were tiled otherwise than configured.*16 px.*configured 32"):
        load_training_data(other)


def test_without_a_split_or_a_slide_to_train_on_it_is_told(config: RunConfig) -> None:
    path = config.bookkeeping.out / "splits.json"
    path.unlink()
    with pytest.raises(CohortError, match="no split at .*gigamil split"):
        load_training_data(config)

"""What a run reads is checked before a rank starts: a slide that cannot be pooled never reaches a step."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from gigamil.config.load import load_config
from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.data.h5 import write_features
from gigamil.data.split import load_splits, make_splits, save_splits
from gigamil.errors import BagError, CohortError, ConfigError, ShardError
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.cohort import load_training_data, unused_keys
from gigamil.train.identity import refuse_other_run, run_identity
from gigamil.train.loop import Progress
from gigamil.train.spent import Spent

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
        assert slides.target_SX.tolist() == [[float(slide_id.endswith("2"))] for slide_id in slides.slide_ids]
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


def test_features_that_were_made_here_are_of_slides_that_can_be_compared(config: RunConfig) -> None:
    of_others = with_features(config)
    shutil.copytree(config.bookkeeping.out / "features0", config.bookkeeping.out / "features")
    made_here = of_others.model_copy(update={"data": of_others.data.model_copy(update={"features": None})})
    path = config.bookkeeping.out / "splits.json"
    splits = replace(load_splits(path, load_cohort(config.cohort, need_files=False)), sources_sha256="of other files")
    save_splits(splits, path)
    for run in (config, made_here):
        with pytest.raises(CohortError, match="slide files are others than"):
            load_training_data(run)
    load_training_data(of_others)
    shutil.rmtree(config.bookkeeping.shard_root)
    load_training_data(made_here)  # there is nothing left to compare


def with_features(config: RunConfig, seed: int = 0, **science: object) -> RunConfig:
    """The same run on features of its slides."""
    folder = config.bookkeeping.out / f"features{seed}"
    for number, (slide_id, size) in enumerate(SIZES.items()):
        features = np.random.default_rng((seed, number)).normal(size=(size, 4)).astype(np.float32)
        coords = np.arange(2 * size).reshape(size, 2) * 16
        write_features(folder / f"{slide_id}.h5", features, coords, {"patch_size": 16, "patch_size_level0": 16})
    data = {"source": "features", "features": folder}
    return RunConfig.model_validate(config.model_dump() | {"data": data, "science": science})


def test_features_take_the_place_of_shards(config: RunConfig) -> None:
    shutil.rmtree(config.bookkeeping.shard_root)
    data = load_training_data(with_features(config))
    assert data.dim == 4
    slides = data.slides("train")
    assert slides.sizes == tuple(SIZES[slide_id] for slide_id in slides.slide_ids)


def test_a_run_belongs_to_its_source_and_to_its_features(config: RunConfig) -> None:
    def identity(of: RunConfig) -> dict[str, object]:
        return run_identity(of, load_training_data(of))

    recorded, out = identity(with_features(config)), config.bookkeeping.out
    refuse_other_run(identity(with_features(config)), recorded, out)
    with pytest.raises(ConfigError, match="another split, or on other tiles or features of its slides"):
        refuse_other_run(identity(with_features(config, seed=1)), recorded, out)
    with pytest.raises(ConfigError, match="different: data.source"):
        refuse_other_run(identity(config), recorded, out)


def test_a_key_that_an_older_version_did_not_know_had_its_default(config: RunConfig) -> None:
    identity = run_identity(config, load_training_data(config))
    recorded = json.loads(json.dumps(identity))
    del recorded["science"]["science"]["bag"], recorded["science"]["science"]["optim"]["ema"]
    refuse_other_run(identity, recorded, config.bookkeeping.out)
    identity["science"]["science"]["optim"]["ema"] = 0.9
    with pytest.raises(ConfigError, match=r"different: science\.optim\.ema\)"):
        refuse_other_run(identity, recorded, config.bookkeeping.out)


def test_a_run_of_before_there_were_tasks_goes_on(config: RunConfig) -> None:
    identity = run_identity(config, load_training_data(config))
    recorded = json.loads(json.dumps(identity))
    for name in ("task", "also", "regime"):
        del recorded["science"]["science"][name]
    recorded["science"]["science"]["loss"] = "cross_entropy"
    refuse_other_run(identity, recorded, config.bookkeeping.out)
    recorded["science"]["science"]["loss"] = "mine"
    with pytest.raises(ConfigError, match=r"different: science\.task\.loss\)"):
        refuse_other_run(identity, recorded, config.bookkeeping.out)
    facts = asdict(Progress(epoch=2, best_score=0.75, spent=Spent(tiles=9)))
    assert Progress.of(facts) == Progress(epoch=2, best_score=0.75, spent=Spent(tiles=9))
    facts["best_auc"] = facts.pop("best_score")
    del facts["spent"]
    assert Progress.of(facts) == Progress(epoch=2, best_score=0.75)


def test_what_only_an_encoder_could_use_is_named(config: RunConfig) -> None:
    plain = {"flips": False, "turns": False, "brightness": 0, "contrast": 0, "saturation": 0, "stain": 0}
    assert unused_keys(with_features(config, augment=plain, optim={"lr_encoder": 0})) == []
    optim = {"layer_decay": 0.5, "freeze_encoder_epochs": 1}
    found = unused_keys(with_features(config, optim=optim, encoder={"lora_rank": 2}))
    assert found == [
        "science.augment",
        "science.encoder.lora_rank",
        "science.optim.lr_encoder",
        "science.optim.layer_decay",
        "science.optim.freeze_encoder_epochs",
    ]

"""`gigamil features`: what is written is what the encoder gives, once, whatever stops or damages the work in between."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from gigamil.config.schema import RunConfig
from gigamil.data.augment import to_float
from gigamil.data.decode import decode_tiles
from gigamil.data.features import FeatureSet
from gigamil.errors import Interrupted, ShardError
from gigamil.evaluate import features as module
from gigamil.evaluate import heatmap
from gigamil.evaluate.attention import Attention, attention_path, write_attention
from gigamil.evaluate.features import cache_features, encode_share
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.lock import folder_lock
from gigamil.models.encoder import SmallCNN, encoders
from gigamil.models.slide_model import build_model
from gigamil.parallel.topology import Topology
from gigamil.shards.read import ShardSet
from gigamil.testing.runs import CLASSES, SIZES, TILE_PX, tiny_run
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.cohort import load_training_data
from gigamil.train.stale import kind_of_features, read_time, refuse_stale

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with features."""
    config = tiny_run(tmp_path_factory.mktemp("made"))
    cache_features(config)
    return config


@pytest.fixture
def config(made: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of it."""
    shutil.copytree(made.bookkeeping.out.parent, tmp_path / "copy")
    book = made.bookkeeping.model_copy(
        update={"out": tmp_path / "copy" / "run", "shards": tmp_path / "copy" / "cohort" / "shards"}
    )
    return made.model_copy(update={"bookkeeping": book})


def contents(config: RunConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (config.bookkeeping.out / "features").iterdir()}


def test_features_are_what_the_encoder_of_the_run_gives(made: RunConfig) -> None:
    encoder = build_model(made.science, 2).encoder.eval()
    shards = ShardSet(made.bookkeeping.shard_root)
    assert len(shards.slide_ids) == len(SIZES)
    for slide_id in shards.slide_ids[:3]:
        index, manifest = shards.index(slide_id), shards.manifest(slide_id)
        pixels = decode_tiles(shards.read_span(slide_id, 0, len(index)), TILE_PX)
        with torch.no_grad():
            wanted_ND = encoder(to_float(torch.from_numpy(pixels)), None).numpy()
        with h5py.File(made.bookkeeping.out / "features" / f"{slide_id}.h5") as file:
            assert file["features"].dtype == np.float32
            np.testing.assert_allclose(file["features"][:], wanted_ND, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(file["coords"][:], np.stack([index.x_px0, index.y_px0], axis=1))
            # What TRIDENT's users look for.
            assert file["coords"].attrs["patch_size"] == TILE_PX
            assert file["coords"].attrs["patch_size_level0"] == TILE_PX
            assert file["coords"].attrs["level0_width"] == manifest.width_px0
            assert file["coords"].attrs["name"] == slide_id
            assert file["features"].attrs["encoder"] == "small_cnn"


def test_a_second_call_does_nothing_and_a_deleted_file_heals(config: RunConfig) -> None:
    before = contents(config)
    report = cache_features(config)
    assert (report.num_slides, report.num_written, report.num_encoded) == (len(SIZES), 0, 0)
    assert (report.num_tiles, report.dim) == (sum(SIZES), 16)
    folder = config.bookkeeping.out / "features"
    (folder / "s04.h5").unlink()
    (folder / "s05.h5").write_bytes(before["s05.h5"][:-100])
    (folder / ".s06.h5.123.tmp").write_bytes(b"left by a killed run")
    report = cache_features(config)
    assert (report.num_written, report.num_encoded) == (2, SIZES[4] + SIZES[5])
    assert contents(config) == before
    assert "12 slides (2 encoded now, 10 there before)" in report.text()


def test_another_encoder_or_kind_writes_all_and_other_tiles_their_slide(config: RunConfig) -> None:
    before = contents(config)
    science = config.science.model_copy(update={"seed": 1})
    assert cache_features(config.model_copy(update={"science": science})).num_written == len(SIZES)
    assert all(before[name] != content for name, content in contents(config).items() if name.endswith(".h5"))
    assert cache_features(config).num_written == len(SIZES)
    assert contents(config) == before
    shutil.rmtree(ShardSet(config.bookkeeping.shard_root).folder("s07"))
    make_shards(config.bookkeeping.shard_root, "s07", noise_jpegs(5, TILE_PX), tile_px=TILE_PX, tile_mpp=1.0)
    report = cache_features(config)
    assert (report.num_written, report.num_encoded) == (1, 5)
    assert cache_features(config, kind="float16").num_written == len(SIZES)
    with h5py.File(config.bookkeeping.out / "features" / "s07.h5") as file:
        assert file["features"].dtype == np.float16


def test_a_damaged_slide_is_named_and_the_others_are_done(config: RunConfig) -> None:
    folder = config.bookkeeping.out / "features"
    shutil.rmtree(folder)
    tar = next(ShardSet(config.bookkeeping.shard_root).folder("s02").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"1 of 12 slides could not be encoded; the others are done:\n.*'s02'"):
        cache_features(config)
    assert len(list(folder.glob("*.h5"))) == len(SIZES) - 1


def test_a_damaged_slide_of_one_rank_does_not_stop_another(config: RunConfig) -> None:
    folder = config.bookkeeping.out / "features"
    shutil.rmtree(folder)
    tar = next(ShardSet(config.bookkeeping.shard_root).folder("s04").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:2000])
    execution = config.execution.model_copy(update={"ranks": 2})
    for _ in range(2):  # the second time one rank has nothing to do but the damaged slide
        with pytest.raises(
            ShardError, match=r"1 of 12 slides could not be encoded; the others are done:\n.*'s04': .*tar"
        ):
            cache_features(config.model_copy(update={"execution": execution}))
        assert len(list(folder.glob("*.h5"))) == len(SIZES) - 1


def test_the_kind_of_number_stays_that_of_the_files_there(config: RunConfig) -> None:
    folder = config.bookkeeping.out / "features"
    assert cache_features(config, kind="float16").num_written == len(SIZES)
    (folder / "s00.h5").write_bytes(b"damaged")
    (folder / "s01.h5").unlink()
    assert kind_of_features(folder) == "float16"
    assert cache_features(config).num_written == 2
    assert cache_features(config, kind="float32").num_written == len(SIZES)
    assert kind_of_features(folder / "nothing here") == "float32"


def test_a_stop_leaves_whole_files_only(config: RunConfig) -> None:
    before, folder = contents(config), config.bookkeeping.out / "features"
    shutil.rmtree(folder)
    folder.mkdir()
    calls = iter(range(100))
    with pytest.raises(Interrupted, match="same command continues"):
        encode_share(config, folder, Topology(), "float32", CPU, lambda: next(calls) >= 8)
    done = {path.name for path in folder.iterdir()}
    assert 1 <= len(done) < len(SIZES)
    cache_features(config)
    assert contents(config) == before


def test_ranks_share_out_all_slides(config: RunConfig, tmp_path: Path) -> None:
    before = contents(config)
    for rank in range(3):
        encode_share(config, tmp_path / f"{rank}", Topology(3, rank, rank, 3, 3), "float32", CPU)
    parts = [{path.name: path.read_bytes() for path in (tmp_path / f"{rank}").iterdir()} for rank in range(3)]
    assert sum(map(len, parts)) == len(SIZES)
    assert parts[0] | parts[1] | parts[2] == before
    tiles = [sum(SIZES[int(name[1:3])] for name in part) for part in parts]
    assert max(tiles) - min(tiles) <= min(SIZES[i] for i in range(len(SIZES)) if SIZES[i] > 1)


def test_two_commands_do_not_write_to_one_folder(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "encode_share", lambda *words: pytest.fail("it began to work"))
    with (
        folder_lock(config.bookkeeping.out / "features", "gigamil features"),
        pytest.raises(Exception, match="gigamil features"),
    ):
        cache_features(config)


def test_features_of_a_trained_encoder(config: RunConfig) -> None:
    """`science.warm_start` names the run whose encoder it is."""
    from gigamil.train.checkpoint import CheckpointStore
    from gigamil.train.engine import TrainingState

    other = build_model(config.science.model_copy(update={"seed": 5}), 2)
    run = config.bookkeeping.out.parent / "trained"
    state = TrainingState({name: values.clone() for name, values in other.state_dict().items()}, {}, ())
    CheckpointStore(run / "checkpoints").commit(state, {}, step=1, best=True)
    science = config.science.model_copy(update={"warm_start": run})
    cache_features(config.model_copy(update={"science": science}))
    warm = contents(config)
    cache_features(config.model_copy(update={"science": config.science.model_copy(update={"seed": 5})}))
    assert contents(config) == warm


@pytest.mark.parametrize("shards_are", ["the same tiles", "other tiles", "positions only", "missing"])
def test_attention_on_features_is_drawn_on_the_slide_or_on_a_plain_one(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_are: str
) -> None:
    root, has_picture = config.bookkeeping.shard_root, shards_are == "the same tiles"
    if shards_are == "other tiles":
        shutil.rmtree(ShardSet(root).folder("s00"))
        make_shards(root, "s00", noise_jpegs(SIZES[0], TILE_PX), tile_px=TILE_PX, tile_mpp=2.0)
    if shards_are == "positions only":
        manifest = ShardSet(root).folder("s00") / "manifest.json"
        text = manifest.read_text()
        assert '"stored": true' in text
        manifest.write_text(text.replace('"stored": true', '"stored": false'))
    features = FeatureSet(config.bookkeeping.out / "features", float(TILE_PX))
    index, sizes = features.index("s00"), features.manifest("s00").tile_um
    even_N = np.full(len(index), 1 / len(index), dtype=np.float32)
    attention = Attention("s00", np.arange(len(index)), index.x_um, index.y_um, even_N, sizes, sizes)
    write_attention(attention_path(tmp_path, "s00"), attention)
    probs_NK = np.array([[0.25, 0.75]])
    write_predictions(tmp_path / FILE_NAME, Predictions(("s00",), ("p",), ("dark",), ("test",), CLASSES, probs_NK))
    drawn = []
    monkeypatch.setattr(heatmap, "draw_heatmap", lambda *words, **names: drawn.append((words[0], names)))
    pictures = None if shards_are == "missing" else ShardSet(root)
    _, geojson, _ = heatmap.heatmap_run(tmp_path, features, ["s00"], pictures=pictures)
    ((picture_HW3, words),) = drawn
    assert ("its features are all that is here" in words["note"]) == (not has_picture)
    assert len(words["top_tiles"]) == (8 if has_picture else 0)
    assert (len(np.unique(picture_HW3)) == 2) == (not has_picture)  # white, and grey where there are tiles
    assert len(json.loads(geojson.read_text())["features"]) == len(index)


@encoders.register("forgetful")
def forgetful() -> nn.Module:
    """A network that drops numbers at random while it is trained."""
    network = SmallCNN(width=4)
    network.features.append(nn.Dropout(0.5))
    return network


def test_layers_that_draw_in_training_do_not_draw_here(config: RunConfig) -> None:
    encoder = config.science.encoder.model_copy(update={"name": "forgetful", "options": {}})
    forgetting = config.model_copy(update={"science": config.science.model_copy(update={"encoder": encoder})})
    cache_features(forgetting)
    before = contents(config)
    shutil.rmtree(config.bookkeeping.out / "features")
    cache_features(forgetting)
    assert contents(config) == before


def on_features(config: RunConfig, **science: object) -> RunConfig:
    changes = {"data": config.data.model_copy(update={"source": "features"})}
    return config.model_copy(update=changes | {"science": config.science.model_copy(update=science)})


def test_stale_features_are_refused(config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    run = on_features(config)
    data = load_training_data(run)
    refuse_stale(run, data)
    with pytest.raises(
        ShardError, match=r"12 of 12 slides have stale features.*\n.*of another encoder, or of other weights"
    ):
        refuse_stale(on_features(config, seed=5), data)
    slide_id = data.slides("train").slide_ids[0]
    make_shards(
        config.bookkeeping.shard_root, slide_id, noise_jpegs(7, TILE_PX, seed=99), tile_px=TILE_PX, tile_mpp=1.0
    )
    with pytest.raises(ShardError, match=rf"1 of 12 slides.*\n *slide '{slide_id}': of other tiles than those of now"):
        refuse_stale(run, data)
    shutil.rmtree(config.bookkeeping.shard_root)
    refuse_stale(run, data)
    gone = config.science.encoder.model_copy(update={"weights": Path("gone.safetensors")})
    assert not caplog.records
    refuse_stale(on_features(config, encoder=gone), data)
    assert "was not checked" in caplog.text


def test_features_of_others_are_taken_as_they_are(config: RunConfig) -> None:
    run = on_features(config, seed=5)
    for path in (config.bookkeeping.out / "features").iterdir():
        with h5py.File(path, "a") as file:
            for holder in (file, *file.values()):
                for name in ("encoder", "encoder_sha256", "tiles_sha256"):
                    holder.attrs.pop(name, None)
    refuse_stale(run, load_training_data(run))


def test_what_making_them_took_is_added_up(config: RunConfig) -> None:
    folder, number = config.bookkeeping.out / "features", sum(SIZES)
    first = read_time(folder)
    assert first.tiles == number
    assert 0 < first.seconds == first.rank_seconds
    cache_features(config)
    assert read_time(folder) == first, "nothing was encoded"
    next(folder.glob("*.h5")).unlink()
    cache_features(config)
    assert number < read_time(folder).tiles < 2 * number
    assert read_time(folder).seconds > first.seconds

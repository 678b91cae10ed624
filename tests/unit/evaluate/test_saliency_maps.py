"""Saliency of a run's slides: from shards and from slide files, with little memory, as pictures that lie on the slide."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import torch
from PIL import Image

from gigamil.config.schema import RunConfig
from gigamil.data.tile import tile_cohort
from gigamil.errors import ConfigError, TrainingError
from gigamil.evaluate.attention import Attention, attention_path, write_attention
from gigamil.evaluate.heatmap import heatmap_run
from gigamil.evaluate.predict import predict_slides
from gigamil.evaluate.predictions import FILE_NAME, Predictions, write_predictions
from gigamil.evaluate.saliency_figure import write_saliency_tiff
from gigamil.evaluate.saliency_maps import MOST_SQUARES, Saliencies, Saliency, _square_px, refuse_tile_encoder
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.shards.read import ShardSet
from gigamil.tasks.classification import Multiclass
from gigamil.testing.tiff import write_pyramid_tiff
from gigamil.train.cohort import open_source

CPU = torch.device("cpu")
TILE_PX, MPP = 32, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide of 320 x 224 px, tissue but for its edge, and its table."""
    path = tmp_path_factory.mktemp("saliency")
    image = np.full((224, 320, 3), 245, np.uint8)
    image[32:-32, 32:-64] = [190, 90, 150] + np.random.default_rng(0).integers(0, 40, (160, 224, 3))
    write_pyramid_tiff(path / "a.tiff", image, MPP, levels=1)
    (path / "slides.csv").write_text("slide_id,path,patient_id,label\na,a.tiff,a,no\n")
    return path


def config_of(folder: Path, source: str, encoder: str = "small_dense_cnn") -> RunConfig:
    options = {"width": 4, "pool": 2} if encoder == "small_dense_cnn" else {}
    return RunConfig.model_validate(
        {
            "cohort": {"table": folder / "slides.csv", "classes": ("no", "yes")},
            "slides": {"tile_px": TILE_PX, "tile_mpp": MPP, "min_tissue_area_um2": 1000, "tissue_mpp": 2},
            "data": {"source": source},
            "science": {"encoder": {"name": encoder, "options": options}},
            "execution": {"tile_workers": 1, "chunk": 16, "device": "cpu"},
            "bookkeeping": {"out": folder / source, "progress": False},
        }
    )


def tiled(config: RunConfig) -> tuple[SlideModel, ShardSet]:
    """A model with a random start, and the slide's tiles."""
    tile_cohort(config, progress=False)
    torch.manual_seed(0)
    return build_model(config.science, 2).eval(), ShardSet(config.bookkeeping.shard_root)


@pytest.fixture(params=["shards", pytest.param("slides", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, folder: Path) -> tuple[RunConfig, SlideModel, ShardSet]:
    config = config_of(folder, request.param)
    return config, *tiled(config)


def test_pictures_of_a_slide(run: tuple[RunConfig, SlideModel, ShardSet]) -> None:
    config, model, shards = run
    out, index = config.bookkeeping.out, shards.index("a")
    size = TILE_PX * MPP, TILE_PX * MPP
    even_N = np.full(len(index), 1 / len(index), np.float32)
    write_attention(attention_path(out, "a"), Attention("a", index.number, index.x_um, index.y_um, even_N, size, size))
    write_predictions(
        out / FILE_NAME, Predictions(("a",), ("a",), ("no",), ("test",), ("no", "yes"), np.array([[0.2, 0.8]]))
    )
    saliencies = Saliencies(config, model, shards, CPU)
    asked: list[tuple[str, int]] = []

    def saliency(slide_id: str, class_number: int) -> Saliency:
        asked.append((slide_id, class_number))
        return saliencies(slide_id, class_number)

    reader = open_source(config, shards, ["a"], CPU).read_tiles
    read = reader if config.data.source == "slides" else None
    files = heatmap_run(out, shards, ["a"], saliency=saliency, read=read)
    assert asked == [("a", 1)]  # of the class that it is predicted to be, not of its label
    names = ["a.png", "a.geojson", "a.tiff", "a.saliency.png", "a.saliency.tiff"]
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (out / "heatmaps").iterdir()) == sorted(names)
    with Image.open(files[3]) as picture:
        assert picture.width > 800
    with openslide.OpenSlide(files[2]) as cells, openslide.OpenSlide(files[4]) as squares:
        assert cells.dimensions == (10, 7)
        assert squares.dimensions == (40, 28)  # 8 px each
        for slide, pixel_px in ((cells, TILE_PX), (squares, 8)):
            for axis in "xy":
                assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(pixel_px * MPP, rel=1e-4)
        found_HW3 = np.asarray(squares.read_region((0, 0), 0, squares.dimensions).convert("RGB"))
    # Far from all tissue nothing moves the logit; in its midst something does.
    assert (found_HW3[:, 36:] == 255).all()
    assert (found_HW3[8:20, 8:28] < 255).any(axis=2).mean() > 0.9


def test_where_memory_runs_out_blocks_become_smaller_and_the_result_stays(folder: Path) -> None:
    config = config_of(folder, "shards")
    model, shards = tiled(config)
    wanted = Saliencies(config, model, shards, CPU)("a", 0)
    sizes: list[int] = []

    def refuse_large(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(inputs[0].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("injected")

    # A block of 4 x 4 tiles and around it is larger, one of 2 x 2 is not.
    limit = 3 * 130**2
    saliencies = Saliencies(config, model, shards, CPU)
    model.encoder.network.register_forward_pre_hook(refuse_large)
    found = saliencies("a", 0)
    assert max(sizes) > limit > sizes[-1]
    np.testing.assert_allclose(found.value_hw, wanted.value_hw, rtol=1e-4, atol=1e-6 * wanted.rms)
    limit = 0
    with pytest.raises(TrainingError, match="slide 'a': the device has no memory for the saliency of a single tile"):
        saliencies("a", 0)


def test_blocks_are_as_large_as_the_memory_of_this_machine_lets_them_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, "shards")
    model, shards = tiled(config)
    config = config.model_copy(update={"execution": config.execution.model_copy(update={"chunk": None})})
    sizes: list[int] = []

    def called(free: int) -> tuple[np.ndarray, np.ndarray]:
        """What is found, and to `sizes` the numbers of pixels of the largest blocks."""
        monkeypatch.setattr("gigamil.train.plan.free_device_memory", lambda *_: free)
        inputs: list[int] = []
        hook = model.encoder.network.register_forward_pre_hook(lambda _, images: inputs.append(images[0][0, 0].numel()))
        (prediction,) = predict_slides(config, model, Multiclass(("no", "yes")), shards, ["a"], CPU)
        sizes.append(max(inputs))
        inputs.clear()
        saliency = Saliencies(config, model, shards, CPU)("a", 0)  # of parameters without gradients, the second time
        sizes.append(max(inputs))
        hook.remove()
        return prediction.value_P, saliency.value_hw

    much, little = called(8 * 10**9), called(10**6)
    whole, tile = 224 * 320, (3 * TILE_PX) ** 2  # the slide, and what a tile in its midst looks at
    assert max(sizes[:2]) > whole / 2
    assert max(sizes[2:]) <= tile
    for found, wanted in zip(little, much, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * wanted.max())


@pytest.mark.parametrize("source", ["shards", "features"])
def test_an_encoder_of_tiles_is_refused(folder: Path, source: str) -> None:
    config = config_of(folder, source, "small_cnn")
    model = build_model(config.science, 2, 6 if source == "features" else None)
    with pytest.raises(ConfigError, match="'small_cnn' of this run sees tiles one by one. Set science.encoder.dense"):
        refuse_tile_encoder(model, config)


def test_colours_rise_to_a_top_that_single_squares_do_not_set(tmp_path: Path) -> None:
    value_hw = np.arange(3000, dtype=np.float32).reshape(30, 100)
    value_hw[-1, -1] = 1e6
    saliency = Saliency(value_hw, (4.0, 5.0), 8)
    levels = saliency.levels(value_hw).astype(int)
    assert (levels.ravel()[0], levels.ravel()[1], levels.max()) == (0, 1, 255)
    assert (np.diff(levels.ravel()) >= 0).all()
    assert 2 <= (levels == 255).sum() < 30
    write_saliency_tiff(tmp_path / "s.tiff", saliency)
    with openslide.OpenSlide(tmp_path / "s.tiff") as slide:
        assert slide.dimensions == (100, 30)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(5.0, rel=1e-4)
        found_HW3 = np.asarray(slide.read_region((0, 0), 0, (100, 30)).convert("RGB")).astype(int)
    assert found_HW3[0, 0].tolist() == [255, 255, 255]
    assert found_HW3[-1, -1].sum() < found_HW3[15, 0].sum() < found_HW3[1, 0].sum()


def test_a_slide_that_moves_nothing_is_white(tmp_path: Path) -> None:
    saliency = Saliency(np.zeros((3, 4), np.float32), (4.0, 4.0), 8)
    assert (saliency.rms, saliency.top) == (1.0, 1.0)
    assert not saliency.levels(saliency.value_hw).any()


def test_large_slides_have_larger_squares() -> None:
    assert [_square_px(side, side, 256) for side in (100, 32_768, 32_769, 65_536, 200_000)] == [8, 8, 16, 16, 64]
    assert _square_px(100, 100, 28) == 4  # a tile is whole squares
    assert (200_000 // 64) ** 2 <= MOST_SQUARES

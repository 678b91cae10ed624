"""Slides -> probabilities and attention, by the same forward pass as in training, on all tiles, in one process."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gigamil.config.schema import RunConfig
from gigamil.data.features import SlideFeatures
from gigamil.data.patients import Bags
from gigamil.data.pipeline import DrawKeys, StepLoader
from gigamil.errors import CheckpointError
from gigamil.evaluate.attention import Attention, Size
from gigamil.memory.budget import memory_budget
from gigamil.models.encoder import DenseEncoder, TileEncoder
from gigamil.models.slide_model import SlideModel, build_model, refuse_small_bags
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.manifest import SlideManifest
from gigamil.tasks.task import Task
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import TiledSlides, check_grids, check_tiles, open_source
from gigamil.train.dense import dense_geometry, largest_grids
from gigamil.train.plain import PlainEngine
from gigamil.train.plan import best_chunk
from gigamil.train.prepare import set_batchnorm
from gigamil.train.step import FEATURE_ROWS, ExactStep, Ranks


@dataclass(frozen=True)
class SlidePrediction:
    """One slide: what is predicted, float64 (P,) (`Task.predicted_names`), and the attention of its tiles."""

    slide_id: str
    value_P: np.ndarray
    attention: Attention


def load_model(config: RunConfig, num_outputs: int, pointer: str = "best", dim: int | None = None) -> SlideModel:
    """The trained model of a run, in evaluation mode, on the CPU.

    Args:
        num_outputs: of its task.
        pointer: "best" or "latest".
        dim: D of the features that it was trained on; None if it has an encoder.
    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another model.
    """
    state = CheckpointStore(config.bookkeeping.out / "checkpoints").load_parameters(pointer)
    science = config.science
    # The checkpoint has every weight; the file that training started from may be gone.
    encoder = science.encoder.model_copy(update={"weights": None})
    model = build_model(science.model_copy(update={"encoder": encoder}), num_outputs, dim)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the checkpoint in '{config.bookkeeping.out}' is of another model than configured: {error}"
        ) from error
    return model.eval()


def tiles_per_call(
    config: RunConfig, model: SlideModel, shards: TiledSlides, slide_ids: Sequence[str], device: torch.device
) -> int:
    """`execution.chunk`; where that is null, the blocks that a run on this machine's memory would take without kept graphs.

    What the checkpoint says is of the machine that trained.

    Args:
        model: whose BatchNorm is folded if `execution` asks for it.
        slide_ids: to predict.
    Raises:
        ConfigError: see `best_chunk`.
    Cost: that of `best_chunk`, and memory of a second model meanwhile.
    """
    execution = config.execution
    if execution.chunk is not None or not isinstance(model.encoder, DenseEncoder):
        return execution.tiles_per_call
    sizes = [shards.manifest(slide_id).num_tiles for slide_id in slide_ids]
    changes = {"memory": "replay", "group_size": None, "halo": "read", "device": device.type}
    alone = execution.model_copy(update=changes)
    science = config.science.model_copy(update={"slides_per_step": 1})
    config = config.model_copy(update={"execution": alone, "science": science})
    measured = copy.deepcopy(model).cpu().requires_grad_()
    return best_chunk(config, measured, sizes, 1, device, 1, largest_grids(shards, slide_ids, sizes, 1))


def predict_slides(
    config: RunConfig,
    model: SlideModel,
    task: Task,
    shards: TiledSlides,
    slide_ids: Sequence[str],
    device: torch.device,
    paths: Mapping[str, Path] | None = None,
    bags: Bags | None = None,
) -> Iterator[SlidePrediction]:
    """Predict slides one by one, in the given order, each on all its tiles.

    Args:
        config: of the run that trained the model: chunk, precision, tile size.
        model: from `load_model`.
        task: that it was trained for.
        shards: where the slides' tiles, or features, are.
        device: where to compute.
        paths: slide files by id, for `data.source: slides`; None takes those of the slide table.
        bags: of these slides, each predicted as a whole; None: each slide is a bag.
    Yields:
        A prediction per slide, that of its bag, bag by bag; attention is the mean over heads, or of the predicted class, and sums
        to 1 over a slide.
    Raises:
        ShardError: a slide is missing, damaged, or tiled otherwise than the model was trained on.
        BagError: a slide has fewer tiles than the aggregator takes.
        TrainingError: an embedding is not finite; names slide and tile.
    """
    check_tiles(config, shards, slide_ids)
    if isinstance(model.encoder, DenseEncoder):
        check_grids(shards, slide_ids)
    bags = {slide_id: (slide_id,) for slide_id in slide_ids} if bags is None else bags
    names = list(bags)
    size_of = {slide_id: shards.manifest(slide_id).num_tiles for slide_id in slide_ids}
    sizes = [sum(size_of[slide_id] for slide_id in own) for own in bags.values()]
    refuse_small_bags(model, names, sizes)
    topology = Topology()
    has_encoder = isinstance(model.encoder, TileEncoder)
    if has_encoder:
        set_batchnorm(model.encoder, config.execution)
    share = partial(memory_budget, config.execution.tile_cache, local_ranks=1, default=0.25)
    step = ExactStep(
        PlainEngine(model.to(device)),
        Ranks(topology),
        task.losses,
        chunk=tiles_per_call(config, model, shards, slide_ids, device) if has_encoder else FEATURE_ROWS,
        num_keep=0,
        keys=DrawKeys(0, names),  # never drawn from: prediction has no dropout and no augmentation
        cache_bytes=share(device=device),
        num_shown=task.num_shown,
    )
    plans = plan_steps(range(len(names)), sizes, 1, topology.num_groups, topology.group_size)
    held_bytes = share(device=torch.device("cpu"))
    source, execution = open_source(config, shards, slide_ids, device, paths, bags), config.execution
    loader = StepLoader(
        source,
        names,
        config.slides.tile_px,
        topology,
        execution.prefetch,
        held_bytes,
        execution.decode_workers,
        dense_geometry(model.encoder, config.slides),
    )
    hidden = None if config.bookkeeping.progress else True
    bfloat16 = config.science.precision == "bfloat16"
    for plan, tiles in tqdm(loader.iterate(plans), total=len(plans), desc="predict", unit="slide", disable=hidden):
        if isinstance(tiles, Exception):
            raise tiles
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits_SK, attention_nA = step.evaluate(plan, tiles)
        value_P = task.predict(logits_SK)[0].cpu().numpy()
        weight_n = attention_nA.mean(dim=1).double().cpu().numpy()
        first = 0
        for slide_id in bags[names[plan.slides[0]]]:
            places, last = shards.index(slide_id), first + size_of[slide_id]
            attention = Attention(
                slide_id,
                np.arange(last - first),
                np.asarray(places.x_um, dtype=np.float64),
                np.asarray(places.y_um, dtype=np.float64),
                _shares(weight_n[first:last]),
                *_tile_sizes(shards.manifest(slide_id)),
            )
            yield SlidePrediction(slide_id, value_P, attention)
            first = last


def _shares(weight_N: np.ndarray) -> np.ndarray:
    """Attention over the tiles of a slide; even where a bag has none to spare for it."""
    total = weight_N.sum()
    shares_N = weight_N / total if total > 0 else np.full(len(weight_N), 1 / max(1, len(weight_N)))
    return np.asarray(shares_N, dtype=np.float32)


def _tile_sizes(manifest: SlideManifest | SlideFeatures) -> tuple[Size, Size]:
    """Size and stride of a slide's tiles in micron."""
    if isinstance(manifest, SlideFeatures):
        return manifest.tile_um, manifest.stride_um
    stride_um = manifest.stride_px * manifest.pixel_mpp_x, manifest.stride_px * manifest.pixel_mpp_y
    return (manifest.tile_width_um, manifest.tile_height_um), stride_um

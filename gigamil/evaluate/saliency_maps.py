"""Input-gradient saliency of slides of a run: from its model and its slides to a map with its scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from gigamil.config.schema import RunConfig
from gigamil.data.blocks import BlockImages
from gigamil.data.pipeline import StepLoader, StepTiles
from gigamil.errors import ConfigError, TrainingError
from gigamil.evaluate.attention import Size
from gigamil.evaluate.predict import tiles_per_call
from gigamil.evaluate.saliency import slide_saliency
from gigamil.models.encoder import DenseEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.read import ShardSet
from gigamil.train.cohort import TiledSlides, check_tiles, open_source
from gigamil.train.dense import dense_geometry
from gigamil.train.prepare import set_batchnorm

SQUARE_PX = 8  # 4 um at 0.5 um per pixel: half a nucleus
MOST_SQUARES = 2**24  # of a slide, 64 MB; larger slides have squares of twice the side, and so on
TOP_SHARE = 0.998  # of squares that the scale of colours covers: single ones would make all others pale
_LEVELS = 256


@dataclass(frozen=True)
class Saliency:
    """Of one slide: the Euclidean norm of d logit / d pixels (RGB in 0..1) over each square of pixels.

    Attributes:
        value_hw: float32 (h, w); square (0, 0) starts at the corner of level 0. 0 where nothing moves the logit.
        square_um: width and height of a square, micron.
        square_px: its side in pixels of the tiles.
    """

    value_hw: NDArray[np.float32]
    square_um: Size
    square_px: int

    @cached_property
    def rms(self) -> float:
        """Root mean square over the squares that move the logit at all; 1 if there are none."""
        number = np.count_nonzero(self.value_hw)
        return math.sqrt(np.square(self.value_hw).sum(dtype=np.float64) / number) if number else 1.0

    @cached_property
    def top(self) -> float:
        """Where the scale of colours ends, in units of `rms`."""
        moved = self.value_hw[self.value_hw > 0]
        return float(np.quantile(moved, TOP_SHARE)) / self.rms if len(moved) else 1.0

    def levels(self, value_hw: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Values on the scale of colours: 0 is none, 1 to 255 rise to the top and stay there."""
        share_hw = value_hw * np.float32((_LEVELS - 1) / (self.top * self.rms))
        return np.ceil(np.clip(share_hw, 0, _LEVELS - 1, out=share_hw), out=share_hw).astype(np.uint8)


class Saliencies:
    """Computes saliency of slides with a trained model, block by block.

    Args:
        config: of the run that trained the model.
        model: from `load_model`; it is moved to the device, and its parameters get no gradients any more.
        shards: where the slides' tiles are.
        device: where to compute, in float32 whatever `science.precision` is.
        paths: slide files by id, for `data.source: slides`; None takes those of the slide table.
    Raises:
        ConfigError: the encoder is none that sees the slide.
    """

    def __init__(
        self,
        config: RunConfig,
        model: SlideModel,
        shards: TiledSlides,
        device: torch.device,
        paths: Mapping[str, Path] | None = None,
    ) -> None:
        refuse_tile_encoder(model, config)
        set_batchnorm(model.encoder, config.execution)
        self._config, self._model = config, model.to(device).requires_grad_(False)
        self._shards, self._device, self._paths = shards, device, paths
        self._geometry = dense_geometry(model.encoder, config.slides)
        self._most: float = math.inf  # tiles of a block that the device has had memory for

    def __call__(self, slide_id: str, class_number: int) -> Saliency:
        """Saliency of a slide for the logit of a class; for the last threshold of the last class of an ordinal task.

        Raises:
            ShardError, SlideError: a tile or a block cannot be read.
            TrainingError: the device has no memory for a block of one tile.
        Cost: see `slide_saliency`. Where memory runs out it begins anew with blocks of a quarter.
        """
        config, shards = self._config, self._shards
        assert isinstance(shards, ShardSet), "a dense encoder has tiles"
        check_tiles(config, shards, [slide_id])
        manifest, tile_px = shards.manifest(slide_id), config.slides.tile_px
        source = open_source(config, shards, [slide_id], self._device, self._paths)
        loader = StepLoader(source, [slide_id], tile_px, Topology(), prefetch=0, geometry=self._geometry)
        tiles = loader.load(plan_steps([0], [manifest.num_tiles], 1, 1, 1)[0])
        if not isinstance(tiles.images, BlockImages):
            raise ConfigError("saliency is computed block by block, and this run does not read blocks")
        square_px = _square_px(*tiles.images.size_px, tile_px)
        chunk = tiles_per_call(config, self._model, shards, [slide_id], self._device)
        value_hw = self._computed(slide_id, tiles, class_number, square_px, int(min(chunk, self._most)))
        return Saliency(value_hw, (square_px * manifest.pixel_mpp_x, square_px * manifest.pixel_mpp_y), square_px)

    def _computed(
        self, slide_id: str, tiles: StepTiles, class_number: int, square_px: int, chunk: int
    ) -> NDArray[np.float32]:
        hidden = None if self._config.bookkeeping.progress else True
        while True:
            with tqdm(total=2 * tiles.num_tiles, desc=f"saliency {slide_id}", unit="tile", disable=hidden) as bar:
                try:
                    return slide_saliency(self._model, tiles, class_number, chunk, square_px, done=bar.update)
                except torch.OutOfMemoryError as error:
                    if chunk == 1:
                        raise TrainingError(
                            f"slide '{slide_id}': the device has no memory for the saliency of a single tile. Free it, or set "
                            "execution.device=cpu."
                        ) from error
            self._most = chunk = max(1, chunk // 4)


def _square_px(height: int, width: int, tile_px: int) -> int:
    """The least of SQUARE_PX, twice it, ... that gives at most MOST_SQUARES; of a tile that it does not divide, less."""
    side = SQUARE_PX
    while height * width > MOST_SQUARES * side**2:
        side *= 2
    return math.gcd(side, tile_px)


def refuse_tile_encoder(model: SlideModel, config: RunConfig) -> None:
    """Refuse a run whose encoder does not see the slide.

    Raises:
        ConfigError: says what to set.
    """
    if not isinstance(model.encoder, DenseEncoder):
        raise ConfigError(
            f"saliency needs a dense encoder, and '{config.science.encoder.name}' of this run sees tiles one by one. Set "
            "science.encoder.dense to layer3 or layer4, with data.source shards or slides (docs/streaming.md), and train it in "
            "another bookkeeping.out; or go without --saliency: attention is drawn of every run."
        )

"""Tiles that learn from a bag model (iterative coupling): a student encoder is taught by the classifier of slides.

The teacher is the encoder and the bag classifier as they were; it looks at a tile as if that were a whole slide. The student starts
as its copy and sees the same tile augmented.

Shapes: n tiles on this rank, c tiles of a chunk, D embedding, K classes, X slide embedding.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.data.augment import to_float
from gigamil.data.features import features_path
from gigamil.data.h5 import read_features
from gigamil.data.images import ChunkFeed
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.errors import ConfigError
from gigamil.models.aggregator import min_tiles
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import DenseEncoder, TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.partition.schedule import StepPlan
from gigamil.partition.spans import chunk_ranges
from gigamil.tasks.classification import Multiclass
from gigamil.tasks.task import Task
from gigamil.train.plain import Engine
from gigamil.train.step import Prepare, Ranks, StepResult, attention_of

if TYPE_CHECKING:
    from gigamil.data.images import TileImages

_WEIGHT_SIMILARITY = 0.5  # of each of the two terms that keep the student's head near the classifier of bags
Trust = Callable[[int, Tensor], Tensor]  # slide, numbers of its tiles -> weight of each, float64


class TaughtStep:
    """One optimiser step over tiles of a plan: mean over tiles of L_c + (L_w1 + L_w2) / 2, each a Kullback-Leibler divergence.

    - L_c: what the student says of the augmented tile, from what the teacher says of the tile; weighted by trust.
    - L_w1: what the student's head says of the teacher's embedding, from what the teacher says.
    - L_w2: softmax of the slide embedding that the student's aggregator makes of the teacher's embedding, from the teacher's; absent
      where the aggregator gives logits.

    All from the teacher's distribution to the student's, KL(teacher || student). Equal for any ranks and chunks.

    Args:
        engine: the student, its gradients and its optimiser.
        ranks: of the run.
        teacher: is moved to the engine's device and dtype, frozen, and evaluated without dropout.
        chunk: tiles per call.
        keys: draws of augmentation and dropout, and names of the slides.
        augment: (image in 0..1, tile keys) -> image; None leaves tiles as they are.
        trust: weights of tiles in L_c; None takes all for 1.
        alone: entered around the work of a rank, to measure it.
    Cost: of each tile a forward of the teacher, a forward and backward of the student; one gradient reduction.
    Source: Wang et al. 2023, arXiv:2303.15749 (ICMIL, E and M steps); 2024, arXiv:2312.01099 (confidence). Test:
        distributed/test_taught.py
    """

    num_keep = 0

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        teacher: SlideModel,
        *,
        chunk: int,
        keys: DrawKeys,
        augment: Prepare | None = None,
        trust: Trust | None = None,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine = engine
        self.chunk = chunk
        self._ranks = ranks
        self._teacher = teacher.to(engine.device, engine.dtype).eval().requires_grad_(False)
        self._keys = keys
        self._augment = augment
        self._trust = trust
        self._alone = alone

    def train(
        self,
        plan: StepPlan,
        tiles: StepTiles,
        target_S: Tensor,
        weight_S: Tensor,
        *,
        step: int,
        learning_rates: Sequence[float],
        train_encoder: bool = True,
    ) -> StepResult:
        """Run one step on all ranks together; arguments as `ExactStep.train`, of which targets and weights are not looked at.

        A step with a loss or gradient that is not finite, or tiles that cannot be read, changes no weight on any rank.
        """
        engine, topology = self.engine, self._ranks.topology
        group = plan.groups[topology.group]
        slide_key_B = self._keys.slides(step, [plan.slides[position] for position in group])
        key_n = DrawKeys.tiles(slide_key_B, tiles.slide_index_n, tiles.number_n)
        trust_n = self._trust_of(plan, tiles)
        scale = topology.world_size / sum(plan.sizes)  # the reduction takes the mean over ranks
        total, error = torch.zeros((), dtype=torch.float64, device=engine.device), None
        ranges = chunk_ranges(tiles.num_tiles, self.chunk) or [(0, 0)]
        with engine.one_reduction(), self._alone(), ChunkFeed(tiles.images, engine.device, 0) as feed:
            for number, (start, stop) in enumerate(ranges):
                upcoming = ranges[number + 1] if number + 1 < len(ranges) else None
                image_cHWC, failure = _read(feed, tiles.images, start, stop, upcoming, engine.device)
                error = error or failure
                loss_c = self._losses(image_cHWC, key_n[start:stop], trust_n[start:stop])
                # A blank tile, of a rank without any, gives every parameter a gradient to reduce.
                loss = loss_c.sum() * scale * (1.0 if stop > start else 0.0)
                total += loss.detach().double()
                engine.backward(loss)
        norm = engine.step(learning_rates)
        mean = float(self._ranks.sum_world(total)) / topology.world_size
        skipped = () if torch.isfinite(torch.tensor([norm, mean])).all() else tuple(range(len(plan.slides)))
        return StepResult(mean, torch.empty(0), skipped, norm, error=error)

    def _losses(self, image_cHWC: Tensor, key_c: Tensor, trust_c: Tensor) -> Tensor:
        """L of each tile; of no rows that of one blank tile."""
        engine = self.engine
        if not len(key_c):
            key_c, trust_c = key_c.new_zeros(1), trust_c.new_ones(1)
        key_c = key_c.to(engine.device)
        plain_cCHW = to_float(image_cHWC, engine.dtype)
        with torch.no_grad():
            taught_cD = self._teacher("encode", plain_cCHW, None)
            taught_cK, pooled = self._teacher("classify", _singles(taught_cD, None))
            seen_cCHW = plain_cCHW if self._augment is None else self._augment(plain_cCHW, key_c)
        student_cD = engine.encode(seen_cCHW, key_c)
        said_cK, _ = engine.classify(_singles(student_cD, key_c))
        head_cK, own = engine.classify(_singles(taught_cD, key_c))
        loss_c = trust_c.to(said_cK) * _divergence(taught_cK, said_cK)
        loss_c = loss_c + _WEIGHT_SIMILARITY * _divergence(taught_cK, head_cK)
        if self._teacher.head is not None:
            loss_c = loss_c + _WEIGHT_SIMILARITY * _divergence(pooled.slide_BX, own.slide_BX)
        return loss_c

    def _trust_of(self, plan: StepPlan, tiles: StepTiles) -> Tensor:
        weight_n = torch.ones(tiles.num_tiles, dtype=torch.float64)
        if self._trust is not None:
            for slide, position in enumerate(plan.groups[self._ranks.topology.group]):
                rows = torch.nonzero(tiles.slide_index_n == slide).flatten()
                if len(rows):
                    weight_n[rows] = self._trust(plan.slides[position], tiles.number_n[rows])
        return weight_n


def confidence(attention_N: Tensor, beta: float) -> Tensor:
    """|2 a - 1|^beta, a the attention of a slide's tiles scaled to 0..1 within the slide: the highest and the lowest are trusted.

    Args:
        attention_N: of all tiles of a slide.
        beta: 0 trusts all alike.
    Source: Wang et al. 2024, arXiv:2312.01099, where a is scaled within a random batch.
    """
    low, high = attention_N.min(), attention_N.max()
    scaled_N = (attention_N - low) / (high - low).clamp(min=torch.finfo(attention_N.dtype).tiny)
    return (2 * scaled_N - 1).abs() ** beta


class TrustedTiles:
    """Confidence of tiles by the attention that a bag classifier gives them, from the features that it was trained on.

    Args:
        teacher: whose attention.
        run: of the classifier, with `features/`.
        slide_ids: that are asked for by number.
        beta: see `confidence`.
    Raises:
        ConfigError: the run has no features.
    """

    def __init__(self, teacher: SlideModel, run: Path, slide_ids: Sequence[str], beta: float) -> None:
        self._teacher, self._run, self._slide_ids, self._beta = teacher, run, slide_ids, beta
        self._known: dict[int, Tensor] = {}
        if not (run / "features").is_dir():
            raise ConfigError(
                f"science.regime.confidence={beta} looks at the features of the bag classifier, and '{run}' has none: set it to 0, or "
                "science.warm_start to a run that made its features itself"
            )

    def __call__(self, slide: int, number_n: Tensor) -> Tensor:
        """Weights of tiles of a slide."""
        if slide not in self._known:
            self._known[slide] = confidence(self._attention(self._slide_ids[slide]), self._beta)
        return self._known[slide][number_n]

    @torch.no_grad()
    def _attention(self, slide_id: str) -> Tensor:
        found = read_features(features_path(self._run / "features", slide_id))
        parameter = next(self._teacher.parameters())
        embedding_ND = torch.from_numpy(np.asarray(found.features_ND)).to(parameter)
        num = len(embedding_ND)
        position_N2 = torch.zeros((num, 2), dtype=torch.float64, device=parameter.device)
        bag = Bag(embedding_ND, position_N2, (num,), LocalPool(num))
        logits_1K, pooled = self._teacher("classify", bag)
        return attention_of(bag, pooled, logits_1K).double().mean(dim=1).cpu()


def refuse_phases(config: RunConfig) -> None:
    """Refuse what is no single run, or has no start.

    Raises:
        ConfigError: says who runs it, or what is missing.
    """
    if config.science.regime.name == "coupled":
        raise ConfigError(
            "science.regime=coupled is a chain of runs: `gigamil train` and `gigamil run` start them one after the other on "
            "execution.ranks ranks of this machine; under another launcher start each phase by itself (docs/regimes.md)"
        )
    if config.science.regime.name == "taught" and config.science.warm_start is None:
        raise ConfigError(
            "science.regime=taught: tiles are taught by a bag classifier, which science.warm_start has to name (or choose coupled)"
        )


def refuse_untaught(config: RunConfig, model: SlideModel, task: Task) -> None:
    """Refuse what cannot be taught tile by tile.

    Raises:
        ConfigError: an encoder that is not of tiles, an aggregator that takes several tiles, or a task without classes.
    """
    words = f"science.regime={config.science.regime.name}: tiles are taught"
    if not isinstance(model.encoder, TileEncoder) or isinstance(model.encoder, DenseEncoder):
        raise ConfigError(
            f"{words} one by one, which features and dense encoders have no use for; set data.source to shards"
        )
    if min_tiles(model.aggregator) > 1:
        name, number = type(model.aggregator).__name__, min_tiles(model.aggregator)
        raise ConfigError(f"{words} by a classifier that can look at one alone, and {name} takes {number} or more")
    if not isinstance(task, Multiclass):
        raise ConfigError(
            f"{words} the classes of slides: science.task.name must be binary or multiclass, without science.also"
        )


def _singles(embedding_nD: Tensor, key_n: Tensor | None) -> Bag:
    """Every tile as a slide of its own."""
    num = len(embedding_nD)
    nowhere_n2 = torch.zeros((num, 2), dtype=torch.float64, device=embedding_nD.device)
    return Bag(embedding_nD, nowhere_n2, (1,) * num, LocalPool(num), tile_key_n=key_n, slide_key_B=key_n)


def _divergence(teacher_cK: Tensor, student_cK: Tensor) -> Tensor:
    """KL(teacher || student) of softmax over the last axis, for each row."""
    taught_cK = teacher_cK.log_softmax(dim=-1)
    divergence_c: Tensor = (taught_cK.exp() * (taught_cK - student_cK.log_softmax(dim=-1))).sum(dim=-1)
    return divergence_c


def _read(
    feed: ChunkFeed, images: "TileImages", start: int, stop: int, upcoming: tuple[int, int] | None, device: torch.device
) -> tuple[Tensor, Exception | None]:
    """Rows of tiles; NaN, and why, where they cannot be read: then no rank uses the step."""
    if start == stop:
        return torch.zeros((1, *images.shape), dtype=torch.uint8, device=device), None
    try:
        return feed.get(start, stop, upcoming), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the caller agrees on it with the other ranks
        return torch.full((stop - start, *images.shape), torch.nan, device=device), error

"""The exact step: encode chunks, pool over ranks, one backward through the head, chunks back-propagate, one reduction.

Shapes: n tiles on this rank, S slides of the step, B slides of this rank's group, D embedding, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.data.augment import to_float
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.memory.budget import SavedBytes
from gigamil.memory.replay import EncodedChunk, backward_chunk, encode_chunk
from gigamil.models.bag import Bag, LocalPool, Pool
from gigamil.parallel.pooling import GroupPool
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan
from gigamil.partition.spans import chunk_ranges
from gigamil.train.loss import SlideLoss, group_loss
from gigamil.train.plain import Engine

Prepare = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Ranks:
    """Process groups of a run; None where there is one process.

    Attributes:
        topology: the shape of the world.
        world: all ranks.
        group: the ranks that pool with this one.
    """

    topology: Topology
    world: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None

    def pool(self) -> Pool:
        """How bags are pooled: over the group, or locally."""
        return LocalPool() if self.group is None or self.topology.group_size == 1 else GroupPool(self.group)

    def sum_world(self, values: Tensor) -> Tensor:
        """Sum over all ranks; not differentiable."""
        if self.world is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.world)
        return values


@dataclass(frozen=True)
class ForwardPass:
    """Result of encoding and pooling one step's slides on this rank.

    Attributes:
        chunks: one per encoder call, own chunks first, then blank ones.
        embedding_nD: leaf that receives dL/dh; float32 or wider.
        logits_BK: of the group's slides, equal on all its ranks.
        attention_nA: of this rank's tiles.
    """

    chunks: list[EncodedChunk]
    embedding_nD: Tensor
    logits_BK: Tensor
    attention_nA: Tensor


@dataclass(frozen=True)
class StepResult:
    """What a training step reports; equal on all ranks.

    Attributes:
        loss: weighted mean over the step's slides.
        slide_loss_S: per slide, float64, in the plan's order.
        skipped: positions of slides whose loss is not finite, or all of them if the gradient is not; if any, no rank
            changed its weights.
        grad_norm: of the whole gradient, before clipping; 0 if a loss was not finite.
    """

    loss: float
    slide_loss_S: Tensor
    skipped: tuple[int, ...]
    grad_norm: float


class ExactStep:
    """One optimiser step over the slides of a plan, on all their tiles.

    Args:
        engine: model, gradients, optimiser.
        ranks: process groups.
        loss: per-slide loss.
        chunk: tiles per encoder call.
        num_keep: chunks whose graphs are kept; the others are encoded twice. Equal on all ranks.
        keys: draws of augmentation and dropout.
        augment: (image in 0..1, tile keys) -> image; None leaves tiles as they are.
    Cost: with kept fraction f of the chunks, (4 - f) encoder forwards per tile; the head runs once. Two all-reduces of
        B A (D + 2) numbers forward, one backward, one of S numbers, and the engine's gradient reduction.
    Source: Ilse et al. 2018, arXiv:1802.04712 (model); Andersson et al. 2022, arXiv:2203.03981 (accumulation).
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        loss: SlideLoss,
        *,
        chunk: int,
        num_keep: int,
        keys: DrawKeys,
        augment: Prepare | None = None,
    ) -> None:
        self.engine = engine
        self.num_keep = num_keep
        self._ranks = ranks
        self._loss = loss
        self._chunk = chunk
        self._keys = keys
        self._augment = augment

    def train(
        self,
        plan: StepPlan,
        tiles: StepTiles,
        label_S: Tensor,
        weight_S: Tensor,
        *,
        step: int,
        learning_rates: Sequence[float],
        train_encoder: bool = True,
    ) -> StepResult:
        """Run one step on all ranks together.

        Args:
            plan: the step's slides; equal on all ranks.
            tiles: this rank's tiles of it.
            label_S, weight_S: class and weight of each slide of the plan, int64 and float64.
            step: number of the optimiser step, for the draws.
            learning_rates: one per parameter group.
            train_encoder: False leaves the encoder without a gradient (its learning rate must be 0).
        """
        slide_key_S = self._keys.slides(step, plan.slides)
        forward = self._forward(plan, tiles, slide_key_S, keep=train_encoder)
        mine = list(plan.groups[self._ranks.topology.group])
        loss_B = self._loss(forward.logits_BK, label_S[mine].to(self.engine.device))
        slide_loss_S = self._gather_losses(loss_B, mine, len(plan.slides))
        skipped = tuple(int(i) for i in torch.nonzero(~torch.isfinite(slide_loss_S)).flatten())
        mean_loss = float((slide_loss_S * weight_S).sum() / weight_S.sum())
        if skipped:
            return StepResult(mean_loss, slide_loss_S, skipped, 0.0)

        weight_B = weight_S[mine].to(loss_B)
        scalar = group_loss(loss_B, weight_B, float(weight_S.sum()), self._ranks.topology.num_groups)
        with self.engine.one_reduction():
            self.engine.backward(scalar)
            if train_encoder:
                self._backward_encoder(tiles, slide_key_S[mine], forward)
        norm = self.engine.step(learning_rates)
        # The gradient is the world's, so all ranks see the same norm; no slide alone is to blame.
        skipped = () if math.isfinite(norm) else tuple(range(len(plan.slides)))
        return StepResult(mean_loss, slide_loss_S, skipped, norm)

    @torch.no_grad()
    def evaluate(self, plan: StepPlan, tiles: StepTiles) -> tuple[Tensor, Tensor]:
        """Logits (S, K) of a plan's slides, float64 and equal on all ranks, and attention (n, A) of this rank's tiles.

        No augmentation and no dropout.
        """
        forward = self._forward(plan, tiles, None, keep=False)
        mine = list(plan.groups[self._ranks.topology.group])
        logits_SK = forward.logits_BK.new_zeros((len(plan.slides), forward.logits_BK.shape[1]), dtype=torch.float64)
        if self._ranks.topology.group_rank == 0:  # one rank of each group speaks for it
            logits_SK[mine] = forward.logits_BK.double()
        return self._ranks.sum_world(logits_SK), forward.attention_nA

    def _forward(self, plan: StepPlan, tiles: StepTiles, slide_key_S: Tensor | None, keep: bool) -> ForwardPass:
        mine = list(plan.groups[self._ranks.topology.group])
        slide_key_B = None if slide_key_S is None else slide_key_S[mine]
        tile_key_n = None
        if slide_key_B is not None:
            tile_key_n = DrawKeys.tiles(slide_key_B, tiles.slide_index_n, tiles.number_n).to(self.engine.device)
        chunks = [
            encode_chunk(self._call(tiles, tile_key_n, start, stop), keep and number < self.num_keep)
            for number, (start, stop) in enumerate(self._calls(plan, tiles.num_tiles))
        ]
        embedding_cD = torch.cat([chunk.embedding_cD for chunk in chunks])[: tiles.num_tiles]
        embedding_nD = embedding_cD.to(torch.promote_types(embedding_cD.dtype, torch.float32))
        embedding_nD.requires_grad_(torch.is_grad_enabled())
        bag = Bag(
            embedding_nD=embedding_nD,
            slide_index_n=tiles.slide_index_n.to(self.engine.device),
            position_n2=tiles.position_n2.to(self.engine.device),
            num_slides=len(mine),
            tile_key_n=tile_key_n,
            slide_key_B=None if slide_key_B is None else slide_key_B.to(self.engine.device),
            pool=self._ranks.pool(),
        )
        logits_BK, attention_nA = self.engine.classify(bag)
        return ForwardPass(chunks, embedding_nD, logits_BK, attention_nA)

    def _backward_encoder(self, tiles: StepTiles, slide_key_B: Tensor, forward: ForwardPass) -> None:
        tile_key_n = DrawKeys.tiles(slide_key_B, tiles.slide_index_n, tiles.number_n).to(self.engine.device)
        cotangent_nD = forward.embedding_nD.grad
        if cotangent_nD is None:  # a rank without tiles: nothing of the head depends on its leaf
            cotangent_nD = torch.zeros_like(forward.embedding_nD)
        start = 0
        for chunk in forward.chunks:
            stop = min(start + len(chunk.embedding_cD), tiles.num_tiles)
            cotangent_cD = cotangent_nD[start:stop]
            if start == stop:  # a blank chunk takes part with a zero cotangent
                cotangent_cD = torch.zeros_like(chunk.embedding_cD, dtype=cotangent_nD.dtype)
            backward_chunk(chunk, self._call(tiles, tile_key_n, start, stop), cotangent_cD, self.engine.backward)
            start = stop

    def _calls(self, plan: StepPlan, num_tiles: int) -> list[tuple[int, int]]:
        """Tile ranges of this rank's encoder calls; empty ranges are blank tiles.

        Every rank makes one call at least, so that all of its parameters have a gradient to reduce. Where parameters
        are gathered per call (ZeRO 3), every rank of the world makes as many as the busiest.
        """
        ranges = list(chunk_ranges(num_tiles, self._chunk))
        wanted = plan.max_calls(self._chunk) if self.engine.equal_calls else 1
        return ranges + [(num_tiles, num_tiles)] * (wanted - len(ranges))

    def _call(self, tiles: StepTiles, tile_key_n: Tensor | None, start: int, stop: int) -> Callable[[], Tensor]:
        def encode() -> Tensor:
            if start == stop:
                side = tiles.image_nHWC.shape[1]
                blank = torch.zeros((1, 3, side, side), dtype=self.engine.dtype, device=self.engine.device)
                key = None if tile_key_n is None else torch.zeros(1, dtype=torch.int64, device=self.engine.device)
                return self.engine.encode(blank, key)
            image_cCHW = to_float(tiles.image_nHWC[start:stop].to(self.engine.device), self.engine.dtype)
            if tile_key_n is None:
                return self.engine.encode(image_cCHW, None)
            if self._augment is not None:
                with torch.no_grad():
                    image_cCHW = self._augment(image_cCHW, tile_key_n[start:stop])
            return self.engine.encode(image_cCHW, tile_key_n[start:stop])

        return encode

    def _gather_losses(self, loss_B: Tensor, mine: list[int], num_slides: int) -> Tensor:
        loss_S = torch.zeros(num_slides, dtype=torch.float64, device=self.engine.device)
        if self._ranks.topology.group_rank == 0:
            loss_S[mine] = loss_B.detach().double()
        return self._ranks.sum_world(loss_S).cpu()


def measure_chunk_bytes(engine: Engine, chunk: int, tile_px: int) -> int:
    """Bytes that autograd keeps for one encoder call on `chunk` tiles: an encoder forward, which changes nothing."""
    image = torch.zeros((chunk, 3, tile_px, tile_px), dtype=engine.dtype, device=engine.device)
    key = torch.zeros(chunk, dtype=torch.int64, device=engine.device)
    with SavedBytes(engine.module) as saved:
        engine.encode(image, key)
    return saved.total

"""The exact step: encode chunks, pool over ranks, one backward through the head, chunks back-propagate, one reduction.

Shapes: n tiles on this rank, c tiles of a chunk, S slides of the step, B slides of this rank's group, D embedding,
K classes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.data.augment import to_float
from gigamil.data.blocks import BlockImages, Turn
from gigamil.data.images import ChunkFeed
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.data.rows import SlideRows
from gigamil.errors import ConfigError, TrainingError
from gigamil.memory.geometry import Geometry
from gigamil.memory.peak import LiveBytes
from gigamil.memory.replay import EncodedChunk, chunk_with_graph, cotangent_product, encode_chunk
from gigamil.models.aggregator import min_tiles
from gigamil.models.bag import Bag, LocalPool, Pool, Pooled
from gigamil.models.encoder import Cells, DenseEncoder
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.pooling import GroupPool
from gigamil.parallel.shared_slide import SharedSlide
from gigamil.parallel.topology import Topology
from gigamil.partition.blocks import block_ranges, block_side
from gigamil.partition.schedule import StepPlan
from gigamil.partition.spans import chunk_ranges
from gigamil.train.agree import agree
from gigamil.train.loss import SlideLoss, group_loss, slide_losses
from gigamil.train.plain import Engine

# Cached features per call of what stands in for the encoder; it passes on any number of them.
FEATURE_ROWS = 2**14

Prepare = Callable[[Tensor, Tensor], Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Process groups of a run; None where there is one process.

    Attributes:
        topology: the shape of the world.
        world: all ranks.
        group: the ranks that pool with this one.
        hosts: name of each rank's machine, by rank; empty if nobody asked.
    """

    topology: Topology
    world: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None
    hosts: tuple[str, ...] = ()

    def name(self, rank: int) -> str:
        """A rank in words, with its host where there are several."""
        return f"rank {rank} on host '{self.hosts[rank]}'" if len(set(self.hosts)) > 1 else f"rank {rank}"

    def pool(self, counts: Sequence[int]) -> Pool:
        """How bags are pooled: over the group, or locally.

        Args:
            counts: tiles of each rank of the group.
        """
        group = self.pooling_group
        return LocalPool(sum(counts)) if group is None else GroupPool(group, counts, self.topology.group_rank)

    @property
    def pooling_group(self) -> dist.ProcessGroup | None:
        """The group; None where this rank pools alone."""
        return None if self.topology.group_size == 1 else self.group

    def sum_world(self, values: Tensor) -> Tensor:
        """Sum over all ranks; not differentiable."""
        if self.world is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.world)
        return values


@dataclass(frozen=True)
class StepResult:
    """What a training step reports; equal on all ranks, but for `error` and `signal`.

    Attributes:
        loss: weighted mean over the step's slides.
        slide_loss_S: per slide, and per task where there are several, float64, in the plan's order.
        skipped: positions of slides whose loss is not finite, or all of them if the gradient is not; if any, no rank
            changed its weights.
        grad_norm: of the whole gradient, before clipping; 0 if a loss was not finite.
        bad_tile: (position of its slide, its number) of the first tile whose embedding is not finite, on the lowest
            rank that has one; None without any.
        error: what this rank met when it read its tiles; the step was skipped on all ranks.
        signal: squared norm of dL/dh of this rank's tiles.
    """

    loss: float
    slide_loss_S: Tensor
    skipped: tuple[int, ...]
    grad_norm: float
    bad_tile: tuple[int, int] | None = None
    error: Exception | None = None
    signal: float = 0.0


class OutOfMemory(Exception):
    """All ranks agreed to make the step again with smaller chunks.

    Args:
        tried: rows of the smallest call that did not fit, on any rank; twice the chunk if graphs were kept beside it.
    """

    def __init__(self, tried: int) -> None:
        super().__init__(tried)
        self.tried = tried


@dataclass
class _Pass:
    """One step's slides on this rank, encoded and pooled.

    Attributes:
        chunks: one per encoder call, in row order, blank ones last.
        embedding_nD: leaf that receives dL/dh; float32 or wider.
        bag: of the group's slides.
        logits_BK: of the group's slides, equal on all its ranks.
        pooled: all that the aggregator gave.
    """

    chunks: list[EncodedChunk]
    embedding_nD: Tensor
    bag: Bag
    logits_BK: Tensor
    pooled: Pooled


class ExactStep:
    """One optimiser step over the slides of a plan, with the gradient of full-bag autograd.

    Args:
        engine: model, gradients and optimiser.
        ranks: who pools with whom.
        loss: (logits, target) -> one number per slide.
        chunk: tiles per encoder call. Halved on a rank whose device runs out of memory.
        num_keep: chunks whose graphs are kept for backward; the others are encoded twice.
        keys: draws of augmentation and dropout, and names of the slides.
        augment: (image in 0..1, tile keys) -> image; None leaves tiles as they are.
        cache_bytes: memory of the device for tiles that are needed in both passes and cannot be held as they come.
        pad: fill the last chunk up with blank tiles, for a compiled encoder, which wants one shape.
        turn: slide key -> how a slide is laid in training, for a dense encoder; `augment` is then given blocks, and the
            keys of their slides.
        alone: entered around the work that a rank does without the others (but for `SlideRows`), to measure it.
        couples: the loss of a slide depends on the logits of others of its step: they are gathered over all groups.
        class_of: targets -> classes, for aggregators with a loss of their own; None of targets that have none.
        num_shown: logits of which the largest says whose attention is shown, see `Task.num_shown`; None: all.
    Cost: with kept fraction f of the chunks, (4 - f) encoder forwards per tile; the head runs once. The aggregator's
        reductions (docs/aggregators.md), one of S numbers, and the engine's gradient reduction. On a GPU the first wait
        for it is for the norm, after the last backward.
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
        cache_bytes: int = 0,
        pad: bool = False,
        turn: Callable[[int], Turn] | None = None,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
        couples: bool = False,
        class_of: Callable[[Tensor], Tensor | None] = lambda label_B: label_B,
        num_shown: int | None = None,
    ) -> None:
        self._num_shown = num_shown
        self.kept_share = 0.0  # of this rank's tiles of the last step those whose graphs were kept
        self.is_attention = True  # what `evaluate` has shown last decides of slides; else it is made of scores
        self._turn = turn
        self._alone = alone
        self._couples = couples
        self._class_of = class_of
        self.engine = engine
        self.chunk = chunk
        self.num_keep = num_keep
        self._ranks = ranks
        self._loss = loss
        self._keys = keys
        self._augment = augment
        self._cache_bytes = cache_bytes
        self._pad = pad

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
        """Run one step on all ranks together.

        Args:
            plan: the step's slides; equal on all ranks.
            tiles: this rank's tiles of it.
            target_S: what is known of each slide of the plan: classes, int64 (S,), or numbers, float64 (S, X).
            weight_S: of each slide, float64; all 0 is a step that teaches nothing.
            step: number of the optimiser step, for the draws.
            learning_rates: one per parameter group.
            train_encoder: False leaves the encoder without a gradient (its learning rate must be 0).
        Raises:
            TrainingError: the device has no memory for a single tile; on all ranks.
        """
        while True:
            calls = self._calls(plan, tiles, self._keys.slides(step, plan.slides))
            try:
                with calls:
                    return self._train(calls, target_S, weight_S, learning_rates, train_encoder)
            except OutOfMemory as error:
                tried = error.tried
            self._halve(tried)  # outside of `except`: until then the error's frames hold the step's tensors

    def _calls(self, plan: StepPlan, tiles: StepTiles, slide_key_S: Tensor | None) -> "_Calls":
        kind = _SharedCalls if isinstance(tiles.images, SlideRows) else _Calls
        return kind(self, plan, tiles, slide_key_S)

    @cached_property
    def _sharded(self) -> ShardedNetwork:
        """The network of a dense encoder on the rows of the group's ranks."""
        encoder, topology = self.engine.module.encoder, self._ranks.topology
        assert isinstance(encoder, DenseEncoder)
        return ShardedNetwork(encoder.network, self._ranks.pooling_group, topology.group_rank)

    def _train(
        self,
        calls: "_Calls",
        target_S: Tensor,
        weight_S: Tensor,
        learning_rates: Sequence[float],
        train_encoder: bool,
    ) -> StepResult:
        topology, plan = self._ranks.topology, calls.plan
        mine = list(plan.groups[topology.group])
        target_S = target_S.to(self.engine.device, non_blocking=True)
        with self.engine.gathered():
            forward = self._forward(calls, self._class_of(target_S[mine]), is_training=True, keep=train_encoder)
            loss_B, scored = self._losses(forward, target_S, mine)
            weight_B = weight_S[scored].to(loss_B, non_blocking=True) if scored else torch.zeros_like(loss_B)
            # A loss that is not finite must not pass for a gradient: 1 + 0 x inf is NaN, and a NaN anywhere skips the
            # step.
            weight_B = weight_B * (1 + 0 * loss_B.detach())
            scalar = group_loss(loss_B, weight_B, float(weight_S.sum()), topology.num_groups)
            # Nor must an embedding: a maximum over tiles or ranks may pass a NaN over.
            scalar = scalar * (1 + 0 * forward.embedding_nD.detach().sum())
            with self.engine.one_reduction():
                self.engine.backward(scalar)
                if train_encoder:
                    with self._alone():
                        self._backward_encoder(calls, forward)
        norm = self.engine.step(learning_rates)
        slide_loss_S = self._gather_losses(loss_B[mine] if self._couples else loss_B, mine, len(plan.slides))
        is_finite_S = torch.isfinite(slide_loss_S.reshape(len(plan.slides), -1)).all(dim=1)
        skipped = tuple(int(i) for i in torch.nonzero(~is_finite_S).flatten())
        mean_loss = float((slide_loss_S * weight_S).sum() / (weight_S.sum() or 1.0))
        if math.isfinite(norm) and not skipped:
            grad_nD = forward.embedding_nD.grad
            signal = 0.0 if grad_nD is None else float(grad_nD.double().square().sum())
            return StepResult(mean_loss, slide_loss_S, (), norm, signal=signal)
        # The gradient is the world's, so all ranks are here; no slide alone is to blame for a norm.
        bad_tile = self._find_blame(calls, forward)
        return StepResult(
            mean_loss,
            slide_loss_S,
            skipped or tuple(range(len(plan.slides))),
            0.0 if skipped else norm,
            bad_tile,
            calls.error,
        )

    @torch.no_grad()
    def evaluate(self, plan: StepPlan, tiles: StepTiles) -> tuple[Tensor, Tensor]:
        """Logits (S, K) of a plan's slides, float64 and equal on all ranks, and attention (n, A) of this rank's tiles.

        No augmentation and no dropout. Attention sums to 1 over a slide's tiles; where the aggregator has a column per
        class, the column of the class that it predicts for the slide is given.

        Raises:
            TrainingError: an embedding is not finite, names slide and tile; or some rank could not read a tile (one
                process raises what the reader raised). On all ranks.
        """
        while True:
            calls = self._calls(plan, tiles, None)
            try:
                with calls:
                    return self._evaluate(calls, tiles)
            except OutOfMemory as error:
                tried = error.tried
            self._halve(tried)

    def _evaluate(self, calls: "_Calls", tiles: StepTiles) -> tuple[Tensor, Tensor]:
        plan, mine = calls.plan, list(calls.plan.groups[self._ranks.topology.group])
        with self.engine.gathered():
            forward = self._forward(calls, None, is_training=False, keep=False)
        logits_SK = forward.logits_BK.new_zeros((len(plan.slides), forward.logits_BK.shape[1]), dtype=torch.float64)
        if self._ranks.topology.group_rank == 0:  # one rank of each group speaks for it
            logits_SK[mine] = forward.logits_BK.double()[: len(mine)]
        logits_SK = self._ranks.sum_world(logits_SK)
        bad_tile = self._find_blame(calls, forward)
        agree(self._ranks, self.engine.device, error=calls.error, stop=False, save=False)
        if bad_tile is not None:
            slide_id = self._keys.slide_ids[plan.slides[bad_tile[0]]]
            raise TrainingError(f"slide '{slide_id}': the embedding of tile {bad_tile[1]} is not finite")
        self.is_attention = forward.pooled.attention_nA is not None
        shown = attention_of(forward.bag, forward.pooled, forward.logits_BK[:, : self._num_shown])
        return logits_SK, shown[: tiles.num_tiles]  # a group without a slide computes a blank one

    def _losses(self, forward: _Pass, target_S: Tensor, mine: list[int]) -> tuple[Tensor, list[int]]:
        """Losses, and the positions of their slides in the step: the group's, or all of them if they depend on each other.

        Raises:
            ConfigError: losses of pairs of slides, and an aggregator that learns from parts of one; on all ranks.
        """
        logits_BK, pooled = forward.logits_BK, forward.pooled
        if not self._couples:
            target_B = target_S[mine] if mine else _blank_target(target_S)
            return slide_losses(self._loss, logits_BK, pooled, target_B), mine
        if pooled.extra_logits_MK is not None or pooled.loss_B is not None:
            aggregator = type(self.engine.module.aggregator).__name__
            raise ConfigError(
                f"{aggregator} learns from parts of slides, and a loss that compares slides (cox) has nothing to say of them. Choose "
                "another science.aggregator, or science.task.loss: discrete."
            )
        everyone = list(range(len(target_S)))
        return self._loss(self._gather_logits(logits_BK, mine, len(everyone)), target_S) * pooled.weight, everyone

    def _gather_logits(self, logits_BK: Tensor, mine: list[int], num_slides: int) -> Tensor:
        """Logits of all slides of the step, (S, K), equal on all ranks; a gradient goes to those of the own group only."""
        logits_SK = logits_BK.new_zeros((num_slides, logits_BK.shape[1]))
        if self._ranks.topology.group_rank == 0:  # one rank of each group speaks for it
            logits_SK[mine] = logits_BK.detach()[: len(mine)]
        logits_SK = self._ranks.sum_world(logits_SK)
        if not mine:  # the blank slide's graph, with the same calls as the others'
            return logits_SK + 0 * logits_BK.sum()
        return logits_SK.index_copy(0, torch.tensor(mine, device=logits_SK.device), logits_BK)

    def _forward(self, calls: "_Calls", label_B: Tensor | None, *, is_training: bool, keep: bool) -> _Pass:
        plan, group = calls.plan, self._ranks.topology.group
        with self._alone():
            chunks, embedding_nD = calls.encode_all(keep)
        if keep and chunks:
            rows = [chunk.stop - chunk.start for chunk in chunks]
            self.kept_share = sum(rows[: self.num_keep]) / max(1, sum(rows))
        embedding_nD.requires_grad_(torch.is_grad_enabled())
        if not plan.groups[group]:
            return self._forward_blank(chunks, embedding_nD, is_training and label_B is not None, is_training)
        bag = Bag(
            embedding_nD=embedding_nD,
            position_n2=calls.tiles.position_n2.to(self.engine.device, non_blocking=True),
            sizes=plan.group_sizes(group),
            pool=self._ranks.pool(plan.counts(group)),
            tile_key_n=calls.tile_key_n,
            slide_key_B=calls.slide_key_B,
            label_B=label_B,
        )
        logits_BK, pooled = self.engine.classify(bag)
        return _Pass(chunks, embedding_nD, bag, logits_BK, pooled)

    def _forward_blank(
        self, chunks: list[EncodedChunk], embedding_nD: Tensor, has_classes: bool, is_training: bool
    ) -> _Pass:
        """A group without slides makes the same calls as the others, on one blank slide that nobody looks at."""
        topology, device = self._ranks.topology, self.engine.device
        size = min_tiles(self.engine.module.aggregator)  # type: ignore[arg-type]
        own = size if topology.group_rank == 0 else 0
        bag = Bag(
            embedding_nD=torch.cat([embedding_nD, embedding_nD.new_zeros((own, embedding_nD.shape[1]))]),
            position_n2=torch.zeros((own, 2), dtype=torch.float64, device=device),
            sizes=(size,),
            pool=self._ranks.pool([size] + [0] * (topology.group_size - 1)),
            tile_key_n=torch.zeros(own, dtype=torch.int64, device=device) if is_training else None,
            slide_key_B=torch.zeros(1, dtype=torch.int64, device=device) if is_training else None,
            label_B=torch.zeros(1, dtype=torch.int64, device=device) if has_classes else None,
        )
        logits_BK, pooled = self.engine.classify(bag)
        return _Pass(chunks, embedding_nD, bag, logits_BK, pooled)

    def _backward_encoder(self, calls: "_Calls", forward: _Pass) -> None:
        if calls.out_of_memory is not None:
            calls.poison()
            return
        cotangent_nD = forward.embedding_nD.grad
        if cotangent_nD is None:  # a rank without tiles: nothing of the head depends on its leaf
            cotangent_nD = torch.zeros_like(forward.embedding_nD)
        for number, chunk in enumerate(forward.chunks):
            upcoming = forward.chunks[number + 1 :]
            cotangent_cD = cotangent_nD[chunk.start : chunk.stop]
            if not calls.backward(chunk, cotangent_cD, next((c for c in upcoming if c.graph_cD is None), None)):
                return

    def _find_blame(self, calls: "_Calls", forward: _Pass) -> tuple[int, int] | None:
        """Why a step came to nothing: first tile with an embedding that is not finite, or too little memory.

        Raises:
            OutOfMemory: on all ranks, if some rank ran out of it.
        """
        topology, plan = self._ranks.topology, calls.plan
        found = torch.full((topology.world_size, 3), -1, dtype=torch.float64, device=self.engine.device)
        found *= torch.arange(topology.world_size, device=self.engine.device)[:, None] == topology.rank
        bad = torch.nonzero(~torch.isfinite(forward.embedding_nD).all(1)).flatten()
        if len(bad) and calls.error is None:
            slide = int(calls.tiles.slide_index_n[bad[0]])
            position = plan.groups[topology.group][slide]
            found[topology.rank, :2] = torch.tensor([position, int(calls.tiles.number_n[bad[0]])])
        if calls.out_of_memory is not None:
            found[topology.rank, 2] = calls.out_of_memory
        found = self._ranks.sum_world(found).cpu()
        tried = [int(size) for size in found[:, 2].tolist() if size > 0]
        if tried:
            raise OutOfMemory(min(tried))
        tiles = [(int(position), int(number)) for position, number, _ in found.tolist() if number >= 0]
        return tiles[0] if tiles else None

    def _halve(self, tried: int) -> None:
        refuse_no_memory(tried)
        self.chunk = min(self.chunk, tried // 2)
        self.num_keep = 0
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gather_losses(self, loss_B: Tensor, mine: list[int], num_slides: int) -> Tensor:
        loss_S = torch.zeros((num_slides, *loss_B.shape[1:]), dtype=torch.float64, device=self.engine.device)
        if self._ranks.topology.group_rank == 0:
            loss_S[mine] = loss_B.detach().double()[: len(mine)]
        return self._ranks.sum_world(loss_S).cpu()


def _blank_target(target_S: Tensor) -> Tensor:
    """The target of a slide that nobody looks at: the first class, or nothing known."""
    if target_S.is_floating_point():
        return target_S.new_full((1, *target_S.shape[1:]), math.nan)
    return target_S.new_zeros(1)


class _Calls:
    """The encoder calls of one step on this rank.

    What a rank meets alone must not keep it from the collectives that the others are in. Tiles that cannot be read
    become NaN, and so does the gradient of a chunk whose backward ran out of memory: the world's norm is then NaN, no
    rank changes its weights, and afterwards all ask each other why.

    Args:
        step: settings.
        plan, tiles: of the step.
        slide_key_S: keys of the draws; None outside training.
    """

    def __init__(self, step: ExactStep, plan: StepPlan, tiles: StepTiles, slide_key_S: Tensor | None) -> None:
        self.plan, self.tiles = plan, tiles
        self.size = step.chunk
        self.error: Exception | None = None
        self.out_of_memory: int | None = None  # `OutOfMemory.tried` of a call that did not fit and cannot be cut
        self._step = step
        self._engine = step.engine
        images = tiles.images
        self._upcoming: tuple[int, int] | None = None
        self.slide_key_B: Tensor | None = None
        self.tile_key_n: Tensor | None = None
        if slide_key_S is not None:
            slide_key_B = slide_key_S[list(plan.groups[step._ranks.topology.group])]
            if isinstance(images, BlockImages) and step._turn is not None:
                slides = tiles.slide_index_n[torch.from_numpy(images.first_n)]
                images = images.turned([step._turn(key) for key in slide_key_B[slides].tolist()])
            elif isinstance(images, SlideRows) and step._turn is not None:
                images = images.turned([step._turn(key) for key in slide_key_B.tolist()])
            self.slide_key_B = slide_key_B.to(self._engine.device, non_blocking=True)
            keys = DrawKeys.tiles(slide_key_B, tiles.slide_index_n, tiles.number_n)
            self.tile_key_n = keys.to(self._engine.device, non_blocking=True)
        self._blocks = images if isinstance(images, BlockImages) else None
        self._images = images
        self._feed = ChunkFeed(images, step.engine.device, step._cache_bytes)

    def __enter__(self) -> Self:
        self._feed.__enter__()
        return self

    def __exit__(self, *words: object) -> None:
        self._feed.__exit__(*words)

    def encode_all(self, keep: bool) -> tuple[list[EncodedChunk], Tensor]:
        """First pass over all tiles: the chunks and the embeddings (n, D), a leaf of float32 or wider."""
        num_tiles = self.tiles.num_tiles
        embedding_nD: Tensor | None = None
        chunks: list[EncodedChunk] = []
        todo = deque(self._ranges())
        while todo:
            start, stop = todo.popleft()
            self._upcoming = next((rows for rows in todo if rows[0] < rows[1]), None)
            keeps = keep and len(chunks) < self._step.num_keep
            found = _unless_out_of_memory(partial(encode_chunk, self._encode, start, stop, keeps))
            if found is None:
                smaller = self._smaller(start, stop, chunks, keeps)
                if not smaller:  # this rank is at its end, but the others learn of it in their place only
                    self.out_of_memory = 1
                    break
                todo.extendleft(reversed(smaller))
                continue
            chunk, embedding_cD = found
            chunks.append(chunk)
            if embedding_nD is None:
                dtype = torch.promote_types(embedding_cD.dtype, torch.float32)
                embedding_nD = embedding_cD.new_empty((num_tiles, embedding_cD.shape[1]), dtype=dtype)
            embedding_nD[start:stop] = embedding_cD[: stop - start]
        if self.out_of_memory is not None or embedding_nD is None:
            width = int(self._engine.module.encoder.dim)  # type: ignore[arg-type]
            dtype = torch.promote_types(self._engine.dtype, torch.float32)
            return [], torch.full((num_tiles, width), torch.nan, dtype=dtype, device=self._engine.device)
        return chunks, embedding_nD

    def backward(self, chunk: EncodedChunk, cotangent_cD: Tensor, upcoming: EncodedChunk | None) -> bool:
        """Back-propagate dL/dh of a chunk into the encoder; False gives up the step."""
        self._upcoming = None if upcoming is None else (upcoming.start, upcoming.stop)
        graph_cD = _unless_out_of_memory(partial(chunk_with_graph, chunk, self._encode))
        if graph_cD is None:
            if self._rows(chunk.start, chunk.stop) > 1 and chunk.random_state is None:
                return self._backward_halves(chunk, cotangent_cD)  # nothing was added to the gradients yet
            return self._give_up(chunk)
        if chunk.start == chunk.stop:  # a blank chunk takes part with a zero cotangent
            cotangent_cD = cotangent_cD.new_zeros(graph_cD.shape)
        product = cotangent_product(graph_cD, cotangent_cD)
        # In a backward that breaks off, a part of the gradients may have been added.
        done = _unless_out_of_memory(partial(_backward, self._engine, product)) is not None
        del graph_cD, product
        return done or self._give_up(chunk)

    def _give_up(self, chunk: EncodedChunk) -> bool:
        # Beside kept graphs there may have been too little memory, and without them enough: the size to try is the same,
        # that of a full chunk, however few tiles this one has.
        self.out_of_memory = 2 * self.size if self._step.num_keep else self._rows(chunk.start, chunk.stop)
        self.poison()
        return False

    def _backward_halves(self, chunk: EncodedChunk, cotangent_cD: Tensor) -> bool:
        return all(
            self.backward(
                replace(chunk, start=start, stop=stop), cotangent_cD[start - chunk.start : stop - chunk.start], None
            )
            for start, stop in self._halves(chunk.start, chunk.stop)
        )

    def _ranges(self) -> list[tuple[int, int]]:
        """Tile ranges of this rank's encoder calls; empty ranges are blank tiles.

        Every rank makes one call at least, so that all of its parameters have a gradient to reduce.
        """
        return self._cut(0, self.tiles.num_tiles) or [(0, 0)]

    def _cut(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Encoder calls on rows start..stop - 1, of the size of now."""
        if self._blocks is None:
            ranges = chunk_ranges(stop - start, self.size)
        else:
            slide_n = self.tiles.slide_index_n[start:stop].numpy()
            ranges = block_ranges(slide_n, self._blocks.cell_n2[start:stop], self.size)
        return [(start + first, start + last) for first, last in ranges]

    def _rows(self, start: int, stop: int) -> int:
        """Rows of the encoder call on tiles start..stop - 1, with those that fill it up, or that a block has room for."""
        if self._blocks is not None:
            return max(1, self._blocks.room(start, stop))
        return max(stop - start, self.size if self._step._pad else 1)

    def _halves(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Tile ranges in place of a call that did not fit; one, if only rows that fill it up become fewer."""
        self._step._halve(self._rows(start, stop))
        self.size = self._step.chunk
        return self._cut(start, stop) or [(start, stop)]

    def _smaller(self, start: int, stop: int, chunks: list[EncodedChunk], keeps: bool) -> list[tuple[int, int]]:
        """What to try in place of a call that did not fit: the same with no graph kept, then halves; empty: nothing."""
        if keeps or any(chunk.graph_cD is not None for chunk in chunks):
            self._step.num_keep = 0
            for chunk in chunks:
                chunk.graph_cD = None
            return [(start, stop)]
        return self._halves(start, stop) if self._rows(start, stop) > 1 else []

    def poison(self) -> None:
        """Make the gradient NaN, so that no rank uses it; every parameter gets one, as in any other step."""
        parameters = [p for p in self._engine.module.parameters() if p.requires_grad]
        self._engine.backward(torch.stack([p.sum() for p in parameters]).sum() * torch.nan)

    def _encode(self, start: int, stop: int) -> Tensor:
        """Embeddings of rows start..stop - 1; no rows give that of one blank tile."""
        if start == stop:
            blank = torch.zeros((1, *self.tiles.images.shape), dtype=torch.uint8, device=self._engine.device)
            return self._call(blank, None, 1)
        if self._blocks is not None:
            return self._encode_block(start, stop)
        try:
            image_cHWC = self._feed.get(start, stop, self._upcoming)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - given to the caller, who agrees on it with the other ranks
            self.error = self.error or error
            shape = (stop - start, *self.tiles.images.shape)
            image_cHWC = torch.full(shape, torch.nan, device=self._engine.device)
        return self._call(image_cHWC, None if self.tile_key_n is None else self.tile_key_n[start:stop], stop - start)

    def _encode_block(self, start: int, stop: int) -> Tensor:
        assert self._blocks is not None
        try:
            image_1HWC = self._feed.get(start, stop, self._upcoming)
            cell_c2 = self._blocks.cells(start, stop).to(self._engine.device, non_blocking=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - given to the caller, who agrees on it with the other ranks
            self.error = self.error or error
            image_1HWC = torch.full((1, *self._blocks.shape), torch.nan, device=self._engine.device)
            cell_c2 = torch.zeros((stop - start, 2), dtype=torch.int64, device=self._engine.device)
        return self._call_dense(image_1HWC, int(self.tiles.slide_index_n[start]), cell_c2)

    def _call_dense(self, image_1HWC: Tensor, slide: int, cells: Cells) -> Tensor:
        image_1CHW, slide_key_1 = to_float(image_1HWC, self._engine.dtype), None
        if self.slide_key_B is not None:
            slide_key_1 = self.slide_key_B[slide][None]
            if self._step._augment is not None:
                with torch.no_grad():
                    image_1CHW = self._step._augment(image_1CHW, slide_key_1)
        return self._engine.encode(image_1CHW, slide_key_1, cells)

    def _call(self, image_cHWC: Tensor, tile_key_c: Tensor | None, rows: int) -> Tensor:
        if self.tile_key_n is not None and tile_key_c is None:
            tile_key_c = torch.zeros(rows, dtype=torch.int64, device=self._engine.device)
        if self._step._pad and rows < self.size:
            image_cHWC = _padded(image_cHWC, self.size)
            tile_key_c = None if tile_key_c is None else _padded(tile_key_c, self.size)
        image_cCHW = to_float(image_cHWC, self._engine.dtype)
        if tile_key_c is not None and self._step._augment is not None:
            with torch.no_grad():
                image_cCHW = self._step._augment(image_cCHW, tile_key_c)
        return self._engine.encode(image_cCHW, tile_key_c)[:rows]


class _SharedCalls(_Calls):
    """The encoder calls of a step whose slides lie row by row on the ranks of the group: one for each slide.

    The ranks make a call together, layer by layer, so no rank can cut it alone where its memory runs out.
    """

    def encode_all(self, keep: bool) -> tuple[list[EncodedChunk], Tensor]:
        """First pass over the slides of the group: a chunk for each, and the embeddings (n, D) of this rank's tiles."""
        if not self._rows_of.num_slides:
            with _refused_out_of_memory():
                blank, embedding_1D = encode_chunk(self._encode, 0, 0, False)
            return [blank], embedding_1D[:0].to(torch.promote_types(embedding_1D.dtype, torch.float32))
        chunks, parts = [], []
        for slide in range(self._rows_of.num_slides):
            rows = self._rows_of.rows(slide)
            keeps = keep and slide < self._step.num_keep
            with _refused_out_of_memory():
                chunk, embedding_cD = encode_chunk(partial(self._encode_slide, slide), *rows, keeps)
            chunk.slide = slide
            chunks.append(chunk)
            parts.append(embedding_cD.to(torch.promote_types(embedding_cD.dtype, torch.float32)))
        return chunks, torch.cat(parts)

    def backward(self, chunk: EncodedChunk, cotangent_cD: Tensor, upcoming: EncodedChunk | None) -> bool:
        """Back-propagate dL/dh of a slide's cells into the encoder; all ranks of the group take part."""
        encode = self._encode if chunk.slide is None else partial(self._encode_slide, chunk.slide)
        with _refused_out_of_memory():
            graph_cD = chunk_with_graph(chunk, encode)
            if chunk.slide is None:
                cotangent_cD = cotangent_cD.new_zeros(graph_cD.shape)
            self._engine.backward(cotangent_product(graph_cD, cotangent_cD))
        return True

    @property
    def _rows_of(self) -> SlideRows:
        assert isinstance(self._images, SlideRows)
        return self._images

    def _encode_slide(self, slide: int, start: int, stop: int) -> Tensor:
        """Embeddings of rows start..stop - 1, maybe none, which are this rank's tiles of a slide."""
        images, ranks = self._rows_of, self._step._ranks
        upcoming = (slide + 1, slide + 2) if slide + 1 < images.num_slides else None
        try:
            image_1HWC = self._feed.get(slide, slide + 1, upcoming)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - given to the caller, who agrees on it with the other ranks
            self.error = self.error or error
            image_1HWC = torch.full(images.read_shape(slide), torch.nan, device=self._engine.device)
        cells = SharedSlide(
            self._step._sharded,
            images.bounds(slide),
            images.wanted(slide),
            ranks.topology.group_rank,
            ranks.pooling_group,
        )
        return self._call_dense(image_1HWC, slide, cells)


def fit_chunk(
    engine: Engine, ranks: Ranks, chunk: int, tile_px: int, geometry: Geometry | None = None
) -> tuple[int, int]:
    """The largest chunk whose graph every rank has memory for, by halves from `chunk`, and the bytes of that graph.

    All ranks call it.

    Raises:
        TrainingError: there is no memory for a single tile; on all ranks.
    """
    while True:
        kept = _unless_out_of_memory(partial(measure_chunk_bytes, engine, chunk, tile_px, geometry))
        num_failed = ranks.sum_world(torch.tensor(float(kept is None), device=engine.device))
        if kept is not None and not num_failed:
            return chunk, kept
        refuse_no_memory(chunk)
        chunk //= 2


def measure_chunk_bytes(engine: Engine, chunk: int, tile_px: int, geometry: Geometry | None = None) -> int:
    """Bytes that one encoder call on `chunk` tiles keeps for its backward: an encoder forward, which changes nothing.

    All ranks call it.

    Args:
        geometry: of a dense encoder, whose call is a block inside a slide.
    """
    image, key, cell_c2 = blank_call(chunk, tile_px, geometry)
    image, key = image.to(engine.device, engine.dtype), key.to(engine.device)
    cell_c2 = None if cell_c2 is None else cell_c2.to(engine.device)
    with engine.gathered(), LiveBytes() as live:
        graph_cD = engine.encode(image, key, cell_c2)
        kept = live.now
    del graph_cD
    return kept


def blank_call(chunk: int, tile_px: int, geometry: Geometry | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the encoder is called with on `chunk` black tiles, on the CPU: image, keys, cells of a block.

    Args:
        geometry: of a dense encoder: the block is the largest, a square of tiles inside a slide.
    """
    if geometry is None:
        return torch.zeros((chunk, 3, tile_px, tile_px)), torch.zeros(chunk, dtype=torch.int64), None
    side = block_side(chunk)
    height, width = (side * tile_px + net.halo for net in (geometry.rows, geometry.cols))
    cell_c2 = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return torch.zeros((1, 3, height, width)), torch.zeros(1, dtype=torch.int64), cell_c2


def refuse_no_memory(tried: int) -> None:
    """Refuse to halve a call of one tile.

    Raises:
        TrainingError: says what to change.
    """
    if tried == 1:
        raise TrainingError(
            "the device has no memory for a single tile. Set execution.activation_checkpointing, take a smaller "
            "encoder or smaller tiles, or see `gigamil plan`."
        )


def attention_of(bag: Bag, pooled: Pooled, logits_BK: Tensor) -> Tensor:
    """Attention (n, A) that sums to 1 over a slide, from what the aggregator gave; of those of each logit that of the largest."""
    weight_nA = pooled.attention_nA
    if weight_nA is None:
        assert pooled.score_nA is not None, "an aggregator gives attention or scores"
        weight_nA = bag.segment_softmax(pooled.score_nA)
    if pooled.per_class:
        predicted_n = logits_BK.argmax(1)[bag.slide_index_n]
        weight_nA = weight_nA.gather(1, predicted_n[:, None])
    return weight_nA


@contextmanager
def _refused_out_of_memory() -> Iterator[None]:
    """Say what to change where ranks that wait for each other have too little memory.

    Raises:
        TrainingError: on this rank; whoever started the ranks ends the others.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device has no memory for this rank's rows of a slide: execution.halo=exchange keeps all activations. "
            "Set execution.memory=replay (one slide at a time), more execution.ranks, or execution.halo=read."
        ) from error


def _unless_out_of_memory(function: Callable[[], Result]) -> Result | None:
    """What the function returns; None if the device has no memory for it."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return None


def _backward(engine: Engine, scalar: Tensor) -> bool:
    engine.backward(scalar)
    return True


def _padded(values_cX: Tensor, rows: int) -> Tensor:
    return torch.cat([values_cX, values_cX.new_zeros((rows - len(values_cX), *values_cX.shape[1:]))])

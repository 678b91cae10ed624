"""Whether end-to-end training is healthy: does attention still choose, does one tile decide, has the encoder moved?

Shapes: S slides of a step, n tiles on this rank, A attention columns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.data.pipeline import StepTiles
from gigamil.partition.schedule import StepPlan
from gigamil.train.step import Ranks

ONE_TILE = 1.5  # tiles that decide, on average: fewer is one, for practical purposes
EVEN = 0.999  # of the largest entropy: no tile counts more than another
MOST = 0.5  # share of slides from which on it is said


@dataclass
class AttentionMonitor:
    """Gathers how attention is spread over the tiles of slides.

    Attributes:
        entropy: of each slide, of the largest that its number of tiles allows: 0 one tile, 1 all alike; NaN of a single tile.
        max_n: largest attention times number of tiles: 1 if all are alike.
        tiles: exp(entropy): so many tiles decide.
    """

    entropy: list[float] = field(default_factory=list)
    max_n: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)

    def note(self, plan: StepPlan, tiles: StepTiles, attention_nA: Tensor, ranks: Ranks) -> None:
        """Add the slides of a plan. All ranks call it; what is gathered is equal on all.

        Args:
            attention_nA: of this rank's tiles, from `ExactStep.evaluate`.
        Cost: two all-reduces of S numbers.
        """
        group = torch.tensor(plan.groups[ranks.topology.group], dtype=torch.int64)
        share_n = attention_nA.double().mean(dim=1)
        slide_n = group[tiles.slide_index_n].to(share_n.device)
        own_S = share_n.new_zeros(len(plan.slides))
        logs_n = torch.where(share_n > 0, -share_n * share_n.clamp(min=torch.finfo(share_n.dtype).tiny).log(), 0.0)
        entropy_S = ranks.sum_world(own_S.index_add(0, slide_n, logs_n))
        most_S = own_S.scatter_reduce(0, slide_n, share_n, "amax")
        if ranks.world is not None:
            dist.all_reduce(most_S, op=dist.ReduceOp.MAX, group=ranks.world)
        for size, entropy, most in zip(plan.sizes, entropy_S.tolist(), most_S.tolist(), strict=True):
            self.entropy.append(entropy / math.log(size) if size > 1 else math.nan)
            self.max_n.append(most * size)
            self.tiles.append(math.exp(entropy))

    def values(self, is_negative: Sequence[bool]) -> dict[str, float]:
        """Means over slides; `attention_max_n_negative` over those in which nothing should stand out.

        Args:
            is_negative: of each slide, in the order in which they were added; empty if the task does not tell.
        """
        known = [value for value in self.entropy if not math.isnan(value)]
        negative = [value for value, is_one in zip(self.max_n, is_negative, strict=False) if is_one]
        found = {"attention_entropy": _mean(known), "attention_max_n": _mean(self.max_n)}
        found["attention_max_n_negative"] = _mean(negative)
        return {name: value for name, value in found.items() if value is not None}

    def warning(self) -> str | None:
        """What is wrong with the attention of most slides; None if nothing is."""
        if not self.entropy:
            return None
        known = [value for value in self.entropy if not math.isnan(value)]
        single = sum(tiles < ONE_TILE and not math.isnan(e) for tiles, e in zip(self.tiles, self.entropy, strict=True))
        if known and single >= MOST * len(known) and len(known) > 1:
            return (
                f"attention has collapsed: in {single} of {len(known)} validation slides a single tile decides. Lower "
                "science.optim.lr_head or lr_encoder, take more slides per step, or an aggregator with several heads or a dropout."
            )
        even = sum(value > EVEN for value in known)
        if known and even >= MOST * len(known) and len(known) > 1:
            return (
                f"attention does not choose: in {even} of {len(known)} validation slides all tiles count alike. Before anything is "
                "learned that is so; if it stays, the aggregator gets no gradient to speak of."
            )
        return None


def encoder_drift(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float | None:
    """How far the encoder has moved since the start: |w - w0| / |w0|; None if no part of it is trained.

    Args:
        parameters: of the model, by name.
        start: those of the encoder that are trained, as they were, on the CPU.
    """
    moved = norm = 0.0
    for name, before in start.items():
        moved += float((parameters[name].detach().to("cpu", torch.float64) - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return math.sqrt(moved / norm) if norm else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None

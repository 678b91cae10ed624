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
LONG = 5  # epochs without a choice


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

    @property
    def num_known(self) -> int:
        """Slides of more than one tile."""
        return sum(not math.isnan(value) for value in self.entropy)

    @property
    def num_single(self) -> int:
        """Slides of more than one tile in which one decides."""
        return sum(n < ONE_TILE and not math.isnan(e) for n, e in zip(self.tiles, self.entropy, strict=True))

    def num_even(self, is_negative: Sequence[bool]) -> tuple[int, int]:
        """Slides in which all tiles count alike, and slides of more than one tile; without the negative ones, where that is right.

        Args:
            is_negative: of each slide, in the order in which they were added; empty if the task does not tell.
        """
        negative = is_negative or [False] * len(self.entropy)
        known = [value for value, is_one in zip(self.entropy, negative, strict=True) if not is_one]
        return sum(value > EVEN for value in known), sum(not math.isnan(value) for value in known)


class AttentionWatch:
    """Says once what is wrong with the attention of most validation slides."""

    def __init__(self) -> None:
        self._even_in_a_row = 0
        self._said: set[str] = set()

    def look(self, monitor: AttentionMonitor, is_negative: Sequence[bool]) -> str | None:
        """The warning after a validation; None if all is well, or it was said before.

        Args:
            is_negative: of each slide, in the order in which they were added; empty if the task does not tell.
        """
        known = monitor.num_known
        is_single = known > 1 and monitor.num_single >= MOST * known
        num_even, choosing = monitor.num_even(is_negative)
        is_even = choosing > 1 and num_even >= MOST * choosing
        self._even_in_a_row = self._even_in_a_row + 1 if is_even else 0
        if is_single and self._is_new("single"):
            return (
                f"attention has collapsed: in {monitor.num_single} of {known} validation slides a single tile decides. Lower "
                "science.optim.lr_head or lr_encoder, take more slides per step, or an aggregator with several heads or a dropout."
            )
        # Before anything is learned all count alike.
        if self._even_in_a_row >= LONG and self._is_new("even"):
            which = " that are not of the first class" if any(is_negative) else ""
            return (
                f"attention does not choose: for {LONG} epochs all tiles have counted alike in most validation slides{which} (now in "
                f"{num_even} of {choosing}). Raise science.optim.lr_head, or let the head learn first "
                "(science.optim.freeze_encoder_epochs)."
            )
        return None

    def _is_new(self, kind: str) -> bool:
        is_new = kind not in self._said
        self._said.add(kind)
        return is_new


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

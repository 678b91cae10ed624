"""What a run has spent on training: the axes on which regimes are compared fairly."""

from dataclasses import dataclass, replace
from typing import Self

from gigamil.partition.schedule import StepPlan


@dataclass(frozen=True)
class Spent:
    """Of training, validation left out.

    Attributes:
        tiles: whose gradient was taken, or whose features, over all steps.
        tile_forwards: forward passes of a tile through the encoder: first ones, those of chunks that are encoded again for
            their backward, and scans that choose tiles. A backward counts nothing: there is one per tile in `tiles`.
        seconds: of steps and of reading for them, as rank 0 saw them, over all sessions.
        rank_seconds: those times the number of ranks.
    """

    tiles: int = 0
    tile_forwards: int = 0
    seconds: float = 0.0
    rank_seconds: float = 0.0

    def plus_step(self, plan: StepPlan, *, kept: float, train_encoder: bool, on_features: bool) -> Self:
        """With a step added.

        Args:
            kept: tiles of a rank, at most, whose graphs are kept; or the share of them, of dense encoders, whose blocks differ in size.
            train_encoder: False encodes every tile once.
            on_features: nothing is encoded.
        """
        tiles = sum(plan.sizes)
        forwards = 0 if on_features else tiles
        if train_encoder and not on_features:
            counts = [own for group in range(len(plan.groups)) for own in plan.counts(group)]
            if isinstance(kept, float):
                forwards += round(sum(counts) * (1 - kept))
            else:
                forwards += sum(max(0, own - kept) for own in counts)
        return replace(self, tiles=self.tiles + tiles, tile_forwards=self.tile_forwards + forwards)

    def plus_forwards(self, tiles: int) -> Self:
        """With so many tiles encoded and nothing learned of them."""
        return replace(self, tile_forwards=self.tile_forwards + tiles)

    def plus_time(self, seconds: float, num_ranks: int) -> Self:
        """With time added."""
        return replace(self, seconds=self.seconds + seconds, rank_seconds=self.rank_seconds + seconds * num_ranks)

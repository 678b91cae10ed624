"""An encoder that sleeps in place of computing: for measuring everything around it on a machine with few cores.

    gigamil train my.yaml --plugin gigamil.testing.sleep --science.encoder.name sleep

Eight ranks that compute on two cores take four times as long as on eight, and a scaling curve of them shows the cores. Ranks
that sleep do not: tiles are read and decoded, embeddings, collectives, gradients and the optimiser are real, and the time of
the encoder is what was asked for.

Shapes: n tiles of a chunk, C H W image, D embedding.
"""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gigamil.models.encoder import encoders

_GRID = 4  # an image is averaged to so many cells along each side


class Pace:
    """Makes calls take a given time. What one takes too long, those after it take less, so that the sum is right.

    A sleep ends some 0.1 ms late, and a core that others use too gives back what it owes in the next call.
    """

    def __init__(self) -> None:
        self._owed = 0.0

    def sleep(self, seconds: float, since: float) -> None:
        """Sleep until so many seconds have passed since `since`, a time of `time.perf_counter`."""
        self._owed += seconds - (time.perf_counter() - since)
        if self._owed > 0:
            start = time.perf_counter()
            time.sleep(self._owed)
            self._owed -= time.perf_counter() - start


class _SleepInBackward(torch.autograd.Function):
    """Identity; its backward takes time."""

    @staticmethod
    def forward(ctx: Any, embedding_nD: Tensor, pace: Pace, seconds: float) -> Tensor:
        """The same values."""
        ctx.pace, ctx.seconds = pace, seconds
        return embedding_nD.view_as(embedding_nD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sleep; the same gradient."""
        ctx.pace.sleep(ctx.seconds, time.perf_counter())
        return grads[0], None, None


@encoders.register("sleep")
class SleepEncoder(nn.Module):
    """A linear layer on a tile of 4 x 4 averaged pixels, which takes as long as it is told.

    Args:
        seconds_per_tile: of a forward; a backward takes twice as long.
        dim: D.
        ballast: more parameters, whose mean is added to every number of an embedding: a gradient of this size.
        slow_rank: takes `slow_times` as long; None: all are equal.
        slow_times: see there.
    """

    def __init__(
        self,
        seconds_per_tile: float = 1e-3,
        dim: int = 16,
        ballast: int = 0,
        slow_rank: int | None = None,
        slow_times: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.project = nn.Linear(3 * _GRID**2, dim)
        self.ballast = nn.Parameter(torch.zeros(ballast)) if ballast else None
        self.block_names = [["project"] if self.ballast is None else ["project", "ballast"]]
        is_slow = slow_rank is not None and dist.is_initialized() and dist.get_rank() == slow_rank
        self._seconds_per_tile = seconds_per_tile * (slow_times if is_slow else 1.0)
        self._pace = Pace()

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Normalised images -> embedding (n, D)."""
        start = time.perf_counter()
        seconds = len(image_nCHW) * self._seconds_per_tile
        cells_nCHW = nn.functional.adaptive_avg_pool2d(image_nCHW, _GRID)
        embedding_nD: Tensor = self.project(cells_nCHW.flatten(1))
        if self.ballast is not None:
            embedding_nD = embedding_nD + self.ballast.mean()
        self._pace.sleep(seconds, start)
        slept_nD: Tensor = _SleepInBackward.apply(embedding_nD, self._pace, 2 * seconds)
        return slept_nD

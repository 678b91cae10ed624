"""A dense encoder's network on one slide whose rows of pixels lie on the ranks of a group: `execution.halo: exchange`.

Shapes: C H W image, D h w grid, c cells that this rank wants.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.parallel.collectives import fetch_rows
from gigamil.parallel.halo import Bounds, ShardedNetwork


class SharedSlide:
    """Rows of a slide's pixels -> embeddings of the cells that each rank wants; differentiable.

    Args:
        network: of the encoder.
        bounds: of the rows of pixels on the ranks.
        wanted: for each rank, the cells that it wants: row x columns of the grid + column.
        rank: of this process in the group.
        group: the ranks, or None for a process alone.
    Cost: that of `ShardedNetwork`, and one all-to-all of the wanted cells, one more in backward.
    """

    def __init__(
        self,
        network: ShardedNetwork,
        bounds: Bounds,
        wanted: Sequence[np.ndarray],
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._network, self._bounds, self._wanted, self._rank, self._group = network, bounds, wanted, rank, group

    def __call__(self, image_1CHW: Tensor) -> Tensor:
        """This rank's rows, normalised -> embeddings (c, D). All ranks call it."""
        grid_1Dhw, cuts = self._network(image_1CHW, self._bounds)
        width = grid_1Dhw.shape[3]
        cell_XD = grid_1Dhw[0].flatten(1).T
        if self._group is None:
            return cell_XD[torch.from_numpy(self._wanted[0]).to(cell_XD.device)]
        counts = [(stop - start) * width for start, stop in itertools.pairwise(cuts)]
        ranges = [[(cell, cell + 1) for cell in cells.tolist()] for cells in self._wanted]
        return fetch_rows(cell_XD.contiguous(), counts, ranges, self._rank, self._group)

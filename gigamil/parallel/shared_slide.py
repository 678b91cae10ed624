"""A dense encoder's network on one slide whose rows of pixels lie on the ranks of a group: `execution.halo: exchange`.

Shapes: C H W image, D h w grid, c cells that this rank wants.
"""

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
        first_R = np.array(cuts[:-1]) * width
        # Who has a cell is the last rank that begins at or before it: others that begin there have none.
        owners = [np.searchsorted(first_R, cells, side="right") - 1 for cells in self._wanted]
        mine = [cells[owner == self._rank] for cells, owner in zip(self._wanted, owners, strict=True)]
        own_XD = cell_XD[_index(np.concatenate(mine) - first_R[self._rank], cell_XD.device)]
        if self._group is None:
            return own_XD
        # Each rank sends each other one run of rows; what comes is in the order of its owners.
        sent_RR = np.array([np.bincount(owner, minlength=len(first_R)) for owner in owners]).T
        stop_RR = sent_RR.cumsum().reshape(sent_RR.shape)
        runs_RR2 = np.stack([stop_RR - sent_RR, stop_RR], axis=2)
        ranges = [
            [(start, stop) for start, stop in runs_R2.tolist() if start < stop] for runs_R2 in runs_RR2.swapaxes(0, 1)
        ]
        found_cD = fetch_rows(own_XD, sent_RR.sum(axis=1).tolist(), ranges, self._rank, self._group)
        order = np.argsort(owners[self._rank], kind="stable")
        return found_cD[_index(np.argsort(order), cell_XD.device)]


def _index(numbers: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int64)).to(device)

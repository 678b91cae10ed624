"""CLAM: attention pooling whose most and least attended tiles also learn as instances.

Shapes: n tiles on this rank, B slides, D embedding, E projected, A attention branches, K classes, k tiles per end, M
picked tiles of a slide, C columns that are looked at: one, or K.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import GatedScores, HeadLinear, check_counts
from gigamil.models.bag import Bag, Pooled, softmax_pool
from gigamil.models.dropout import KeyedDropout


@aggregators.register("clam_sb")
class ClamSingleBranch(nn.Module):
    """CLAM with one attention branch: z = sum_i a_i h'_i, h'_i = relu(W h_i), and a loss of its instances.

    In training every class k has a classifier of instances, g_k(h') in two logits. For the class of the slide the k
    tiles of highest attention are to give 1 and the k of lowest to give 0; cross entropy is averaged over the 2k. With
    `subtyping` a tile of one class is none of another: for every other class the k highest are to give 0, averaged
    over k, and the sum over classes is divided by K. k is min(k, N // 2) for a slide of N tiles, so a slide of one tile
    has no instance loss. The loss of a slide is bag_weight x loss(logits) + (1 - bag_weight) x instance loss.

    Args:
        dim: embedding width D.
        num_classes: K; labels must be classes 0 .. K - 1.
        width: rows of W.
        hidden: rows of V and U of the gated attention.
        k: tiles at each end.
        subtyping: the other classes learn too.
        bag_weight: share of the loss of the slide's logits.
        dropout: keyed dropout on h'.
    Raises:
        ConfigError: a share that is none, or a count below 1.
    Cost: one max all-reduce of B A numbers, one sum of B A (E + 1); in training one all-gather of 4 B k A float64
        numbers and one sum of B M E, where M is 2 k (k K + k with `subtyping` and a branch per class); in backward the
        two sums again. A is 1, or K with a branch per class.
    Source: Lu et al. 2021, doi:10.1038/s41551-020-00682-w, arXiv:2004.09666. The instance loss is the cross entropy,
        which the authors' code offers beside the smooth top-1 SVM.
    """

    per_class: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_classes: int,
        width: int = 512,
        hidden: int = 256,
        k: int = 8,
        subtyping: bool = False,
        bag_weight: float = 0.7,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(width=width, k=k)
        if not 0 <= bag_weight <= 1:
            raise ConfigError(f"bag_weight={bag_weight} must be from 0 to 1")
        self.project = nn.Linear(dim, width)
        self.score = GatedScores(width, hidden, num_classes if self.per_class else 1)
        self.instance = nn.Linear(width, 2 * num_classes)
        self.dropout = KeyedDropout(dropout, "aggregator.projection")
        self.num_classes = num_classes
        self.k = k
        self.subtyping = subtyping
        self.bag_weight = bag_weight
        self.classify = HeadLinear(num_classes, width, 1) if self.per_class else None
        self.out_dim = None if self.per_class else width

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, E), or logits (B, K) with a branch per class, and attention (n, A)."""
        value_nE = self.dropout(F.relu(self.project(bag.embedding_nD)), bag.tile_key_n)
        score_nA = self.score(value_nE)
        pooled_BAE, attention_nA = softmax_pool(score_nA, value_nE, bag)
        slide_BX = pooled_BAE[:, 0] if self.classify is None else self.classify(pooled_BAE)[:, :, 0]
        pooled = Pooled(slide_BX, attention_nA, per_class=self.per_class)
        if bag.label_B is None:
            return pooled
        loss_B = (1 - self.bag_weight) * self.instance_loss(score_nA, value_nE, bag, bag.label_B)
        return pooled._replace(weight=self.bag_weight, loss_B=loss_B)

    def instance_loss(self, score_nA: Tensor, value_nE: Tensor, bag: Bag, label_B: Tensor) -> Tensor:
        """Loss of the instances of each slide, (B,)."""
        top_BkC, bottom_BkA = bag.top(torch.cat([score_nA, -score_nA], dim=1), self.k).chunk(2, dim=2)
        bottom_Bk1 = _of_label(bottom_BkA, label_B)
        if not self.subtyping:
            top_BkC = _of_label(top_BkC, label_B)
        number_BM = torch.cat([top_BkC.flatten(1), bottom_Bk1.flatten(1)], dim=1)
        value_BME = bag.pick(value_nE, number_BM.flatten()).view(*number_BM.shape, -1)
        logp_BMK2 = self.instance(value_BME).unflatten(2, (self.num_classes, 2)).log_softmax(3)
        logp_BkCK2 = logp_BMK2[:, : -self.k].unflatten(1, (self.k, -1))
        if logp_BkCK2.shape[2] == 1:  # all classes look at the same tiles
            logp_BkCK2 = logp_BkCK2.expand(-1, -1, self.num_classes, -1, -1)
        top_Bk2K = torch.diagonal(logp_BkCK2, dim1=2, dim2=3)
        none_BkK = logp_BMK2[:, -self.k :, :, 0]
        is_own_B1K = label_B[:, None, None] == torch.arange(self.num_classes, device=label_B.device)
        # Per tile, summed over classes: the mean over 2k, or over k, is taken with the slide's own k below.
        own_Bk = (torch.where(is_own_B1K, -top_Bk2K[:, :, 1] - none_BkK, 0.0) / 2).sum(2)
        other_Bk = torch.where(is_own_B1K, 0.0, -top_Bk2K[:, :, 0]).sum(2)
        loss_Bk = (own_Bk + other_Bk) / self.num_classes if self.subtyping else own_Bk
        # On the CPU first: sizes are known there, and the copy need not wait.
        k_B1 = torch.tensor([min(self.k, size // 2) for size in bag.sizes], dtype=torch.float64)[:, None]
        weight_Bk = (torch.arange(self.k) < k_B1) / k_B1.clamp(min=1)
        return (loss_Bk * weight_Bk.to(loss_Bk, non_blocking=True)).sum(1)


@aggregators.register("clam_mb")
class ClamMultiBranch(ClamSingleBranch):
    """CLAM with an attention branch per class: z_k = sum_i a_ik h'_i, logit_k = c_k . z_k + b_k.

    Class k looks for its highest and lowest tiles in its own branch. All else, arguments included, is that of
    `ClamSingleBranch`.

    Source: Lu et al. 2021, doi:10.1038/s41551-020-00682-w, arXiv:2004.09666.
    """

    per_class = True


def _of_label(number_BkA: Tensor, label_B: Tensor) -> Tensor:
    """The column of each slide's class, or the only one, (B, k, 1)."""
    if number_BkA.shape[2] == 1:
        return number_BkA
    return number_BkA.gather(2, label_B[:, None, None].expand(-1, number_BkA.shape[1], 1))

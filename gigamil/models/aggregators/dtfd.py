"""DTFD-MIL: a slide is split into pseudo-bags that learn its label, and what they distil is pooled once more.

Shapes: n tiles on this rank, B slides, E projected, K classes, G pseudo-bags of a slide at most, M those of all slides,
F features of all pseudo-bags: M, or 2 M.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil import keyed
from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import GatedScores, check_counts
from gigamil.models.bag import Bag, Pooled
from gigamil.models.dropout import KeyedDropout

DISTIL = ("afs", "maxs", "maxmins")
DRAW = keyed.text_key("aggregator.pseudo_bags")


@aggregators.register("dtfd")
class DoubleTier(nn.Module):
    """Gated attention over each pseudo-bag, a feature of each, gated attention over those.

    h'_i = relu(W h_i). Tier 1: u_g = sum_i a_i h'_i with gated attention a over pseudo-bag g, and a linear classifier t
    of u_g that learns the slide's label with weight 1 / G_s. Tier 2: z = sum_g b_g x_g with gated attention b over the
    features x that pseudo-bags distil: their u_g (`afs`), the h'_i of highest instance probability (`maxs`), or those
    of highest and lowest (`maxmins`). The instance probability is that of the classes but the first in
    softmax(t(a_i h'_i)); with two classes that is the positive one. Of equal tiles the lowest number is taken.

    A slide of N tiles has G_s = min(G, N) pseudo-bags. Of every G_s consecutive tiles each goes to another one: in
    an order drawn from (step, slide) in training, in their own order outside it. So their sizes differ by one at most,
    and who is where does not depend on ranks. The attention given of a tile is that of its pseudo-bag in tier 2 times
    its own in tier 1.

    Args:
        dim: embedding width.
        num_classes: K.
        groups: G.
        distil: "afs", "maxs" or "maxmins".
        width: rows of W.
        hidden: rows of V and U of both attentions.
        dropout: keyed dropout on h'.
    Raises:
        ConfigError: an unknown way to distil, or a count below 1.
    Cost: one max all-reduce of M numbers, one sum of M (E + 1); with `maxs` two more max of M and one sum of M E, with
        `maxmins` of twice as many; in backward the sums again. Tier 2 is computed on every rank.
    Source: Zhang et al. 2022, arXiv:2203.12081; random pseudo-bags are balanced here, not drawn tile by tile.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        groups: int = 5,
        distil: str = "afs",
        width: int = 512,
        hidden: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(groups=groups, width=width)
        if distil not in DISTIL:
            raise ConfigError(f"distil={distil!r} must be one of {', '.join(DISTIL)}")
        self.project = nn.Linear(dim, width)
        self.score1 = GatedScores(width, hidden, 1)
        self.classify1 = nn.Linear(width, num_classes)
        self.score2 = GatedScores(width, hidden, 1)
        self.dropout = KeyedDropout(dropout, "aggregator.projection")
        self.groups = groups
        self.distil = distil
        self.out_dim = width

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, E), attention (n, 1), and the logits of the pseudo-bags."""
        sizes = [min(self.groups, size) for size in bag.sizes]
        segment_n, num_segments = pseudo_bags(bag, self.groups), sum(sizes)
        value_nE = self.dropout(F.relu(self.project(bag.embedding_nD)), bag.tile_key_n)
        score_n1 = self.score1(value_nE)
        weight_n1 = torch.exp(score_n1 - bag.segment_max(score_n1, segment_n, num_segments)[segment_n])
        total_MX = bag.segment_sum(torch.cat([weight_n1 * value_nE, weight_n1], dim=1), segment_n, num_segments)
        attention_n1 = weight_n1 / total_MX[segment_n, -1:]
        pooled_ME = total_MX[:, :-1] / total_MX[:, -1:]
        logit_MK = self.classify1(pooled_ME)
        if self.distil == "afs":
            feature_FE, per_bag = pooled_ME, 1
        else:
            with torch.no_grad():  # the tiles' logits only choose
                instance_nK = self.classify1(attention_n1 * value_nE)
            number_MX = self._chosen(instance_nK, segment_n, num_segments, bag)
            feature_FE, per_bag = bag.pick(value_nE, number_MX.flatten()), number_MX.shape[1]
        slide_BE, attention_F = _pool(self.score2(feature_FE), feature_FE, [size * per_bag for size in sizes])
        attention_M1 = attention_F.view(num_segments, per_bag).sum(1, keepdim=True)
        slide_M = torch.repeat_interleave(torch.arange(bag.num_slides), torch.tensor(sizes), output_size=num_segments)
        share_M = torch.cat([torch.full((size,), 1 / size, dtype=torch.float64) for size in sizes])
        return Pooled(
            slide_BE,
            attention_M1[segment_n] * attention_n1,
            extra_logits_MK=logit_MK,
            extra_slide_M=slide_M.to(logit_MK.device, non_blocking=True),
            extra_weight_M=share_M.to(logit_MK, non_blocking=True),
        )

    def _chosen(self, logit_nK: Tensor, segment_n: Tensor, num_segments: int, bag: Bag) -> Tensor:
        """Pooled number of each pseudo-bag's tile of highest probability, and of lowest, (M, 1 or 2)."""
        # log p / (1 - p), because p itself rounds to equal values.
        margin_n1 = torch.logsumexp(logit_nK[:, 1:], dim=1, keepdim=True) - logit_nK[:, :1]
        margin_nX = margin_n1 if self.distil == "maxs" else torch.cat([margin_n1, -margin_n1], dim=1)
        is_best_nX = margin_nX == bag.segment_max(margin_nX, segment_n, num_segments)[segment_n]
        number_n1 = torch.arange(len(logit_nK), dtype=torch.float64, device=logit_nK.device)[:, None] + bag.first
        return -bag.segment_max(torch.where(is_best_nX, -number_n1, -torch.inf), segment_n, num_segments).long()


def pseudo_bags(bag: Bag, groups: int) -> Tensor:
    """Pseudo-bag of each tile of this rank, int64 (n,), numbered through all slides.

    Args:
        groups: of a slide; fewer where it has fewer tiles.
    """
    slide_n, device = bag.slide_index_n, bag.embedding_nD.device
    # On the CPU first: what depends on sizes is known there, and the copies need not wait.
    count_B = torch.tensor([min(groups, size) for size in bag.sizes])
    facts_3B = torch.stack([count_B, torch.cumsum(count_B, 0) - count_B, torch.tensor(bag.offsets)])
    count_n, start_n, offset_n = facts_3B.to(device, non_blocking=True)[:, slide_n]
    number_n = torch.arange(len(slide_n), device=device) + bag.first - offset_n
    place_n = number_n % count_n
    if bag.slide_key_B is not None:
        key_n = keyed.fold(keyed.fold(bag.slide_key_B, DRAW)[slide_n], number_n // count_n)
        draw_nG = keyed.uniform(key_n, groups)
        draw_nG = torch.where(torch.arange(groups, device=device) < count_n[:, None], draw_nG, torch.inf)
        # A permutation of the places: where a stable sort of the draws puts each.
        order_nG = torch.argsort(torch.argsort(draw_nG, dim=1, stable=True), dim=1)
        place_n = order_nG.gather(1, place_n[:, None])[:, 0]
    return start_n + place_n


def _pool(score_F1: Tensor, feature_FE: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Softmax pooling of the features of each slide, (B, E), and their attention (F,)."""
    attention = [torch.softmax(score_X1[:, 0], dim=0) for score_X1 in score_F1.split(sizes)]
    pooled = [a_X @ feature_XE for a_X, feature_XE in zip(attention, feature_FE.split(sizes), strict=True)]
    return torch.stack(pooled), torch.cat(attention)

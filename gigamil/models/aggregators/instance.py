"""Pooling without attention: of embeddings (mean, maximum), or of the logits of single tiles.

Shapes: n tiles on this rank, B slides, D embedding, K classes, k best tiles.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import check_counts, pick_entries
from gigamil.models.bag import Bag, Pooled
from gigamil.models.dropout import KeyedDropout


class InstancePooling(nn.Module):
    """A classifier f of single tiles; subclasses say how the logits f_k(h_i) of a slide become one.

    Scores are the logits of the tiles, one column per class.

    Args:
        dim: embedding width D.
        num_classes: K.
        hidden: width of a hidden layer of f, with a ReLU; 0 makes f linear.
        dropout: keyed dropout on the embeddings.
        one_sided: of two classes f has a logit for the second only, and that of the first is 0: no tile speaks for the first.
    Raises:
        ConfigError: `one_sided` and another number of classes than two.
    """

    out_dim = None

    def __init__(
        self, dim: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, one_sided: bool = False
    ) -> None:
        super().__init__()
        if hidden:
            check_counts(hidden=hidden)
        if one_sided and num_classes != 2:
            raise ConfigError(
                f"one_sided takes two classes, the second of which is what tiles show; here are {num_classes}"
            )
        layers = [nn.Linear(dim, hidden), nn.ReLU()] if hidden else []
        self.classify = nn.Sequential(*layers, nn.Linear(hidden or dim, 1 if one_sided else num_classes))
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.one_sided = one_sided

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> logits (B, K), and those of the tiles (n, K)."""
        logit_nK = self.classify(self.dropout(bag.embedding_nD, bag.tile_key_n))
        logit_BK = self.pooled(logit_nK, bag)
        if self.one_sided:
            logit_BK, logit_nK = F.pad(logit_BK, (1, 0)), F.pad(logit_nK, (1, 0))
        return Pooled(logit_BK, score_nA=logit_nK, per_class=True)

    def pooled(self, logit_nK: Tensor, bag: Bag) -> Tensor:
        """Logits of tiles (n, K) -> logits of slides (B, K)."""
        raise NotImplementedError


@aggregators.register("mean")
class MeanPooling(InstancePooling):
    """Mean of instance logits: logit_k = sum_i f_k(h_i) / N.

    Arguments are those of `InstancePooling`.

    Cost: one sum all-reduce of B K numbers, and one in backward.
    Source: Wang et al. 2018 ("mi-Net"), arXiv:1610.02501; with a linear f it is also the classifier of the mean.
    """

    def pooled(self, logit_nK: Tensor, bag: Bag) -> Tensor:
        """Mean over tiles."""
        return bag.segment_mean(logit_nK)


@aggregators.register("lse")
class LogSumExpPooling(InstancePooling):
    """A smooth maximum of instance logits: logit_k = 1/r log(1/N sum_i exp(r f_k(h_i))).

    Args:
        dim, num_classes, hidden, dropout: as `InstancePooling`.
        r: sharpness; towards 0 it is the mean, towards infinity the maximum.
    Cost: one max and one sum all-reduce of B K numbers, and one sum in backward.
    Source: Pinheiro & Collobert 2015, arXiv:1411.6228.
    """

    def __init__(self, dim: int, num_classes: int, r: float = 5.0, hidden: int = 0, dropout: float = 0.0) -> None:
        super().__init__(dim, num_classes, hidden, dropout)
        if not 0 < r < math.inf:
            raise ConfigError(
                f"r={r} must be a number above 0; for the mean take 'mean', for the maximum 'instance_max'"
            )
        self.r = r

    def pooled(self, logit_nK: Tensor, bag: Bag) -> Tensor:
        """Log of the mean exponential over tiles, shifted by the maximum, which cancels."""
        shift_BK = bag.segment_max(logit_nK)
        mean_BK = bag.segment_mean(torch.exp(self.r * (logit_nK - shift_BK[bag.slide_index_n])))
        return shift_BK + torch.log(mean_BK) / self.r


@aggregators.register("noisy_or")
class NoisyOrPooling(InstancePooling):
    """The probability that at least one tile is of the class: p_k = 1 - prod_i (1 - p_ik), p_ik = sigmoid(f_k(h_i)).

    The logit of p_k is given, log p_k - log(1 - p_k). With S = log(1 - p_k) = sum_i log sigmoid(-f_k(h_i)) it is
    log(-expm1(S)) - S, which stays exact where p_k rounds to 0 or 1.

    Args:
        dim, num_classes, hidden, dropout: as `InstancePooling`.
        bias: where the bias of f starts. Near 0 every p_k of thousands of tiles is 1; at -7 a tile has p = 0.0009.
        one_sided: as `InstancePooling`. p is then the probability of the second class, and a further tile never lowers it: the
            assumption of multiple-instance learning, which two logits let a model break (Raff & Holt 2023, arXiv:2310.17867).
    Cost: one sum all-reduce of B K numbers, and one in backward.
    Source: Maron & Lozano-Perez 1998 (NIPS 10), and Zhang, Platt & Viola 2005 (NIPS 18).
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        bias: float = -7.0,
        hidden: int = 0,
        dropout: float = 0.0,
        one_sided: bool = False,
    ) -> None:
        super().__init__(dim, num_classes, hidden, dropout, one_sided)
        nn.init.constant_(self.classify[-1].bias, bias)  # type: ignore[arg-type]

    def pooled(self, logit_nK: Tensor, bag: Bag) -> Tensor:
        """Logit of the noisy or."""
        none_BK = bag.segment_sum(F.logsigmoid(-logit_nK))
        # Below the smallest normal number the logarithm would be that of 0.
        none_BK = none_BK.clamp(max=-torch.finfo(none_BK.dtype).tiny)
        return torch.log(-torch.expm1(none_BK)) - none_BK


@aggregators.register("topk_mean")
class TopMeanPooling(InstancePooling):
    """Mean of the k highest instance logits of each class; of equal ones, those of the lowest tile numbers.

    Args:
        dim, num_classes, hidden, dropout, one_sided: as `InstancePooling`; one-sided, a further tile never lowers the second class.
        k: tiles that count; a slide must have as many.
    Cost: one all-gather of 2 B k K float64 numbers, one sum all-reduce of B k K; one sum of that size in backward.
    Source: Campanella et al. 2019, doi:10.1038/s41591-019-0508-1 (k = 1); Durand et al. 2016 (CVPR, "WELDON").
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        k: int = 8,
        hidden: int = 0,
        dropout: float = 0.0,
        one_sided: bool = False,
    ) -> None:
        super().__init__(dim, num_classes, hidden, dropout, one_sided)
        check_counts(k=k)
        self.min_tiles = k

    def pooled(self, logit_nK: Tensor, bag: Bag) -> Tensor:
        """Mean of the best."""
        number_BkK = bag.top(logit_nK, self.min_tiles)
        best_MK = pick_entries(logit_nK, number_BkK.flatten(0, 1), bag)
        return best_MK.view(number_BkK.shape).mean(1)


@aggregators.register("instance_max")
class MaxInstancePooling(TopMeanPooling):
    """The highest instance logit of each class: logit_k = max_i f_k(h_i); of equal ones the lowest tile number learns.

    Arguments are those of `InstancePooling`; one-sided, a further tile never lowers the second class.

    Cost: one all-gather of 2 B K float64 numbers, one sum all-reduce of B K; one sum of that size in backward.
    Source: Campanella et al. 2019, doi:10.1038/s41591-019-0508-1; Wang et al. 2018, arXiv:1610.02501.
    """

    def __init__(
        self, dim: int, num_classes: int, hidden: int = 0, dropout: float = 0.0, one_sided: bool = False
    ) -> None:
        super().__init__(dim, num_classes, 1, hidden, dropout, one_sided)


@aggregators.register("max")
class MaxPooling(nn.Module):
    """Maximum of embeddings: z_j = max_i h_ij. The gradient goes to the winning tile; of equals, the lowest number.

    Attention is the share of the D dimensions that a tile wins.

    Args:
        dim: embedding width D.
        dropout: keyed dropout on the embeddings.
    Cost: one all-gather of 2 B D float64 numbers, one sum all-reduce of B D; one sum of that size in backward.
    Source: Wang et al. 2018 ("MI-Net"), arXiv:1610.02501.
    """

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.out_dim = dim

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, D) and attention (n, 1)."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        number_BD = _winners(embedding_nD, bag)
        row_BD = bag.own_rows(number_BD)
        share_BD = torch.full_like(row_BD, 1 / self.out_dim, dtype=embedding_nD.dtype)
        # What tiles of other ranks win falls into a row behind the last, which is cut off.
        padded_n = share_BD.new_zeros(len(embedding_nD) + 1).scatter_add(0, row_BD.flatten(), share_BD.flatten())
        return Pooled(pick_entries(embedding_nD, number_BD, bag), padded_n[:-1, None])


@aggregators.register("mean_mlp")
class MeanMLP(nn.Module):
    """SiMLP: logits = MLP(mean_i h_i), an MLP of one hidden layer.

    Scores are MLP(h_i), computed outside training only.

    Args:
        dim: embedding width D.
        num_classes: K.
        hidden: width of the hidden layer.
        dropout: keyed dropout on the hidden layer, one mask per slide.
    Cost: one sum all-reduce of B D numbers, and one in backward.
    Source: Li et al. 2025, arXiv:2502.20823.
    """

    out_dim = None

    def __init__(self, dim: int, num_classes: int, hidden: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        check_counts(hidden=hidden)
        self.first = nn.Linear(dim, hidden)
        self.last = nn.Linear(hidden, num_classes)
        self.dropout = KeyedDropout(dropout, "aggregator.hidden")

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> logits (B, K), and scores (n, K) outside training."""
        mean_BD = bag.segment_mean(bag.embedding_nD)
        logit_BK = self.last(self.dropout(F.relu(self.first(mean_BD)), bag.slide_key_B))
        if torch.is_grad_enabled():
            return Pooled(logit_BK)
        return Pooled(logit_BK, score_nA=self.last(F.relu(self.first(bag.embedding_nD))), per_class=True)


def _winners(values_nD: Tensor, bag: Bag) -> Tensor:
    """Pooled number of the tile with the highest value of each slide and dimension, (B, D); of equals, the lowest.

    `Bag.top` for k = 1, without sorting every dimension.

    Cost: one all-gather of 2 B D float64 numbers.
    """
    values_nD = values_nD.detach()
    best_2BD = values_nD.new_full((2, bag.num_slides, values_nD.shape[1]), -torch.inf, dtype=torch.float64)
    for slide, (start, stop) in enumerate(bag.runs()):
        if start < stop:
            row_1D = values_nD[start:stop].argmax(0, keepdim=True)  # argmax, unlike max, promises the first of equals
            best_2BD[0, slide] = values_nD[start:stop].gather(0, row_1D)[0]
            best_2BD[1, slide] = row_1D[0] + (bag.first + start)
    best_R2BD = bag.pool.stack(best_2BD)
    rank_1BD = best_R2BD[:, 0].argmax(0, keepdim=True)
    return best_R2BD[:, 1].gather(0, rank_1BD)[0].long()

"""Parts that several aggregators share: attention logits, layers per head, entries of other ranks, checks of options.

Shapes: n tiles on this rank, B slides, D embedding, A heads, E numbers per head, F outputs per head, M rows, X any.
"""

import math

import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.bag import Bag


class TanhScores(nn.Module):
    """Attention logits s_i = w . tanh(V h_i), one w per head, (n, A).

    The logit has no bias: a softmax does not change when all its logits shift.

    Args:
        dim: D.
        hidden: rows of V.
        heads: A.
    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 8.
    """

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        check_counts(hidden=hidden, heads=heads)
        self.value = nn.Linear(dim, hidden)
        self.logit = nn.Linear(hidden, heads, bias=False)

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """(n, D) -> (n, A)."""
        return self.logit(torch.tanh(self.value(embedding_nD)))


class GatedScores(nn.Module):
    """Attention logits s_i = w . (tanh(V h_i) * sigmoid(U h_i)), one w per head, (n, A); no bias, as `TanhScores`.

    Args:
        dim: D.
        hidden: rows of V and U.
        heads: A.
    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 9.
    """

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        check_counts(hidden=hidden, heads=heads)
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.logit = nn.Linear(hidden, heads, bias=False)

    def forward(self, embedding_nD: Tensor) -> Tensor:
        """(n, D) -> (n, A)."""
        return self.logit(torch.tanh(self.value(embedding_nD)) * torch.sigmoid(self.gate(embedding_nD)))


class HeadLinear(nn.Module):
    """A linear layer of its own for each head: (..., A, E) -> (..., A, F).

    Args:
        heads: A.
        inputs, outputs: E and F.
        bias: with one bias per head and output.
    """

    def __init__(self, heads: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear draws them
        self.weight_AFE = nn.Parameter(torch.empty(heads, outputs, inputs).uniform_(-bound, bound))
        self.bias_AF = nn.Parameter(torch.empty(heads, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, values_XAE: Tensor) -> Tensor:
        """Each head's values through its own layer."""
        result_XAF = torch.einsum("...ae,afe->...af", values_XAE, self.weight_AFE)
        return result_XAF if self.bias_AF is None else result_XAF + self.bias_AF


def softmax_pool_heads(logit_nA: Tensor, value_nAE: Tensor, bag: Bag) -> tuple[Tensor, Tensor]:
    """As `softmax_pool`, where each head pools values of its own.

    Args:
        logit_nA: unnormalised attention of this rank's tiles.
        value_nAE: what each head averages.
        bag: tells which tile belongs to which slide.
    Returns:
        Pooled values (B, A, E), equal on all ranks, and attention (n, A).
    Cost: one max all-reduce of B A numbers, one sum all-reduce of B A (E + 1); one sum of that size in backward.
    """
    shift_BA = bag.segment_max(logit_nA)
    weight_nA = torch.exp(logit_nA - shift_BA[bag.slide_index_n])
    runs = bag.runs()
    weighted_BAE = torch.stack(
        [torch.einsum("na,nae->ae", weight_nA[start:stop], value_nAE[start:stop]) for start, stop in runs]
    )
    norm_BA = torch.stack([weight_nA[start:stop].sum(0) for start, stop in runs])
    total_BAX = bag.pool.sum(torch.cat([weighted_BAE, norm_BA[:, :, None]], dim=2))
    norm_BA = total_BAX[:, :, -1]
    return total_BAX[:, :, :-1] / norm_BA[:, :, None], weight_nA / norm_BA[bag.slide_index_n]


def pick_entries(values_nX: Tensor, number_MX: Tensor, bag: Bag) -> Tensor:
    """As `Bag.pick`, with a tile of its own for each column: entry (m, x) is values[number[m, x], x]; 0 for number -1.

    Args:
        values_nX: a row per tile of this rank.
        number_MX: pooled tile numbers, int64, equal on all ranks.
    Backward: the owner of each tile receives the gradient of its entry.
    Cost: one all-reduce of M X numbers, and one in backward.
    """
    padded_nX = torch.cat([values_nX, values_nX.new_zeros((1, values_nX.shape[1]))])
    return bag.pool.sum(padded_nX.gather(0, bag.own_rows(number_MX)))


def check_heads(width: int, heads: int, name: str = "dim") -> None:
    """Refuse heads that do not divide a width.

    Args:
        name: of the width, for the message.
    Raises:
        ConfigError: lists those that do.
    """
    check_counts(heads=heads)
    if width % heads:
        fitting = [number for number in range(1, min(width, 32) + 1) if width % number == 0]
        raise ConfigError(f"heads={heads} does not divide {name}={width}; use one of {fitting}")


def check_counts(**options: object) -> None:
    """Refuse options that count something and are not whole numbers of 1 or more.

    Raises:
        ConfigError: names the first.
    """
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of 1 or more")

"""Attention pooling: every tile has a weight of its own, a softmax over the slide.

Shapes: n tiles on this rank, B slides, D embedding, A attention heads, E = D / A, K classes.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import (
    GatedScores,
    HeadLinear,
    TanhScores,
    check_counts,
    check_heads,
    softmax_pool_heads,
)
from gigamil.models.bag import Bag, Pooled, softmax_pool
from gigamil.models.dropout import KeyedDropout
from gigamil.models.rowwise import rowwise_softmax_pool


@aggregators.register("attention")
class Attention(nn.Module):
    """Attention pooling (ABMIL): a = softmax_i(w . tanh(V h_i)), z = sum_i a_i h_i.

    Args:
        dim: embedding width D.
        hidden: rows of V.
        heads: number of attention heads; their pooled embeddings are concatenated.
        dropout: keyed dropout on the embeddings before attention and pooling.
    Cost: one max all-reduce of B A numbers and one sum of B A (D + 1); one sum of that size in backward.
    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 7 and 8.
    """

    scores: ClassVar[type[nn.Module]] = TanhScores

    def __init__(self, dim: int, hidden: int = 128, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.score = self.scores(dim, hidden, heads)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.out_dim = heads * dim

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, A D) and attention (n, A)."""
        pooled_BAD, attention_nA = rowwise_softmax_pool(self._rows, list(self.score.parameters()), bag)
        return Pooled(pooled_BAD.flatten(1), attention_nA)

    def _rows(self, embedding_bD: Tensor, tile_key_b: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention logits and values of some rows."""
        embedding_bD = self.dropout(embedding_bD, tile_key_b)
        return self.score(embedding_bD), embedding_bD


@aggregators.register("gated_attention")
class GatedAttention(Attention):
    """Gated attention pooling: a = softmax_i(w . (tanh(V h_i) * sigmoid(U h_i))), z = sum_i a_i h_i.

    Arguments and cost are those of `Attention`; `hidden` are the rows of V and of U.

    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 9.
    """

    scores = GatedScores


@aggregators.register("multi_head")
class MultiHeadAttention(nn.Module):
    """Gated attention over parts of the embedding: z = [z_1 .. z_A], z_a = sum_i a_ia h_ia, with h_i = [h_i1 .. h_iA].

    a_.a = softmax_i(w_a . (tanh(V_a h_ia) * sigmoid(U_a h_ia))): each part decides by itself where it looks.

    Args:
        dim: embedding width D.
        hidden: rows of each V_a and U_a.
        heads: A; divide D.
        dropout: keyed dropout on the embeddings before attention and pooling.
    Raises:
        ConfigError: heads do not divide the width.
    Cost: one max all-reduce of B A numbers and one sum of B (D + A); one sum of that size in backward.
    Source: Ilse et al. 2018, arXiv:1802.04712, eq. 9 per part; parts as Vaswani et al. 2017, arXiv:1706.03762.
    """

    def __init__(self, dim: int, hidden: int = 128, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(dim, heads)
        check_counts(hidden=hidden)
        self.value = HeadLinear(heads, dim // heads, hidden)
        self.gate = HeadLinear(heads, dim // heads, hidden)
        self.logit = HeadLinear(heads, hidden, 1, bias=False)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.heads = heads
        self.out_dim = dim

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, D) and attention (n, A)."""
        part_nAE = self.dropout(bag.embedding_nD, bag.tile_key_n).unflatten(1, (self.heads, -1))
        hidden_nAX = torch.tanh(self.value(part_nAE)) * torch.sigmoid(self.gate(part_nAE))
        pooled_BAE, attention_nA = softmax_pool_heads(self.logit(hidden_nAX)[:, :, 0], part_nAE, bag)
        return Pooled(pooled_BAE.flatten(1), attention_nA)


@aggregators.register("multi_branch")
class MultiBranchAttention(nn.Module):
    """A branch of gated attention and a linear score per class: z_k = sum_i a_ik h_i, logit_k = c_k . z_k + b_k.

    Args:
        dim: embedding width D.
        num_classes: K.
        hidden: rows of V and U, which the branches share; each has its own w.
        dropout: keyed dropout on the embeddings before attention and pooling.
    Cost: one max all-reduce of B K numbers and one sum of B K (D + 1); one sum of that size in backward.
    Source: Lu et al. 2021, arXiv:2004.09666 (the bag level of CLAM-MB); Ilse et al. 2018, arXiv:1802.04712, eq. 9.
    """

    out_dim = None

    def __init__(self, dim: int, num_classes: int, hidden: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.score = GatedScores(dim, hidden, num_classes)
        self.classify = HeadLinear(num_classes, dim, 1)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> logits (B, K) and the attention of each class (n, K)."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        pooled_BKD, attention_nK = softmax_pool(self.score(embedding_nD), embedding_nD, bag)
        return Pooled(self.classify(pooled_BKD)[:, :, 0], attention_nK, per_class=True)


@aggregators.register("additive")
class AdditiveAttention(nn.Module):
    """Additive MIL: logits = b + sum_i f(a_i h_i), a the gated attention: what each tile adds to each logit is known.

    f is an MLP of two layers with a ReLU and without biases. A bias would be added once per tile, thousands of times,
    and a_i h_i is as small as 1 / N; without biases f(a h) = a f(h) exactly, so f works on embeddings of their own
    scale, and one reduction gives the sum and the norm of a together. The one bias b is the slide's.

    Args:
        dim: embedding width D.
        num_classes: K.
        hidden: rows of V and U.
        mlp: hidden width of f.
        dropout: keyed dropout on the embeddings.
    Cost: one max all-reduce of B numbers and one sum of B (K + 1); one sum of that size in backward.
    Source: Javed et al. 2022 (NeurIPS), arXiv:2206.01794.
    """

    out_dim = None

    def __init__(self, dim: int, num_classes: int, hidden: int = 128, mlp: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        check_counts(mlp=mlp)
        self.score = GatedScores(dim, hidden, 1)
        self.contribution = nn.Sequential(
            nn.Linear(dim, mlp, bias=False), nn.ReLU(), nn.Linear(mlp, num_classes, bias=False)
        )
        self.bias_K = nn.Parameter(torch.zeros(num_classes))
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> logits (B, K), and N times what each tile adds to them (n, K), whose mean is the logit without b."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        value_nK: Tensor = self.contribution(embedding_nD)
        sum_B1K, attention_n1 = softmax_pool(self.score(embedding_nD), value_nK, bag)
        size_B1 = torch.tensor(bag.sizes, dtype=value_nK.dtype).to(value_nK.device, non_blocking=True)[:, None]
        added_nK = size_B1[bag.slide_index_n] * attention_n1 * value_nK
        return Pooled(sum_B1K[:, 0] + self.bias_K, score_nA=added_nK, per_class=True)

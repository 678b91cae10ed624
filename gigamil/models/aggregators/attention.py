"""Attention pooling: every tile has a weight of its own, a softmax over the slide.

Shapes: n tiles on this rank, B slides, D embedding, A attention heads.
"""

import torch
from torch import Tensor, nn

from gigamil.models.aggregator import aggregators
from gigamil.models.bag import Bag, Pooled, softmax_pool
from gigamil.models.dropout import KeyedDropout


@aggregators.register("gated_attention")
class GatedAttention(nn.Module):
    """Gated attention pooling: a = softmax_i(w . (tanh(V h_i) * sigmoid(U h_i))), z = sum_i a_i h_i.

    The logit has no bias: a softmax does not change when all its logits shift.

    Args:
        dim: embedding width D.
        hidden: rows of V and U.
        heads: number of attention heads; their pooled embeddings are concatenated.
        dropout: keyed dropout on the embeddings before attention and pooling.
    Cost: one max all-reduce of B A numbers and one sum of B A (D + 1); one sum of that size in backward.
    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 9.
    """

    def __init__(self, dim: int, hidden: int = 128, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.logit = nn.Linear(hidden, heads, bias=False)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.out_dim = heads * dim

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, A D) and attention (n, A)."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        pooled_BAD, attention_nA = softmax_pool(self.logits(embedding_nD), embedding_nD, bag)
        return Pooled(pooled_BAD.flatten(1), attention_nA)

    def logits(self, embedding_nD: Tensor) -> Tensor:
        """Unnormalised attention, (n, A)."""
        return self.logit(torch.tanh(self.value(embedding_nD)) * torch.sigmoid(self.gate(embedding_nD)))

"""Aggregators: the embeddings of a slide -> one slide embedding.

Shapes: n tiles on this rank, B slides, D embedding, A attention heads.
An aggregator is a module with an attribute `out_dim` and `forward(bag) -> (slide_BX, attention_nA)`. It reduces over
tiles only through `bag.pool`, so it is exact over ranks without knowing of them. Register your own with
`@aggregators.register("name")`: a factory that takes the embedding width and `science.aggregator.options`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.bag import Bag, softmax_pool
from gigamil.models.dropout import KeyedDropout
from gigamil.registry import Registry

aggregators: Registry[Callable[..., nn.Module]] = Registry("aggregator", "gigamil.aggregators")


@aggregators.register("gated_attention")
class GatedAttention(nn.Module):
    """Gated attention pooling: a = softmax_i(w . (tanh(V h_i) * sigmoid(U h_i))), z = sum_i a_i h_i.

    The logit has no bias: a softmax does not change when all its logits shift.

    Args:
        dim: embedding width D.
        hidden: rows of V and U.
        heads: number of attention heads; their pooled embeddings are concatenated.
        dropout: keyed dropout on the embeddings before attention and pooling.
    Source: Ilse, Tomczak & Welling 2018, arXiv:1802.04712, eq. 9.
    """

    def __init__(self, dim: int, hidden: int = 128, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Linear(dim, hidden)
        self.gate = nn.Linear(dim, hidden)
        self.logit = nn.Linear(hidden, heads, bias=False)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.out_dim = heads * dim

    def forward(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Bag -> slide embedding (B, A D) and attention (n, A), which sums to 1 over a slide."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        hidden_nX = torch.tanh(self.value(embedding_nD)) * torch.sigmoid(self.gate(embedding_nD))
        pooled_BAD, attention_nA = softmax_pool(self.logit(hidden_nX), embedding_nD, bag)
        return pooled_BAD.flatten(1), attention_nA


def build_aggregator(name: str, dim: int, options: Mapping[str, Any]) -> nn.Module:
    """The aggregator that the configuration names.

    Raises:
        ConfigError: unknown name, or options that the factory does not take.
    """
    try:
        aggregator = aggregators[name](dim, **options)
    except TypeError as error:
        raise ConfigError(f"science.aggregator.options do not fit aggregator '{name}': {error}") from error
    if not isinstance(getattr(aggregator, "out_dim", None), int):
        raise ConfigError(f"aggregator '{name}' must have an integer attribute `out_dim`, the width of its output")
    return aggregator

"""ABMILX: attention logits that spread to tiles that look alike, made to be trained end to end.

Shapes: n tiles on this rank, s those of one slide, m tiles of the slides that it owns a tile of, B slides, N tiles of a
slide, D width, A heads, E = D / A, H hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import HeadLinear, check_counts, check_heads, softmax_pool_heads
from gigamil.models.aggregators.spans import fetch_slides
from gigamil.models.bag import Bag, Pooled
from gigamil.models.dropout import KeyedDropout


@aggregators.register("abmilx")
class ABMILX(nn.Module):
    """Multi-head attention pooling whose logits are propagated over the likeness of tiles.

    x_i = relu(W LN(h_i)) is split into A parts x_ia. Each head has logits s_ia = w_a . tanh(V_a x_ia), propagated
    within the slide, s'_.a = s_.a + alpha softmax(Q_a K_a^T / sqrt(E)) s_.a with [Q_1 .. Q_A] = x W_q,
    [K_1 .. K_A] = x W_k and a learnable alpha; z = [z_1 .. z_A], z_a = sum_i softmax_i(s'_ia) x_ia. Tiles that look
    alike then share attention, where a few sharp weights would leave most of the encoder's tiles without gradient.
    Nothing in the head has a bias.

    Args:
        dim: embedding width.
        width: D.
        hidden: H, rows of each V_a.
        heads: A; divide `width`.
        alpha: where alpha starts.
        dropout: keyed dropout on x.
    Raises:
        ConfigError: heads do not divide the width.
    Cost: time N_s^2 D per slide, without a matrix of N_s x N_s where torch has a kernel for it (CPU, and CUDA with E a
        multiple of 8). One all-to-all in which each rank receives m (D + A) numbers at most; one max all-reduce of
        B A, one sum of B (D + A); in backward the all-to-all and the sum again.
    Source: Tang et al. 2025, arXiv:2506.02408.
    """

    def __init__(
        self, dim: int, width: int = 512, hidden: int = 128, heads: int = 8, alpha: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_counts(width=width, hidden=hidden)
        check_heads(width, heads, "width")
        self.norm = nn.LayerNorm(dim, bias=False)
        self.project = nn.Linear(dim, width, bias=False)
        self.hidden = HeadLinear(heads, width // heads, hidden, bias=False)
        self.logit = HeadLinear(heads, hidden, 1, bias=False)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.alpha_1 = nn.Parameter(torch.tensor([float(alpha)]))
        self.dropout = KeyedDropout(dropout, "aggregator.projection")
        self.heads = heads
        self.out_dim = width

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, D) and attention (n, A)."""
        value_nD = self.dropout(F.relu(self.project(self.norm(bag.embedding_nD))), bag.tile_key_n)
        value_nAE = value_nD.unflatten(1, (self.heads, -1))
        score_nA = self.logit(torch.tanh(self.hidden(value_nAE)))[:, :, 0]
        spread_nA = propagate(self.query(value_nD), self.key(value_nD), score_nA, bag)
        pooled_BAE, attention_nA = softmax_pool_heads(score_nA + self.alpha_1 * spread_nA, value_nAE, bag)
        return Pooled(pooled_BAE.flatten(1), attention_nA)


def propagate(query_nD: Tensor, key_nD: Tensor, score_nA: Tensor, bag: Bag) -> Tensor:
    """softmax(Q K^T / sqrt(E)) s for each head, over all tiles of each tile's slide, (n, A).

    Cost: one all-to-all in which each rank receives the keys and scores of the slides that it owns a tile of.
    """
    num_heads = score_nA.shape[1]
    spans, none_0X, found_parts = fetch_slides(torch.cat([key_nD, score_nA], dim=1), bag)
    # The empty part keeps queries and exchange in the graph of a rank without tiles, whose backward needs them too.
    parts = [none_0X[:, -num_heads:] + query_nD[:0, :num_heads]]
    query_parts = query_nD.split([span.stop - span.start for span in spans])
    for query_sD, found_NX in zip(query_parts, found_parts, strict=True):
        key_ND, score_NA = found_NX.tensor_split([key_nD.shape[1]], dim=1)
        query_AsE = query_sD.unflatten(1, (num_heads, -1)).transpose(0, 1)
        key_ANE = key_ND.unflatten(1, (num_heads, -1)).transpose(0, 1)
        # The kernels that store no N x N matrix want values as wide as keys: the score, and zeros.
        value_ANE = F.pad(score_NA.T[:, :, None], (0, key_ANE.shape[2] - 1))
        spread_AsE = F.scaled_dot_product_attention(query_AsE[None], key_ANE[None], value_ANE[None])[0]
        parts.append(spread_AsE[:, :, 0].T)
    return torch.cat(parts)

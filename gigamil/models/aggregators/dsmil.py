"""DSMIL: the critical tile of each class asks all others how alike they are.

Shapes: n tiles on this rank, B slides, D embedding, Q queries, V values, K classes.
"""

import torch
from torch import nn

from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import check_counts
from gigamil.models.bag import Bag, Pooled, softmax_pool
from gigamil.models.dropout import KeyedDropout


@aggregators.register("dsmil")
class DualStream(nn.Module):
    """Two streams: the highest instance logit of each class, and attention by likeness to the tile that has it.

    f_k(h_i) is linear, m_k = argmax_i f_k(h_i), q_i = W_q h_i, v_i = W_v h_i. The first stream gives
    max_k = f_k(h_(m_k)), the second z_k = sum_i a_ik v_i with a_.k = softmax_i(q_i . q_(m_k) / sqrt(Q)), and
    bag_k = sum_l c_kl . z_l + b_k. A slide's logits are (max + bag) / 2, in training as outside it. The loss is
    1/2 loss(max) + 1/2 loss(bag), as in the paper, and not that of the mean, whose weight is 0.

    Args:
        dim: embedding width D.
        num_classes: K.
        hidden: Q.
        width: V.
        dropout: keyed dropout on the embeddings.
    Cost: one all-gather of 2 B K float64 numbers, one sum all-reduce of B K (Q + K) (the critical tiles, from their
        owners), one max of B K and one sum of B K (V + 1); in backward the two sums again.
    Source: Li, Li & Eliceiri 2021, arXiv:2011.08939; 1 / sqrt(Q) is of the authors' code.
    """

    out_dim = None

    def __init__(self, dim: int, num_classes: int, hidden: int = 128, width: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        check_counts(hidden=hidden, width=width)
        self.instance = nn.Linear(dim, num_classes)
        self.query = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, width)
        self.classify = nn.Linear(num_classes * width, num_classes)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> logits (B, K) and the attention of each class (n, K)."""
        embedding_nD = self.dropout(bag.embedding_nD, bag.tile_key_n)
        logit_nK, query_nQ = self.instance(embedding_nD), self.query(embedding_nD)
        num_slides, num_classes = bag.num_slides, logit_nK.shape[1]
        # Queries and logits of the critical tiles in one exchange; row (b, k) is the critical tile of class k.
        number_M = bag.top(logit_nK, 1).flatten()
        critical_MX = bag.pick(torch.cat([query_nQ, logit_nK], dim=1), number_M)
        critical_BKX = critical_MX.view(num_slides, num_classes, -1)
        critical_BKQ, logit_BKK = critical_BKX.split([query_nQ.shape[1], num_classes], dim=2)
        max_BK = torch.diagonal(logit_BKK, dim1=1, dim2=2)
        likeness_nK = torch.cat(
            [query_nQ[start:stop] @ critical_BKQ[slide].T for slide, (start, stop) in enumerate(bag.runs())]
        )
        pooled_BKV, attention_nK = softmax_pool(likeness_nK / query_nQ.shape[1] ** 0.5, self.value(embedding_nD), bag)
        bag_BK = self.classify(pooled_BKV.flatten(1))
        return Pooled(
            (max_BK + bag_BK) / 2,
            attention_nK,
            per_class=True,
            weight=0.0,
            extra_logits_MK=torch.cat([max_BK, bag_BK]),
            extra_slide_M=torch.arange(num_slides, device=number_M.device).repeat(2),
            extra_weight_M=max_BK.new_full((2 * num_slides,), 0.5),
        )

"""Encoder + aggregator + linear head: one module, so that one engine, one optimiser and one norm cover it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag
from gigamil.models.dropout import KeyedDropout
from gigamil.models.encoder import TileEncoder, build_encoder

if TYPE_CHECKING:
    from gigamil.config.schema import Science


class SlideModel(nn.Module):
    """A multiple-instance model in its two halves, which the exact step calls apart.

    Args:
        encoder: tile -> embedding.
        aggregator: bag -> slide embedding.
        num_classes: K, logits per slide.
        dropout: keyed dropout on the slide embedding, with one mask per slide on all ranks.
    """

    def __init__(self, encoder: TileEncoder, aggregator: nn.Module, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator
        self.dropout = KeyedDropout(dropout, "head.slide")
        self.head = nn.Linear(int(aggregator.out_dim), num_classes)  # type: ignore[arg-type]

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        """Tiles, RGB in 0..1 -> embeddings (n, D)."""
        return self.encoder(image_nCHW, tile_key_n)

    def classify(self, bag: Bag) -> tuple[Tensor, Tensor]:
        """Bag -> logits (B, K), equal on all ranks that share it, and attention (n, A) of this rank's tiles.

        Runs outside autocast: softmax statistics, pooled sums and the head are float32 or wider.
        """
        with torch.autocast(bag.embedding_nD.device.type, enabled=False):
            slide_BX, attention_nA = self.aggregator(bag)
            return self.head(self.dropout(slide_BX, bag.slide_key_B)), attention_nA

    def forward(self, half: str, *inputs: object) -> Tensor | tuple[Tensor, Tensor]:
        """`forward("encode", ...)` or `forward("classify", bag)`: engines hook forward, so both halves go through it."""
        if half == "encode":
            return self.encode(*inputs)  # type: ignore[arg-type]
        return self.classify(*inputs)  # type: ignore[arg-type]


def build_model(science: "Science", num_classes: int) -> SlideModel:
    """The model that the configuration describes; random parameters are a function of `science.seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(science.seed)
        part = science.encoder
        encoder = build_encoder(part.name, part.options, part.mean, part.std, part.weights)
        aggregator = build_aggregator(science.aggregator.name, encoder.dim, science.aggregator.options)
        return SlideModel(encoder, aggregator, num_classes, science.dropout)

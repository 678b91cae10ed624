"""Encoder + aggregator + linear head: one module, so that one engine, one optimiser and one norm cover it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gigamil.errors import BagError, ConfigError
from gigamil.models.aggregator import build_aggregator, min_tiles
from gigamil.models.bag import Bag, Pooled
from gigamil.models.dropout import KeyedDropout
from gigamil.models.encoder import Cells, GivenFeatures, TileEncoder, build_encoder

if TYPE_CHECKING:
    from gigamil.config.schema import Science


class SlideModel(nn.Module):
    """A multiple-instance model in its two halves, which the exact step calls apart.

    Args:
        encoder: tile -> embedding, or `GivenFeatures`.
        aggregator: bag -> slide embedding, or logits.
        num_classes: K, logits per slide.
        dropout: keyed dropout on the slide embedding, with one mask per slide on all ranks.
    Raises:
        ConfigError: dropout on a slide embedding that the aggregator does not give.
    """

    def __init__(
        self, encoder: TileEncoder | GivenFeatures, aggregator: nn.Module, num_classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.aggregator = aggregator
        self.dropout = KeyedDropout(dropout, "head.slide")
        self.head: nn.Linear | None = None
        if aggregator.out_dim is not None:
            self.head = nn.Linear(int(aggregator.out_dim), num_classes)  # type: ignore[arg-type]
        elif dropout:
            raise ConfigError(
                f"science.dropout={dropout} is for a slide embedding, but {type(aggregator).__name__} gives logits. Set "
                "it to 0, and dropout in science.aggregator.options if the aggregator has it."
            )

    def encode(self, image_nCHW: Tensor, tile_key_n: Tensor | None, cells: Cells | None = None) -> Tensor:
        """Tiles, RGB in 0..1 -> embeddings (n, D); features stay what they are.

        With `cells` a dense encoder gives those of cells of one block, (c, D).
        """
        if cells is None:
            return self.encoder(image_nCHW, tile_key_n)
        return self.encoder(image_nCHW, tile_key_n, cells)

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Bag -> logits (B, K), equal on all ranks that share it, and all that the aggregator gave.

        Runs outside autocast: softmax statistics, pooled sums and the head are float32 or wider.
        """
        with torch.autocast(bag.embedding_nD.device.type, enabled=False):
            pooled: Pooled = self.aggregator(bag)
            if self.head is None:
                return pooled.slide_BX, pooled
            return self.head(self.dropout(pooled.slide_BX, bag.slide_key_B)), pooled

    def forward(self, half: str, *inputs: object) -> Tensor | tuple[Tensor, Pooled]:
        """`forward("encode", ...)` or `forward("classify", bag)`: engines hook forward, so both halves go through it."""
        if half == "encode":
            return self.encode(*inputs)  # type: ignore[arg-type]
        return self.classify(*inputs)  # type: ignore[arg-type]


def build_model(science: "Science", num_classes: int, dim: int | None = None) -> SlideModel:
    """The model that the configuration describes; random parameters are a function of `science.seed` only.

    Args:
        science: of the configuration.
        num_classes: K.
        dim: D of cached features, which then take the encoder's place; None builds the encoder.
    """
    with _seeded(science.seed):
        encoder = build_encoder(science.encoder) if dim is None else GivenFeatures(dim)
        aggregator = build_aggregator(science.aggregator.name, encoder.dim, num_classes, science.aggregator.options)
        return SlideModel(encoder, aggregator, num_classes, science.dropout)


def build_encoder_alone(science: "Science") -> TileEncoder:
    """The encoder of `build_model`, with the same parameters."""
    with _seeded(science.seed):
        return build_encoder(science.encoder)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def refuse_small_bags(model: SlideModel, slide_ids: Sequence[str], sizes: Sequence[int]) -> None:
    """Refuse slides with fewer tiles than the aggregator takes, for example than its k.

    Raises:
        BagError: names the first of them and its number of tiles.
    """
    wanted = min_tiles(model.aggregator)
    small = [(slide_id, size) for slide_id, size in zip(slide_ids, sizes, strict=True) if size < wanted]
    if small:
        raise BagError(
            f"{len(small)} slides have fewer than the {wanted} tiles that {type(model.aggregator).__name__} takes, for "
            f"example '{small[0][0]}' with {small[0][1]}. Lower k in science.aggregator.options, or leave them out."
        )

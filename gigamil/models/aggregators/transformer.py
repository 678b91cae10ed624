"""A transformer over a slide's tiles: every tile looks at every other, and at where it lies.

Shapes: n tiles on this rank, N tiles of the group, D width, H heads, d = D / H, F frequencies, X anything.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil.errors import ConfigError
from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.aggregators.parts import check_counts, check_heads
from gigamil.models.aggregators.spans import fetch_slides
from gigamil.models.bag import Bag, Pooled
from gigamil.models.dropout import KeyedDropout


@aggregators.register("transformer")
class SlideTransformer(nn.Module):
    """Pre-norm transformer over a slide's tiles, then gated attention pooling.

    x_i = W h_i + PE(position_i); in each layer x = x + MHA(LN(x)), x = x + MLP(LN(x)); z = sum_i a_i LN(x_i) with the
    weights a of `GatedAttention`, which are the attention that is given. Tokens stay with the owners of their tiles.

    Args:
        dim: embedding width.
        width: D.
        heads: of the multi-head attention; divide `width`. Ranks exchange least where the group's size divides them.
        layers: number of layers.
        mlp: hidden width of the MLPs, in units of `width`.
        hidden: hidden width of the pooling.
        min_wavelength_um, max_wavelength_um: range of the position code, in micron: some tiles to more than a slide.
        dropout: keyed dropout on what attention and MLP add.
    Raises:
        ConfigError: heads do not divide the width, 4 does not, or the wavelengths are no range.
    Cost: time N_s^2 D per slide and layer, without a matrix of N_s x N_s where torch has a kernel for it (CPU, and CUDA
        with D / H a multiple of 8). Per layer, two all-to-alls of 3 n D and n D numbers where the number of ranks
        divides the heads, else one in which a rank receives keys and values of the slides that it owns a tile of; as
        many in backward; once, the reductions of the pooling.
    Source: Vaswani et al. 2017, arXiv:1706.03762; pre-norm, Xiong et al. 2020, arXiv:2002.04745.
    """

    def __init__(
        self,
        dim: int,
        width: int = 256,
        heads: int = 8,
        layers: int = 2,
        mlp: int = 4,
        hidden: int = 128,
        min_wavelength_um: float = 1e3,
        max_wavelength_um: float = 1e5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(width=width, layers=layers, mlp=mlp, hidden=hidden)
        check_heads(width, heads, "width")
        if width % 4:
            raise ConfigError(f"width={width} must be a multiple of 4: sine and cosine of x and of y")
        if not 0 < min_wavelength_um < max_wavelength_um:
            raise ConfigError(
                f"min_wavelength_um={min_wavelength_um} and max_wavelength_um={max_wavelength_um} are no range in micron"
            )
        self.project = nn.Linear(dim, width)
        self.layers = nn.ModuleList(_Layer(width, heads, mlp, dropout, f"aggregator.layer{i}") for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pooling = GatedAttention(width, hidden)
        self.out_dim = width
        self.wavelengths_um = (min_wavelength_um, max_wavelength_um)

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, D) and attention (n, 1)."""
        x_nD = self.project(bag.embedding_nD)
        x_nD = x_nD + position_code(bag.position_n2, x_nD.shape[1], *self.wavelengths_um).to(x_nD.dtype)
        for layer in self.layers:
            x_nD = layer(x_nD, bag)
        pooled: Pooled = self.pooling(dataclasses.replace(bag, embedding_nD=self.norm(x_nD)))
        return pooled


def position_code(position_n2: Tensor, width: int, min_wavelength_um: float, max_wavelength_um: float) -> Tensor:
    """Sine and cosine of x and of y at width / 4 wavelengths in a geometric range, (n, width).

    Args:
        position_n2: in micron, so that the code does not depend on the size of tiles.
    """
    start, stop = math.log(min_wavelength_um), math.log(max_wavelength_um)
    wavelength_F = torch.linspace(start, stop, width // 4, dtype=position_n2.dtype, device=position_n2.device).exp()
    angle_nF = (2 * math.pi * position_n2[:, :, None] / wavelength_F).flatten(1)
    return torch.cat([angle_nF.sin(), angle_nF.cos()], dim=1)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, dropout: float, name: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _SlideAttention(width, heads)
        self.dropout1 = KeyedDropout(dropout, f"{name}.attention")
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp * width), nn.GELU(), nn.Linear(mlp * width, width))
        self.dropout2 = KeyedDropout(dropout, f"{name}.mlp")

    def forward(self, x_nD: Tensor, bag: Bag) -> Tensor:
        x_nD = x_nD + self.dropout1(self.attention(self.norm1(x_nD), bag), bag.tile_key_n)
        return x_nD + self.dropout2(self.mlp(self.norm2(x_nD)), bag.tile_key_n)


class _SlideAttention(nn.Module):
    """Multi-head self-attention among the tiles of each slide, wherever they are."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_nD: Tensor, bag: Bag) -> Tensor:
        qkv_nHX = self.qkv(x_nD).unflatten(1, (self.heads, -1))
        share = _by_heads if self.heads % len(bag.pool.counts) == 0 else _by_rows
        return self.out(share(qkv_nHX, bag).flatten(1))


def _by_heads(qkv_nHX: Tensor, bag: Bag) -> Tensor:
    """Each rank takes all tiles of some heads (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509)."""
    q_NHd, k_NHd, v_NHd = bag.pool.heads_apart(qkv_nHX).chunk(3, dim=2)
    slides = [slice(offset, offset + size) for offset, size in zip(bag.offsets, bag.sizes, strict=True)]
    return bag.pool.heads_together(torch.cat([_attend(q_NHd[own], k_NHd[own], v_NHd[own]) for own in slides]))


def _by_rows(qkv_nHX: Tensor, bag: Bag) -> Tensor:
    """Each rank takes its own tiles' queries, and the keys and values of all tiles of their slides."""
    q_nHd, kv_nHX = qkv_nHX.tensor_split([qkv_nHX.shape[2] // 3], dim=2)
    spans, none_0HX, kv_parts = fetch_slides(kv_nHX, bag)
    q_parts = q_nHd.split([span.stop - span.start for span in spans])
    # The empty part keeps a rank without tiles in the backward of the exchange.
    parts = [none_0HX[:, :, : q_nHd.shape[2]]]
    parts += [_attend(q_nHd, *kv_NHX.chunk(2, dim=2)) for q_nHd, kv_NHX in zip(q_parts, kv_parts, strict=True)]
    return torch.cat(parts)


def _attend(q_nHd: Tensor, k_NHd: Tensor, v_NHd: Tensor) -> Tensor:
    q, k, v = (values.transpose(0, 1)[None] for values in (q_nHd, k_NHd, v_NHd))
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)

"""TransMIL: Nystrom attention over the sequence of a slide's tiles, with convolutions on a square in between.

Shapes: n tiles or tokens on this rank, B slides, D width, H heads, d = D / H, m landmarks of a slide, G those of all
slides, T tokens of a slide, X anything.
The tokens of all slides are laid end to end, and every rank owns an even run of them, as it does of tiles. Attention
needs no more of the other ranks than sums over landmarks; the convolutions need the tokens beside a run, its halo.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigamil.models.aggregator import aggregators
from gigamil.models.aggregators.parts import check_counts, check_heads
from gigamil.models.aggregators.spans import fetch_windows, spans_by_rank
from gigamil.models.bag import Bag, Pooled, Ranges
from gigamil.models.dropout import KeyedDropout

PINV_ITERATIONS = 6  # of the paper
RESIDUAL_KERNEL = 33  # tokens; of the paper's code


@aggregators.register("transmil")
class TransMIL(nn.Module):
    """Two blocks of Nystrom attention with a position code by convolution (PPEG) in between; z is the class token.

    x_i = relu(W h_i). A slide of N tiles is the sequence of a class token and s^2 tokens, s = ceil(sqrt(N)): its tiles
    in stored order, and the first of them again. Then x = x + A(LN(x)), x = PPEG(x), x = x + A(LN(x)), z = LN(x)_class.
    The attention given outside training is that of the class token in the last block, mean over heads: Nystrom's
    approximation may be negative there, which counts as next to nothing.

    What differs from the authors' code: sequences are not padded with zeros to a multiple of the landmarks, so the
    landmarks are means of real tokens only; the scaling that starts the pseudo-inverse is each matrix's own and not the
    batch's, so no slide changes another; dropout is on x_i; PPEG has one bias in place of three that are only added.

    Args:
        dim: embedding width.
        width: D.
        heads: H; divide `width`.
        landmarks: at most, m = min(landmarks, T).
        dropout: keyed dropout on the projected tiles.
    Raises:
        ConfigError: heads do not divide the width, or no landmark.
    Cost: per token and block about 5 m D multiplications, and H m numbers kept; per slide and block 18 H m^3 for the
        pseudo-inverse. Forward 4 all-to-alls (one of n D numbers, the others of halos) and 7 all-reduces; backward 4
        and 5.
    Source: Shao et al. 2021, arXiv:2106.00908; Xiong et al. 2021, arXiv:2102.03902. Over ranks the pseudo-inverse
        enlarges the rounding of its sums: distributed/test_sequences.py has the bound.
    """

    def __init__(self, dim: int, width: int = 512, heads: int = 8, landmarks: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        check_counts(width=width, landmarks=landmarks)
        check_heads(width, heads, "width")
        self.project = nn.Linear(dim, width)
        self.dropout = KeyedDropout(dropout, "aggregator.embedding")
        self.class_token_1D = nn.Parameter(0.02 * torch.randn(1, width))
        self.norm1 = nn.LayerNorm(width)
        self.attention1 = NystromAttention(width, heads, landmarks)
        self.square = SquareConvolution(width)
        self.norm2 = nn.LayerNorm(width)
        self.attention2 = NystromAttention(width, heads, landmarks)
        self.norm = nn.LayerNorm(width)
        self.out_dim = width

    def forward(self, bag: Bag) -> Pooled:
        """Bag -> slide embedding (B, D), and attention (n, 1) outside training."""
        tile_nD = self.dropout(F.relu(self.project(bag.embedding_nD)), bag.tile_key_n)
        tokens = make_tokens(tile_nD, self.class_token_1D, bag)
        x_nD = tokens.embedding_nD
        x_nD = x_nD + self.attention1(self.norm1(x_nD), tokens)[0]
        x_nD = self.square(x_nD, tokens)
        change_nD, row_n = self.attention2(self.norm2(x_nD), tokens, wants_row=not torch.is_grad_enabled())
        slide_BD = self.norm(tokens.pick(x_nD + change_nD, _class_numbers(tokens)))
        return Pooled(slide_BD, None if row_n is None else _attention_of_tiles(row_n, tokens, bag))


def make_tokens(tile_nD: Tensor, class_token_1D: Tensor, bag: Bag) -> Bag:
    """The slides' token sequences, in even runs over the ranks, as a bag of tokens.

    Cost: one all-to-all of the tiles, and one in backward.
    """
    sizes = [_side(size) ** 2 + 1 for size in bag.sizes]
    num_ranks = len(bag.pool.counts)
    bounds = [sum(sizes) * rank // num_ranks for rank in range(num_ranks + 1)]
    pool = bag.pool.repartitioned([stop - start for start, stop in itertools.pairwise(bounds)])
    spans, offsets = spans_by_rank(pool, sizes), bag.offsets

    def sources(slide: int, start: int, stop: int) -> Ranges:
        """Tiles of the tokens after the class token: those of the slide, then its first ones again."""
        first, size = offsets[slide], bag.sizes[slide]
        both = [(max(start, 1), min(stop, 1 + size), first - 1), (max(start, 1 + size), stop, first - 1 - size)]
        return [(a + shift, b + shift) for a, b, shift in both if a < b]

    wanted = [[piece for span in own for piece in sources(*span)] for own in spans]
    fetched_nD = torch.cat([class_token_1D, bag.pool.fetch(tile_nD, wanted)])
    # Row 0 is the class token: it goes to the start of each slide, the tiles follow one after the other.
    is_class = torch.cat([torch.arange(0), *(torch.arange(start, stop) for _, start, stop in spans[pool.rank])]) == 0
    row_n = torch.where(is_class, 0, torch.cumsum(~is_class, 0)).to(tile_nD.device, non_blocking=True)
    nowhere_n2 = bag.position_n2.new_zeros((len(row_n), 2))
    return Bag(fetched_nD[row_n], nowhere_n2, tuple(sizes), pool)


class NystromAttention(nn.Module):
    """softmax(Q K_l^T) pinv(softmax(Q_l K_l^T)) softmax(Q_l K^T) V + conv(V), with landmarks Q_l, K_l.

    A landmark is the mean of a segment of tokens; token t of T belongs to segment floor(t m / T). All softmaxes are of
    scores over sqrt(d). The convolution runs along the sequence, one kernel per head.

    Args:
        width: D.
        heads: H.
        landmarks: m = min(landmarks, T).
    Source: Xiong et al. 2021, arXiv:2102.03902, eq. 13 and 14.
    """

    def __init__(self, width: int, heads: int, landmarks: int) -> None:
        super().__init__()
        self.heads = heads
        self.landmarks = landmarks
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.kernel_H1k = nn.Parameter(_uniform(heads, 1, RESIDUAL_KERNEL))

    def forward(self, x_nD: Tensor, tokens: Bag, wants_row: bool = False) -> tuple[Tensor, Tensor | None]:
        """Rows (n, D) of this rank's tokens; on demand what the class token gives to each, (n,), mean over heads.

        Cost: one sum all-reduce of 2 G D numbers, one max of G H, one sum of G (D + H), one all-to-all of halos; the
            same in backward but for the maximum. The row takes one sum of B D more.
        """
        q_nHd, k_nHd, v_nHd = self.qkv(x_nD).unflatten(1, (3, self.heads, -1)).unbind(1)
        q_Hnd, k_Hnd, v_Hnd = (values.transpose(0, 1) for values in (q_nHd, k_nHd, v_nHd))
        counts = [min(self.landmarks, size) for size in tokens.sizes]
        landmark_GHX = landmark_means(torch.cat([q_nHd, k_nHd], dim=2), tokens, counts)
        q_HGd, k_HGd = landmark_GHX.transpose(0, 1).chunk(2, dim=2)
        scale = q_nHd.shape[2] ** -0.5
        slides = [  # its rows on this rank, its landmarks
            (slice(*run), slice(end - count, end))
            for run, count, end in zip(tokens.runs(), counts, itertools.accumulate(counts), strict=True)
        ]

        # softmax(Q_l K^T) V over the tokens of all ranks, as in `softmax_pool`; a slide without rows here adds zeros.
        logits = [scale * q_HGd[:, marks] @ k_Hnd[:, rows].mT for rows, marks in slides]  # (H, m, n) of each slide
        shift_HG = tokens.pool.max(torch.cat([_largest(logit_Hmn) for logit_Hmn in logits], dim=1))
        weights = [torch.exp(logits.pop(0) - shift_HG[:, marks, None]) for _, marks in slides]
        sums = [
            torch.cat([weight_Hmn @ v_Hnd[:, rows], weight_Hmn.sum(2, keepdim=True)], dim=2)
            for weight_Hmn, (rows, _) in zip(weights, slides, strict=True)
        ]
        total_HGX = tokens.pool.sum(torch.cat(sums, dim=1))
        norm_HG1 = total_HGX[:, :, -1:]
        value_HGd = total_HGX[:, :, :-1] / norm_HG1

        class_BHd = tokens.pick(q_nHd, _class_numbers(tokens)) if wants_row else None
        mixed = [value_HGd.transpose(0, 1)[:0]]  # keeps a rank without tokens in the backward of the sums
        row = [x_nD.new_zeros(0)]
        for slide, (rows, marks) in enumerate(slides):
            if rows.start == rows.stop:
                continue
            inverse_Hmm = iterative_pinv(torch.softmax(scale * q_HGd[:, marks] @ k_HGd[:, marks].mT, dim=2))
            pair = k_HGd[None, :, marks], (inverse_Hmm @ value_HGd[:, marks])[None]
            mixed.append(F.scaled_dot_product_attention(q_Hnd[None, :, rows], *pair)[0].transpose(0, 1))
            if class_BHd is not None:
                own_H1m = torch.softmax(scale * class_BHd[slide, :, None] @ k_HGd[:, marks].mT, dim=2) @ inverse_Hmm
                row.append(((own_H1m / norm_HG1[:, marks].mT) @ weights[slide]).mean((0, 1)))
        mixed_nHd = torch.cat(mixed) + self._along_sequence(v_nHd, tokens)
        return self.out(mixed_nHd.flatten(1)), torch.cat(row) if wants_row else None

    def _along_sequence(self, v_nHd: Tensor, tokens: Bag) -> Tensor:
        """The convolution, over the tokens of each slide alone, zeros beyond its ends."""
        reach = self.kernel_H1k.shape[2] // 2

        def window(slide: int, start: int, stop: int) -> tuple[int, int]:
            return max(start - reach, 0), min(stop + reach, tokens.sizes[slide])

        spans, nothing, windows = fetch_windows(v_nHd, tokens, window)
        parts = [nothing * self.kernel_H1k.sum()]  # a rank without tokens has a gradient of zero, not none
        for span, window_wHd in zip(spans, windows, strict=True):
            (_, start, stop), (low, high) = span, window(*span)
            padded_dHw = F.pad(window_wHd.permute(2, 1, 0), (reach - (start - low), reach - (high - stop)))
            parts.append(F.conv1d(padded_dHw, self.kernel_H1k, groups=self.heads).permute(2, 1, 0))
        return torch.cat(parts)


class SquareConvolution(nn.Module):
    """PPEG: x + conv7(x) + conv5(x) + conv3(x), depthwise, on the square of a slide's tokens; the class token passes by.

    Convolution is linear: the kernels are added up first, the identity is one of a single weight.

    Args:
        width: D.
    Source: Shao et al. 2021, arXiv:2106.00908, section 3.3.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel7_D1kk = nn.Parameter(_uniform(width, 1, 7, 7))
        self.kernel5_D1kk = nn.Parameter(_uniform(width, 1, 5, 5))
        self.kernel3_D1kk = nn.Parameter(_uniform(width, 1, 3, 3))
        self.bias_D = nn.Parameter(torch.zeros(width))

    def forward(self, x_nD: Tensor, tokens: Bag) -> Tensor:
        """Rows (n, D) of this rank's tokens.

        Cost: one all-to-all, in which a rank asks for the lines of the square that its run touches and three on each
            side; one in backward.
        """
        identity_D1kk = torch.ones_like(self.kernel3_D1kk[:, :, :1, :1])
        kernels = (self.kernel7_D1kk, self.kernel5_D1kk, self.kernel3_D1kk, identity_D1kk)
        reach = self.kernel7_D1kk.shape[2] // 2
        kernel_D1kk = torch.stack([F.pad(kernel, [reach - kernel.shape[2] // 2] * 4) for kernel in kernels]).sum(0)
        sides = [_side(size - 1) for size in tokens.sizes]

        def lines(slide: int, start: int, stop: int) -> tuple[int, int]:
            """The lines that hold these tokens: token 1 + i is in line i // side."""
            return max(start - 1, 0) // sides[slide], -(-(stop - 1) // sides[slide])

        def window(slide: int, start: int, stop: int) -> tuple[int, int]:
            (first, last), side = lines(slide, start, stop), sides[slide]
            if first == last:  # the class token alone
                return 1, 1
            return 1 + max(first - reach, 0) * side, 1 + min(last + reach, side) * side

        spans, nothing, windows = fetch_windows(x_nD, tokens, window)
        parts = [nothing * (kernel_D1kk.sum((1, 2, 3)) + self.bias_D)]  # as in `NystromAttention`
        row = 0
        for span, window_wD in zip(spans, windows, strict=True):
            (_, start, stop), (first, last), side = span, lines(*span), sides[span[0]]
            if start == 0:
                parts.append(x_nD[row : row + 1])
            row += stop - start
            if first == last:
                continue
            missing = [reach - min(first, reach), reach - min(side - last, reach)]  # lines above and below the square
            padded_Dhw = F.pad(window_wD.unflatten(0, (-1, side)).permute(2, 0, 1), (reach, reach, *missing))
            found_Dhw = F.conv2d(padded_Dhw[None], kernel_D1kk, self.bias_D, groups=len(self.bias_D))[0]
            parts.append(found_Dhw.flatten(1).T[max(start - 1, 0) - first * side : stop - 1 - first * side])
        return torch.cat(parts)


def landmark_means(values_nX: Tensor, tokens: Bag, counts: Sequence[int]) -> Tensor:
    """Means over segments of each slide's tokens, (G, X): token t of T is in segment floor(t m / T) of m.

    Args:
        values_nX: of this rank's tokens.
        counts: m of each slide.
    Cost: one all-reduce of G X numbers, and one in backward.
    """
    firsts = list(itertools.accumulate(counts, initial=0))
    parts = [
        firsts[slide] + torch.arange(start, stop) * counts[slide] // tokens.sizes[slide]
        for slide, start, stop in spans_by_rank(tokens.pool, tokens.sizes)[tokens.pool.rank]
    ]
    segment_n = torch.cat([torch.arange(0), *parts]).to(values_nX.device, non_blocking=True)
    # Segment i starts at token ceil(i T / m).
    starts = [-(-torch.arange(m + 1) * size // m) for m, size in zip(counts, tokens.sizes, strict=True)]
    size_G = torch.cat([start.diff() for start in starts]).to(values_nX.device, values_nX.dtype, non_blocking=True)
    sum_GX = tokens.segment_sum(values_nX, segment_n, firsts[-1])
    return sum_GX / size_G.view(-1, *[1] * (values_nX.dim() - 1))


def iterative_pinv(matrix_Xmm: Tensor) -> Tensor:
    """Approximate the pseudo-inverse of matrices whose rows sum to 1, each by itself.

    Z_0 = A^T / (||A||_1 ||A||_inf), Z_{j+1} = Z_j (13 I - A Z_j (15 I - A Z_j (7 I - A Z_j))) / 4. ||A||_inf = 1 here.

    Source: Razavi et al. 2014; Xiong et al. 2021, arXiv:2102.03902, eq. 11 and 12.
    """
    one_mm = torch.eye(matrix_Xmm.shape[-1], dtype=matrix_Xmm.dtype, device=matrix_Xmm.device)
    inverse_Xmm = matrix_Xmm.mT / matrix_Xmm.sum(-2).amax(-1)[..., None, None]
    for _ in range(PINV_ITERATIONS):
        product_Xmm = matrix_Xmm @ inverse_Xmm
        inner_Xmm = 15 * one_mm - product_Xmm @ (7 * one_mm - product_Xmm)
        inverse_Xmm = inverse_Xmm @ (13 * one_mm - product_Xmm @ inner_Xmm) / 4
    return inverse_Xmm


def _attention_of_tiles(row_n: Tensor, tokens: Bag, bag: Bag) -> Tensor:
    """The class token's row of attention, brought to the owners of the tiles, (n, 1): not negative, of sum 1."""
    firsts = [offset + 1 for offset in tokens.offsets]  # after the class token
    wanted = [
        [(firsts[slide] + start, firsts[slide] + stop) for slide, start, stop in one_rank]
        for one_rank in spans_by_rank(bag.pool, bag.sizes)
    ]
    # Where the class token looks at itself alone, what it leaves for the tiles is rounding: they get the same, not noise.
    floor_B = torch.tensor([torch.finfo(row_n.dtype).eps ** 0.5 / size for size in bag.sizes], dtype=row_n.dtype)
    floor_n = floor_B.to(row_n.device, non_blocking=True)[bag.slide_index_n]
    weight_n1 = torch.maximum(tokens.pool.fetch(row_n, wanted), floor_n)[:, None]
    return weight_n1 / bag.segment_sum(weight_n1)[bag.slide_index_n]


def _class_numbers(tokens: Bag) -> Tensor:
    return torch.tensor(tokens.offsets).to(tokens.embedding_nD.device, non_blocking=True)


def _largest(logit_Hmn: Tensor) -> Tensor:
    """Maximum over tokens, (H, m); -inf without any."""
    return logit_Hmn.detach().amax(2) if logit_Hmn.shape[2] else logit_Hmn.new_full(logit_Hmn.shape[:2], -torch.inf)


def _side(num_tokens: int) -> int:
    """Side of the smallest square that holds them."""
    return math.isqrt(num_tokens - 1) + 1


def _uniform(*shape: int) -> Tensor:
    """How torch starts a convolution: uniform in +-1 / sqrt(weights per output)."""
    bound = math.prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)

"""How much each part of a slide moves its prediction: the gradient of a logit by the pixels, through a dense encoder.

Shapes: n tiles of the slide, D embedding, H W image.
The gradient of a pixel is the sum over all blocks that see it, so it is added up before its size is taken; what is kept of it is
one number for each square of pixels, and the squares that no later block sees are given up on the way.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gigamil.data.augment import to_float
from gigamil.data.blocks import BlockImages
from gigamil.data.pipeline import StepTiles
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.slide_model import SlideModel
from gigamil.partition.blocks import block_ranges, block_side


def slide_saliency(
    model: SlideModel,
    tiles: StepTiles,
    class_number: int,
    chunk: int,
    square_px: int = 32,
    done: Callable[[int], object] = lambda num_tiles: None,
) -> np.ndarray:
    """Size of d logit / d pixels over a slide, by squares; pixels are RGB in 0..1.

    Args:
        model: with a dense encoder, in evaluation mode, on the device where it is to be computed.
        tiles: all tiles of one slide, as blocks.
        class_number: of the logit; the last one where there are fewer (an ordinal task has one per threshold).
        chunk: tiles of a block.
        square_px: side of a square in pixels; a tile is a whole number of them.
        done: told how many tiles a block has when it is through, twice for each.
    Returns:
        float32 (H / square_px, W / square_px): the Euclidean norm of the gradient over a square's pixels and colours.
    Raises:
        ValueError: `square_px` does not divide a tile.
    Cost: two forwards and a backward of each block. Memory of a block, of the embeddings, and of the pixels on the border
    of what is done, 24 bytes x the shorter side of the slide x how far a cell looks: 1.5 GB of a slide of 65,536 px that is
    full of tissue with ResNet-34 to layer4 (928 px).
    """
    images = tiles.images
    assert isinstance(images, BlockImages), "saliency of tiles one by one needs no blocks"
    side = images.shape[0]
    if side % square_px:
        raise ValueError(f"squares of {square_px} px do not fill a tile of {side}")
    device = next(model.parameters()).device
    ranges = block_ranges(tiles.slide_index_n.numpy(), images.cell_n2, chunk)
    embeddings = []
    for start, stop in ranges:
        with torch.no_grad():
            embeddings.append(_encoded(model, images, start, stop, device)[0])
        done(stop - start)
    embedding_nD = torch.cat(embeddings)
    cotangent_nD = _cotangent(model, tiles, embedding_nD, class_number)
    readers = Counter(square for start, stop in ranges for square in images.tiles_read(start, stop))
    height, width = images.size_px
    result_hw = np.zeros((height // square_px, width // square_px), np.float32)
    sums: dict[tuple[int, int], np.ndarray] = {}
    # Row by row across the shorter side: the border of what is done is then half as long as along the curve.
    across = -1 if width > height else 1
    for start, stop in sorted(ranges, key=lambda rows: tuple(images.cell_n2[rows[0]] // block_side(chunk))[::across]):
        graph_cD, image_1CHW = _encoded(model, images, start, stop, device)
        (grad_1CHW,) = torch.autograd.grad(graph_cD, image_1CHW, cotangent_nD[start:stop])
        grad_HWC = grad_1CHW[0].permute(1, 2, 0).cpu().numpy()
        for (row, col), part, inside in _parts(images, start, stop, grad_HWC):
            held = sums.setdefault((row, col), np.zeros((side, side, grad_HWC.shape[2]), grad_HWC.dtype))
            held[inside] += part
            readers[row, col] -= 1
            if not readers[row, col]:
                number = side // square_px
                energy = np.square(sums.pop((row, col)), dtype=np.float64).sum(axis=2)
                squares = energy.reshape(number, square_px, number, square_px).sum(axis=(1, 3))
                result_hw[row * number : (row + 1) * number, col * number : (col + 1) * number] = np.sqrt(squares)
        done(stop - start)
    return result_hw


def _encoded(
    model: SlideModel, images: BlockImages, start: int, stop: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    image_1CHW = to_float(images.read(start, stop).to(device), next(model.parameters()).dtype)
    image_1CHW.requires_grad_(torch.is_grad_enabled())
    return model.encode(image_1CHW, None, images.cells(start, stop).to(device)), image_1CHW


def _cotangent(model: SlideModel, tiles: StepTiles, embedding_nD: Tensor, class_number: int) -> Tensor:
    """d logit / d embeddings."""
    embedding_nD = embedding_nD.detach().requires_grad_()
    bag = Bag(
        embedding_nD=embedding_nD,
        position_n2=tiles.position_n2.to(embedding_nD.device),
        sizes=(len(embedding_nD),),
        pool=LocalPool(len(embedding_nD)),
        tile_key_n=None,
        slide_key_B=None,
        label_B=None,
    )
    logits_1K, _ = model.classify(bag)
    output = min(class_number, logits_1K.shape[1] - 1)
    (cotangent_nD,) = torch.autograd.grad(logits_1K[0, output], embedding_nD)
    return cotangent_nD


def _parts(
    images: BlockImages, start: int, stop: int, grad_HWC: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray, tuple[slice, slice]]]:
    """What a block gives to each tile that it reads: (tile, gradient, where in the tile)."""
    side = images.shape[0]
    top, left = images.corner_px(start, stop)
    bottom, right = top + grad_HWC.shape[0], left + grad_HWC.shape[1]
    for row, col in images.tiles_read(start, stop):
        y0, y1 = max(top, row * side), min(bottom, (row + 1) * side)
        x0, x1 = max(left, col * side), min(right, (col + 1) * side)
        inside = slice(y0 - row * side, y1 - row * side), slice(x0 - col * side, x1 - col * side)
        yield (row, col), grad_HWC[y0 - top : y1 - top, x0 - left : x1 - left], inside

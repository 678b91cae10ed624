"""Saliency over blocks is the gradient by the pixels of the whole slide."""

import numpy as np
import pytest
import torch

from gigamil.data.augment import to_float
from gigamil.evaluate.saliency import slide_saliency
from gigamil.models.bag import Bag, LocalPool
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.dense import DenseCase, make_model, make_slides, own_blocks

CASE = DenseCase("convolutions, mean", ((7, 5, 0.6),), 1, random=False)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("square", [2, 8])
def test_blocks_add_up_to_the_whole_slide(chunk: int, square: int) -> None:
    model = make_model(CASE.net).eval()
    (image_HW3,), (grid,) = make_slides(CASE, 8)
    number = len(grid.cell_N2)
    tiles = own_blocks(CASE, model, plan_steps([0], [number], 1, 1, 1)[0], Topology())
    image = to_float(image_HW3[None], torch.float64).requires_grad_()
    bag = Bag(
        embedding_nD=model.encode(image, None, torch.from_numpy(grid.cell_N2)),
        position_n2=torch.zeros((number, 2), dtype=torch.float64),
        sizes=(number,),
        pool=LocalPool(number),
        tile_key_n=None,
        slide_key_B=None,
        label_B=None,
    )
    model.classify(bag)[0][0, 1].backward()
    assert image.grad is not None
    energy = image.grad[0].square().sum(0).reshape(56 // square, square, 40 // square, square).sum(dim=(1, 3))
    found = slide_saliency(model, tiles, 1, chunk, square)
    np.testing.assert_allclose(found, energy.sqrt().numpy(), rtol=1e-5, atol=1e-12)
    assert (found > 0).any()
    # An ordinal task has a class more than it has logits.
    last, beyond = (slide_saliency(model, tiles, number, chunk, square) for number in (2, 3))
    np.testing.assert_array_equal(beyond, last)


def test_squares_fill_a_tile() -> None:
    model = make_model(CASE.net).eval()
    (_,), (grid,) = make_slides(CASE, 8)
    tiles = own_blocks(CASE, model, plan_steps([0], [len(grid.cell_N2)], 1, 1, 1)[0], Topology())
    with pytest.raises(ValueError, match="squares of 3 px do not fill a tile of 8"):
        slide_saliency(model, tiles, 0, 4, 3)

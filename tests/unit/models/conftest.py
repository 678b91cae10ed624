"""Bags that lie in one process, for the tests of what looks at them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gigamil import keyed
from gigamil.models.bag import Bag, LocalPool

MakeBag = Callable[..., Bag]


def bag_of(
    embedding_nD: Tensor, sizes: Sequence[int], draws: bool = False, label_B: Tensor | None = None, first_slide: int = 0
) -> Bag:
    """A bag of slides laid end to end; the draws of a slide depend on its number only, counted from `first_slide`."""
    slide_key_B = keyed.fold(keyed.root_key(0), torch.arange(first_slide, first_slide + len(sizes)))
    slide_n = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    number_n = torch.cat([torch.arange(0), *(torch.arange(size) for size in sizes)])
    return Bag(
        embedding_nD=embedding_nD,
        position_n2=torch.stack([number_n % 4, number_n // 4], dim=1).double() * 128,
        sizes=tuple(sizes),
        pool=LocalPool(sum(sizes)),
        tile_key_n=keyed.fold(slide_key_B[slide_n], number_n) if draws else None,
        slide_key_B=slide_key_B if draws else None,
        label_B=label_B,
    )


@pytest.fixture
def make_bag() -> MakeBag:
    """`bag_of`, for tests that cannot import it from here."""
    return bag_of

"""Small slide files with known content."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gigamil.testing.slides import write_pyramid_tiff

WHITE, PINK = (245, 244, 246), (225, 150, 190)

MakeSlide = Callable[..., Path]


@pytest.fixture
def make_slide(tmp_path: Path) -> MakeSlide:
    """`make_slide(image_HW3, mpp, name=..., **options)` writes a pyramidal TIFF and returns its path."""

    def make(image_HW3: np.ndarray, mpp: Any = 0.5, name: str = "slide.tiff", **options: Any) -> Path:
        path = tmp_path / name
        write_pyramid_tiff(path, image_HW3, mpp, quality=95, **options)
        return path

    return make


def plain(height: int, width: int, colour: tuple[int, int, int] = WHITE) -> np.ndarray:
    """An image of one colour."""
    return np.full((height, width, 3), colour, np.uint8)


def glass(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An empty slide as a scanner sees it: almost white, with noise."""
    rng = np.random.default_rng(seed)
    return np.clip(np.array(WHITE) + rng.normal(0, 2, (height, width, 3)), 0, 255).astype(np.uint8)


def ramps(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green to the bottom: every region says where it was read."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, axis=0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, axis=1)
    return np.stack([red, green, np.full_like(red, 128)], axis=2).round().astype(np.uint8)

"""Slide file -> tissue mask -> tile grid. Knows nothing of ranks, shards or models."""

from gigamil.slides.grid import TileGrid, choose_tiles
from gigamil.slides.inspect import SlideReport, inspect_slide
from gigamil.slides.native import NativeTiles, NotNative, native_tiles
from gigamil.slides.pool import SlidePool
from gigamil.slides.reader import MppError, Slide, SlideInfo, open_slide
from gigamil.slides.tissue import TissueMask, find_tissue

__all__ = [
    "MppError",
    "NativeTiles",
    "NotNative",
    "Slide",
    "SlideInfo",
    "SlidePool",
    "SlideReport",
    "TileGrid",
    "TissueMask",
    "choose_tiles",
    "find_tissue",
    "inspect_slide",
    "native_tiles",
    "open_slide",
]

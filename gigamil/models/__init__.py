"""Models: ordinary single-process modules, the reference for every test."""

from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool, Pooled, softmax_pool
from gigamil.models.dropout import KeyedDropout
from gigamil.models.encoder import SmallCNN, TileEncoder
from gigamil.models.networks import FrozenStatistics
from gigamil.models.slide_model import SlideModel, build_model

__all__ = [
    "Bag",
    "FrozenStatistics",
    "GatedAttention",
    "KeyedDropout",
    "LocalPool",
    "Pooled",
    "SlideModel",
    "SmallCNN",
    "TileEncoder",
    "build_model",
    "softmax_pool",
]

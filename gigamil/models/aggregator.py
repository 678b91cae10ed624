"""What an aggregator is, and the registry of them: the embeddings of a slide -> one slide embedding, or its logits.

Shapes: n tiles on this rank, B slides, D embedding, A attention heads, K classes.
An aggregator is a module with `forward(bag) -> Pooled` and an attribute `out_dim`: the width of its slide embedding, which
a linear head classifies, or None if it gives logits itself. It looks at more than one tile only through the bag, so it is
exact over ranks without knowing of them. An attribute `min_tiles` tells how many tiles a slide must have (1 without it).
Register your own with `@aggregators.register("name")`: a factory that takes the embedding width, `num_classes` if it
names such a parameter, and `science.aggregator.options`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from gigamil.errors import ConfigError
from gigamil.registry import Registry

aggregators: Registry[Callable[..., nn.Module]] = Registry("aggregator", "gigamil.aggregators")


def build_aggregator(name: str, dim: int, num_classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The aggregator that the configuration names.

    Raises:
        ConfigError: unknown name, or options that the factory does not take.
    """
    factory = aggregators[name]
    classes = {"num_classes": num_classes} if "num_classes" in inspect.signature(factory).parameters else {}
    try:
        aggregator = factory(dim, **classes, **options)
    except TypeError as error:
        raise ConfigError(f"science.aggregator.options do not fit aggregator '{name}': {error}") from error
    except ConfigError as error:
        raise ConfigError(f"science.aggregator.options of aggregator '{name}': {error}") from error
    if not hasattr(aggregator, "out_dim") or not isinstance(aggregator.out_dim, int | None):
        raise ConfigError(
            f"aggregator '{name}' must have an attribute `out_dim`: the width of its output, or None if it gives logits"
        )
    return aggregator


def min_tiles(aggregator: nn.Module) -> int:
    """Tiles that a slide must have for this aggregator."""
    return int(getattr(aggregator, "min_tiles", 1))

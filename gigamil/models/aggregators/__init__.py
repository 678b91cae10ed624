"""The aggregators of the field, each a plain module with its paper's formula. Importing this registers them."""

from gigamil.models.aggregators import abmilx, attention, clam, dsmil, dtfd, instance, transformer, transmil

__all__ = ["abmilx", "attention", "clam", "dsmil", "dtfd", "instance", "transformer", "transmil"]

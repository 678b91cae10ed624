"""The aggregators of the field, each a plain module with its paper's formula. Importing this registers them."""

from gigamil.models.aggregators import attention

__all__ = ["attention"]

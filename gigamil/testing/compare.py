"""How errors are measured: one definition for tests, benchmarks and reports."""

from collections.abc import Mapping

import torch
from torch import Tensor


def gradient_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], floor: float = 1e-3) -> float:
    """Largest relative error over parameters: ||d|| / max(||g_parameter||, floor ||g_all||).

    The floor keeps a parameter whose gradient is nearly zero from turning rounding into a large ratio.

    Raises:
        KeyError: the parameters are not the same.
    """
    if found.keys() != wanted.keys():
        raise KeyError(f"other parameters: {sorted(found.keys() ^ wanted.keys())}")
    norm_all = torch.stack([g.double().norm() for g in wanted.values()]).norm()
    errors = []
    for name, gradient in wanted.items():
        difference = (found[name].double() - gradient.double()).norm()
        errors.append(difference / torch.maximum(gradient.double().norm(), floor * norm_all))
    return float(torch.stack(errors).max())  # the maximum of torch is NaN if one of them is; Python's need not be


def relative_error(found: float, wanted: float) -> float:
    """|found - wanted| / |wanted|."""
    return abs(found - wanted) / max(abs(wanted), 1e-300)

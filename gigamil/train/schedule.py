"""Learning rates: a function of the step, so that nothing has to be saved."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigamil.config.schema import Optim


def learning_rates(
    optim: "Optim", step: int, num_steps: int, train_encoder: bool, shares: Sequence[float] = (1.0,)
) -> list[float]:
    """Rates of the parameter groups (those of the encoder, then the head) at a step: linear warm-up, then half a cosine.

    Args:
        step: number of the optimiser step, from 0.
        num_steps: steps of the whole run; the cosine ends there at `final_lr_fraction` of each rate.
        train_encoder: False gives the encoder rate 0, which freezes it exactly.
        shares: of `lr_encoder`, one per group of the encoder (the keys of `gigamil.models.blocks.parameters_by_rate`).
    """
    if step < optim.warmup_steps:
        factor = (step + 1) / optim.warmup_steps
    else:
        progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
        low = optim.final_lr_fraction
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    rate = optim.lr_encoder * factor if train_encoder else 0.0
    return [*(rate * share for share in shares), optim.lr_head * factor]

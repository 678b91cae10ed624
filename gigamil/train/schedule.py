"""Learning rates: a function of the step, so that nothing has to be saved."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gigamil.config.schema import Optim


def learning_rates(optim: "Optim", step: int, num_steps: int, train_encoder: bool) -> list[float]:
    """Rates of the parameter groups (encoder, head) at a step: linear warm-up, then half a cosine.

    Args:
        step: number of the optimiser step, from 0.
        num_steps: steps of the whole run; the cosine ends there at `final_lr_fraction` of each rate.
        train_encoder: False gives the encoder rate 0, which freezes it exactly.
    """
    if step < optim.warmup_steps:
        factor = (step + 1) / optim.warmup_steps
    else:
        progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
        low = optim.final_lr_fraction
        factor = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return [optim.lr_encoder * factor if train_encoder else 0.0, optim.lr_head * factor]

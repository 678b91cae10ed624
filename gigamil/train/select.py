"""Which tiles of a step's slides the encoder learns from: drawn, or chosen by the attention of a scan without gradients.

A scan encodes all tiles, so attention is that of the weights of this step; what is chosen is then shared out over the ranks anew,
so that no rank is left with the slides' best tiles, and the step is exact for the chosen ones.

Shapes: B slides of the group, n tiles on this rank, M tiles that are chosen of a slide.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gigamil import keyed
from gigamil.config.schema import Regime
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.data.source import TilePlaces
from gigamil.parallel.collectives import stack_ranks
from gigamil.partition.choose import region_tiles, uniform_tiles
from gigamil.partition.schedule import StepPlan
from gigamil.train.step import Ranks

_NOISE = keyed.text_key("select")


def sampled_plans(
    plans: Iterable[StepPlan],
    first: int,
    regime: Regime,
    seed: int,
    slide_ids: Sequence[str],
    sizes: Sequence[int],
    places: Callable[[str], TilePlaces],
    tile_um: Callable[[str], float],
) -> Iterator[StepPlan]:
    """Plans with tiles that are drawn anew in each step, by (seed, step, slide) alone; each made when it is asked for.

    Args:
        plans: of steps `first`, `first` + 1, ..., with the sizes of `sampled_sizes`.
        slide_ids, sizes: that `StepPlan.slides` indexes; all tiles of each.
        places: where a slide's tiles lie.
        tile_um: distance of a slide's neighbouring tiles.
    """

    def drawn(step: int, slide: int) -> np.ndarray:
        slide_id, key = slide_ids[slide], f"{seed}/{step}/{slide_ids[slide]}"
        if regime.how != "regions":
            return uniform_tiles(sizes[slide], regime.tiles, key)
        index = places(slide_id)
        return region_tiles(index.x_um, index.y_um, tile_um(slide_id), regime.tiles, key)

    for step, plan in enumerate(plans, first):
        yield replace(plan, tiles=tuple(tuple(drawn(step, slide).tolist()) for slide in plan.slides))


def selected_plan(
    plan: StepPlan, tiles: StepTiles, attention_n: Tensor, regime: Regime, ranks: Ranks, keys: DrawKeys, step: int
) -> StepPlan:
    """The plan of the tiles with most attention, or of tiles drawn in proportion to it, shared out over the ranks of the group.

    Args:
        plan, tiles: of all tiles of the step; this rank's.
        attention_n: of this rank's tiles, from a scan.
        keys: draws of the run.
        step: number of the step.
    Returns:
        A plan with `regime.tiles` tiles of each slide at most; `tiles` of the slides of this group.
    Cost: an all-gather of 2 B M numbers in the group.
    """
    group = plan.groups[ranks.topology.group]
    score_n = attention_n.double().log()
    if regime.how == "weighted":  # the M largest of log a + Gumbel noise are a draw without replacement
        slide_key_B = keyed.fold(keys.slides(step, [plan.slides[position] for position in group]), _NOISE)
        key_n = DrawKeys.tiles(slide_key_B, tiles.slide_index_n, tiles.number_n)
        uniform_n = keyed.uniform(key_n, 2).double() @ torch.tensor([1.0, 2.0**-24], dtype=torch.float64) + 2.0**-50
        score_n = score_n - (-uniform_n.log()).log().to(score_n)
    best_BM2 = torch.full((len(group), regime.tiles, 2), -torch.inf, dtype=torch.float64, device=score_n.device)
    for slide in range(len(group)):
        rows = torch.nonzero(tiles.slide_index_n == slide).flatten()
        number_m = tiles.number_n[rows].to(score_n)
        order = _by_score(score_n[rows.to(score_n.device)], number_m)[: regime.tiles]
        best_BM2[slide, : len(order)] = torch.stack([score_n[rows.to(score_n.device)][order], number_m[order]], dim=1)
    everyone_RBM2 = best_BM2[None] if ranks.pooling_group is None else stack_ranks(best_BM2, ranks.pooling_group)
    chosen: list[tuple[int, ...] | None] = [None] * len(plan.slides)
    for slide, position in enumerate(group):
        found = everyone_RBM2[:, slide].reshape(-1, 2)
        found = found[torch.isfinite(found[:, 1])]
        order = _by_score(found[:, 0], found[:, 1])[: regime.tiles]
        chosen[position] = tuple(sorted(int(number) for number in found[order, 1].tolist()))
    sizes = tuple(min(size, regime.tiles) for size in plan.sizes)
    return replace(plan, sizes=sizes, tiles=tuple(chosen))


def _by_score(score_m: Tensor, number_m: Tensor) -> Tensor:
    """Order from the highest score on; of equal ones the lowest number first."""
    by_number = torch.argsort(number_m, stable=True)
    return by_number[torch.argsort(score_m[by_number], descending=True, stable=True)]

"""Which slides make which step, and which group pools them: pure functions of (seed, epoch, sizes)."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gigamil.partition.spans import Span, chunk_ranges, owned_range, owned_spans, shared_bounds


@dataclass(frozen=True)
class StepPlan:
    """The slides of one optimiser step and the group that pools each.

    Attributes:
        slides: indices into the caller's slide list, in the epoch's order.
        sizes: number of tiles of each of them.
        groups: for each group, positions in `slides` that it pools, ascending; may be empty.
        group_size: ranks of a group.
        shares: in proportion to which the ranks of a group own its tiles, for every rank of the world; None: equal.
        tiles: of each slide the numbers of the tiles that take part, ascending, as many as `sizes` says, or None for all of
            them; a group needs those of its own slides only. None: all of all slides.
    """

    slides: tuple[int, ...]
    sizes: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    group_size: int
    shares: tuple[int, ...] | None = None
    tiles: tuple[tuple[int, ...] | None, ...] | None = None

    def spans(self, group: int, group_rank: int) -> tuple[Span, ...]:
        """Spans that a rank owns; `Span.slide` counts in `groups[group]`, and its tiles in `tiles` of that slide if it has some."""
        return owned_spans(self.group_sizes(group), group_rank, self.group_size, self._group_shares(group))

    def group_sizes(self, group: int) -> tuple[int, ...]:
        """Tiles of each slide of a group."""
        return tuple(self.sizes[position] for position in self.groups[group])

    def counts(self, group: int) -> tuple[int, ...]:
        """Tiles that each rank of a group owns."""
        total, shares = sum(self.group_sizes(group)), self._group_shares(group)
        if shares is not None:
            return tuple(stop - start for start, stop in itertools.pairwise(shared_bounds(total, shares)))
        bounds = [owned_range(total, rank, self.group_size) for rank in range(self.group_size)]
        return tuple(stop - start for start, stop in bounds)

    def max_calls(self, chunk: int) -> int:
        """Largest number of encoder calls that any rank of the world makes for its own tiles (at least 1)."""
        if self.shares is None:
            tiles = [sum(self.group_sizes(group)) for group in range(len(self.groups))]
            most = -(-max(tiles) // self.group_size)  # the largest run that `owned_range` hands out
        else:
            most = max(max(self.counts(group)) for group in range(len(self.groups)))
        return max(1, len(chunk_ranges(most, chunk)))

    def _group_shares(self, group: int) -> tuple[int, ...] | None:
        if self.shares is None:
            return None
        return self.shares[group * self.group_size : (group + 1) * self.group_size]


def epoch_order(num_slides: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the training slides in an epoch: int64 (num_slides,), the same for any number of ranks."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)  # a plain list of these would become float64 and lose bits
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.permutation(num_slides)


def balanced_order(classes: Sequence[int], seed: int, epoch: int) -> np.ndarray:
    """Order of as many training slides with every class equally often: int64 (num_slides,), the same for any number of ranks.

    Slides of a small class come several times in an epoch, of a large one some not at all; each class is gone through in shuffled
    rounds, so that none comes again before all others have.

    Args:
        classes: class of each slide.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    members = [np.flatnonzero(np.asarray(classes) == one) for one in sorted(set(classes))]
    turns = np.arange(len(classes)) % len(members)  # which class is drawn from; the last ones by chance
    turns = generator.permutation(len(members))[turns]
    chosen = np.empty(len(classes), dtype=np.int64)
    for number, slides in enumerate(members):
        wanted = int((turns == number).sum())
        rounds = [generator.permutation(slides) for _ in range(-(-wanted // len(slides)))]
        chosen[turns == number] = np.concatenate([*rounds, slides[:0]])[:wanted]
    return chosen[generator.permutation(len(classes))]


def plan_steps(
    order: Sequence[int] | np.ndarray, sizes: Sequence[int], slides_per_step: int, num_groups: int, group_size: int
) -> list[StepPlan]:
    """Cut an epoch's order into steps and share each step's slides between groups.

    Every slide is in exactly one step; the last step may be smaller. Groups are balanced by tiles: the largest slide
    goes first, each to the group with the fewest tiles so far (ties to the lowest group).
    """
    plans = []
    for start in range(0, len(order), slides_per_step):
        slides = tuple(int(index) for index in order[start : start + slides_per_step])
        step_sizes = tuple(int(sizes[index]) for index in slides)
        plans.append(StepPlan(slides, step_sizes, balance(step_sizes, num_groups), group_size))
    return plans


def balance(sizes: Sequence[int], num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Share positions 0..len(sizes) - 1 between groups by largest-first; each group's positions ascend."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    load = [0] * num_groups
    for position in sorted(range(len(sizes)), key=lambda p: (-sizes[p], p)):
        target = min(range(num_groups), key=lambda g: (load[g], g))
        groups[target].append(position)
        load[target] += sizes[position]
    return tuple(tuple(sorted(group)) for group in groups)

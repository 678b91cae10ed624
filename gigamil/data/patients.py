"""All slides of a patient as one bag: what stands in for a slide, to everything between the files and the model.

A bag is called as its patient. Its tiles are those of its slides, one slide after another.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from gigamil.data.cohort import CohortTable
from gigamil.data.features import FeaturePlaces
from gigamil.data.source import TileSource
from gigamil.data.table import folded
from gigamil.errors import ShardError

Bags = Mapping[str, Sequence[str]]  # bag -> its slides, whose tiles follow each other
GAP_UM = 10_000.0  # between slides of a bag, which lie side by side
_NUM_PLACES = 32  # bags whose places are kept


def patient_bags(table: CohortTable, slide_ids: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """These slides by patient, both in the order of the table; a patient is called as in its first row there."""
    wanted = set(slide_ids)
    names: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for row in table.rows:
        patient_id = names.setdefault(folded(row.patient_id), row.patient_id)
        if row.slide_id in wanted:
            found.setdefault(patient_id, []).append(row.slide_id)
    return {patient_id: tuple(own) for patient_id, own in found.items()}


class BagSource:
    """Tiles of bags out of the tiles of their slides.

    Args:
        source: of the slides.
        bags: whose tiles may be asked for.
        sizes: tiles of each slide.
    """

    def __init__(self, source: TileSource, bags: Bags, sizes: Mapping[str, int]) -> None:
        self._source, self._bags, self._sizes = source, bags, sizes
        self.index = lru_cache(_NUM_PLACES)(self._index)

    @property
    def dim(self) -> int | None:
        """As the slides'."""
        return self._source.dim

    @property
    def block(self) -> int:
        """As the slides'."""
        return self._source.block

    def read_tiles(self, bag: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tiles start..stop - 1 of a bag, as those of a slide.

        Raises:
            ShardError: as the source; names the slide and its own tile.
        """
        parts, first = [], 0
        for slide_id in self._bags[bag]:
            last = first + self._sizes[slide_id]
            low, high = max(start, first), min(stop, last)
            if low < high:
                own = None if out is None else out[low - start : high - start]
                parts.append(self._source.read_tiles(slide_id, low - first, high - first, own))
            first = last
        if stop > first:
            raise ShardError(f"bag '{bag}' has {first} tiles, and tiles up to {stop} were asked for")
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _index(self, bag: str) -> FeaturePlaces:
        """Where each tile lies, the slides side by side with a gap."""
        x_um, y_um, left_um = [], [], 0.0
        for slide_id in self._bags[bag]:
            places = self._source.index(slide_id)
            if not len(places.x_um):
                continue
            x_um.append(places.x_um - places.x_um.min() + left_um)
            y_um.append(places.y_um - places.y_um.min())
            left_um = float(x_um[-1].max()) + GAP_UM
        none = np.zeros(0)
        return FeaturePlaces(np.concatenate([none, *x_um]), np.concatenate([none, *y_um]))

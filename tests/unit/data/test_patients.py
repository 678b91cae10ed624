"""All slides of a patient as one bag: order, names, tiles and places."""

from pathlib import Path

import numpy as np
import pytest

from gigamil.data.cohort import CohortTable, SlideRow
from gigamil.data.features import FeaturePlaces
from gigamil.data.patients import GAP_UM, BagSource, patient_bags
from gigamil.errors import ShardError

SIZES = {"a": 3, "b": 0, "c": 2}


class Slides:
    """Tiles that say whose they are: row = (slide, number)."""

    dim, block = 2, 4

    def read_tiles(self, slide_id: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        rows = np.array([[ord(slide_id), number] for number in range(start, stop)], np.float32).reshape(-1, 2)
        if out is not None:
            out[:] = rows
        return rows if out is None else out

    def index(self, slide_id: str) -> FeaturePlaces:
        number_N = np.arange(SIZES[slide_id], dtype=np.float64)
        return FeaturePlaces(100 + 10 * number_N, 5 + number_N)


@pytest.fixture
def source() -> BagSource:
    return BagSource(Slides(), {"p": ("a", "b", "c")}, SIZES)


def test_a_bag_has_the_tiles_of_its_slides_one_after_another(source: BagSource) -> None:
    whole = [[97, 0], [97, 1], [97, 2], [99, 0], [99, 1]]
    for start in range(6):
        for stop in range(start, 6):
            wanted = np.array(whole[start:stop], np.float32).reshape(-1, 2)
            out = np.full((stop - start, 2), -1, np.float32)
            if stop > start:
                np.testing.assert_array_equal(source.read_tiles("p", start, stop), wanted)
            np.testing.assert_array_equal(source.read_tiles("p", start, stop, out), wanted)
    with pytest.raises(ShardError, match="has 5 tiles"):
        source.read_tiles("p", 3, 6)


def test_slides_of_a_bag_lie_side_by_side(source: BagSource) -> None:
    places = source.index("p")
    np.testing.assert_array_equal(places.x_um, [0, 10, 20, 20 + GAP_UM, 30 + GAP_UM])
    np.testing.assert_array_equal(places.y_um, [0, 1, 2, 0, 1])


def test_patients_are_told_apart_as_splits_do() -> None:
    names = {"s1": "P-1", "s2": "p-2", "s3": "p-1 ", "s4": "P-2"}
    rows = tuple(
        SlideRow(slide_id, Path(slide_id), patient, "x", None, None, None) for slide_id, patient in names.items()
    )
    table = CohortTable(rows, ("x",))
    assert patient_bags(table, ["s4", "s3", "s1"]) == {"P-1": ("s1", "s3"), "p-2": ("s4",)}

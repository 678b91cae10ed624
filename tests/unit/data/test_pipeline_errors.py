"""A plan that cannot be made is an error that ranks agree on, with tiles read ahead or not."""

from collections.abc import Iterator
from typing import Any

import pytest

from gigamil.data.pipeline import StepLoader
from gigamil.errors import ShardError
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan, plan_steps


class NoTiles:
    dim, block = 2, 4

    def read_tiles(self, *_: Any) -> Any:
        raise ShardError("damaged")

    def index(self, slide_id: str) -> Any:
        raise ShardError("damaged")


def plans() -> Iterator[StepPlan]:
    yield plan_steps([0], [3], 1, 1, 1)[0]
    raise ShardError("no index")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_come_in_the_place_of_tiles(prefetch: int) -> None:
    loader = StepLoader(NoTiles(), ["a"], 8, Topology(), prefetch)
    found = [str(tiles) for _, tiles in loader.iterate(plans())]
    assert found == ["damaged", "no index"]

"""Each aggregator makes the collective calls that docs/aggregators.md says, with the numbers that it says, and no others.

The page's table is what is tested: it is read here. Ranks have even runs of tiles, uneven ones, or none; nothing changes but
what depends on them by its formula.
"""

import inspect
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gigamil.models.aggregator import aggregators, build_aggregator
from gigamil.models.bag import Bag
from gigamil.parallel.pooling import GroupPool
from gigamil.testing.ranks import run_on_ranks
from gigamil.testing.traffic import Call, count_traffic
from gigamil.train.loss import cross_entropy, slide_losses

PAGE = Path(__file__).parents[2] / "docs" / "aggregators.md"
DIM, NUM_CLASSES, SIZES = 16, 3, (20, 9, 31)
COUNTS = {
    2: ((30, 30), (7, 53), (0, 60)),
    3: ((20, 20, 20), (7, 30, 23), (35, 0, 25)),
}
WORDS = {  # of the page
    "max": ("all_reduce", "max"),
    "sum": ("all_reduce", "sum"),
    "stack": ("all_gather", ""),
    "fetch": ("all_to_all_single", ""),
}
HALOS = {"t", "u", "v"}  # of tokens, tested below


class Row(NamedTuple):
    """A row of the page's table: (word, formula) of each call."""

    name: str
    options: str
    forward: tuple[tuple[str, str], ...]
    backward: tuple[tuple[str, str], ...]


def read_table() -> list[Row]:
    section = PAGE.read_text("utf-8").split("## What crosses ranks")[1].split("\n## ")[0]
    rows = []
    for line in section.splitlines():
        if line.startswith("| `"):
            name, options, *calls = (cell.strip() for cell in line.strip("|").split("|"))
            forward, backward = (tuple(tuple(call.split(" ", 1)) for call in cell.split(", ")) for cell in calls)
            rows.append(Row(name.strip("`"), options, forward, backward))
    return rows


TABLE = read_table()


def applies(row: Row, num_ranks: int) -> bool:
    """Whether a row is of this number of ranks."""
    if not row.options.startswith("R "):
        return True
    divides = symbols(row)["A"] % num_ranks == 0
    return divides == (row.options == "R divides `heads`")


def options_of(row: Row) -> dict[str, Any]:
    """`a=b` of the page."""
    values = {"True": True}
    return {key: values.get(text, text) for key, text in re.findall(r"`(\w+)=(\w+)`", row.options)}


def symbols(row: Row) -> dict[str, int]:
    """What the letters of the page stand for, but for those of one rank."""
    default = {key: option.default for key, option in inspect.signature(aggregators[row.name]).parameters.items()}
    tokens = [math.ceil(math.sqrt(size)) ** 2 + 1 for size in SIZES]
    return {
        "B": len(SIZES),
        "D": DIM,
        "K": NUM_CLASSES,
        "N": sum(SIZES),
        "A": default.get("heads", 1),
        "W": default.get("width", 0),
        "Q": default.get("hidden", 0),
        "k": default.get("k", 0),
        "M": default.get("groups", 0) * len(SIZES),
        "G": sum(min(default.get("landmarks", 0), size) for size in tokens),
    }


def rank_symbols(counts: tuple[int, ...], rank: int) -> dict[str, int]:
    """Letters that stand for something of one rank."""
    first = sum(counts[:rank])
    ends = itertools.pairwise(itertools.accumulate(SIZES, initial=0))
    touched = [stop - start for start, stop in ends if max(start, first) < min(stop, first + counts[rank])]
    return {"n": counts[rank], "m": sum(touched), "R": len(counts)}


def test_every_built_in_aggregator_is_in_the_table() -> None:
    built_in = {name for name in aggregators.names() if aggregators[name].__module__.startswith("gigamil.models.")}
    assert {row.name for row in TABLE} == built_in


@pytest.fixture(scope="module", params=[2, 3])
def worlds(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank said."""
    return run_on_ranks(measure, request.param, request.param)


def measure(rank: int, num_ranks: int) -> dict[str, Any]:
    # For each row of the table and each way to share out the tiles: calls of forward and of backward.
    rows = [[measure_step(row, counts, rank) for counts in COUNTS[num_ranks]] for row in TABLE]
    return {"rows": rows, "halos": measure_halos(rank, num_ranks)}


def measure_step(row: Row, counts: tuple[int, ...], rank: int) -> tuple[list[Call], list[Call]]:
    torch.manual_seed(0)
    aggregator = build_aggregator(row.name, DIM, NUM_CLASSES, options_of(row)).double()
    width = aggregator.out_dim
    head = nn.Identity() if width is None else nn.Linear(width, NUM_CLASSES).double()
    bag = Bag(
        torch.randn(counts[rank], DIM, dtype=torch.float64).requires_grad_(),
        torch.zeros(counts[rank], 2, dtype=torch.float64),
        SIZES,
        GroupPool(dist.group.WORLD, counts, rank),
        tile_key_n=torch.arange(counts[rank]),
        slide_key_B=torch.arange(len(SIZES)),
        label_B=torch.tensor([0, 1, 2]),
    )
    with count_traffic() as forward:
        pooled = aggregator(bag)
    loss = slide_losses(cross_entropy, head(pooled.slide_BX), pooled, bag.label_B).sum()
    with count_traffic() as backward:
        loss.backward()
    return forward, backward


def expected(calls: tuple[tuple[str, str], ...], letters: dict[str, int]) -> list[tuple[str, str, int | None]]:
    """Collective, operation and bytes of each call; None where its formula has a letter without a value."""
    wanted = []
    for word, formula in calls:
        known = set(re.findall(r"[A-Za-z]", formula)) <= letters.keys()
        number = eval(formula.replace("·", "*").replace("/", "//"), {}, letters) if known else None  # noqa: S307
        wanted.append((*WORDS[word], None if number is None else 8 * number))
    return wanted


@pytest.mark.parametrize("index", range(len(TABLE)), ids=[f"{row.name} {row.options}".strip() for row in TABLE])
def test_an_aggregator_says_what_the_page_says(worlds: list[dict[str, Any]], index: int) -> None:
    row = TABLE[index]
    if not applies(row, len(worlds)):
        return
    for rank, found in enumerate(worlds):
        for counts, calls_of_passes in zip(COUNTS[len(worlds)], found["rows"][index], strict=True):
            letters = symbols(row) | rank_symbols(counts, rank)
            for is_backward, (calls, wanted) in enumerate(zip(calls_of_passes, row[2:], strict=True)):
                # A fetch brings its rows in the forward, and takes their gradients back in the backward.
                seen = [
                    (c.name, c.operation, c.received if c.name == "all_to_all_single" and not is_backward else c.sent)
                    for c in calls
                ]
                expected_calls = expected(wanted, letters)
                assert [call[:2] for call in seen] == [call[:2] for call in expected_calls]
                for call, expected_call in zip(seen, expected_calls, strict=True):
                    assert expected_call[2] in (None, call[2]), (counts, rank, call, expected_call)


def test_the_formulas_left_open_are_those_of_halos() -> None:
    letters = symbols(TABLE[0]).keys() | rank_symbols((1, 1), 0).keys()
    used = {
        letter
        for row in TABLE
        for _, formula in row.forward + row.backward
        for letter in re.findall("[A-Za-z]", formula)
    }
    assert used - letters == HALOS
    assert {row.name for row in TABLE if any(HALOS & set(formula) for _, formula in row.forward)} == {"transmil"}


def test_halos_are_a_small_part_of_a_large_bag(worlds: list[dict[str, Any]]) -> None:
    own = 10_001 / len(worlds)  # tiles and a class token
    for found in worlds:
        tiles, along1, square, along2 = (rows / own for rows in found["halos"])
        assert tiles == pytest.approx(1, abs=1e-3)
        assert 1 < along1 == along2 <= 1.02
        assert 1 < square <= 1.25  # lines of 100 tokens, three on each side and the rest of the first and the last


def measure_halos(rank: int, num_ranks: int) -> list[int]:
    """Rows that TransMIL fetches: tiles, tokens along the sequence, of the square, along the sequence."""
    counts = (3_000, 7_000, 0)[:num_ranks]
    embedding_nD = torch.randn(counts[rank], DIM, requires_grad=True)
    bag = Bag(embedding_nD, torch.zeros(counts[rank], 2), (10_000,), GroupPool(dist.group.WORLD, counts, rank))
    with count_traffic() as calls:
        build_aggregator("transmil", DIM, NUM_CLASSES, {"width": 8, "heads": 2, "landmarks": 4})(bag)
    return [call.received // (4 * 8) for call in calls if call.name == "all_to_all_single"]

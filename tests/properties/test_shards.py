"""Any tiles, any tar size, any span: the same bytes come back; any damage: an error or the same bytes, never others."""

import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigamil.errors import ShardError
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards, noise_jpegs

SLIDE_ID = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True)
TILES = st.lists(st.binary(min_size=1, max_size=2000), min_size=1, max_size=12)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(SLIDE_ID, TILES, st.integers(1, 5), st.data())
def test_round_trip(slide_id: str, tiles: list[bytes], tiles_per_tar: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), slide_id, tiles, tile_px=16, tiles_per_tar=tiles_per_tar)
        shards = ShardSet(folder)
        start = data.draw(st.integers(0, len(tiles)))
        stop = data.draw(st.integers(start, len(tiles)))
        assert shards.slide_ids == (slide_id,)
        assert shards.read_span(slide_id, start, stop) == tiles[start:stop]
        shards.verify(slide_id)


@QUICK
@given(TILES, st.data())
def test_damage_is_never_returned(tiles: list[bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), "s", tiles, tile_px=16, tiles_per_tar=100)
        shards = ShardSet(folder)
        path = shards.folder("s") / "tiles-00000.tar"
        damaged = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(damaged)
        try:
            found = shards.read_span("s", 0, len(tiles))
        except ShardError:
            return
        assert found == tiles  # the damage lies in padding or in a header field that names nothing


@pytest.fixture(scope="module")
def tiles() -> list[bytes]:
    return noise_jpegs(6, 16)


def spans_of(shards: ShardSet, tiles: Sequence[bytes]) -> int:
    """Read all tiles and each one alone; each gives its bytes or a named error. Returns how many were errors."""
    errors = 0
    for start, stop in [(0, len(tiles)), *((n, n + 1) for n in range(len(tiles)))]:
        try:
            assert shards.read_span("s", start, stop) == list(tiles[start:stop])
        except ShardError as error:
            assert "slide 's', 'tiles-0000" in str(error)  # noqa: PT017 (both outcomes are right)
            errors += 1
    return errors


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_tar_cut_at_any_block_gives_an_error_and_never_fewer_tiles(
    tiles: list[bytes], tmp_path: Path, step: int
) -> None:
    make_shards(tmp_path, "s", tiles, tile_px=16, tiles_per_tar=4)
    shards = ShardSet(tmp_path)
    paths = [shards.folder("s") / file.name for file in shards.manifest("s").tars]
    ends = shards.index("s").offset + shards.index("s").length
    for number, path in enumerate(paths):
        whole = path.read_bytes()
        for length in [*range(0, len(whole), 512 * step), *range(0, 2048, 97 * step)]:
            os.truncate(path, length)
            lost = int(((shards.index("s").tar == number) & (ends > length)).sum())
            assert spans_of(shards, tiles) == lost + (lost > 0)  # each lost tile, and all tiles together
            path.write_bytes(whole)


@pytest.mark.parametrize("num_flips", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_flipped_bits_give_an_error_or_change_nothing(tiles: list[bytes], tmp_path: Path, num_flips: int) -> None:
    make_shards(tmp_path, "s", tiles, tile_px=16, tiles_per_tar=100)
    shards, draw = ShardSet(tmp_path), random.Random(0)
    path, index = shards.folder("s") / "tiles-00000.tar", shards.index("s")
    whole = path.read_bytes()
    in_tiles = 0
    for _ in range(num_flips):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ bit]))
        errors = spans_of(shards, tiles)
        in_a_tile = bool(((at >= index.offset - 512) & (at < index.offset + index.length)).any())
        assert errors == 2 * in_a_tile  # the tile alone, and all tiles together; padding and the end are not read
        in_tiles += in_a_tile
        with path.open("r+b") as file:
            file.seek(at)
            file.write(whole[at : at + 1])
    assert in_tiles > num_flips / 4

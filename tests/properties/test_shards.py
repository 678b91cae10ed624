"""Any tiles, any tar size, any span: the same bytes come back; any damage: an error or the same bytes, never others."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gigamil.errors import ShardError
from gigamil.shards.read import ShardSet
from gigamil.testing.shards import make_shards

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

"""Blocks of slides: what is read is a part of the slide as it lies, and knows where its tiles are."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gigamil.config.schema import Augment
from gigamil.data.augment import augment_block, draw_turn
from gigamil.data.blocks import BlockImages, SlideGrid, Turn
from gigamil.data.pipeline import DrawKeys
from gigamil.data.source import ShardSource
from gigamil.errors import ShardError
from gigamil.memory.geometry import geometry_of
from gigamil.models.encoder import Cells, DenseEncoder
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.shards.index import SlideIndex
from gigamil.shards.read import ShardSet
from gigamil.testing.dense import DenseCase, MemorySlides, make_model, own_blocks
from gigamil.testing.shards import make_shards, noise_jpegs
from gigamil.train.cohort import check_grids
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

TILE_PX = 8
NETWORK = nn.Sequential(nn.Conv2d(3, 4, 5, 2, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 4, 1))
CELLS = np.array([[0, 0], [0, 1], [1, 1], [1, 0], [2, 0], [4, 2]])
GRID = SlideGrid(5, 3, CELLS)
TURNS = [Turn(*flags) for flags in product([False, True], repeat=3)]


def blocks(turn: Turn) -> tuple[BlockImages, np.ndarray]:
    """Of one slide, and the slide as it lies."""
    image_HW3 = np.random.default_rng(0).integers(0, 256, (5 * TILE_PX, 3 * TILE_PX, 3), dtype=np.uint8)
    source = MemorySlides([torch.from_numpy(image_HW3)], [GRID])
    found = BlockImages([("slide-0", 0, 6)], source, geometry_of(NETWORK), TILE_PX).turned([turn])
    if turn.transpose:
        image_HW3 = image_HW3.transpose(1, 0, 2)
    return found, image_HW3[:: -1 if turn.flip_y else 1, :: -1 if turn.flip_x else 1]


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 4), (4, 5), (5, 6), (2, 5)])
def test_a_block_gives_its_cells_what_the_slide_gives(turn: Turn, start: int, stop: int) -> None:
    found, slide_HW3 = blocks(turn)
    whole = BlockImages(
        [("slide-0", 0, 6)], MemorySlides([torch.zeros(40, 24, 3)], [GRID]), geometry_of(NETWORK), TILE_PX
    )
    network = NETWORK.double()

    def grid(image_HW3: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(image_HW3.permute(2, 0, 1)[None].double())[0]

    row_n, col_n = found.cells(start, stop).T
    got_Dn = grid(found.read(start, stop)[0])[:, row_n, col_n]
    rows, cols = found._cell_n2[start:stop].T
    wanted_Dn = grid(torch.from_numpy(slide_HW3.copy()))[:, rows, cols]
    torch.testing.assert_close(got_Dn, wanted_Dn, rtol=1e-12, atol=1e-12)
    assert whole.cell_n2.tolist() == found.cell_n2.tolist()


def test_blocks_of_shards_are_put_together_and_background_is_white(tmp_path: Path) -> None:
    make_shards(tmp_path, "s", noise_jpegs(7, 16), tile_px=16)  # 3 x 3 cells, two of them empty
    source = ShardSource(ShardSet(tmp_path), 16)
    tiles = source.read_tiles("s", 0, 7)
    slide_HW3 = np.full((48, 48, 3), 255, np.uint8)
    for number, (row, col) in enumerate(source.grid("s").cell_N2):
        slide_HW3[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = tiles[number]
    for top, left, height, width in ((0, 0, 48, 48), (5, 9, 30, 11), (20, 33, 16, 15), (47, 0, 1, 48)):
        found = source.read_block("s", top, left, height, width)
        np.testing.assert_array_equal(found, slide_HW3[top : top + height, left : left + width])


def test_the_grid_is_made_once_for_the_blocks_of_a_slide(tmp_path: Path) -> None:
    class Counting(ShardSet):
        num_asked = 0

        def index(self, slide_id: str) -> SlideIndex:
            self.num_asked += 1
            return super().index(slide_id)

    make_shards(tmp_path, "s", noise_jpegs(7, 16), tile_px=16)
    shards = Counting(tmp_path)
    source = ShardSource(shards, 16)
    source.read_block("s", 0, 0, 48, 48)
    before = shards.num_asked
    source.read_block("s", 5, 9, 30, 11)
    assert shards.num_asked == before


@pytest.mark.parametrize(
    ("was", "becomes"),
    [('"stride_px": 16', '"stride_px": 8'), ('"min_tissue": 0.25', '"coords_file_sha256": "f00"')],
    ids=["overlapping", "of another tool"],
)
def test_tiles_that_are_no_cells_are_refused_before_one_is_read(tmp_path: Path, was: str, becomes: str) -> None:
    for slide_id in ("good", "s"):
        make_shards(tmp_path, slide_id, noise_jpegs(4, 16), tile_px=16)
    manifest = tmp_path / "slides" / "s" / "manifest.json"
    assert was in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(was, becomes))
    shards = ShardSet(tmp_path)
    check_grids(shards, ["good"])
    for check in (lambda: ShardSource(shards, 16).grid("s"), lambda: check_grids(shards, ["good", "s"])):
        with pytest.raises(ShardError, match=r"slide 's': its tiles do not lie side by side.* slides\.coords: null"):
            check()


def test_tiles_that_lie_between_cells_are_refused_before_one_is_read(tmp_path: Path) -> None:
    make_shards(tmp_path, "s", noise_jpegs(4, 16), tile_px=16)

    class Shifted(ShardSet):
        def index(self, slide_id: str) -> SlideIndex:
            index = super().index(slide_id)
            return replace(index, x_um=index.x_um + 1.0)

    with pytest.raises(ShardError, match="slide 's': its tiles do not lie side by side"):
        check_grids(Shifted(tmp_path), ["s"])


def test_room_is_that_of_the_square_and_for_no_rows_that_of_a_blank_tile() -> None:
    found, _ = blocks(Turn())
    assert [found.room(*rows) for rows in ((0, 1), (0, 2), (0, 4), (0, 6), (3, 3), (0, 0))] == [1, 4, 4, 64, 1, 1]


class NoMemory(DenseEncoder):
    """It never fits."""

    def forward(
        self, image_nCHW: torch.Tensor, tile_key_n: torch.Tensor | None, cells: Cells | None = None
    ) -> torch.Tensor:
        raise torch.OutOfMemoryError("injected")


def test_a_rank_without_tiles_that_runs_out_of_memory_ends_like_any_other() -> None:
    """It tells the others in their next collective, so it must get there."""
    case, topology = DenseCase("convolutions, mean", ((1, 1, 1.0),), 2), Topology(2, 0, group_size=2)
    model = make_model(case.net)
    model.encoder.__class__ = NoMemory
    plan = plan_steps([0], [1], 1, 1, 2)[0]
    tiles = own_blocks(case, model, plan, topology)
    step = ExactStep(
        PlainEngine(model), Ranks(topology), cross_entropy, chunk=16, num_keep=0, keys=DrawKeys(0, ["slide-0"])
    )
    with step._calls(plan, tiles, None) as calls:
        chunks, embedding_nD = calls.encode_all(keep=False)
    assert (tiles.num_tiles, chunks, embedding_nD.shape, calls.out_of_memory) == (0, [], (0, model.encoder.dim), 1)


def test_blocks_of_a_slide_are_recoloured_alike() -> None:
    image_1CHW = torch.rand(1, 3, 20, 30, dtype=torch.float64)
    settings = Augment(brightness=0.3, contrast=0.3, saturation=0.3, stain=0.2)
    key_1 = torch.tensor([7])
    whole_1CHW = augment_block(image_1CHW, key_1, settings)
    assert not torch.allclose(whole_1CHW, image_1CHW)
    torch.testing.assert_close(augment_block(image_1CHW[..., 3:9, 4:25], key_1, settings), whole_1CHW[..., 3:9, 4:25])
    assert not torch.allclose(augment_block(image_1CHW, key_1 + 1, settings), whole_1CHW)


@pytest.mark.parametrize(
    ("flips", "turns", "number"), [(True, True, 8), (True, False, 4), (False, True, 4), (False, False, 1)]
)
def test_a_slide_is_laid_every_way_that_is_allowed(flips: bool, turns: bool, number: int) -> None:
    settings = Augment(flips=flips, turns=turns)
    found = {draw_turn(key, settings) for key in range(200)}
    assert len(found) == number
    if turns and not flips:  # rotations: none is a mirror image
        assert all(turn.transpose == (turn.flip_y != turn.flip_x) for turn in found)

"""A bounded number of open slides, each process and thread with its own."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gigamil.errors import SlideError
from gigamil.slides import SlidePool, open_slide
from gigamil.slides.reader import Slide

from .conftest import MakeSlide, ramps


@pytest.fixture
def paths(make_slide: MakeSlide) -> list[Path]:
    return [make_slide(ramps(128, 128 + number), 0.5, f"{number}.tiff", tile=64) for number in range(5)]


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def pixel(slide: Slide) -> bytes:
    return slide.read_um(8.0, 8.0, 16.0, 16.0, 32, 32).tobytes()


def is_closed(slide: Slide) -> bool:
    try:
        pixel(slide)
    except ValueError:
        return True
    return False


def test_the_least_recently_used_slide_is_closed(paths: list[Path]) -> None:
    with open_slide(paths[0]) as first:
        pixel(first)  # libraries open files of their own at their first use
    before, pool = num_open_files(), SlidePool(2)
    zero, one = pool.get(paths[0]), pool.get(paths[1])
    assert pool.get(paths[0]) is zero
    two = pool.get(str(paths[2]))
    assert [is_closed(slide) for slide in (zero, one, two)] == [False, True, False]
    for path in paths * 3:
        pixel(pool.get(path))
    assert num_open_files() <= before + 2 * 2  # OpenSlide's and ours
    pool.close()
    assert num_open_files() == before


def test_settings_make_another_slide(paths: list[Path]) -> None:
    pool = SlidePool()
    assert pool.get(paths[0], mpp=0.25).info.mpp_x == 0.25
    assert pool.get(paths[0]).info.mpp_x == 0.5
    assert pool.get(paths[0], mpp=0.25) is pool.get(paths[0], mpp=0.25)


def test_a_slide_that_cannot_be_opened_leaves_the_pool_usable(paths: list[Path], tmp_path: Path) -> None:
    pool = SlidePool(1)
    with pytest.raises(SlideError, match="no such file"):
        pool.get(tmp_path / "absent.tiff")
    assert pixel(pool.get(paths[0])) == pixel(SlidePool().get(paths[0]))


def test_a_slide_reads_on_after_an_error(make_slide: MakeSlide) -> None:
    path = make_slide(ramps(128, 512), 0.5, tile=64, levels=1)
    good = pixel(SlidePool().get(path))
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1000))
    pool = SlidePool()
    for _ in range(2):
        with pytest.raises(SlideError):
            pool.get(path).read_um(0.0, 0.0, 256.0, 64.0, 512, 128)
        assert pixel(pool.get(path)) == good


def test_each_thread_has_its_own_slides(paths: list[Path]) -> None:
    pool = SlidePool(2)
    mine = pool.get(paths[0])
    with ThreadPoolExecutor(1) as thread:
        theirs = thread.submit(lambda: pool.get(paths[0])).result()
        assert theirs is not mine
        assert thread.submit(lambda: pool.get(paths[0])).result() is theirs
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: pixel(pool.get(paths[number % 5])), range(200)))
    assert found == [pixel(pool.get(paths[number % 5])) for number in range(200)]


def test_a_forked_process_opens_its_own(paths: list[Path]) -> None:
    pool = SlidePool()
    mine = pool.get(paths[0])
    truth = pixel(mine)
    child = os.fork()
    if not child:
        good = pool.get(paths[0]) is not mine and pixel(pool.get(paths[0])) == truth
        pool.close()
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.get(paths[0]) is mine
    assert np.frombuffer(pixel(mine), np.uint8).size == 32 * 32 * 3


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="max_open=0"):
        SlidePool(0)

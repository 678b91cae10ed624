"""Real slides with flipped bytes: whatever a decoder makes of them, `gigamil tile` goes on and says what became of each."""

from pathlib import Path

import numpy as np
import pytest

from gigamil.config.schema import Bookkeeping, Cohort, Execution, RunConfig, Slides
from gigamil.data.tile import tile_cohort
from gigamil.shards.read import ShardSet

BATCH = 20
# Headers and directories lie at the ends, where a flip does most.
END_BYTES = 4096


def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip up to 64 bits: anywhere, or at one of the ends; a tenth of the files are cut off too."""
    changed = np.frombuffer(data, np.uint8).copy()
    num = int(rng.integers(1, 65))
    where = rng.integers(3)
    place = rng.integers(0, len(changed) if where == 0 else END_BYTES, num)
    place = len(changed) - 1 - place if where == 2 else place
    np.bitwise_xor.at(changed, place, (1 << rng.integers(0, 8, num)).astype(np.uint8))
    return changed[: int(rng.integers(len(changed))) if rng.random() < 0.1 else None].tobytes()


def tile_mutants(folder: Path, original: Path, number: int) -> dict[str, int]:
    """Tile one batch in child processes; returns how many slides ended how."""
    data = original.read_bytes()
    folder.mkdir()
    rows = ["slide_id,path,patient_id"]
    for n in range(BATCH):
        name = f"m{n:02}"
        rng = np.random.default_rng([number, n])
        (folder / f"{name}{original.suffix}").write_bytes(mutant(data, rng))
        rows.append(f"{name},{name}{original.suffix},{name}")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")
    report = tile_cohort(
        RunConfig(
            cohort=Cohort(table=folder / "slides.csv"),
            slides=Slides(tile_px=240, tile_mpp=0.499, tissue_mpp=16.0),
            execution=Execution(tile_workers=2, tile_timeout_s=60),
            bookkeeping=Bookkeeping(out=folder / "run"),
        ),
        progress=False,
    )
    shards = ShardSet(report.shards) if (report.shards / "slides").exists() else None
    ends: dict[str, int] = {}
    for row in report.rows:
        ends[row.status] = ends.get(row.status, 0) + 1
        assert (row.status == "failed") <= bool(row.reason), row
        if row.status == "ok":
            assert shards is not None
            shards.verify(row.slide_id)
    assert not (report.shards / ".gigamil-staging").exists()
    return ends


def tile_batches(folder: Path, original: Path, numbers: range) -> dict[str, int]:
    """Tile batches one after the other, and delete each."""
    import shutil

    total: dict[str, int] = {}
    for number in numbers:
        for status, count in tile_mutants(folder / f"batch{number}", original, number).items():
            total[status] = total.get(status, 0) + count
        shutil.rmtree(folder / f"batch{number}")
    return total


@pytest.mark.real_data
def test_a_few_mutants_of_a_real_slide(tmp_path: Path, real_data: Path) -> None:
    total = tile_batches(tmp_path, real_data / "wsi" / "CMU-1-Small-Region.svs", range(1))
    assert sum(total.values()) == BATCH
    assert total["ok"] > 0
    assert total["failed"] > 0


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(3600)
def test_two_thousand_mutants_of_a_real_slide(tmp_path: Path, real_data: Path) -> None:
    total = tile_batches(tmp_path, real_data / "wsi" / "CMU-1-Small-Region.svs", range(1, 101))
    assert sum(total.values()) == 2000
    assert total["ok"] > 100
    assert total["failed"] > 100

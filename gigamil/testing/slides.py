"""The demo cohort: a folder of synthetic slides with a slide table, as a hospital would hand it over, flaws too."""

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gigamil.testing.paint import Box, SyntheticSlide, synthetic_slide
from gigamil.testing.tiff import write_pyramid_tiff

__all__ = ["SyntheticSlide", "make_demo_cohort", "synthetic_slide", "write_pyramid_tiff"]

CLASSES = ("normal", "tumour")
# Scanners differ: one per site, and sites hold both classes alike.
MPP_OF_SITE = {"site-a": 0.5, "site-b": 0.48, "site-c": 0.55, "site-d": 1.0}
DRAWN_MPP = 0.5  # sizes are given in pixels of this
NO_TISSUE_ID, TRUNCATED_ID = BAD_IDS = ("bad-no-tissue", "bad-truncated")
TRUNCATED_SHARE = 0.55  # of the bytes that are left
PATIENTS_PER_DOUBLE = 5  # one patient in so many has two slides
GLASS_LEVEL = 244


@dataclass(frozen=True)
class _Row:
    slide_id: str
    path: str  # from the folder of the table
    patient_id: str
    label: str
    site: str


def make_demo_cohort(
    out: Path | str,
    *,
    num_slides: int = 52,
    seed: int = 0,
    size_px: tuple[int, int] = (1600, 2200),
    progress: bool = True,
    num_workers: int | None = None,
) -> Path:
    """Draw a cohort for the demo and the tests.

    Classes and sites are balanced, some patients have two slides (with one label). The last two slides are bad on
    purpose: one holds no tissue, one is a truncated file; their names say so.

    Args:
        out: folder; gets `slides.csv`, `slides/*.tiff`, and `lesions.json` with the planted nests of each good slide,
            {slide_id: [[x0, y0, x1, y1], ...]} in micron from the corner of level 0 (negative slides have none).
        num_slides: including the two bad ones, >= 6.
        seed: same seed, same bytes.
        size_px: smallest and largest side of a slide, in pixels at 0.5 micron.
        progress: show a bar on stderr.
        num_workers: threads; default all cores. The result does not depend on it.
    Returns:
        The path of `slides.csv`.
    Raises:
        ValueError: too few slides to hold both classes and the bad ones.
    Cost: about half a second of one core per slide; numpy lets go of the interpreter, so threads are enough.
    """
    if num_slides < 6:
        raise ValueError(f"num_slides={num_slides}: a demo cohort needs at least 6 (2 of each class and 2 bad ones)")
    out = Path(out)
    (out / "slides").mkdir(parents=True, exist_ok=True)
    rows = _rows(num_slides)

    def draw(number: int) -> tuple[Box, ...]:
        return _draw(out, rows[number], np.random.default_rng([seed, number]), size_px)

    with ThreadPoolExecutor(num_workers or os.cpu_count()) as pool:
        drawn = pool.map(draw, range(num_slides))
        lesions = list(
            tqdm(drawn, total=num_slides, desc="draw slides", unit="slide", disable=None if progress else True)
        )
    good = {row.slide_id: boxes for row, boxes in zip(rows, lesions, strict=True) if row.slide_id not in BAD_IDS}
    (out / "lesions.json").write_text(json.dumps(good, indent=1) + "\n")
    return _write_table(out / "slides.csv", rows)


def _rows(num_slides: int) -> list[_Row]:
    """Good slides, patient by patient, then the two bad ones. Label and site cycle at different periods."""
    rows: list[_Row] = []
    sites = list(MPP_OF_SITE)
    patient = 0
    while len(rows) < num_slides - len(BAD_IDS):
        patient_id = f"patient-{patient:03d}"
        label, site = CLASSES[patient % 2], sites[patient // 2 % len(sites)]
        wanted = 2 if patient % PATIENTS_PER_DOUBLE == 0 else 1
        for _ in range(min(wanted, num_slides - len(BAD_IDS) - len(rows))):
            slide_id = f"demo-{len(rows):03d}"
            rows.append(_Row(slide_id, f"slides/{slide_id}.tiff", patient_id, label, site))
        patient += 1
    for slide_id in BAD_IDS:
        rows.append(_Row(slide_id, f"slides/{slide_id}.tiff", slide_id, CLASSES[0], sites[0]))
    return rows


def _draw(out: Path, row: _Row, rng: np.random.Generator, size_px: tuple[int, int]) -> tuple[Box, ...]:
    """Write the file of one row; returns the planted nests."""
    width_um, height_um = (float(side) * DRAWN_MPP for side in rng.integers(*size_px, 2, endpoint=True))
    mpp = MPP_OF_SITE[row.site]
    path = out / row.path
    if row.slide_id == NO_TISSUE_ID:
        shape = (round(height_um / mpp), round(width_um / mpp), 3)
        glass_HW3 = rng.normal(GLASS_LEVEL, 1.5, shape).round().astype(np.uint8)
        write_pyramid_tiff(path, glass_HW3, mpp)
        return ()
    slide = synthetic_slide(
        int(rng.integers(2**31)), tumour=row.label == CLASSES[1], size_um=(width_um, height_um), mpp=mpp
    )
    write_pyramid_tiff(path, slide.image_HW3, mpp)
    if row.slide_id == TRUNCATED_ID:
        os.truncate(path, int(path.stat().st_size * TRUNCATED_SHARE))
    return slide.lesions_um


def _write_table(path: Path, rows: list[_Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(_Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path

"""Slide files that no run has seen: tiled as the slides that a model was trained on, to be predicted."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gigamil.config.schema import RunConfig
from gigamil.data.cohort import load_cohort
from gigamil.data.features import features_folder
from gigamil.data.scan import slide_id_of
from gigamil.data.tile import refuse_failures, tile_cohort
from gigamil.errors import SlideError
from gigamil.evaluate.features import cache_features
from gigamil.train.cohort import TiledSlides, open_tiles
from gigamil.train.stale import kind_of_features


class NewSlides(NamedTuple):
    """Tiled slide files.

    Attributes:
        config: the run's, with these slides as its cohort.
        tiles: their tiles, or features.
        slide_ids: names of the files, with a number behind those that came before.
        paths: the files.
    """

    config: RunConfig
    tiles: TiledSlides
    slide_ids: tuple[str, ...]
    paths: dict[str, Path]


def tile_new(config: RunConfig, files: Sequence[Path], folder: Path, mpp: float | None = None) -> NewSlides:
    """Tile slide files into `<folder>/shards`; with `data.source: features` also encode them, into `<folder>/features`.

    Args:
        config: of the run that trained the model.
        files: slide files, or DICOM folders.
        folder: made if it is not there; gets slides.csv too. What is there of the same files is not done again.
        mpp: of files that carry none.
    Raises:
        SlideError: a file is not there, or has no tiles; names it and why.
    """
    missing = [f"'{path}'" for path in files if not path.exists()]
    if missing:
        raise SlideError(f"no such slide: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    names = _distinct([slide_id_of(path.resolve().name) for path in files])
    paths = {name: path.resolve() for name, path in zip(names, files, strict=True)}
    table = folder / "slides.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide_id", "path", "patient_id"])
        writer.writerows([name, path, name] for name, path in paths.items())
    cohort = config.cohort.model_copy(update={"table": table, "root": None, "columns": type(config.cohort.columns)()})
    book = config.bookkeeping.model_copy(update={"out": folder, "shards": folder / "shards", "limit": None})
    default_mpp = config.slides.default_mpp if mpp is None else mpp
    slides = config.slides.model_copy(update={"default_mpp": default_mpp})
    new = config.model_copy(update={"cohort": cohort, "slides": slides, "bookkeeping": book})
    refuse_failures(tile_cohort(new, progress=config.bookkeeping.progress), None)
    if config.data.source == "features":
        alone = config.execution.model_copy(update={"ranks": 1, "group_size": None})
        cache_features(new.model_copy(update={"execution": alone}), kind=kind_of_features(features_folder(config)))
    return NewSlides(new, open_tiles(new, load_cohort(cohort, need_labels=False)), tuple(names), paths)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that came before: a slide may be given as SVS and as DICOM."""
    before = [names[:position].count(name) for position, name in enumerate(names)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(names, before, strict=True)]

"""What a hospital hands over: a folder of slide files and a table of labels, matched by slide id."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from gigamil.config.schema import Columns
from gigamil.data.table import read_table, refusal, text_problems
from gigamil.errors import CohortError

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".svslide", ".bif", ".czi")
DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

# Names that label tables in the field use; case is ignored, and the first that occurs is taken.
_KNOWN_COLUMNS = {
    "slide_id": ("slide_id", "slide", "image_id", "image", "filename", "file_name", "file", "wsi"),
    "patient_id": ("patient_id", "patient", "case_id", "case", "subject_id", "subject"),
    "label": ("label", "class", "target", "subtype", "diagnosis"),
    "site": ("site", "center", "centre", "institution", "hospital"),
    "mpp": ("mpp", "slide_mpp"),
    "split": ("split",),
}
_NOT_OURS = "lost+found"  # at the top of a disk, for root only; no slides are put there
OPTIONAL_COLUMNS = ("site", "mpp", "split")


def find_slides(folder: Path) -> Iterator[Path]:
    """Every slide below a folder, sorted: files with a suffix that OpenSlide knows, and folders of DICOM files.

    PNG and JPEG files are slides only where there is nothing else: beside slides they are thumbnails. Links to folders
    are followed; each folder is searched once.

    Raises:
        CohortError: a folder cannot be read.
    """
    images = []
    num_slides = 0
    seen: set[tuple[int, int]] = set()
    for where, subfolders, names in os.walk(folder, onerror=_refuse_unreadable, followlinks=True):
        if not _is_new(where, seen):  # a link to a folder above, or to one that was searched
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != _NOT_OURS)
        shown = sorted(name for name in names if not name.startswith("."))
        slides = [Path(where)] if any(name.lower().endswith(DICOM_SUFFIXES) for name in shown) else []
        slides += [Path(where, name) for name in shown if name.lower().endswith(SLIDE_SUFFIXES)]
        images += [Path(where, name) for name in shown if name.lower().endswith(IMAGE_SUFFIXES)]
        num_slides += len(slides)
        yield from slides
    if not num_slides:
        yield from images


def _is_new(folder: str, seen: set[tuple[int, int]]) -> bool:
    found = os.stat(folder)
    key = (found.st_dev, found.st_ino)
    is_new = key not in seen
    seen.add(key)
    return is_new


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise CohortError(
        f"folder '{error.filename}' cannot be read ({error.strerror}), and slides may lie in it. Let it be read, "
        "or move it elsewhere."
    ) from error


def slide_id_of(name: str) -> str:
    """Id of a slide from its file name, or from what a label table calls it: no folder, no suffix, plain characters."""
    base = re.split(r"[/\\]", name.strip())[-1]
    suffix = next((s for s in (*SLIDE_SUFFIXES, *DICOM_SUFFIXES, *IMAGE_SUFFIXES) if base.lower().endswith(s)), "")
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", base[: len(base) - len(suffix)])
    return re.sub(r"^\.+", "_", plain)


def files_by_id(folder: Path) -> dict[str, list[Path]]:
    """Paths, from `folder`, of the slides below it, by slide id.

    Raises:
        CohortError: no such folder, no slide in it, or as `find_slides`.
    """
    if not folder.is_dir():
        raise CohortError(f"no folder '{folder}' of slides")
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in find_slides(folder):
        found[slide_id_of(path.name)].append(path.relative_to(folder))
    if not found:
        raise CohortError(
            f"no slide in '{folder}' or below; looked for {', '.join((*SLIDE_SUFFIXES, *IMAGE_SUFFIXES))} and DICOM folders"
        )
    return dict(found)


def read_labels(path: Path, chosen: Mapping[str, str | None], patient_is_slide: bool) -> dict[str, dict[str, str]]:
    """Cells of each slide of a label table, under gigamil's own column names.

    Args:
        chosen: column of the table for "slide_id", "patient_id" and "label"; None means one of the usual names.
        patient_is_slide: no patient column is needed, each slide is its own patient.
    Raises:
        CohortError: the table cannot be read, lacks a column, or has two rows for a slide that differ.
    """
    header, records = read_table(path, "label table")
    found = {name: _column(path, name, chosen.get(name), header, patient_is_slide) for name in _KNOWN_COLUMNS}
    columns = {name: column for name, column in found.items() if column is not None}
    problems = list(text_problems(records, columns))
    if problems:
        raise refusal("label table", path, problems)
    labels: dict[str, dict[str, str]] = {}
    for line, record in records:
        cells = {name: record[column].strip() for name, column in columns.items()}
        slide_id = cells["slide_id"] = slide_id_of(cells["slide_id"])
        if patient_is_slide:
            cells["patient_id"] = slide_id
        if labels.setdefault(slide_id, cells) != cells:
            raise CohortError(
                f"label table '{path}', line {line}: slide '{slide_id}' has another row that says otherwise"
            )
    return labels


def label_columns(path: Path, header: list[str], chosen: Mapping[str, str | None], patient_is_slide: bool) -> Columns:
    """Columns of a label table under gigamil's names; an optional one that the table lacks keeps its usual name.

    Raises:
        CohortError: a column is needed and not known, or was chosen and is not there.
    """
    found = {name: _column(path, name, chosen.get(name), header, patient_is_slide) for name in _KNOWN_COLUMNS}
    return Columns(**{name: column for name, column in found.items() if column is not None})


def _column(path: Path, name: str, chosen: str | None, header: list[str], patient_is_slide: bool) -> str | None:
    """The column of the label table that holds `name`; None if it is optional and absent."""
    if chosen is not None:
        if chosen not in header:
            raise CohortError(f"label table '{path}' has no column '{chosen}'; it has: {', '.join(header)}")
        return chosen
    by_lower = {column.strip().lower(): column for column in reversed(header)}
    known = next((by_lower[word] for word in _KNOWN_COLUMNS[name] if word in by_lower), None)
    if known is None and name not in OPTIONAL_COLUMNS and not (name == "patient_id" and patient_is_slide):
        option = {"slide_id": "slide_column", "patient_id": "patient_column", "label": "label_column"}[name]
        hint = ", or patient_is_slide if every slide is a patient of its own" if name == "patient_id" else ""
        raise CohortError(
            f"label table '{path}' has no column that is known to be the {name} (it has: {', '.join(header)}); "
            f"name it with {option}{hint}"
        )
    return known

"""A folder of slides and a label CSV -> slides.csv and a commented YAML: the first step with one's own data."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gigamil.config.load import to_commented_yaml
from gigamil.config.schema import Bookkeeping, Cohort, RunConfig
from gigamil.data.cohort import CohortTable, load_cohort
from gigamil.data.scan import OPTIONAL_COLUMNS, files_by_id, read_labels
from gigamil.errors import CohortError, ConfigError, SlideError
from gigamil.slides.reader import open_slide

_TABLE_COLUMNS = ("slide_id", "path", "patient_id", "label", *OPTIONAL_COLUMNS)
_MAX_NAMED = 10


@dataclass(frozen=True)
class InitReport:
    """What `init_config` found and wrote.

    Attributes:
        yaml, table: the files written.
        slides_per_class: number of slides of each class.
        without_label: slide files that the label table lacks; they are left out.
        without_file: ids of the label table without a slide file; they are left out.
        vendors: number of slides of each kind of scanner, of those opened.
        problems: why slides that were opened cannot be tiled as they are.
    """

    yaml: Path
    table: Path
    slides_per_class: dict[str, int]
    without_label: tuple[str, ...]
    without_file: tuple[str, ...]
    vendors: dict[str, int]
    problems: tuple[str, ...]

    def text(self) -> str:
        """For people: counts, what was left out, what to look at, what to type next."""
        classes = ", ".join(f"{num} {name}" for name, num in self.slides_per_class.items())
        vendors = ", ".join(f"{num} {name}" for name, num in self.vendors.items())
        lines = [f"{sum(self.slides_per_class.values())} slides with a label: {classes}"]
        lines += [f"opened {sum(self.vendors.values()) + len(self.problems)} of them: {vendors or 'none can be tiled'}"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += _some("slide files without a label, left out", self.without_label)
        lines += _some("labels without a slide file, left out", self.without_file)
        return "\n".join([*lines, f"wrote '{self.table}' and '{self.yaml}'", f"next: gigamil run {self.yaml}"])


def init_config(
    slides_folder: Path | str,
    labels_csv: Path | str,
    out_yaml: Path | str,
    *,
    slide_column: str | None = None,
    patient_column: str | None = None,
    label_column: str | None = None,
    patient_is_slide: bool = False,
    num_opened: int = 100,
    overwrite: bool = False,
) -> InitReport:
    """Find slides, join them with their labels, and write slides.csv and a commented YAML.

    A slide's id is its file name without the suffix, with characters outside A-Z a-z 0-9 . _ - made `_`; a folder that
    holds DICOM files is one slide. A slide in the label table may be named with or without folder and suffix.

    Args:
        slides_folder: searched with its subfolders.
        labels_csv: one row per slide; site, mpp and split columns are taken over.
        out_yaml: the YAML to write; slides.csv is put beside it.
        slide_column, patient_column, label_column: columns of the label table; default: the usual names.
        patient_is_slide: there are no patient ids, and each slide is its own patient.
        num_opened: so many slides (>= 1), evenly spaced, are opened to see whether they can be tiled.
        overwrite: replace files that are there.
    Raises:
        ConfigError: a file to be written is there already.
        CohortError: no slides, no match with the labels, a column is missing, two files or two rows with one id, or as
            `load_cohort`. Nothing is written then.
    """
    folder, labels_csv, out_yaml = Path(slides_folder).resolve(), Path(labels_csv), Path(out_yaml).resolve()
    table = out_yaml.with_name("slides.csv")
    for path in (out_yaml, table):
        if path.exists() and not overwrite:
            raise ConfigError(f"'{path}' is there already; name another YAML, delete it, or ask to overwrite it")
    chosen = {"slide_id": slide_column, "patient_id": patient_column, "label": label_column}
    labels = read_labels(labels_csv, chosen, patient_is_slide)
    files = files_by_id(folder)
    paths = _matched(folder, files, labels_csv, labels)
    rows = [labels[slide_id] | {"path": str(path)} for slide_id, path in paths.items()]
    cohort = Cohort(table=table, root=folder, patient_is_slide=patient_is_slide)
    checked = _checked(cohort, rows)

    out_yaml.parent.mkdir(parents=True, exist_ok=True)
    _write_table(table, rows)
    config = RunConfig(
        cohort=cohort.model_copy(update={"classes": checked.classes}),
        bookkeeping=Bookkeeping(out=out_yaml.parent / "runs" / out_yaml.stem, name=out_yaml.stem),
    )
    out_yaml.write_text(_heading(out_yaml) + to_commented_yaml(config), encoding="utf-8")

    count = Counter(row.label or "" for row in checked.rows)
    vendors, problems = _open_some(checked, num_opened)
    return InitReport(
        yaml=out_yaml,
        table=table,
        slides_per_class={name: count[name] for name in checked.classes},
        without_label=tuple(str(path) for slide_id in files if slide_id not in labels for path in files[slide_id]),
        without_file=tuple(slide_id for slide_id in labels if slide_id not in files),
        vendors=vendors,
        problems=problems,
    )


def _matched(folder: Path, files: dict[str, list[Path]], labels_csv: Path, labels: Iterable[str]) -> dict[str, Path]:
    """The one file of each slide that has a label."""
    both = [slide_id for slide_id in files if slide_id in labels]
    if not both:
        raise CohortError(
            f"no slide in '{folder}' has a row in '{labels_csv}': files are called {_examples(files)}, "
            f"rows {_examples(labels)}"
        )
    twice = [slide_id for slide_id in both if len(files[slide_id]) > 1]
    if twice:
        where = "; ".join(f"'{slide_id}': {', '.join(map(str, files[slide_id]))}" for slide_id in twice[:_MAX_NAMED])
        raise CohortError(f"{len(twice)} slide ids stand for several files; move or rename all but one ({where})")
    return {slide_id: files[slide_id][0] for slide_id in both}


def _checked(cohort: Cohort, rows: list[dict[str, str]]) -> CohortTable:
    """The slide table that `rows` will be, read and checked before its final place is touched."""
    with TemporaryDirectory() as folder:
        draft = Path(folder) / cohort.table.name
        _write_table(draft, rows)
        try:
            return load_cohort(cohort.model_copy(update={"table": draft}))
        except CohortError as error:
            # The draft is gone before anyone could look at its lines, so they get the names of their slides.
            slide_on = _slides_by_line(draft)
            text = re.sub(r"(?m)^  - line (\d+):", lambda line: f"  - slide '{slide_on[int(line[1])]}':", str(error))
            text = text.replace(str(draft), str(cohort.table))
            raise CohortError(f"nothing was written, since {text}") from error


def _slides_by_line(table: Path) -> dict[int, str]:
    slides = {}
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            slides[reader.line_num] = row["slide_id"]
    return slides


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    used = [name for name in _TABLE_COLUMNS if any(row.get(name) for row in rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, used, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _open_some(cohort: CohortTable, num: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Open evenly spaced slides: count the vendors, and collect why slides do not open."""
    vendors: Counter[str] = Counter()
    problems = []
    for row in cohort.rows[:: max(1, -(-len(cohort.rows) // num))]:
        try:
            with open_slide(row.path, mpp=row.mpp) as slide:
                vendors[slide.info.vendor] += 1
        except SlideError as error:
            problems.append(str(error))
    return dict(sorted(vendors.items())), tuple(problems)


def _heading(out_yaml: Path) -> str:
    return (
        f"# Written by `gigamil init`. Look it over, then type: gigamil run {out_yaml.name}\n"
        "# A key that is left out has the value shown here, except for cohort and bookkeeping.\n\n"
    )


def _examples(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in list(names)[:3])


def _some(title: str, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return [f"{len(names)} {title}: {', '.join(names[:_MAX_NAMED])}{more}"]

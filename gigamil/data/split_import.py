"""Splits that others have made: folds.json of `gigamil split`, CLAM's splits_k.csv, Patho-Bench's tables."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gigamil.data.cohort import SPLIT_WORDS, SPLITS, CohortTable
from gigamil.data.folds import Folds
from gigamil.data.scan import slide_id_of
from gigamil.data.table import Record, escaped, read_table, refusal, text_problems
from gigamil.errors import CohortError

_WHAT = "split file"


def import_split(path: Path, table: CohortTable, fold: int = 0, inner_fold: int | None = None) -> dict[str, str]:
    """Read one split of the slides of a table.

    - folds.json: what `gigamil split` writes; `fold` and `inner_fold` choose.
    - CLAM: `splits_3.csv`, with columns train, val and test of slide ids, or `splits_3_bool.csv`, with a row per slide
      and True in one of them; or their folder, from which `fold` chooses the file.
    - Patho-Bench: a .tsv or .csv with slide_id or case_id and columns fold_0, fold_1... of train, val and test.

    Slides may be named with folder and suffix. Slides of the table that the file does not name are in no side.

    Returns:
        Side of each slide that the file names, in the order of the table.
    Raises:
        CohortError: the file is missing, of another kind, has no such fold, names slides that the table lacks, names one
            twice, or gives a side of another name; all problems at once.
    """
    if path.is_dir():
        path = path / f"splits_{fold}.csv"
    if not path.is_file():
        raise CohortError(f"no {_WHAT} '{path}'. Set cohort.splits to a file, or to null to make a split.")
    if path.suffix.lower() == ".json":
        return _ordered(path, _from_folds(path, fold, inner_fold), table)
    if inner_fold is not None:
        raise CohortError(f"cohort.inner_fold={inner_fold}: '{path}' holds no inner folds; only folds.json does")
    columns, records = read_table(path, _WHAT, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    if set(SPLITS) <= set(columns):
        _check_number(path, fold)
        used = {name: name for name in SPLITS} | ({"index": columns[0]} if columns[0] not in SPLITS else {})
        pairs = list(_clam(columns, records))
    elif "slide_id" in columns or "case_id" in columns:
        column = f"fold_{fold}"
        if column not in columns:
            raise CohortError(f"{_WHAT} '{path}' has no column '{column}' for cohort.fold={fold}: {', '.join(columns)}")
        key = "slide_id" if "slide_id" in columns else "case_id"
        used = {key: key, "fold": column}
        pairs = list(_patho_bench(records, key, column, table))
    else:
        raise CohortError(
            f"{_WHAT} '{path}' is of no known kind. It has the columns {escaped(', '.join(columns))}; CLAM's has train, "
            "val, test, and Patho-Bench's slide_id or case_id, and fold_0, ..."
        )
    problems = list(text_problems(records, used))
    if problems:
        raise refusal(_WHAT, path, problems)
    return _ordered(path, pairs, table)


def count_folds(path: Path) -> int:
    """How many splits a file, or a folder of CLAM's files, holds; errors as `import_split`."""
    if path.is_dir():
        numbers = {int(found[1]) for file in path.iterdir() if (found := re.fullmatch(r"splits_(\d+)\.csv", file.name))}
        count = next(number for number in range(len(numbers) + 1) if number not in numbers)  # 0, 1, ... without a gap
    elif path.suffix.lower() == ".json":
        count = len(_read_folds(path).folds)
    elif path.is_file():
        columns, _ = read_table(path, _WHAT, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        count = (
            1 if set(SPLITS) <= set(columns) else sum(re.fullmatch(r"fold_\d+", name) is not None for name in columns)
        )
    else:
        count = 0
    if not count:
        raise CohortError(f"no split in '{path}'. Set cohort.splits to a {_WHAT}, or to null to make splits.")
    return count


def _from_folds(path: Path, fold: int, inner_fold: int | None) -> Iterable[tuple[str, str]]:
    return _read_folds(path).sides(fold, inner_fold).items()


def _read_folds(path: Path) -> Folds:
    try:
        return Folds.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # also what is not UTF-8
        raise CohortError(f"{_WHAT} '{path}' is no folds.json of `gigamil split`: {error}") from error


def _check_number(path: Path, fold: int) -> None:
    """A file of CLAM is one fold; `cohort.fold` may say so again, but not otherwise."""
    number = re.search(r"(\d+)(?:_bool)?$", path.stem)
    if fold and (number is None or int(number[1]) != fold):
        raise CohortError(
            f"cohort.fold={fold}, but '{path.name}' holds one other fold. Set cohort.splits to the folder of the files, or "
            "cohort.fold to 0."
        )


def _clam(columns: Sequence[str], records: Iterable[Record]) -> Iterator[tuple[str, str]]:
    records = list(records)
    words = {record[side].strip().lower() for _, record in records for side in SPLITS}
    if words <= {"true", "false"}:
        index = columns[0]
        for _, record in records:
            yield from ((record[index], side) for side in SPLITS if record[side].strip().lower() == "true")
    else:
        for side in SPLITS:
            yield from ((record[side], side) for _, record in records if record[side].strip())


def _patho_bench(records: Iterable[Record], key: str, column: str, table: CohortTable) -> Iterator[tuple[str, str]]:
    slides: defaultdict[str, list[str]] = defaultdict(list)
    for row in table.rows:
        slides[row.patient_id].append(row.slide_id)
    for _, record in records:
        word = record[column].strip().lower()
        if word:
            name, side = record[key].strip(), SPLIT_WORDS.get(word, word)
            for slide_id in [name] if key == "slide_id" else slides.get(name, [name]):
                yield slide_id, side


def _ordered(path: Path, pairs: Iterable[tuple[str, str]], table: CohortTable) -> dict[str, str]:
    """The pairs of slide and side as one mapping in the table's order, or all that is wrong with them."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, side in pairs:
        name = name.strip()
        found[name if name in table else slide_id_of(name)].append(side)
    problems = [f"slide '{slide_id}' is not in the slide table" for slide_id in found if slide_id not in table]
    for slide_id, sides in found.items():
        if len(sides) > 1:
            where = ", ".join(f"{num} times in {side}" for side, num in Counter(sides).items())
            problems.append(f"slide '{slide_id}' is named more than once: {where}")
        problems += [
            f"slide '{slide_id}' is in '{side}'; known: {', '.join(SPLITS)}" for side in sides if side not in SPLITS
        ]
    if not found:
        problems.append("it names no slide")
    if problems:
        cure = "Slides whose files are missing may stay in the slide table: they get no tiles, and are said to be left out."
        raise refusal(_WHAT, path, problems, cure if any(slide_id not in table for slide_id in found) else "")
    return {row.slide_id: found[row.slide_id][0] for row in table.rows if row.slide_id in found}

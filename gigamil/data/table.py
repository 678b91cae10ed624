"""A CSV from people: read as text, with every cell that is no plain text named by its line, and nothing echoed raw."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gigamil.errors import CohortError

Record = tuple[int, dict[str, str]]  # a row's line, and its cells by column

_MAX_CELL = 4096  # the longest path of Linux
_MAX_LISTED = 100
_MAX_SHOWN = 600  # characters of one problem
_MAX_BYTES = 1 << 28  # of a table: a million rows
# Control characters, formats (bidirectional overrides, zero width), lone surrogates, line and paragraph separators.
_NO_TEXT = ("Cc", "Cf", "Cs", "Zl", "Zp")


def read_table(path: Path, what: str, *, delimiter: str = ",") -> tuple[list[str], list[Record]]:
    """Column names, and rows with the line they stand on. Cells stay text: '001' is not 1 and 'NA' is not missing.

    Bytes that are not UTF-8 are kept as lone surrogates, which `text_problems` reports with their line.

    Args:
        what: what the file is, in messages.
    Raises:
        CohortError: there is no such file, its header is not UTF-8 or has a name twice, a quote is not closed, it has
            no rows, or rows of another length.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CohortError(f"{what} '{path}' has {path.stat().st_size} bytes; that is no table of slides")
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = [name.strip() for name in _row(reader) or []]
        if any(map(_is_no_text, columns)):
            raise CohortError(f"{what} '{path}' cannot be read as UTF-8 CSV: its header is {escaped(str(columns))}")
        twice = [name for name, num in Counter(columns).items() if num > 1 and name]
        if twice:
            names = ", ".join(f"'{escaped(name)}'" for name in twice)
            raise CohortError(
                f"{what} '{path}' has several columns of one name: {names}. Rename or delete all but one."
            )
        lines = list(_lines(reader))
    except FileNotFoundError:
        raise CohortError(f"no {what} '{path}'") from None
    except (OSError, csv.Error) as error:
        raise CohortError(f"{what} '{path}' cannot be read as UTF-8 CSV: {error}") from error
    if not lines:
        raise CohortError(f"{what} '{path}' has no rows below its header")
    ragged = [
        f"line {line} has {len(cells)} cells and the header {len(columns)}; put cells that hold a comma in quotes"
        for line, cells in lines
        if len(cells) != len(columns)
    ]
    if ragged:
        raise refusal(what, path, ragged)
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in lines]


def text_problems(records: Iterable[Record], columns: Mapping[str, str]) -> Iterator[str]:
    """What could harm a log, a spreadsheet, a page or a folder, in the columns that are used.

    Args:
        columns: gigamil's name of each column that the table has, and its name in the table.
    """
    for line, record in records:
        for name, column in columns.items():
            problem = _text_problem(record[column].strip())
            if problem:
                yield f"line {line}: {name} {record[column][:60]!r} {problem}"


def path_problem(text: str) -> str | None:
    """Why a path of a table is refused: only plain paths are, nothing that would be run, fetched or expanded."""
    if not text:
        return "is empty"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        return "names a command or an address; write a plain path (./a:b for a file of that name)"
    if re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", text):
        return "holds braces that stand for many paths; write a row for each slide"
    return None


def refusal(what: str, path: Path, problems: Iterable[str], cure: str = "") -> CohortError:
    """All problems of a table in one message, escaped, the first 100 of them; and what to do, if it is not plain."""
    problems = list(problems)
    listed = "\n".join(f"  - {escaped(problem)}" for problem in problems[:_MAX_LISTED])
    rest = len(problems) - _MAX_LISTED
    more = f"\n  - and {rest} more" if rest > 0 else ""
    return CohortError(f"{what} '{path}' has {len(problems)} problem(s):\n{listed}{more}" + f"\n{cure}" * bool(cure))


def escaped(text: str) -> str:
    """Text for a log: what is no plain text as escapes, and of a long text the beginning and the end."""
    half = _MAX_SHOWN // 2
    cut = text if len(text) <= _MAX_SHOWN else f"{text[:half]}... ({len(text)} characters) ...{text[-half:]}"
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _NO_TEXT else char for char in cut
    )


def folded(name: str) -> str:
    """A name without what people spell differently: case, Unicode form, blanks at the ends and doubled.

    Folders of ids that differ in case only are one folder on macOS and Windows.
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows of a csv.reader that are not empty, with the line that they end on."""
    while (cells := _row(reader)) is not None:
        if cells:
            yield reader.line_num, cells


def _row(reader: Any) -> list[str] | None:
    """The next row of a csv.reader; None at the end."""
    first = reader.line_num + 1
    try:
        cells: list[str] | None = next(reader, None)
    except csv.Error as error:  # a quote that is never closed takes in the rest of the file, or 128 KiB of it
        raise csv.Error(f"line {first}: {error}; a quote that is opened must be closed") from error
    return cells


def _text_problem(cell: str) -> str | None:
    if len(cell) > _MAX_CELL:
        return f"has {len(cell)} characters; the longest allowed is {_MAX_CELL}"
    if any("\ud800" <= char <= "\udfff" for char in cell):
        return "is not UTF-8"
    if _is_no_text(cell):
        return "holds a line break or another control character"
    # A lone + or - is a finding; a formula calls something or refers to another cell.
    if cell[:1] in ("=", "@") or (cell[:1] in ("+", "-") and re.search(r"[(|!]", cell)):
        return "would run as a formula in a spreadsheet"
    return None


def _is_no_text(text: str) -> bool:
    return any(unicodedata.category(char) in _NO_TEXT for char in text)

"""CSV and TSV files: a header, and text in every cell."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from jaxpref.data.sources.contents import read_contents
from jaxpref.data.sources.source import ListSource
from jaxpref.errors import InputError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""The delimiter of each kind of file; semicolons are recognized in .csv files."""


def open_csv(path: Path, name: str, suffix: str) -> ListSource:
    """Opens a CSV or TSV file, maybe compressed.

    Cells are texts, and nothing is converted: "007" and "NA" stay what they are.  The
    exception is a cell with messages, which must be a JSON list of objects.  Rows in
    errors are those of a spreadsheet, where the header is row 1.

    Args:
      path: the file.
      name: what errors call it.
      suffix: .csv or .tsv.

    Raises:
      InputError: if it cannot be read, or a row does not fit the header.
    """
    try:
        text = read_contents(path, name)[:].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: byte {error.object[error.start]:#04x} at position"
            f" {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    delimiter = DELIMITERS[suffix]
    header = text.partition("\n")[0]
    if suffix == ".csv" and ";" in header and "," not in header:
        delimiter = ";"
    before = csv.field_size_limit(len(text) + 1)  # the default is 131,072 characters
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, strict=True
        )
        return ListSource(_records(reader, name), name, first_row=2)
    except csv.Error as error:
        line = reader.line_num
        raise InputError(
            f"{name} line {line}: not valid CSV ({error}); a quote inside a quoted cell"
            " is written twice"
        ) from None
    finally:
        csv.field_size_limit(before)


def _records(reader: Any, name: str) -> list[dict[str, Any]]:
    names = next(reader, [])
    twice = sorted({field for field in names if names.count(field) > 1})
    if twice:
        raise InputError(
            f"{name} row 1: two columns are named {twice[0]!r:.100}; keep one of them"
        )
    records = []
    for row, cells in enumerate(reader, start=2):
        where = f"{name} row {row}"
        if not cells:
            raise InputError(f"{where}: the row is empty; remove it")
        if len(cells) != len(names):
            raise InputError(
                f"{where}: {len(cells)} cells, but the header has {len(names)}; put"
                " quotes around cells with commas or line breaks"
            )
        pairs = zip(names, cells, strict=True)
        records.append({key: _cell(cell, key, where) for key, cell in pairs})
    return records


def _cell(cell: str, name: str, where: str) -> Any:
    """The text of a cell, or its messages."""
    start = cell[:100].lstrip()
    if not start.startswith("[{"):
        return cell
    try:
        value = json.loads(cell)
    except (RecursionError, ValueError):
        if start.startswith("[{'") and ("'role'" in cell or "'from'" in cell):
            raise InputError(
                f"{where}: field {name!r:.100} holds messages as Python prints them;"
                " write them as JSON (json.dumps), or use a JSONL file"
            ) from None
        return cell
    turns = all(isinstance(x, dict) and ("role" in x or "from" in x) for x in value)
    return value if turns else cell

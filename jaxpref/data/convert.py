"""Records of any source as one file with random access."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.sources import Source
from jaxpref.data.sources.array_records import SUFFIXES as ARRAY_RECORD
from jaxpref.data.sources.arrow import PARQUET
from jaxpref.data.sources.optional import import_optional
from jaxpref.errors import InputError
from jaxpref.files import write_whole

LINES = (".jsonl",)
KINDS = (*LINES, *ARRAY_RECORD, *PARQUET)
"""Suffixes of the files that `convert` writes."""
_ROWS = 10_000


def check_suffix(out: Path) -> None:
    """Raises InputError unless `convert` writes files with this suffix."""
    if out.suffix not in KINDS:
        raise InputError(f"--out {out}: give a name that ends in {', '.join(KINDS)}")


def convert(source: Source, out: Path, *, seed: int | None = None) -> int:
    """Writes the records of a source to one file, and returns their number.

    The file is written under a temporary name and then renamed, so it is complete or
    absent.

    Args:
      source: the records.
      out: .jsonl, .parquet, or .array_record with a JSON object as each record.
      seed: shuffles the records; None keeps their order.

    Raises:
      InputError: for another suffix, a missing package, or records that do not fit into
        the columns of a Parquet file.
    """
    check_suffix(out)
    order = np.arange(len(source))
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    records = (source[int(n)] for n in order)
    if out.suffix in LINES:
        lines = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records)
        write_whole(out, lines)
    elif out.suffix in PARQUET:
        _write_parquet(out, records)
    else:
        _write_array_record(out, records)
    return len(order)


def _write_parquet(out: Path, records: Iterator[Any]) -> None:
    pyarrow = import_optional("pyarrow", str(out), extra="hub")
    parquet = import_optional("pyarrow.parquet", str(out), extra="hub")
    sink = pyarrow.BufferOutputStream()
    try:
        table = pyarrow.Table.from_pylist(list(records))
        parquet.write_table(table, sink, row_group_size=_ROWS)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise InputError(
            f"--out {out}: a column holds values of several types"
            f" ({str(error).splitlines()[0]:.200}); write .jsonl or .array_record"
        ) from None
    write_whole(out, sink.getvalue().to_pybytes())


def _write_array_record(out: Path, records: Iterator[Any]) -> None:
    module = "array_record.python.array_record_module"
    package = import_optional(module, str(out), extra="tfds")
    partial = out.with_name(f".{out.name}.partial")
    try:
        # Groups of one record: any record is read without its neighbors.
        writer = package.ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            writer.write(json.dumps(record).encode())
        writer.close()
        write_whole(out, partial.read_bytes())
    finally:
        partial.unlink(missing_ok=True)

"""The answers of a run: `samples.jsonl`, and `eval_samples.jsonl`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxpref.files import open_to_append, write_whole

FILE = "samples.jsonl"
EVAL_FILE = "eval_samples.jsonl"
"""Answers to held-out prompts, if `FILE` has those that a run learns from."""


def keep_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops answers from `step` on, which a resumed run repeats; returns the others.

    The last line of a killed run may be incomplete and is then dropped, too.
    """
    if not path.exists():
        return []
    # Not splitlines: an answer may hold other line breaks.
    lines = path.read_text("utf-8").split("\n")[:-1]
    kept = [x for x in map(json.loads, lines) if x["step"] < step]
    write_whole(path, "".join(map(_line, kept)))
    return kept


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds a line for each answer."""
    with open_to_append(path) as file:
        file.writelines(map(_line, records))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"

"""Which prompts each round answers, and which are held out."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data import RecordOptions, open_records
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.records import parse_prompt, prompt_key
from jaxpref.data.records.view import View
from jaxpref.errors import InputError
from jaxpref.files import write_whole
from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.stages import RECORD


def split_prompts(config: RoundsConfig) -> tuple[list[list[Any]], list[Any]]:
    """The records of each round, and the held-out ones; each prompt is in one of them.

    The order is that of hashes of the prompts, so it does not depend on the order of
    the file, and a later round gets the same prompts whatever the number of rounds is.

    Raises:
      InputError: if there are too few.
    """
    records = _by_prompt(config.prompts)
    keys = sorted(records)
    order = np.argsort(hash_uniforms(keys, salt=f"rounds {config.seed}"))
    ordered = [records[keys[n]] for n in order]
    held = min(config.eval_prompts, max(1, len(ordered) // 4))
    if config.same_prompts and len(ordered) > held:
        return [ordered[held:]] * config.rounds, ordered[:held]
    size = config.prompts_per_round or (len(ordered) - held) // config.rounds
    wanted = held + config.rounds * max(size, 1)
    if len(ordered) < wanted:
        raise InputError(
            f"{config.prompts}: has {len(ordered):,} different prompts, but "
            f"{config.rounds} rounds and the held-out prompts need {wanted:,}; lower "
            "--prompts-per-round, --rounds or --eval-prompts"
        )
    rest = ordered[held:]
    parts = [rest[n * size : (n + 1) * size] for n in range(config.rounds)]
    return parts, ordered[:held]


def _by_prompt(data: str) -> dict[str, Any]:
    """The first record of each prompt, as in its file."""
    source = open_records(data, RecordOptions(), sides=2)
    found: dict[str, Any] = {}
    for n in range(len(source)):
        record = source[n]
        example = parse_prompt(record, source.location(n))
        if example is not None:
            raw = record.origin.record if isinstance(record, View) else record
            found.setdefault(prompt_key(example.prompt), raw)
    return found


def check_records(path: Path, records: list[Any]) -> None:
    """Refuses a file with other records, of which results have been made.

    Raises:
      InputError: names the file.
    """
    used = (path.parent / RECORD).is_file()
    if used and path.is_file() and path.read_text("utf-8") != _lines(records):
        raise InputError(
            f"{path}: was made from other prompts than --prompts has now, or with "
            "another --prompts-per-round, --eval-prompts or --seed; use another --out"
        )


def write_records(path: Path, records: list[Any]) -> None:
    """Writes records as JSONL, unless the file has them already."""
    if not path.is_file() or path.read_text("utf-8") != _lines(records):
        write_whole(path, _lines(records))


def _lines(records: list[Any]) -> str:
    # Of dates and the like, which columnar files hold, the text.
    return "".join(json.dumps(record, default=str) + "\n" for record in records)

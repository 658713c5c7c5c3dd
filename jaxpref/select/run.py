"""`jaxpref data select`: scores the records of a file, and writes those to keep."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.bad_rows import log_skipped
from jaxpref.data.convert import check_suffix, convert
from jaxpref.data.sources import Source
from jaxpref.errors import InputError
from jaxpref.files import check_output, write_whole
from jaxpref.select.config import SelectConfig
from jaxpref.select.duplicates import by_duplicates
from jaxpref.select.fifa import by_fifa
from jaxpref.select.model_scores import by_ches, by_donod, prompt_states
from jaxpref.select.opened import Opened, open_file
from jaxpref.select.plain import by_agreement, by_column
from jaxpref.select.scores import Scores, choose


def _fifa(opened: Opened) -> Scores:
    model = opened.config.model
    return by_fifa(opened, None if model is None else prompt_states(opened))


METHODS: Mapping[str, Callable[[Opened], Scores]] = {
    "column": by_column,
    "agreement": by_agreement,
    "duplicates": by_duplicates,
    "ches": by_ches,
    "normalized-ches": by_ches,
    "fifa": _fifa,
    "donod": by_donod,
}
"""The scores of each method."""


@dataclasses.dataclass(frozen=True)
class Selected:
    """What was selected."""

    records: int
    """Records of all files."""
    kept: int
    """Those that were written."""
    reasons: dict[str, int]
    """How many of the others were left out for each reason."""
    scores: dict[str, float]
    """The median and the extremes of the scores: `lowest`, `median`, `highest`, and of
    those that were kept, `kept_lowest` and `kept_highest`; empty without scores."""


class _Subset:
    """Some records of a source."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._source[int(self._rows[index])]

    def location(self, index: int) -> str:
        """The location in the source."""
        return self._source.location(int(self._rows[index]))


def run(config: SelectConfig) -> Selected:
    """Scores all records, and writes those that are kept and the file of scores.

    Raises:
      InputError: if a record is malformed, the method cannot use the data, no record
        is left, or a file cannot be written.
    """
    reads = {"--data": config.files, "--model": config.model}
    check_output("--out", config.out, reads)
    check_output("--scores", config.scores_file, reads)
    check_suffix(Path(config.out))
    if Path(config.out).resolve() == Path(config.scores_file).resolve():
        raise InputError(
            f"--scores {config.scores_file}: is also --out; choose another"
        )
    opened = open_file(config)
    scores = METHODS[config.by](opened)
    log_skipped(opened.bad.found)
    kept, reasons = choose(
        scores,
        keeps=config.keeps,
        keep=config.keep,
        low=config.min,
        high=config.max,
        seed=config.seed,
    )
    places = [
        ({"file": name} if len(opened.sizes) > 1 else {}) | {"row": row + 1}
        for name, size in opened.sizes.items()
        for row in range(size)
    ]
    lines = [
        json.dumps(
            places[n]
            | {"kept": bool(kept[n])}
            | ({"score": _json(scores.values[n])} if config.keeps else {})
            | {name: _json(column[n]) for name, column in scores.others.items()}
            | ({} if kept[n] else {"reason": reasons[n]})
        )
        for n in range(len(kept))
    ]
    write_whole(config.scores_file, "".join(line + "\n" for line in lines))
    convert(_Subset(opened.file, np.flatnonzero(kept)), Path(config.out))
    return Selected(
        len(kept),
        int(kept.sum()),
        dict(collections.Counter(x for x in reasons if x).most_common()),
        _described(scores, kept) if config.keeps else {},
    )


def _described(scores: Scores, kept: np.ndarray) -> dict[str, float]:
    values = scores.values
    known = values[[not reason for reason in scores.reasons]]
    return {
        "lowest": float(known.min()),
        "median": float(np.median(known)),
        "highest": float(known.max()),
        "kept_lowest": float(values[kept].min()),
        "kept_highest": float(values[kept].max()),
    }


def _json(value: Any) -> Any:
    """A number for JSON, which has no NaN."""
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value.item() if isinstance(value, np.generic) else value

"""Several data files for one run, with or without weights."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from jaxpref.errors import InputError

Data = str | tuple[str, ...]
"""One or several names of data, each maybe followed by a weight: "a.jsonl:0.7"."""
_ONLY_HOST = re.compile(r"[a-z][a-z0-9+.-]*://[^/]*")
"""What stands before the port of a URL without a path."""
_WEIGHTED = re.compile(r"(.+):((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The data of a run."""

    names: tuple[str, ...]
    """What `open_source` opens."""
    weights: tuple[float, ...] | None = None
    """The share of each in every epoch; their sum is 1.  None takes all pairs of all
    once per epoch."""


def read_mixture(data: Data) -> Mixture:
    """The names and weights of one or several data files.

    Raises:
      InputError: if a name occurs twice, a weight is not above 0, or only some of the
        names have one.
    """
    given = (data,) if isinstance(data, str) else data
    if not given:
        raise InputError("--data: give a file or dataset")
    parts = [_split(name) for name in given]
    names = tuple(name for name, _ in parts)
    weights = [weight for _, weight in parts if weight is not None]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"--data {twice}: is given more than once; name it once")
    if not weights:
        return Mixture(names)
    if len(weights) < len(names):
        bare = next(name for name, weight in parts if weight is None)
        raise InputError(
            f"--data {bare}: has no weight, but others do; write {bare}:WEIGHT"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(
            f"--data {' '.join(given)}: weights must be finite and above 0"
        )
    total = sum(weights)
    return Mixture(names, tuple(weight / total for weight in weights))


def short_names(files: Sequence[str]) -> list[str]:
    """Names of files for metrics: without folder and endings, unless two are equal."""
    short = [Path(name).name.partition(".")[0] or name for name in files]
    return [s if short.count(s) == 1 else name for s, name in zip(short, files)]


def _split(name: str) -> tuple[str, float | None]:
    """A name and its weight; a file whose name ends like a weight has none."""
    found = _WEIGHTED.fullmatch(name)
    if found is None or Path(name).exists() or _ONLY_HOST.fullmatch(found[1]):
        return name, None
    return found[1], float(found[2])

"""Injected label noise: the pairs to flip are chosen by a hash of their ids.

Every `flip_*` returns bool [N], true if chosen and rejected are swapped.  It compares a
number for each pair, u(seed, id), with the pair's own rate.  Whether a pair is flipped
thus does not depend on the other pairs.  With the same seed, pairs flipped at a low
rate are a subset of those flipped at a higher rate, even across kinds of noise.

`flip_pairs` flips tokenized pairs and marks them in the column `is_flipped`, which is
for evaluation only.
"""

import dataclasses
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.columns import OF_ANSWERS, VOTES, exchanged
from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.errors import InputError, first_line
from jaxpref.files import check_regular


def flip_symmetric(
    ids: Iterable[str], *, rate: float | np.ndarray, seed: int
) -> np.ndarray:
    """Flips every pair at the same rate: flip[n] = u(seed, id[n]) < rate.

    Args:
      ids: the ids of N pairs.
      rate: from 0 to 1, for all pairs or, as [N], for each.
      seed: determines which pairs are flipped.
    """
    _check_rates(np.asarray(rate))
    return hash_uniforms(ids, salt=f"flip {seed}") < rate


def flip_by_class(
    ids: Iterable[str],
    classes: Sequence[Hashable],
    rates: Mapping[Hashable, float],
    *,
    seed: int,
    default: float = 0.0,
) -> np.ndarray:
    """Flips at the rate of the pair's class, e.g. whether the longer answer is chosen.

    The classes may be annotators.  A rate above 1/2 is an adversarial annotator, whose
    labels are mostly the opposite of the right ones.

    Args:
      ids: the ids of N pairs.
      classes: [N], the class of each pair.
      rates: flip rate by class, from 0 to 1.
      seed: determines which pairs are flipped.
      default: flip rate of classes that are not in `rates`.
    """
    each = np.array([rates.get(name, default) for name in classes], np.float64)
    return flip_symmetric(ids, rate=each, seed=seed)


def flip_by_margin(
    ids: Iterable[str], margins: np.ndarray, *, temperature: float, seed: int
) -> np.ndarray:
    """Flips hard pairs more: rate[n] = 1 / (1 + exp(|margin[n]| / temperature)).

    This is a Bradley-Terry annotator who sees the right reward through logistic noise
    of this scale: random at margin 0, and hardly ever wrong at large margins.

    Args:
      ids: the ids of N pairs.
      margins: [N], how clear each pair is, in any unit; signs are ignored.
      temperature: in the unit of the margins, positive; see `margin_temperature`.
      seed: determines which pairs are flipped.
    """
    return flip_symmetric(ids, rate=margin_rates(margins, temperature), seed=seed)


def margin_temperature(margins: np.ndarray, *, rate: float) -> float:
    """The temperature at which `flip_by_margin` flips this share of the pairs.

    Args:
      margins: [N], none of them zero.
      rate: the mean flip rate, between 0 and 1/2.
    """
    if not 0 < rate < 0.5:
        raise InputError(f"rate {rate} must be between 0 and 1/2")
    size = np.abs(margins)
    if not len(size) or not size.min() > 0 or not np.isfinite(size).all():
        raise InputError("margins must be finite and not zero to be scaled to a rate")
    # At these limits, every pair is nearly certain or nearly random.
    low, high = np.log(size.min() / 700), np.log(size.max() * 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        above = margin_rates(margins, np.exp(middle)).mean() > rate
        low, high = (low, middle) if above else (middle, high)
    return float(np.exp((low + high) / 2))


def margin_rates(margins: np.ndarray, temperature: float) -> np.ndarray:
    """Flip rates 1 / (1 + exp(|margin| / temperature)); see `flip_by_margin`."""
    if not temperature > 0:
        raise InputError(f"temperature {temperature} must be positive")
    # The exponent is never positive, so exp cannot overflow.
    fall = np.exp(-np.abs(np.asarray(margins, np.float64)) / temperature)
    return fall / (1 + fall)


def flip_pairs(pairs: PreferenceDataset, flips: np.ndarray) -> PreferenceDataset:
    """The pairs with chosen and rejected swapped where `flips` [N] is true.

    Flipping a pair that is already marked as flipped makes it right again, and clears
    the mark.  Ratings are swapped with the answers; other numbers are not (see
    `data.columns.exchanged`).  A rationale stays as it is.

    Raises:
      InputError: if the records are single answers or lists, or hold several votes.
    """
    _check_pairs(pairs)
    order = [1, 0, *range(2, pairs.num_completions)]
    sizes = pairs.side_prompt_lengths + pairs.completion_lengths

    def swapped(values: np.ndarray) -> np.ndarray:
        """Numbers of each token, in the order of the swapped answers."""
        values = values.copy()
        for n in np.flatnonzero(flips).tolist():
            start = pairs.offsets[n] + pairs.prompt_lengths[n]
            own = values[start : pairs.offsets[n + 1]]
            sides = np.split(own, np.cumsum(sizes[n])[:-1])
            own[:] = np.concatenate([sides[side] for side in order])
        return values

    swap = lambda x: np.where(flips[:, None], x[:, order], x)
    other = exchanged(pairs.numbers)
    columns = {k: np.where(flips, other[k], v) for k, v in pairs.numbers.items()}
    columns["is_flipped"] = pairs.columns["is_flipped"] ^ flips
    for name, other in (("prompt", "rejected_prompt"), ("rejected_prompt", "prompt")):
        columns[name] = np.where(flips, pairs.columns[other], pairs.columns[name])
    return dataclasses.replace(
        pairs,
        tokens=swapped(pairs.tokens),
        trained=None if pairs.trained is None else swapped(pairs.trained),
        side_prompt_lengths=swap(pairs.side_prompt_lengths),
        completion_lengths=swap(pairs.completion_lengths),
        columns=pairs.columns | columns,
    )


def _check_pairs(pairs: PreferenceDataset) -> None:
    """Raises InputError unless completions 0 and 1 are the answers of one label."""
    if pairs.num_completions < 2 or pairs.columns.keys() & OF_ANSWERS:
        raise InputError(
            f"flip_pairs: {pairs.num_completions} completions are not a pair; read the"
            " records as pairs, or flip them with --inject"
        )
    if VOTES in pairs.columns:
        raise InputError(
            "flip_pairs: a row holds several votes; flip each vote before share_votes"
        )


def read_rates(path: str | Path) -> dict[str, float]:
    """Flip rates by name, e.g. `{"ann": 0.1, "bob": 0.6}`, from a JSON file.

    Raises:
      InputError: if it cannot be read, or is not an object of numbers from 0 to 1.
    """
    rates = read_object(path, '{"annotator": rate, ...}')
    for name, rate in rates.items():
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 <= rate <= 1:
            raise InputError(
                f"{path}: field {name!r}: the flip rate {rate!r} must be a number from "
                "0 to 1"
            )
    return {name: float(rate) for name, rate in rates.items()}


def read_object(path: str | Path, form: str) -> dict[str, Any]:
    """An object with at least one field, from a JSON file.

    Args:
      path: the file.
      form: what it must look like, for errors.

    Raises:
      InputError: if it cannot be read, or contains something else.
    """
    check_regular(path)
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({first_line(error)}); write {form}"
        ) from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path}: must be an object {form}")
    return found


def _check_rates(rates: np.ndarray) -> None:
    wrong = ~((rates >= 0) & (rates <= 1))
    if wrong.any():
        raise InputError(f"flip rate {rates[wrong].flat[0]} must be from 0 to 1")

"""Injected label noise: which pairs are given the wrong label, by hash of their ids.

Every `flip_*` returns bool [N], true where chosen and rejected change places, and
compares one number a pair, u(seed, id), to the pair's own rate.  So a pair is flipped
or not whatever the other pairs are, and with one seed the pairs flipped at low rates
are a subset of those flipped at higher ones, also across the kinds of noise.

`flip_pairs` plants the flips in tokenized pairs; what was flipped stays known as
the column `is_flipped`, for evaluation only.
"""

import dataclasses
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.labels import exchanged
from jaxpref.errors import InputError, first_line


def flip_symmetric(
    ids: Iterable[str], *, rate: float | np.ndarray, seed: int
) -> np.ndarray:
    """Every pair alike: flip[n] = u(seed, id[n]) < rate.

    Args:
      ids: of the pairs, N of them.
      rate: from 0 to 1, of all pairs or [N] one for each.
      seed: which pairs are flipped.
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

    With annotators as classes it is an annotator's own rate; a rate above 1/2 is an
    adversarial annotator, whose labels say the opposite of what is right.

    Args:
      ids: of the pairs, N of them.
      classes: [N], the class of each pair.
      rates: flip rate by class, from 0 to 1.
      seed: which pairs are flipped.
      default: flip rate of classes that are not in `rates`.
    """
    each = np.array([rates.get(name, default) for name in classes], np.float64)
    return flip_symmetric(ids, rate=each, seed=seed)


def flip_by_margin(
    ids: Iterable[str], margins: np.ndarray, *, temperature: float, seed: int
) -> np.ndarray:
    """Hard pairs flip more: rate[n] = 1 / (1 + exp(|margin[n]| / temperature)).

    What a Bradley-Terry annotator does who sees the right reward through logistic noise
    of this scale: a coin at margin 0, hardly ever wrong far from it.

    Args:
      ids: of the pairs, N of them.
      margins: [N], how clear each pair is, in any unit; its sign is not used.
      temperature: in the unit of the margins, positive; see `margin_temperature`.
      seed: which pairs are flipped.
    """
    return flip_symmetric(ids, rate=_margin_rates(margins, temperature), seed=seed)


def margin_temperature(margins: np.ndarray, *, rate: float) -> float:
    """The temperature at which `flip_by_margin` flips this share of the pairs.

    Args:
      margins: [N], none of them zero.
      rate: the mean flip rate, between 0 and 1/2.
    """
    if not 0 < rate < 0.5:
        raise InputError(f"rate {rate} must be between 0 and 1/2: hard pairs are coins")
    size = np.abs(margins)
    if not len(size) or not size.min() > 0 or not np.isfinite(size).all():
        raise InputError("margins must be finite and not zero to be scaled to a rate")
    # Between these every pair is nearly certain, or nearly a coin.
    low, high = np.log(size.min() / 700), np.log(size.max() * 1e6)
    for _ in range(100):
        middle = (low + high) / 2
        above = _margin_rates(margins, np.exp(middle)).mean() > rate
        low, high = (low, middle) if above else (middle, high)
    return float(np.exp((low + high) / 2))


def flip_ties(ids: Sequence[str], *, share: float, seed: int) -> np.ndarray:
    """A share of the pairs is labelled by a coin: half of these come out wrong.

    flip[n] = v(seed, id[n]) < share and u(seed, id[n]) < 1/2.

    Args:
      ids: of the pairs, N of them.
      share: of pairs that the annotators cannot tell apart, from 0 to 1.
      seed: which pairs, and how the coins fall.
    """
    _check_rates(np.asarray(share))
    tied = hash_uniforms(ids, salt=f"tie {seed}") < share
    return tied & flip_symmetric(ids, rate=0.5, seed=seed)


def flip_pairs(pairs: PreferenceDataset, flips: np.ndarray) -> PreferenceDataset:
    """The pairs with chosen and rejected exchanged where `flips` [N] is true.

    A pair known to be flipped already is right again: the column `is_flipped` says so.
    Ratings go with their answers; margins, strengths and ties stay; see `LabelFields`.
    """
    tokens = pairs.tokens.copy()
    for n in np.flatnonzero(flips).tolist():
        start = pairs.offsets[n] + pairs.prompt_lengths[n]
        swapped = [pairs.completion(n, side) for side in (1, 0)]
        tokens[start : pairs.offsets[n + 1]] = np.concatenate(swapped)
    lengths = pairs.completion_lengths
    lengths = np.where(flips[:, None], lengths[:, ::-1], lengths)
    other = exchanged(pairs.labels)
    columns = {k: np.where(flips, other[k], v) for k, v in pairs.labels.items()}
    columns["is_flipped"] = pairs.columns["is_flipped"] ^ flips
    return dataclasses.replace(
        pairs,
        tokens=tokens,
        completion_lengths=lengths,
        columns=pairs.columns | columns,
    )


def read_rates(path: str | Path) -> dict[str, float]:
    """Flip rates by annotator, e.g. `{"ann": 0.1, "bob": 0.6}`, from a JSON file.

    Raises:
      InputError: it cannot be read, or is no object of numbers from 0 to 1.
    """
    try:
        rates = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as JSON ({first_line(error)}); "
            'write {"annotator": rate, ...}'
        ) from error
    if not isinstance(rates, dict) or not rates:
        raise InputError(f'{path}: must be an object {{"annotator": rate, ...}}')
    for name, rate in rates.items():
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 <= rate <= 1:
            raise InputError(
                f"{path}: field {name!r}: the flip rate {rate!r} must be a number from "
                "0 to 1"
            )
    return {name: float(rate) for name, rate in rates.items()}


def _margin_rates(margins: np.ndarray, temperature: float) -> np.ndarray:
    if not temperature > 0:
        raise InputError(f"temperature {temperature} must be positive")
    # exp of a negative number cannot overflow.
    fall = np.exp(-np.abs(np.asarray(margins, np.float64)) / temperature)
    return fall / (1 + fall)


def _check_rates(rates: np.ndarray) -> None:
    wrong = ~((rates >= 0) & (rates <= 1))
    if wrong.any():
        raise InputError(f"flip rate {rates[wrong].flat[0]} must be from 0 to 1")

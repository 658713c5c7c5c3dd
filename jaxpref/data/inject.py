"""Injected noise of a run: who labels each training pair, and whether it is flipped.

Whether a pair is flipped depends on its own record and the seed alone: its flip rate,
compared with a number u(seed, id).  Texts are compared in characters, not tokens, so
that the same pairs are flipped for every model.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.kinds import Kind
from jaxpref.data.noise import flip_symmetric, margin_rates, read_object, read_rates
from jaxpref.data.options import InjectOptions
from jaxpref.data.records import Example, text_of
from jaxpref.errors import InputError

ANNOTATOR = "annotator"
"""The field of a record that names its annotator."""
FORM = '{"share": 0.5, "flip_rate": 0.1}'
"""An example of a simulated annotator in a file."""


@dataclasses.dataclass(frozen=True)
class SimulatedAnnotator:
    """How an annotator's labels differ from those of the file."""

    share: float
    """Probability that a pair is labeled by this annotator."""
    flip_rate: float = 0.0
    """Flip rate of the labels that are not given by length."""
    prefer_longer: float = 0.0
    """Share of the labels that are given by length alone."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the noise depends on of a pair."""

    annotator: str | None
    characters: tuple[int, ...]
    """Length of each completion."""
    values: Mapping[str, Any]
    """The fields that `fields_read` names."""
    matches: bool
    """Whether the prompt contains the topic."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of a run: its options, and the contents of the files that they name."""

    options: InjectOptions
    rates: Mapping[str, float]
    """Flip rate by value of the field `options.by`."""
    annotators: Mapping[str, SimulatedAnnotator]
    topic: re.Pattern | None
    found: set[str] = dataclasses.field(default_factory=set)
    """What has occurred in training pairs so far: values of the field `options.by`, or
    the topic."""

    def check_kind(self, kind: Kind) -> None:
        """Raises InputError if this noise does not fit the kind of records."""
        if not self.options.active or kind.sides == 2:
            return
        if not kind.can_flip:
            raise InputError(
                "--inject needs pairs or labeled answers: "
                + ("a single completion" if kind.sides == 1 else "a list")
                + " has no label to flip"
            )
        by_length = [x.prefer_longer for x in self.annotators.values()]
        if any((self.options.prefer_longer, *by_length)):
            raise InputError(
                "--inject: labels that prefer the longer answer need two answers, but "
                "these records have one; use flip rates instead"
            )

    def label(
        self, pair: Subject, record_id: str, place: str
    ) -> tuple[str | None, bool]:
        """The annotator of a training pair, and whether its label is flipped.

        Args:
          pair: from `subject`.
          record_id: determines annotator and flip, together with the seed.
          place: "file row n", for errors.

        Raises:
          InputError: if a field has a value that cannot be used.
        """
        seed = self.options.seed or 0
        annotator, rate = pair.annotator, self._rate(pair, place)
        share = self.options.prefer_longer or 0.0
        if self.annotators:
            if annotator is not None:
                raise InputError(
                    f"{place}: field 'annotator' is {annotator!r:.50}, but "
                    "--inject.annotators simulates annotators; set the rates of those "
                    "in the file with --inject.rates, or pass --ignore-fields annotator"
                )
            (u,) = hash_uniforms([record_id], salt=f"annotator {seed}")
            annotator = drawn(self.annotators, u)
            rate = self.annotators[annotator].flip_rate
            share = self.annotators[annotator].prefer_longer
        if len(pair.characters) == 2:
            rate = with_length_bias(rate, share, *pair.characters)
        (flip,) = flip_symmetric([record_id], rate=rate, seed=seed)
        return annotator, bool(flip)

    def _rate(self, pair: Subject, place: str) -> float:
        """The flip rate of a pair, apart from labels given by length."""
        options, otherwise = self.options, self.options.flip_rate or 0.0
        if self.rates:
            value = self._value(pair, place)
            if value is None:
                return otherwise
            self.found.add(value)
            return self.rates.get(value, otherwise)
        if self.topic is not None:
            if not pair.matches:
                return otherwise
            self.found.add(self.topic.pattern)
            return options.topic_rate or 0.0
        if options.margins is not None and options.temperature is not None:
            margin = _number(pair.values[options.margins], options.margins, place)
            return float(margin_rates(np.asarray(margin), options.temperature))
        return otherwise

    def _value(self, pair: Subject, place: str) -> str | None:
        """The value of the field `options.by`, as in the file of rates."""
        by = self.options.by or ANNOTATOR
        if by == ANNOTATOR:
            return pair.annotator
        value = pair.values[by]
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int):
            return str(value)
        raise InputError(
            f"{place}: field '{by}' must be a string, an integer, true or false for "
            f"--inject.by, but it is {value!r:.50}; correct it"
        )

    def check_used(self, place: str) -> None:
        """Checks that the rates or the topic apply to some training pair.

        Args:
          place: what was read, for errors.

        Raises:
          InputError: if there is none.
        """
        by = self.options.by or ANNOTATOR
        if self.rates and not self.rates.keys() & self.found:
            found = ", ".join(sorted(self.found)[:5]) or "not given"
            raise InputError(
                f"{self.options.rates}: no training pair of {place} has one of its "
                f"values in field '{by}'; the values of the pairs are {found}"
            )
        if self.topic is not None and not self.found:
            raise InputError(
                f"--inject.topic {self.options.topic}: matches no training prompt of "
                f"{place}; correct it, or leave it out"
            )


def read_noise(options: InjectOptions) -> Noise:
    """The noise that the options describe, with the files they name.

    Raises:
      InputError: if a file or the regular expression is wrong.
    """
    return Noise(
        options,
        rates=read_rates(options.rates) if options.rates else {},
        annotators=read_annotators(options.annotators) if options.annotators else {},
        topic=read_topic(options),
    )


def read_topic(options: InjectOptions) -> re.Pattern | None:
    """The regular expression of the topic, or None.

    Raises:
      InputError: if it is wrong.
    """
    if options.topic is None:
        return None
    try:
        return re.compile(options.topic)
    except re.error as error:
        raise InputError(
            f"--inject.topic {options.topic}: is not a regular expression ({error})"
        ) from error


def subject(example: Example, topic: re.Pattern | None) -> Subject:
    """What the noise depends on, of a pair with the fields of `fields_read`."""
    return Subject(
        annotator=example.annotator,
        characters=example.characters,
        values={name: _plain(value) for name, value in example.values.items()},
        matches=topic is not None and topic.search(prompt_text(example)) is not None,
    )


def fields_read(options: InjectOptions) -> list[str]:
    """The fields of the records that the noise depends on."""
    names = (options.by if options.by != ANNOTATOR else None, options.margins)
    return [name for name in names if name is not None]


def read_annotators(path: str | Path) -> dict[str, SimulatedAnnotator]:
    """Simulated annotators by name, from a JSON file.

    Raises:
      InputError: if it cannot be read, or is not an object of annotators whose shares
        sum to 1.
    """
    found = {}
    for name, fields in read_object(path, f'{{"name": {FORM}, ...}}').items():
        place = f"{path}: field {name!r}"
        if not isinstance(fields, dict) or "share" not in fields:
            raise InputError(
                f"{place}: must be an annotator such as {FORM}; for rates of the "
                "annotators in the data, use --inject.rates"
            )
        known = [field.name for field in dataclasses.fields(SimulatedAnnotator)]
        for key, value in fields.items():
            if key not in known:
                raise InputError(
                    f"{place}: unknown '{key}'; allowed: {', '.join(known)}"
                )
            if not _is_number(value) or not 0 <= value <= 1:
                raise InputError(
                    f"{place}: {key} {value!r:.50} must be a number from 0 to 1"
                )
        found[name] = SimulatedAnnotator(**fields)
    total = sum(annotator.share for annotator in found.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"{path}: the shares sum to {total:.6g}; they must sum to 1")
    return found


def drawn(annotators: Mapping[str, SimulatedAnnotator], u: float) -> str:
    """The annotator in whose part of [0, 1) u lies; parts are as long as the shares."""
    ends = np.cumsum([annotator.share for annotator in annotators.values()])
    index = int(np.searchsorted(ends[:-1], u, side="right"))
    return list(annotators)[index]


def with_length_bias(
    rate: float, share: float, chosen_length: int, rejected_length: int
) -> float:
    """The flip rate of a pair if a share of the labels is given by length alone.

        rate' = share [chosen is shorter] + (1 - share) rate

    Args:
      rate: flip rate of the labels that are not given by length.
      share: share of the labels that name the longer answer.
      chosen_length: length of the chosen answer, in any unit.
      rejected_length: length of the rejected answer.  If both are equally long, length
        decides nothing, and the result is `rate`.
    """
    if chosen_length == rejected_length:
        return rate
    return share * (chosen_length < rejected_length) + (1 - share) * rate


def prompt_text(example: Example) -> str:
    """The prompt as text; the messages of a conversation, one per line."""
    prompt = example.prompt
    turns = [prompt] if isinstance(prompt, str) else [text_of(turn) for turn in prompt]
    return "\n".join(turns)


def _plain(value: Any) -> Any:
    """A value as JSON would store it; others are refused later, whatever they are."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return [repr(value)]
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any, field: str, place: str) -> float:
    if not _is_number(value) or not abs(value) <= np.finfo(np.float64).max:
        raise InputError(
            f"{place}: field '{field}' must be a number for --inject.margins, but it is"
            f" {value!r:.50}; correct it or remove the row"
        )
    return float(value)

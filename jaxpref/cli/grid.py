"""`--over NAME=VALUE,VALUE`: the combinations of a sweep, and the config of each."""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from jaxpref.cli import config_file, train
from jaxpref.cli.objectives import choose
from jaxpref.cli.options import options_of
from jaxpref.cli.words import Given, canonical, closest
from jaxpref.errors import InputError
from jaxpref.sweep.options import SweepRun

Axes = dict[str, tuple[str, ...]]
"""The swept options, without their dashes, and the values of each."""

NOT_SWEPT = ("out", "config", "print-config")
"""Options of `jaxpref train` that have one value in a sweep."""
LONGEST_NAME = 200
"""Maximum characters of a run's name, which is the name of a folder."""


def axes_of(words: Sequence[str]) -> Axes:
    """The options and values in `NAME=VALUE,VALUE` words, one word for each option.

    Raises:
      InputError: if a word has another form, or an option or value is repeated.
    """
    axes: Axes = {}
    for word in words:
        name, equals, listed = word.partition("=")
        name, values = canonical(name.removeprefix("--")), tuple(listed.split(","))
        if not (name and equals and all(values)):
            raise InputError(
                f"--over {word}: expected an option and its values, such as "
                "loss.beta=0.03,0.1"
            )
        if name in NOT_SWEPT:
            raise InputError(f"--over {word}: --{name} cannot be swept; leave it out")
        if name in axes:
            raise InputError(
                f"--over {word}: {name} is given twice; list all values in one --over"
            )
        texts = [_cleaned(value) for value in values]
        for n, text in enumerate(texts):
            if text in texts[:n]:
                raise InputError(
                    f"--over {word}: {values[texts.index(text)]} and {values[n]} would "
                    f"both be named {text}; leave one out, or rename a file"
                )
        axes[name] = values
    return axes


def runs_of(axes: Axes, given: Given) -> list[SweepRun]:
    """The runs of a grid, in order; the values of the last option change fastest.

    If the loss or the objective is swept, an option of a loss or an objective is passed
    to those runs whose loss or objective has it.  Combinations that differ only in
    options that a run does not have are one run.

    Args:
      axes: the swept options.
      given: the other options of `jaxpref train`, and OUT of the sweep.

    Raises:
      InputError: if an option or a combination is invalid; names the combination,
        if it is not the first one.
    """
    for name in axes:
        if found := {name, f"no-{name}"} & given.keys():
            raise InputError(
                f"--{found.pop()}: also given as --over {name}; give only one of them"
            )
    chosen = any(name in axes for name in config_file.NAMED)
    runs: dict[str, SweepRun] = {}
    known: set[str] = set()
    unread: set[str] = set(given) | set(axes)
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination))
        try:
            words = _words(values, given)
            if chosen:
                options, other = _options(words)
                known, unread = known | options, unread & other
                words = {n: v for n, v in words.items() if n not in other}
                values = {n: v for n, v in values.items() if n not in other}
            name = run_name(values)
            if name not in runs:
                runs[name] = _run(name, values, words)
        except InputError as error:
            where = f"{run_name(values)}: " if runs else ""
            raise InputError(f"{where}{error}") from None
    for name in sorted(unread if chosen else ()):
        raise InputError(
            f"--{name}: no loss or objective of this sweep has such an option"
            f"{closest(name, known, '--')}"
        )
    return list(runs.values())


def run_name(values: Mapping[str, str]) -> str:
    """The name of a run: `loss.beta=0.1,seed=0`."""
    name = ",".join(f"{name}={_cleaned(value)}" for name, value in values.items())
    if len(name) > LONGEST_NAME:
        raise InputError(
            f"--over: the name of a run would have {len(name)} characters, more than "
            f"{LONGEST_NAME}; use shorter values or fewer options"
        )
    return name


def _run(name: str, values: Mapping[str, str], words: Given) -> SweepRun:
    out = words.get("out", [])
    if len(out) == 1:
        words = words | {"out": [str(PurePath(out[0]) / name)]}
    config = train.config_of(words)
    flags = [text for n, given in words.items() for text in (f"--{n}", *given)]
    return SweepRun(name, values, config, shlex.join(["jaxpref", "train", *flags]))


def _words(values: Mapping[str, str], given: Given) -> Given:
    """All options of a run, with those of a config file.

    `true` and `false` set a flag; `none` means no correction or objective.
    """
    flags = {"true": True, "false": False}
    swept: Given = {}
    for name, value in values.items():
        swept |= config_file.words_of(name, flags.get(value, value))
    words, _ = train.with_file(given | swept)
    for name in ("correct", "objective", "objective.noise"):
        if words.get(name) == ["none"]:
            del words[name]
    return words


def _options(words: Given) -> tuple[set[str], set[str]]:
    """The options that a run has, and those given for other losses and objectives."""
    choice, rest = choose(words)
    options = set(options_of(train.parts_of(choice)))
    own = lambda name: name.startswith(("loss.", "correct.", "objective."))
    return options, {name for name in rest if own(name) and name not in options}


def _cleaned(value: str) -> str:
    """A value as part of a folder's name: of a path, the last part."""
    last = PurePath(value).name if "/" in value else value
    return re.sub(r"[^\w.+@-]", "_", last)

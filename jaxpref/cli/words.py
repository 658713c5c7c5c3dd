"""Splitting a command line into options and their values."""

import difflib
from collections.abc import Collection, Iterable, Sequence

from jaxpref.errors import InputError

Given = dict[str, list[str]]
"""Option name without its dashes -> the words after it."""


def split(argv: Sequence[str], *, repeatable: Collection[str] = ()) -> Given:
    """Names and values of `--name value`, `--name=value` and `--flag`.

    Args:
      argv: the words.
      repeatable: options that may be given several times; their values are joined.

    Raises:
      InputError: if a word belongs to no option, or an option is repeated.
    """
    given: Given = {}
    name = None
    for word in argv:
        if not word.startswith("--"):
            if name is None:
                raise InputError(f"{word}: expected an option, such as --name value")
            given[name].append(word)
            continue
        option, equals, value = word.partition("=")
        name = canonical(option[2:])
        if name in given and name not in repeatable:
            raise InputError(f"--{name}: given more than once; give it once")
        given.setdefault(name, []).extend([value] if equals else [])
    return given


def canonical(name: str) -> str:
    """An option's name as shown in help, with hyphens."""
    return name.replace("_", "-")


def take(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `flag`, or None if it does not occur, and the other words."""
    argv = list(argv)
    for index, argument in enumerate(argv):
        if argument == flag or argument.startswith(f"{flag}="):
            given = argument.split("=", 1)[1:] or argv[index + 1 : index + 2]
            if not given:
                raise InputError(f"{flag}: expected a value after it")
            del argv[index : index + 1 + ("=" not in argument)]
            return given[0], argv
    return None, argv


def closest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """The end of a message, "; did you mean NAME?"; empty if no name is similar."""
    names = list(names)
    last = name.rpartition(".")[2]
    # `--flip-rate` for `--loss.flip-rate`: the namespace was forgotten.
    near = [n for n in names if n.rpartition(".")[2] == last]
    if not near:
        near = difflib.get_close_matches(name, names, n=4, cutoff=0.6)
        # Swapped letters (rdop for rdpo) come before changed letters (ropo).
        near = sorted(near, key=lambda n: sorted(n) != sorted(name))[:1]
    listed = " or ".join(prefix + n for n in near)
    return f"; did you mean {listed}?" if near else ""

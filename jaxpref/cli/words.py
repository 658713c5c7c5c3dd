"""Splitting a command line into options and their values."""

from collections.abc import Collection, Sequence

from jaxpref.errors import InputError
from jaxpref.errors import closest as closest

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

"""Ranges of options, checked when they are read.

`checked` has the checks that hold for every option of every command; a dataclass of
options checks its own ranges in `__post_init__`.
"""

import dataclasses
import math
from typing import Any, TypeVar

from jaxpref.errors import InputError

MOST = 2**31 - 1
"""The largest integer: steps, sizes and positions are int32."""
SEEDS = 2**32
"""Number of different seeds; for larger ones, jax repeats those of seed - 2^32."""
LEAST_FLOAT32 = 2.0**-126
"""The smallest normal float32; devices may treat smaller numbers as 0."""
MOST_FLOAT32 = 2.0**128 - 2.0**104
"""The largest float32."""

Options = TypeVar("Options")


def checked(options: Options, prefix: str = "") -> Options:
    """Returns a dataclass of options after checking that every value can be used.

    It refuses numbers that are not finite (unless the field's metadata has
    `infinite`), integers that are not int32, seeds that are not uint32, and strings
    that are empty, not Unicode, or contain a NUL character.

    Args:
      options: an instance of any dataclass; nested ones are checked too.
      prefix: namespace of its options, for messages: "loss" for `--loss.beta`.

    Raises:
      InputError: names the option.
    """
    for field in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        name = ".".join(filter(None, (prefix, field.name.replace("_", "-"))))
        value = getattr(options, field.name)
        if value is None or value is field.default:
            continue
        if dataclasses.is_dataclass(value):
            checked(value, name)
        elif isinstance(value, tuple):
            for one in value:
                if isinstance(one, str):
                    check_text(name, one)
        else:
            _check(name, value, bool(field.metadata.get("infinite")))
    return options


def _check(name: str, value: Any, infinite: bool) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"--{name}: is empty; give a value, or leave it out")
        check_text(name, value)
    elif isinstance(value, float):
        if math.isnan(value) or (math.isinf(value) and not infinite):
            raise InputError(f"--{name} {value}: must be a finite number")
    elif isinstance(value, int) and name.rpartition(".")[2] == "seed":
        if not 0 <= value < SEEDS:
            raise InputError(f"--{name} {value}: must be from 0 to {SEEDS - 1}")
    elif isinstance(value, int) and abs(value) > MOST:
        raise InputError(f"--{name} {value}: must be from {-MOST} to {MOST}")


def check_text(name: str, text: str) -> None:
    """Checks that the text of an option is Unicode and has no NUL character.

    Raises:
      InputError: names the option.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise InputError(
            f"--{name} {shown}: is not valid UTF-8; rename it, or check the terminal's "
            "encoding"
        ) from None
    if "\0" in text:
        raise InputError(f"--{name} {text.split(chr(0))[0]}: contains a NUL; remove it")


def at_least(least: int, options: Any, *names: str) -> None:
    """Checks that options which are not None are at least `least`.

    Raises:
      InputError: names the option.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{name} {value}: must be at least {least}")

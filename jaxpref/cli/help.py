"""Help as plain text, 88 columns wide."""

import enum
import textwrap
from collections.abc import Iterable, Mapping

from jaxpref.cli.options import REQUIRED, Option

WIDTH = 88
COLUMN = 28


def rows(options: Iterable[Option], *, full: bool = False) -> str:
    """A row for each option, with only the first sentence of its help unless `full`."""
    return "\n".join(_row(option, full) for option in options)


def command(command: str, options: Mapping[str, Option]) -> str:
    """Usage and all options of a command."""
    needed = [name for name, option in options.items() if option.default is REQUIRED]
    usage = " ".join(f"--{name} {name.upper()}" for name in needed)
    listed = rows(options.values(), full=True)
    return f"usage: {command} {usage} [options]\n\noptions:\n{listed}"


def table(rows: Mapping[str, str], *, column: int = COLUMN) -> str:
    """A table of names and wrapped texts."""
    lines = []
    for name, text in rows.items():
        wrapped = textwrap.wrap(
            text, WIDTH - column, break_on_hyphens=False, break_long_words=False
        )
        left = f"  {name}"
        if len(left) >= column:
            lines.append(left)
            left = ""
        lines += [f"{left:{column}}{wrapped[0] if wrapped else ''}".rstrip()]
        lines += [" " * column + line for line in wrapped[1:]]
    return "\n".join(lines)


def _row(option: Option, full: bool) -> str:
    text = option.help if full else option.help.split(". ")[0].rstrip(".")
    if option.default is REQUIRED:
        text += " (required)"
    elif not any(option.default is silent for silent in (None, True, False, ())):
        default = option.default
        default = default.value if isinstance(default, enum.Enum) else default
        text += f" (default: {default})"
    flag = f"--no-{option.name}" if option.default is True else f"--{option.name}"
    return table({f"{flag} {option.metavar}".rstrip(): text})

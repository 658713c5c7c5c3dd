"""`jaxpref evaluate`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.evaluate import pairs

COMMAND = "jaxpref evaluate"
PARTS = {"config": Part(pairs.EvaluateConfig)}


def command(argv: Sequence[str]) -> None:
    """Scores records and writes metrics."""
    pairs.run(parse(PARTS, split(argv), command=COMMAND).config)


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

"""`jaxpref plan`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.objectives import Choice, choose
from jaxpref.cli.options import Option, Part, Parts, options_of, parse
from jaxpref.cli.words import split
from jaxpref.plan.config import PlanConfig

COMMAND = "jaxpref plan"


def command(argv: Sequence[str]) -> None:
    """Plans a run and prints its needs."""
    from jaxpref.plan.command import run

    choice, given = choose(split(argv))
    parsed = parse(parts_of(choice), given, command=COMMAND, about=choice.about)
    # Any two names: plan reads no data, and their number hardly changes the program.
    objective = choice.objective(parsed, sources=("one", "two"))
    run(parsed.plan, objective, argv)


def parts_of(choice: Choice) -> Parts:
    """The options that the command reads, except `--loss` and `--objective`."""
    return {"plan": Part(PlanConfig), **choice.parts}


def options() -> dict[str, Option]:
    """All options that do not depend on `--loss` or `--objective`."""
    return options_of(parts_of(Choice()))


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return (
        f"{help.command(COMMAND, options())}\n\n--loss, --objective and their options "
        "are those of `jaxpref train`.  There is no\n--columns: plan reads no data, and"
        " a number of a record takes four bytes in a batch.\nGive options of the loss"
        " that differ between records as one number instead."
    )

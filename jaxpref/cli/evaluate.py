"""`jaxpref evaluate`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxpref import report
from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import show
from jaxpref.evaluate import evaluation, pairs

COMMAND = "jaxpref evaluate"
PARTS = {"config": Part(pairs.EvaluateConfig)}


def command(argv: Sequence[str]) -> None:
    """Scores records, and writes metrics, a page, and a table for a model card."""
    config = parse(PARTS, split(argv), command=COMMAND).config
    found = evaluation.evaluate(config)
    if jax.process_index():
        return
    about = {
        "model": config.model,
        "data": Path(config.data).name,
        "command": shlex.join(["jaxpref", "evaluate", *argv]),
    }
    page = f"{config.out}/{evaluation.PAGE}"
    bins = evaluation.reliability(found)
    report.write_evaluation(page, found.metrics, found.lines, bins, **about)
    report.write_model_card(f"{config.out}/{evaluation.CARD}", found.metrics, **about)
    show(f"\n{page}")


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

"""`jaxpref compare`."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxpref import report
from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import InputError, show
from jaxpref.evaluate.compare import command as compare
from jaxpref.evaluate.compare.config import CompareConfig

COMMAND = "jaxpref compare"
PARTS = {"config": Part(CompareConfig)}


def command(argv: Sequence[str]) -> None:
    """Compares the answers of models, and writes a page."""
    files = [*itertools.takewhile(lambda word: not word.startswith("--"), argv)]
    given = split(argv[len(files) :])
    if files and "answers" in given:
        raise InputError("--answers: files are also named before the options")
    if files:
        given = {"answers": files, **given}
    config = parse(PARTS, given, command=COMMAND).config
    found = compare.run(config)
    if jax.process_index():
        return
    page = f"{config.out}/compare.html"
    report.write_comparison(
        page,
        found.summary,
        found.verdicts,
        command=shlex.join(["jaxpref", "compare", *argv]),
    )
    for pair in found.summary.get("pairs", [found.summary]):
        for line in pair_lines(pair):
            show(line)
    show(page)


def pair_lines(pair: Mapping[str, Any]) -> list[str]:
    """A model against the baseline, in lines."""
    percent = lambda x: f"{100 * x:.1f}%"
    between = lambda x: f"95% interval {percent(x[0])} to {percent(x[1])}"
    lines = [
        f"{pair['model']} against {pair['baseline']}: win rate "
        f"{percent(pair['win_rate'])} ({between(pair['win_rate_interval'])}), "
        f"length-controlled {percent(pair['length_controlled_win_rate'])} "
        f"({between(pair['length_controlled_win_rate_interval'])})"
    ]
    if "consistency" in pair:
        lines.append(
            f"  {percent(pair['consistency'])} of the verdicts are the same in both "
            f"orders; the first answer gets {percent(pair['first_position'])}"
        )
    if pair["not_judged"]:
        lines.append(f"  {pair['not_judged']:,} comparisons without a verdict")
    if gold := pair.get("judge_minus_gold"):
        lines.append(
            f"  the judge's win rate is {100 * gold['difference']:+.1f} points from "
            f"the gold judge's ({between(gold['interval'])})"
        )
    return lines


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

"""`jaxpref probe`."""

from collections.abc import Sequence
from typing import Any

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import show
from jaxpref.evaluate.groups import table_lines
from jaxpref.evaluate.probe.config import ProbeConfig
from jaxpref.evaluate.probe.run import MODEL, SUMMARY, run

COMMAND = "jaxpref probe"
PARTS = {"config": Part(ProbeConfig)}


def command(argv: Sequence[str]) -> None:
    """Fits linear heads to frozen features, and reports held-out accuracies."""
    config = parse(PARTS, split(argv), command=COMMAND).config
    found = run(config)
    for line in _summary_lines(found):
        show(line)
    show(f"{config.out}/{SUMMARY}")
    if config.heads == 1 and not config.columns:
        show(f"{config.out}/{MODEL}: the reward model")


def _summary_lines(found: dict[str, Any]) -> list[str]:
    """The results that the command prints."""
    about = "{accuracy:.4f} (95% interval {low:.4f} to {high:.4f})"
    lines = [
        f"{found['votes']} votes on {found['prompts']} prompts, by "
        f"{found['annotators']} annotators; accuracies are held out by prompt",
        "length alone        " + about.format(**found["length_only"]),
        "one head            " + about.format(**found["bradley_terry"]),
    ]
    if "columns" in found:
        lines.append("gain by the columns " + _gain(found["with_columns"]))
        lines += [f"    {name} {x:+.3f}" for name, x in found["columns"].items()]
    if "several" in found:
        lines.append("gain by more heads  " + _gain(found["several"]))
        lines += [
            f"    head {n + 1}: share {x['share']:.3f}, {x['votes']} votes"
            for n, x in enumerate(found["heads"])
        ]
    for count, x in found.get("new_annotators", {}).items():
        lines.append(f"new annotators after {count} votes: gain " + _gain(x))
    for field, groups in found["by"].items():
        lines += ["", *table_lines(field, groups), ""]
    return lines


def _gain(found: dict[str, Any]) -> str:
    return (
        "{difference:+.4f} (95% interval {difference_low:+.4f} to "
        "{difference_high:+.4f}), from {baseline_accuracy:.4f} to "
        "{accuracy:.4f}".format(**found)
    )


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

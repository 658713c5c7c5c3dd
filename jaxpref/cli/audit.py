"""`jaxpref audit`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import show
from jaxpref.evaluate import audit as label_audit

COMMAND = "jaxpref audit"
PARTS = {"config": Part(label_audit.AuditConfig)}


def command(argv: Sequence[str]) -> None:
    """Audits the labels and writes a report."""
    config = parse(PARTS, split(argv), command=COMMAND).config
    found = label_audit.run(config)
    from jaxpref import report

    page = f"{config.out}/report.html"
    report.write_audit(
        page,
        found.summary,
        found.pairs,
        found.suspects,
        found.calibration,
        command=shlex.join(["jaxpref", "audit", *argv]),
        data=Path(config.data).name,
    )
    low, high = found.summary["flip_rate_interval"]
    show(
        f"flip rate {found.summary['flip_rate']:.3f} ({low:.3f} to {high:.3f}); {page}"
        if found.summary["identified"]
        else f"flip rate not identified: {found.summary['reason']}; {page}"
    )
    show(f"{config.out}/clean.jsonl: {found.summary['acted_on']['rule']}")
    show(f"{config.out}/review.csv: the {len(found.suspects)} most suspicious pairs")
    if advice := found.summary["advice"]:
        show(advice)


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

"""`jaxpref audit`."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxpref import report
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
    page = f"{config.out}/report.html"
    report.write_audit(
        page,
        found.summary,
        found.pairs,
        found.suspects,
        found.calibration,
        found.preferences,
        command=shlex.join(["jaxpref", "audit", *argv]),
        data=Path(config.data).name,
    )
    report.write_annotators(
        f"{config.out}/annotators.html",
        found.summary,
        found.annotators,
        data=Path(config.data).name,
    )
    low, high = found.summary["flip_rate_interval"]
    show(
        f"flip rate {found.summary['flip_rate']:.3f} ({low:.3f} to {high:.3f}); {page}"
        if found.summary["identified"]
        else f"flip rate not identified: {found.summary['reason']}; {page}"
    )
    show(f"{config.out}/clean.jsonl: {found.summary['acted_on']['rule']}")
    for line in _summary_lines(found, config):
        show(line)


def _summary_lines(
    found: label_audit.Audit, config: label_audit.AuditConfig
) -> list[str]:
    """The lines that the command prints about its other results."""
    summary, lines = found.summary, []
    if "verdicts" in summary:
        counts = summary["verdicts"]
        lines.append(
            f"verdicts: {counts['right']} right, {counts['wrong']} wrong "
            f"({counts['expected_wrong']:.1f} expected), {counts['drop']} to drop"
        )
    if "budget" in summary:
        looks = summary["budget"]
        lines.append(
            f"{config.out}/review.csv: the {looks['pairs']} pairs that are most worth "
            f"reviewing; expected gain {looks['expected_gain']:.1f} labels "
            f"({looks['expected_gain_at_random']:.1f} for random pairs)"
        )
    elif not label_audit.applies_own(config):
        listed = f"the {len(found.suspects)} most suspicious pairs"
        lines.append(f"{config.out}/review.csv: {listed}")
    if "power" in summary:
        lines.append(report.power_in_words(summary["power"]))
    lines += filter(None, (summary["advice"], summary.get("baselines_missing")))
    return lines


def options() -> dict[str, Option]:
    """All options of the command."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    return help.command(COMMAND, options())

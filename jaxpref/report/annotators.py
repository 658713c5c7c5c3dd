"""The page of an audit's annotators: reliability, agreement, preferences, and pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.report.html import Browse, Link, Section, SideBySide, Table, write_html

Record = Mapping[str, Any]

LISTED = 30
"""Maximum number of pairs of annotators in the table of agreement."""
COEFFICIENTS = {
    "pairwise": "pairs of votes that agree",
    "fleiss_kappa": "Fleiss' kappa",
    "krippendorff_alpha": "Krippendorff's alpha (nominal)",
}
"""Measures of agreement, in words."""


def write_annotators(
    path: str | Path, summary: Record, looks: Sequence[Record], *, data: str
) -> None:
    """Writes the page of an audit's annotators, with a section for each.

    Args:
      path: where to write.
      summary: the contents of `summary.json`.
      looks: for each annotator with a section, its record in `summary`, the
        `preferences` that differ most from everyone's, and the most suspicious pairs
        with their texts, `suspects`.
      data: name of the audited file.

    Raises:
      InputError: if the page cannot be written.
    """
    annotators = summary["annotators"]
    targets = {name: f"#{anchor}" for name, anchor in anchors(looks).items()}
    rows = [
        [
            *reliability_row(record, targets),
            record["suspicious"],
            *_others(record["others"]),
        ]
        for record in annotators
    ]
    caption = (
        "Reliability: the probability that a vote is right. Suspicious: labels that "
        "are more probably wrong than right. Others agree: on pairs that others judged "
        "too, the share of the others who agree, with a 95% interval."
    )
    heads = (
        *("annotator", "reliability", "95% interval", "votes", "suspicious"),
        *("others agree", "common pairs"),
    )
    everyone: list = [
        Link("The report of this audit", "report.html"),
        Browse(Table(heads, rows, caption), [""] * len(rows)),
        *agreement_parts(summary["agreement"]),
    ]
    if len(looks) < len(annotators):
        everyone.insert(
            1,
            f"The {len(looks)} least reliable annotators with a name have a section "
            "below.",
        )
    sections = [Section("All annotators", everyone, anchor="all")]
    for look, target in zip(looks, targets.values()):
        title = f"Annotator {name_of(look)}"
        sections.append(Section(title, _parts(look), anchor=target[1:]))
    write_html(path, f"Annotators of {data}", sections)


def anchors(annotators: Sequence[Record]) -> dict[str, str]:
    """The anchor of each annotator's section, by name; the first has `a1`."""
    named = [r["annotator"] for r in annotators if r["annotator"] is not None]
    return {name: f"a{number}" for number, name in enumerate(named, 1)}


def reliability_row(record: Record, targets: Mapping[str, str]) -> list:
    """Name, with a link if there is a target, reliability, interval, and votes."""
    target = targets.get(record["annotator"])
    name = name_of(record)
    return [
        name if target is None else Link(name, target),
        f"{record['reliability']:.2f}",
        "{:.2f} to {:.2f}".format(*record["interval"]),
        record["count"],
    ]


def agreement_parts(agreement: Record | None) -> list:
    """Agreement on pairs with several votes."""
    if agreement is None:
        return ["No pairs have votes of several annotators, so there is no agreement."]
    rows = [
        [words, *_with_interval(agreement[name])]
        for name, words in COEFFICIENTS.items()
    ]
    votes = f"{agreement['votes']:,} votes of {agreement['annotators']:,} annotators"
    caption = (
        f"Agreement on {agreement['items']:,} pairs with {votes}, with 95% intervals "
        "(bootstrap over pairs). Which answer comes first means nothing, so agreement "
        "by chance is 1/2; kappa and alpha are 0 at chance and 1 if all agree."
    )
    parts: list = [Table(["agreement", "value", "95% interval"], rows, caption)]
    between = [
        [
            " and ".join(pair["annotators"]),
            pair["items"],
            f"{pair['agree']['value']:.2f}",
            *_with_interval(pair["cohen_kappa"]),
        ]
        for pair in agreement["pairs"][:LISTED]
    ]
    if between:
        heads = ["annotators", "common pairs", "agree", "Cohen's kappa", "95% interval"]
        caption = "Pairs of annotators, those with the most common pairs first."
        parts.append(Browse(Table(heads, between, caption), [""] * len(between)))
    return parts


def suspect(number: int, record: Record) -> SideBySide:
    """A suspicious pair, with its texts."""
    who = "" if record["annotator"] is None else f", annotator {name_of(record)}"
    return SideBySide(
        [
            ("`chosen` in the file", record["chosen"]),
            ("`rejected` in the file", record["rejected"]),
        ],
        title=f"{number}. Row {record['row']}{who}: right with probability "
        f"{record['p_correct']:.2f}, margin {record['margin']:.2f}",
        above=record["prompt"],
    )


def name_of(record: Record) -> str:
    """The annotator of a record."""
    return "not named" if record["annotator"] is None else record["annotator"]


def _parts(look: Record) -> list:
    """The section of an annotator."""
    share, items = _others(look["others"])
    facts = [
        ["votes", look["count"]],
        ["reliability", f"{look['reliability']:.2f}"],
        ["95% interval", "{:.2f} to {:.2f}".format(*look["interval"])],
        ["labels more probably wrong than right", look["suspicious"]],
        ["expected number of wrong labels", f"{look['expected_wrong']:.1f}"],
        ["pairs that others judged too", items],
        ["share of the others who agree", share],
    ]
    parts: list = [Table(["", "labels"], facts)]
    number = lambda value: f"{value:+.2f}".replace("-", "−")
    rows = [
        [
            record["meaning"],
            number(record["weight"]),
            f"{number(record['low'])} to {number(record['high'])}",
            number(record["everyone"]),
        ]
        for record in look["preferences"]
    ]
    if rows:
        caption = (
            "Features whose weight differs most clearly from that of all labels. Above "
            "0, answers with more of the feature are preferred."
        )
        heads = ["feature", "weight", "95% interval", "all labels"]
        parts.append(Table(heads, rows, caption))
    else:
        parts.append("There are too few labels for weights of this annotator's own.")
    parts += [suspect(n, record) for n, record in enumerate(look["suspects"], 1)]
    return [*parts, Link("All annotators", "#all")]


def _others(others: Record | None) -> list:
    """Agreement with the other votes, and the number of common pairs."""
    if others is None:
        return [None, 0]
    low, high = others["interval"]
    return [f"{others['agree']:.2f} ({low:.2f} to {high:.2f})", others["items"]]


def _with_interval(found: Record) -> list[str]:
    low, high = found["interval"]
    number = lambda value: f"{value:.2f}".replace("-", "−")
    return [number(found["value"]), f"{number(low)} to {number(high)}"]

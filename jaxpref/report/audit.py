"""The page of an audit: how many labels are wrong, whose, and which first."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.report.drawing import drawing
from jaxpref.report.html import Figure, Section, SideBySide, Table, write_html
from jaxpref.report.style import FAINT, PALETTE

Record = Mapping[str, Any]

LISTED = 30
"""Most annotators shown one by one."""
BANDS = (
    ("below 1/2: suspicious", 0.0, 0.5, PALETTE[1]),
    ("1/2 to 0.8", 0.5, 0.8, PALETTE[3]),
    ("above 0.8", 0.8, 1.1, PALETTE[0]),
)
"""Of the probability that a label is right, and their colors."""


def write_audit(
    path: str | Path,
    summary: Record,
    pairs: Sequence[Record],
    suspects: Sequence[Record],
    calibration: Sequence[Record],
    *,
    command: str,
    data: str,
) -> None:
    """Writes the page of an audit as one file.

    Args:
      path: where to write.
      summary: as in `summary.json`.
      pairs: as in `audit.jsonl`, one record per pair.
      suspects: the most suspicious pairs, worst first, with `prompt`, `chosen` and
        `rejected`.
      calibration: bins with `pairs`, `confidence`, `agreement`, `low` and `high`.
      command: what was typed.
      data: name of the file that was audited.

    Raises:
      InputError: if the page cannot be written.
    """
    annotators = summary["annotators"]
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            name: Path(folder) / f"{name}.png"
            for name in ("margins", "calibration", "annotators")
        }
        _draw_margins(figures["margins"], pairs)
        _draw_calibration(figures["calibration"], calibration, summary)
        named = []
        if len(annotators) > 1:
            _draw_annotators(figures["annotators"], annotators[:LISTED])
            caption = "95% credible intervals; the number of votes on the right."
            named = [Figure(figures["annotators"], caption)]
        sections = [
            Section("How many labels are wrong", _rate_parts(summary, pairs)),
            Section("Whose labels", [*_annotator_parts(annotators), *named]),
            Section(
                "How sure the model is",
                [
                    Figure(
                        figures["margins"],
                        "Margins of all pairs: above 0 the model agrees with the "
                        "label. Colors say how probably the label is right.",
                    ),
                    Figure(
                        figures["calibration"],
                        "Share of labels that agree with the model, against the "
                        "model's confidence in its own choice; ten bins of equal "
                        "counts, 95% intervals. The line is what a calibrated model "
                        f"sees if {_share(_rate_used(summary))} of the labels are "
                        "wrong.",
                    ),
                    _accuracy_table(summary),
                    "If length alone does nearly as well, the audit mostly marks "
                    "labels that prefer the answer of the unusual length: read the "
                    "pairs below before you act on it.",
                ],
            ),
            Section(f"The {len(suspects)} most suspicious pairs", _suspects(suspects)),
            Section("How this page was made", [f"Made by\n\n    {command}\n{_METHOD}"]),
        ]
        write_html(path, f"Audit of {data}", sections, summary=_lead(summary, pairs))


_METHOD = """
Each pair was judged by a Bradley-Terry model on frozen features of the language model,
trained on the pairs of other prompts only. Its margins were divided by one temperature,
fitted together with the flip rate to the marginal likelihood of the labels; EM then
gave the reliabilities and the probabilities. A label counts as wrong if it contradicts
what the model can learn from the other labels, so taste that the model cannot see
counts as noise, and an error that all labels share does not.
"""


def _lead(summary: Record, pairs: Sequence[Record]) -> str:
    low, high = summary["flip_rate_interval"]
    suspicious = sum(row["p_correct"] < 0.5 for row in pairs)
    counted = (
        f"{suspicious} of {summary['pairs']} labels are more probably wrong than right."
    )
    if summary["identified"]:
        rate = _share(summary["flip_rate"])
        return (
            f"About {rate} of the labels are wrong (95% interval {_share(low)} to "
            f"{_share(high)}). {counted}"
        )
    return (
        "These pairs do not determine how many labels are wrong: "
        f"{summary['reason']}. With an assumed {_share(summary['assumed_flip_rate'])}, "
        f"{counted}"
    )


def _rate_parts(summary: Record, pairs: Sequence[Record]) -> list:
    low, high = summary["flip_rate_interval"]
    actions: dict[str, int] = {}
    for row in pairs:
        actions[row["action"]] = actions.get(row["action"], 0) + 1
    known = summary["identified"]
    rows = [
        ["flip rate", _share(summary["flip_rate"]) if known else "not identified"],
        ["95% interval", f"{_share(low)} to {_share(high)}"],
        ["pairs judged", summary["pairs"]],
        ["different pairs of texts", summary["items"]],
        ["different prompts", summary["prompts"]],
        *([f"action: {name}", count] for name, count in sorted(actions.items())),
        *([f"not judged: {k}", v] for k, v in summary["not_judged"].items()),
    ]
    parts: list = [Table(["", "all pairs"], rows)]
    if not known:
        parts.append(
            f"The flip rate is not identified: {summary['reason']}. The order of the "
            "pairs, from most to least suspicious, does not depend on it; the "
            "probabilities do, and stand on an assumed rate of "
            f"{_share(summary['assumed_flip_rate'])}."
        )
    if "known_flips" in summary:
        found = summary["known_flips"]
        parts.append(
            f"The file marks {_share(found['base_rate'])} of its labels as flipped "
            "(field `flip`, not used by the audit). AUROC of the probabilities "
            f"{found['auroc']:.3f}; among the 10% most suspicious pairs "
            f"{_share(found['precision'])} are flipped, {found['lift']:.2f} times the "
            "base rate."
        )
    return parts


def _annotator_parts(annotators: Sequence[Record]) -> list:
    if len(annotators) == 1:
        return ["All labels have one source, or none is named: nothing to compare."]
    rows = [
        [
            _name(record),
            f"{record['reliability']:.2f}",
            "{:.2f} to {:.2f}".format(*record["interval"]),
            record["count"],
        ]
        for record in annotators[:LISTED]
    ]
    left = len(annotators) - len(rows)
    caption = "Probability that a vote is right; the least reliable first."
    if left:
        caption += f" {left} more reliable annotators are in `summary.json`."
    return [Table(["annotator", "reliability", "95% interval", "votes"], rows, caption)]


def _accuracy_table(summary: Record) -> Table:
    rows = [
        [
            name,
            f"{summary[key]['accuracy']:.3f}",
            "{:.3f} to {:.3f}".format(*summary[key]["interval"]),
        ]
        for name, key in (("features", "model"), ("length alone", "length_only"))
    ]
    return Table(
        ["judged by", "accuracy", "95% interval"],
        rows,
        "Share of the labels, as they stand, that the cross-fitted model agrees with.",
    )


def _suspects(suspects: Sequence[Record]) -> list:
    parts: list = [
        "The label prefers the answer on the left; where the margin is negative, the "
        "model prefers the one on the right. Texts are whole, as in the file."
    ]
    for number, record in enumerate(suspects, 1):
        who = f", annotator {_name(record)}" if record["annotator"] is not None else ""
        parts.append(
            SideBySide(
                [
                    ("`chosen` in the file", record["chosen"]),
                    ("`rejected` in the file", record["rejected"]),
                ],
                title=f"{number}. Row {record['row']}{who}: right with probability "
                f"{record['p_correct']:.2f}, margin {record['margin']:.2f}",
                above=record["prompt"],
            )
        )
    return parts


def _rate_used(summary: Record) -> float:
    known = summary["identified"]
    return summary["flip_rate"] if known else summary["assumed_flip_rate"]


def _name(record: Record) -> str:
    return "not named" if record["annotator"] is None else record["annotator"]


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _draw_margins(path: Path, pairs: Sequence[Record]) -> None:
    with drawing(path, size=(6.6, 3.2)) as figure:
        axes = figure.add_subplot()
        parts = [
            [r["margin"] for r in pairs if low <= r["p_correct"] < high]
            for _, low, high, _ in BANDS
        ]
        axes.hist(
            parts, bins=40, stacked=True, color=[band[3] for band in BANDS],
            label=[f"{band[0]} ({len(x)})" for band, x in zip(BANDS, parts)],
        )  # fmt: skip
        axes.axvline(0, color=FAINT, lw=0.8)
        axes.set(xlabel="margin (nats)", ylabel="pairs")
        figure.legend(
            loc="outside lower left", ncols=3, fontsize=9, title_fontsize=9,
            title="probability that the label is right", alignment="left",
        )  # fmt: skip


def _draw_calibration(path: Path, bins: Sequence[Record], summary: Record) -> None:
    rate = _rate_used(summary)
    with drawing(path, size=(6.6, 3.6)) as figure:
        axes = figure.add_subplot()
        x = [record["confidence"] for record in bins]
        y = [record["agreement"] for record in bins]
        errors = [
            [record["agreement"] - record["low"] for record in bins],
            [record["high"] - record["agreement"] for record in bins],
        ]
        ends = [0.5, min(1.0, max(0.6, max(x) + 0.02))]
        axes.plot(
            ends, [rate + (1 - 2 * rate) * end for end in ends], color=FAINT, lw=1.2,
            label=f"calibrated, {_share(rate)} wrong labels",
        )  # fmt: skip
        axes.errorbar(
            x, y, yerr=errors, color=PALETTE[0], fmt="o", ms=4.5, lw=1.2,
            label="labels",
        )  # fmt: skip
        axes.set(xlabel="confidence of the model", ylabel="labels that agree with it")
        axes.legend(loc="upper left", fontsize=9)


def _draw_annotators(path: Path, annotators: Sequence[Record]) -> None:
    height = 1.0 + 0.24 * len(annotators)
    with drawing(path, size=(6.6, height)) as figure:
        axes = figure.add_subplot()
        rows = range(len(annotators))
        at = [record["reliability"] for record in annotators]
        errors = [
            [r["reliability"] - r["interval"][0] for r in annotators],
            [r["interval"][1] - r["reliability"] for r in annotators],
        ]
        axes.errorbar(at, rows, xerr=errors, color=PALETTE[0], fmt="o", ms=4.5, lw=1.2)
        axes.axvline(0.5, color=FAINT, lw=0.8)
        axes.set_yticks(rows, [f"{_name(r):.24}" for r in annotators])
        axes.set_ylim(len(annotators) - 0.4, -0.6)
        axes.set(xlim=(0, 1), xlabel="reliability")
        for row, record in zip(rows, annotators):
            axes.text(
                1.01, row, str(record["count"]), color=FAINT, va="center", fontsize=8.5,
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        axes.grid(axis="y", visible=False)

"""The table, figures, and report of `annotators.py`."""

import io
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from jaxpref import report
from jaxpref.files import write_whole
from jaxpref.report.style import MATPLOTLIB, PALETTE

_NUMBERS = {
    "accuracy": "accuracy, held-out topics",
    "auroc": "AUROC, wrong votes",
    "spearman": "Spearman, gold",
    "spearman_without": "Spearman, gold without the worker",
}
_DIGITS = {"accuracy": 3, "auroc": 3, "spearman": 2, "spearman_without": 2}


def make_table(records: list[dict], regime: str) -> report.Table:
    """One row per method: mean and standard deviation over draws of the votes."""
    found = [record for record in records if record["regime"] == regime]
    names = list(dict.fromkeys(record["arm"] for record in found))
    rows = [
        [
            name,
            *(
                report.mean_spread(
                    [
                        record[key]
                        for record in found
                        # NaN: the method treats all workers equally.
                        if record["arm"] == name
                        and record.get(key) is not None
                        and record[key] == record[key]
                    ],
                    digits=_DIGITS[key],
                )
                for key in _NUMBERS
            ),
        ]
        for name in names
    ]
    seeds = sorted({str(record["seed"]) for record in found})
    caption = f"mean ± standard deviation over draws of the votes ({', '.join(seeds)})"
    return report.Table([regime, *_NUMBERS.values()], rows, caption=caption)


def draw_workers(path: Path, workers: dict[str, list[dict]]) -> None:
    """Learned reliability against agreement with gold, with an interval per worker."""
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        panels = figure.subplots(1, len(workers), sharex=True, sharey=True)
        for axes, (regime, found), color in zip(panels, workers.items(), PALETTE):
            x = [worker["agreement"] for worker in found]
            y = [worker["reliability"] for worker in found]
            low = [worker["reliability"] - worker["lower"] for worker in found]
            high = [worker["upper"] - worker["reliability"] for worker in found]
            # Rounding may put the mode just outside the interval.
            bars = [[max(size, 0) for size in side] for side in (low, high)]
            axes.errorbar(x, y, yerr=bars, fmt="none", color=color, lw=0.7, alpha=0.3)
            axes.scatter(x, y, s=12, color=color, lw=0)
            ends = [min(x), max(x)]
            axes.plot(ends, ends, color="#6b7280", lw=1, ls=":")
            axes.set(title=regime, xlabel="agreement with gold, all votes")
        panels[0].set_ylabel("learned reliability")
        image = io.BytesIO()
        figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def write_results(
    out: Path, records, workers, facts: dict, *, seconds: float, about: str
) -> None:
    """`workers.png`, `votes.png` and `report.html`; prints the tables."""
    regimes = list(dict.fromkeys(record["regime"] for record in records))
    tables = [make_table(records, regime) for regime in regimes]
    draw_workers(out / "workers.png", workers)
    shown = ("accuracy", "auroc", "spearman")
    plotted = [
        {k: v for k, v in record.items() if v == v} for record in records
    ]  # without NaN, which cannot be drawn
    report.training_curves(
        out / "votes.png",
        plotted,
        {name: _NUMBERS[name] for name in shown},
        x="votes",
        x_label="maximum votes per pair",
        title="What more votes bring",
    )
    for table in tables:
        print()
        for row in [table.columns, *table.rows]:
            print("  ".join(f"{cell:<26}" for cell in row).rstrip())
    counted = (
        f"{facts['votes']} votes were used and {facts['ties']} ties left out. Judged on"
        f" {facts['judged_pairs']} pairs with a gold label, and on "
        f"{facts['ranked_workers']} workers with 30 or more votes on them; the "
        "questions on which settings were chosen are not among them."
    )
    curves = report.Figure(out / "votes.png", "Methods by number of votes per pair.")
    dots = report.Figure(
        out / "workers.png",
        "Reliability learned jointly, first draw, with its 95% interval, against the "
        "share of all of a worker's votes that agree with gold.",
    )
    report.write_html(
        out / "report.html",
        "Which crowd workers can be trusted, from their votes and the text",
        [
            report.Section("Result", [counted, *tables, curves]),
            report.Section("Workers", [dots]),
            report.Section("What was done", [textwrap.indent(about, "    ")]),
        ],
        summary=f"Made in {seconds / 60:.1f} minutes.",
    )
    print(f"\nreport: {out / 'report.html'}")

"""The tables, figures, and report of `noise_methods.py`."""

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.sentiment_report import add_shares
from jaxpref import report
from jaxpref.files import write_json, write_whole
from jaxpref.report.style import MATPLOTLIB, PALETTE

_REWARD = (
    "Gold reward, mean and standard deviation over seeds. The dotted line is the"
    " reference before training."
)
_TITLES = {"symmetric": "symmetric noise", "annotators": "noise by annotator"}
_RATES = (
    "Flip rate that was learned against the one that was planted; a dot is a seed, the"
    " band is 0.03 around the truth. Right: the same with fewer pairs."
)


def of(records: list[dict], **wanted) -> list[dict]:
    """The records with these values."""
    return [r for r in records if all(r[name] == x for name, x in wanted.items())]


def make_table(records: list[dict], title: str) -> report.Table:
    """One row per method: mean and standard deviation over seeds."""
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        runs = of(records, method=name)
        spread = lambda key, digits=2, runs=runs: report.mean_spread(
            [r[key] for r in runs if r[key] is not None], digits=digits
        )
        share = [r["auroc"] / r["auroc_oracle"] for r in runs if r["auroc"] is not None]
        rows.append(
            [
                name,
                spread("reward"),
                spread("kl"),
                spread("share_of_best_possible"),
                spread("learned", 3),
                spread("auroc", 3),
                report.mean_spread(share),
            ]
        )
    seeds = sorted({r["seed"] for r in records})
    columns = ["gold reward", "KL", "share of best", "flip rate", "AUROC", "of oracle"]
    caption = (
        f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}; share of "
        "best: gain, divided by the largest possible gain at the same KL"
    )
    return report.Table([title, *columns], rows, caption=caption)


def draw_rewards(path: Path, records: list[dict], start: float, pairs: int) -> None:
    """Reward against flip rate: one line per method, one panel per kind of noise."""
    records = of(records, pairs=pairs)
    noises = list(dict.fromkeys(r["noise"] for r in records if r["rate"]))
    methods = list(dict.fromkeys(r["method"] for r in records))
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(5.4 * len(noises), 3.9), layout="constrained")
        panels = figure.subplots(1, len(noises), sharey=True, squeeze=False)[0]
        for axes, noise in zip(panels, noises):
            axes.axhline(start, color="#6b7280", lw=1, ls=":")
            for number, method in enumerate(methods):
                runs = of(records, method=method, noise=noise)
                rates = sorted({r["rate"] for r in runs})
                found = [[r["reward"] for r in runs if r["rate"] == x] for x in rates]
                means = [np.mean(x) for x in found]
                spreads = [np.std(x, ddof=1) if len(x) > 1 else 0 for x in found]
                # Side by side, so that bars do not hide each other.
                x = np.array(rates) + 0.004 * (number - len(methods) / 2)
                color = PALETTE[number % len(PALETTE)]
                axes.errorbar(
                    x, means, yerr=spreads, marker="o", ms=4, lw=1.2, color=color,
                    label=method, ls="-" if number < len(PALETTE) else "--",
                )  # fmt: skip
            axes.set(
                title=_TITLES[noise], xlabel="planted flip rate", xlim=(-0.02, 0.5)
            )
        panels[0].set_ylabel("gold reward")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        _save(figure, path)


def draw_rates(path: Path, records: list[dict], pairs: int) -> None:
    """Learned against planted flip rate, and against the number of pairs."""
    records = [r for r in of(records, noise="symmetric") if r["learned"] is not None]
    whole = of(records, pairs=pairs)
    methods = list(dict.fromkeys(r["method"] for r in whole))
    rates = sorted({r["rate"] for r in whole})
    ends = np.array([min(rates) - 0.03, max(rates) + 0.03])
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(ends, ends, color="#6b7280", lw=1, ls=":")
        left.fill_between(ends, ends - 0.03, ends + 0.03, color="#6b7280", alpha=0.15)
        for number, (method, color) in enumerate(zip(methods, PALETTE)):
            runs = of(whole, method=method)
            x = [r["rate"] + 0.004 * (number - len(methods) / 2) for r in runs]
            left.scatter(
                x, [r["learned"] for r in runs], s=18, color=color, label=method
            )
        left.set(xlabel="planted flip rate", ylabel="learned flip rate")
        left.legend(frameon=False)
        curve = [r for r in records if r["method"] == methods[-1]]
        for rate, color in zip(rates, PALETTE):
            runs = of(curve, rate=rate)
            right.axhline(rate, color=color, lw=1, ls=":")
            right.scatter(
                [r["pairs"] for r in runs], [r["learned"] for r in runs], s=18,
                color=color, label=f"{methods[-1]}, {rate:.0%} flips",
            )  # fmt: skip
        right.set(xlabel="training pairs", xscale="log", ylabel="learned flip rate")
        sizes = sorted({r["pairs"] for r in curve})
        right.set_xticks(sizes, [f"{n:,}" for n in sizes])
        right.minorticks_off()
        right.legend(frameon=False)
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    write_whole(path, image.getvalue())


def write_results(
    out: Path,
    records: list[dict],
    best: list[dict],
    *,
    learned: str,
    about: str,
) -> None:
    """`results.json`, two figures and `report.html`; prints the tables."""
    add_shares(records, best)
    start = best[0]["reward"]
    pairs = max(r["pairs"] for r in records)
    settings = dict.fromkeys((r["noise"], r["rate"], r["pairs"]) for r in records)
    tables = [
        make_table(
            of(records, noise=noise, rate=rate, pairs=count),
            f"{noise}, {rate:.0%} flips, {count} pairs" if rate else "no flips",
        )
        for noise, rate, count in settings
    ]
    write_json(out / "results.json", {"reference": start, "runs": records})
    draw_rewards(out / "rewards.png", records, start, pairs)
    draw_rates(out / "rates.png", records, pairs)
    sections = {
        "Result": [report.Figure(out / "rewards.png", _REWARD), *tables],
        "Flip rates": [report.Figure(out / "rates.png", _RATES)],
        "What was done": [
            "From the experiment's file:\n\n" + textwrap.indent(about, "    ")
        ],
    }
    near = [
        f"{sum(abs(r['learned'] - rate) <= 0.03 for r in runs)} of {len(runs)} at"
        f" {rate:.0%}"
        for rate in sorted({r["rate"] for r in records if r["rate"]})
        if (runs := of(records, method=learned, rate=rate, pairs=pairs,
                       noise="symmetric"))
    ]  # fmt: skip
    report.write_html(
        out / "report.html",
        "Learning how many labels are wrong",
        [report.Section(title, content) for title, content in sections.items()],
        summary=f"Seeds whose learned flip rate is within 0.03: {', '.join(near)}.",
    )
    for table in tables:
        for row in [table.columns, *table.rows]:
            print("  ".join(f"{cell:<22}" for cell in row).rstrip())
        print()
    print(f"learned flip rate within 0.03: {', '.join(near)}")
    print(f"report: {out / 'report.html'}")

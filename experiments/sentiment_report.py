"""The result files and the report of `noisy_sentiment.py`."""

import dataclasses
import textwrap
from pathlib import Path

import numpy as np

from jaxpref import report
from jaxpref.files import write_json

_REWARD_KL = (
    "Gold reward against KL to the reference; a small dot is a seed. No policy is above"
    " the line `best possible`; DPO on unlimited clean labels would arrive at its end."
)


def make_table(reference: dict, records: list[dict]) -> report.Table:
    """One row per arm: mean and standard deviation over seeds."""
    names = list(dict.fromkeys(r["arm"] for r in records))
    seeds = sorted({str(r["seed"]) for r in records})
    rows = [
        ["reference", f"{reference['reward']:.2f}", "0", "0"]
        + [f"{reference['malformed']:.0%}"]
    ]
    for name in names:
        runs = [r for r in records if r["arm"] == name]
        spread = [
            report.mean_spread([r[key] for r in runs])
            for key in ("reward", "kl", "kept")
        ]
        rows.append([name, *spread, f"{np.mean([r['malformed'] for r in runs]):.0%}"])
    return report.Table(
        ["", "gold reward", "KL to the reference", "share of clean gain", "malformed"],
        rows,
        caption=f"mean ± standard deviation over the seeds {', '.join(seeds)}; reward "
        "from -4 to 4; malformed: share of samples outside the grammar",
    )


def write_results(
    out: Path, *, protocol, reference, records, frontier, curves, seconds, about: str
) -> None:
    """`results.json`, `reward_kl.png`, `training.png` and `report.html`.

    `seconds` is None where more than one process made them; `about` says what was done.
    """
    table = make_table(reference, records)
    results = {
        "protocol": dataclasses.asdict(protocol),
        "reference": reference,
        "runs": records,
        "best_possible": frontier,
        "table": {"columns": table.columns, "rows": table.rows},
        "seconds": seconds,
    }
    write_json(out / "results.json", results)
    line = [{"arm": "best possible", "seed": 0, "step": n, **point}
            for n, point in enumerate(frontier)]  # fmt: skip
    report.reward_against_kl(
        out / "reward_kl.png", records + line, title="What a loss gains, and its cost"
    )
    report.training_curves(
        out / "training.png",
        [c for c in curves if "eval_loss" in c],
        {
            "eval_rewards/accuracies": "accuracy on clean held-out pairs",
            "eval_rewards/margins": "margin on clean held-out pairs",
        },
        title="During training",
    )
    write_page(out, table, records, seconds, about)
    for row in [table.columns, *table.rows]:
        print("  ".join(f"{cell:<24}" for cell in row).rstrip())
    print(f"report: {out / 'report.html'}")


def write_page(out: Path, table: report.Table, records, seconds, about: str) -> None:
    """`report.html`: table, figures, samples, and what was done."""
    samples = [[r["arm"], *r["samples"][:3]] for r in records]
    samples = list({row[0]: row for row in reversed(samples)}.values())[::-1]
    parts = {
        "Result": [table, report.Figure(out / "reward_kl.png", _REWARD_KL)],
        "During training": [report.Figure(out / "training.png")],
        "What the policies write": [
            report.Table(["", "one", "another", "a third"], samples)
        ],
        "What was done": [
            "From the experiment's file:\n\n" + textwrap.indent(about, "    ")
        ],
    }
    report.write_html(
        out / "report.html",
        "Noisy labels and the losses that survive them",
        [report.Section(title, content) for title, content in parts.items()],
        summary=(
            "Run by more than one process (resumed)."
            if seconds is None
            else f"Made in {seconds / 60:.1f} minutes."
        ),
    )

"""The result files and the report of `noisy_sentiment.py`."""

import dataclasses
import json
import math
import textwrap
from pathlib import Path

import numpy as np

from jaxpref import report
from jaxpref.evaluate.frontier import (
    choose_setting,
    reward_at_kl,
    share_of_best_possible,
    t_interval,
)
from jaxpref.files import write_json

COMMITTED = Path(__file__).with_name("noisy_sentiment_full.json")
"""The result of `--full`, made once: five draws of the flips."""
KEPT = ("arm", "beta", "seed", "reward", "kl", "share_of_best_possible", "malformed")
"""Fields of a run that `frontier.json` keeps."""
MATCHED_KLS = (0.5, 1.0)
MOST_KL = 1.0
"""Budget of the tuning rule, in nats."""

MOST_DRAWN = 5.0
"""Runs with a larger KL, in nats, are left out of the figure."""

_FRONTIER = (
    "Gold reward against KL to the reference. A line goes through the means of a "
    "method's betas; a small dot is one draw of pairs and flips. If the lines are from "
    "an earlier sweep, diamonds are the runs of this command. No policy is above the "
    "best possible."
)


def add_shares(records: list[dict], best: list[dict]) -> None:
    """Adds `share_of_best_possible` at the run's own KL; None beyond the curve."""
    shares = share_of_best_possible(*_points(records), *_points(best))
    for record, share in zip(records, shares):
        known = math.isfinite(share)
        record["share_of_best_possible"] = float(share) if known else None


def _points(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([record["kl"] for record in records]),
        np.array([record["reward"] for record in records]),
    )


def of_arm(records: list[dict]) -> dict[str, list[dict]]:
    """Records by arm, in order of first appearance."""
    arms: dict[str, list[dict]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return arms


def make_table(
    records: list[dict], title: str, tuned: dict[str, float] | None = None
) -> report.Table:
    """One row per arm and beta: mean and standard deviation over draws."""
    seeds = sorted({r["seed"] for r in records})
    rows = []
    for name, runs in of_arm(records).items():
        for beta in sorted({r["beta"] for r in runs}, reverse=True):
            same = [r for r in runs if r["beta"] == beta]
            cells = [
                report.mean_spread([r[key] for r in same if r[key] is not None])
                for key in ("reward", "kl", "share_of_best_possible")
            ]
            malformed = np.mean([r["malformed"] for r in same])
            mark = "*" if beta == (tuned or {}).get(name) else ""
            rows.append([name, f"{beta:g}{mark}", *cells, f"{malformed:.1%}"])
    chosen = f"; *: most reward with a KL of at most {MOST_KL:g} on other draws"
    return report.Table(
        [title, "beta", "gold reward", "KL to the reference", "share of best possible"]
        + ["malformed"],
        rows,
        caption="mean ± standard deviation over the draws "
        f"{', '.join(map(str, seeds))} of pairs, labels, and flips; reward from -4 to "
        "4; "
        "share of best possible: gain over the reference, divided by the largest "
        "possible gain at the same KL; malformed: share of samples outside the grammar"
        + (chosen if tuned else ""),
    )


def matched(records: list[dict], at: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Reward of each arm at matched KLs, along its betas: [draws, KLs] by arm."""
    seeds = sorted({r["seed"] for r in records})
    return {
        name: np.array(
            [
                reward_at_kl(
                    *_points([r for r in runs if r["seed"] == seed]), np.array(at)
                )
                for seed in seeds
            ]
        )
        for name, runs in of_arm(records).items()
    }


def matched_table(
    records: list[dict],
    best: list[dict],
    *,
    baseline: str,
    at: tuple[float, ...] = MATCHED_KLS,
    title: str = "",
) -> report.Table:
    """Reward at matched KL, and the paired difference from `baseline`."""
    rewards = matched(records, at)
    best_at = reward_at_kl(*_points(best), np.array(at))
    start = best[0]["reward"]
    rows = []
    for name, values in rewards.items():
        cells = []
        for n in range(len(at)):
            mean = values[:, n].mean()
            share = (mean - start) / (best_at[n] - start)
            cells += [_cell(mean), _cell(share)]
            difference = values[:, n] - rewards[baseline][:, n]
            cells.append(_interval(difference) if name != baseline else "")
        rows.append([name, *cells])
    shares = [[_cell(x), "1", ""] for x in best_at]
    rows.append(["best possible", *(cell for cells in shares for cell in cells)])
    columns = [
        title
        for kl in at
        for title in (f"reward at KL {kl:g}", "share", f"minus {baseline}")
    ]
    return report.Table(
        [title, *columns],
        rows,
        caption="interpolated along each method's betas, linearly in the root of the "
        "KL; differences are paired by draw, with a 95% t interval; –: outside the "
        "measured range in some draw, or a single draw",
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _interval(differences: np.ndarray) -> str:
    mean, low, high = t_interval(differences)
    if math.isnan(mean):
        return "–"
    ends = "" if math.isnan(low) else f" ({low:+.2f} to {high:+.2f})"
    return f"{mean:+.2f}{ends}"


def tuned_betas(
    runs: list[dict], tuning_seeds: list[int], best_possible: list[dict], *, most_kl
) -> dict[str, float]:
    """The beta of each arm by the tuning rule on the tuning draws; {} without any.

    An arm all of whose betas exceed the KL has none.
    """
    betas = {}
    for name, same in of_arm([r for r in runs if r["seed"] in tuning_seeds]).items():
        grid = sorted({r["beta"] for r in same})
        at = {(r["seed"], r["beta"]): r for r in same}
        kls, rewards = (
            np.array([[at[seed, beta][key] for beta in grid] for seed in tuning_seeds])
            for key in ("kl", "reward")
        )
        if kls.mean(axis=0).min() <= most_kl:
            betas[name] = grid[choose_setting(kls, rewards, most_kl=most_kl)]
    return betas


def write_results(
    out: Path, *, protocol, baseline: str, records, best, curves, over, seconds, about
) -> None:
    """`results.json`, `frontier.json`, the figures, and `report.html`.

    Differences are from the arm `baseline`.  `over` is an earlier `frontier.json`, on
    top of which these runs are drawn, or None.
    `seconds` is None where more than one process made them; `about` says what was done.
    """
    add_shares(records, best)
    reported = [r for r in records if r["seed"] in protocol.seeds]
    made = {
        "tuning_seeds": list(protocol.tuning_seeds),
        "runs": [{key: _short(record[key]) for key in KEPT} for record in records],
        "best_possible": [{k: _short(v) for k, v in point.items()} for point in best],
    }
    write_json(out / "frontier.json", made)
    sweep = json.loads(over.read_text()) if over else made
    swept = [r for r in sweep["runs"] if r["seed"] not in sweep["tuning_seeds"]]
    new = reported if over else []
    tables = [
        *([make_table(new, "this command")] if new else []),
        make_table(swept, "the sweep", tuned_betas(**sweep, most_kl=MOST_KL)),
        matched_table(swept, sweep["best_possible"], baseline=baseline),
    ]
    write_json(
        out / "results.json",
        {
            "protocol": dataclasses.asdict(protocol),
            "runs": records,
            "best_possible": best,
            "tables": [{"columns": t.columns, "rows": t.rows} for t in tables],
            "seconds": seconds,
        },
    )
    drawn = [r for r in swept if r["kl"] <= MOST_DRAWN]
    report.frontiers(
        out / "reward_kl.png", drawn, best=sweep["best_possible"], new=new,
        title="What a loss gains, and what it costs",
    )  # fmt: skip
    report.training_curves(
        out / "training.png",
        [c for c in curves if "eval_loss" in c],
        {
            "eval_rewards/accuracies": "accuracy on clean held-out pairs",
            "eval_rewards/margins": "margin on clean held-out pairs",
        },
        title="During training",
    )
    caption = f"{_FRONTIER} {_left_out(len(swept) - len(drawn))}".rstrip()
    write_page(out, tables, caption, reported, seconds, about)
    for table in tables:
        for row in [table.columns, *table.rows]:
            print("  ".join(f"{cell:<22}" for cell in row).rstrip())
        print()
    print(f"report: {out / 'report.html'}")


def _short(value):
    return round(value, 4) if isinstance(value, float) else value


def _left_out(count: int) -> str:
    if not count:
        return ""
    return f"Not shown: runs with a KL above {MOST_DRAWN:g} nats ({count} of them)."


def write_page(out: Path, tables, caption, records, seconds, about: str) -> None:
    """`report.html`: tables, figures, samples, and what was done."""
    samples = [[f"{r['arm']}, beta {r['beta']:g}", *r["samples"][:3]] for r in records]
    samples = list({row[0]: row for row in reversed(samples)}.values())[::-1]
    parts = {
        "Result": [report.Figure(out / "reward_kl.png", caption), *tables],
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
        "What wrong labels cost, and what a correction buys",
        [report.Section(title, content) for title, content in parts.items()],
        summary=(
            "Run by more than one process (resumed)."
            if seconds is None
            else f"Made in {seconds / 60:.1f} minutes."
        ),
    )

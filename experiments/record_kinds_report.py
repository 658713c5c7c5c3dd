"""The tables, the figure, and the page of `record_kinds.py`."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from experiments.exact_frontier import drawn
from experiments.leaderboard_report import interval, markdown
from jaxpref import report
from jaxpref.evaluate.frontier import (
    choose_setting,
    reward_at_kl,
    share_of_best_possible,
    t_interval,
)
from jaxpref.files import write_json

Part = dict[str, Any]
"""All runs of one arm, as in its file."""

MATCHED_KLS = (0.64, 1.0)
MOST_KL = 1.0
"""Budget of the tuning rule, in nats."""
TITLE = "Pairs, thumbs, and lists with the same information"
COLUMNS = (
    *("method", "records", "beta", "reward", "KL", "share"),
    *(
        title
        for kl in MATCHED_KLS
        for title in (f"at KL {kl:g}", "share", "minus DPO on pairs")
    ),
)
CAPTION = (
    "Means ± standard deviations over seeds. Beta: with the most reward at a KL of at "
    "most 1 on other seeds. Share: gain over the reference, divided by the largest "
    "possible gain at the same KL. At a KL: rewards of policies rescaled to this KL. "
    "Differences are paired by seed, with a 95% t interval"
)


def tuned(part: Part, tuning: int) -> int:
    """The setting with the most reward at a KL of at most `MOST_KL`.

    By the runs on the tuning seeds alone, which come first.
    """
    kl, reward = (np.array(part[name])[:tuning] for name in ("kl", "reward"))
    return choose_setting(kl, reward, most_kl=MOST_KL)


def matched(part: Part, tuning: int) -> np.ndarray:
    """Rewards at the matched KLs of the settings tuned for each, [seeds, KLs]."""
    rewards = np.array(part["matched"])
    best = rewards[:tuning].mean(axis=0).argmax(axis=0)
    return rewards[tuning:, best, np.arange(len(MATCHED_KLS))]


def cells(part: Part, baseline: Part, best: list[dict], tuning: int) -> list[str]:
    """One row: the tuned setting, and rewards at matched KL."""
    setting = tuned(part, tuning)
    curve = tuple(np.array([point[key] for point in best]) for key in ("kl", "reward"))
    kl, reward = (np.array(part[name])[tuning:, setting] for name in ("kl", "reward"))
    shares = share_of_best_possible(kl, reward, *curve)
    found = [part["method"], part["records"], f"{part['betas'][setting]:g}"]
    found += [report.mean_spread(values.tolist()) for values in (reward, kl, shares)]
    limits = reward_at_kl(*curve, np.array(MATCHED_KLS))
    own, other = matched(part, tuning), matched(baseline, tuning)
    for n, limit in enumerate(limits):
        start = best[0]["reward"]
        share = (own[:, n].mean() - start) / (limit - start)
        found += [report.mean_spread(own[:, n].tolist()), f"{share:.2f}"]
        difference = t_interval(own[:, n] - other[:, n])
        found.append("" if part is baseline else interval(difference))
    return found


def points(part: Part, tuning: int) -> list[dict]:
    """The reported runs with the learning rate of the tuned setting, for the figure."""
    rate = part["learning_rates"][tuned(part, tuning)]
    return [
        {
            "arm": f"{part['method']}, {part['records']}",
            "beta": beta,
            "seed": seed,
            "kl": part["kl"][row][n],
            "reward": part["reward"][row][n],
        }
        for row, seed in enumerate(part["seeds"])
        for n, beta in enumerate(part["betas"])
        if row >= tuning and part["learning_rates"][n] == rate
    ]


def write_results(
    out: Path,
    parts: list[Part],
    best: list[dict],
    *,
    bounds: dict[str, float],
    tuning: int,
    about: str,
) -> None:
    """`results.json`, `table.md`, `frontier.png`, and `report.html`.

    Differences are from the first part.  The first `tuning` seeds are for tuning.
    """
    rows = [cells(part, parts[0], best, tuning) for part in parts]
    results = {"bounds": bounds, "columns": COLUMNS, "rows": rows}
    write_json(out / "results.json", results)
    (out / "table.md").write_text(markdown(COLUMNS, rows))
    runs = [point for part in parts for point in points(part, tuning)]
    draws = len({run["seed"] for run in runs})
    path = out / "frontier.png"
    report.frontiers(path, drawn(runs, draws=draws), best=best, title=TITLE)
    result = report.Table([*COLUMNS], rows, caption=CAPTION)
    done = "From the experiment's file:\n\n" + textwrap.indent(about, "    ")
    report.write_html(
        out / "report.html",
        TITLE,
        [
            report.Section("Result", [result]),
            report.Section("Frontier", [report.Figure(path)]),
            report.Section("What was done", [done]),
        ],
    )
    print(markdown(COLUMNS, rows))
    print(f"report: {out / 'report.html'}")

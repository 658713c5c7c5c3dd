"""Rows, tables, figures, and the page of `leaderboard.py`."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.exact_frontier import drawn
from experiments.leaderboard_methods import EXCEPTIONS, FULL
from jaxpref import report
from jaxpref.evaluate.frontier import (
    choose_setting,
    reward_at_kl,
    share_of_best_possible,
    t_interval,
)
from jaxpref.files import write_json

Part = dict[str, Any]
"""All runs of one method with one kind of noise, as in its file."""

BASELINE = "dpo"
MATCHED_KLS = (0.64, 1.0)
MOST_KL = MATCHED_KLS[-1]
"""Budget of the tuning rule, in nats."""
FEWEST_SEEDS = 3
"""With fewer seeds, there are no intervals: that of two is 13 standard errors wide."""
LEAST_KL = 0.1
"""Settings whose mean KL is below it have hardly moved and are left out of `spread`."""
DRAWN = (
    *("dpo", "ipo", "rdpo", "forward_dpo", "holder_dpo"),
    *("em", "instance_noise", "known_rates"),
)
"""Methods in the figures, as many as there are colors."""


def points(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """KL and reward of every run, [seeds, settings]; NaN where it diverged."""
    kl, reward = (np.array(part[key], np.float64) for key in ("kl", "reward"))
    diverged = ~(np.isfinite(kl) & np.isfinite(reward))
    return np.where(diverged, np.nan, kl), np.where(diverged, np.nan, reward)


def sweeps(part: Part) -> list[np.ndarray]:
    """The settings of each learning rate; without betas, all are one sweep."""
    rates = np.array(part["learning_rates"])
    if part["betas"][0] is None:
        return [np.arange(len(rates))]
    return [np.flatnonzero(rates == rate) for rate in dict.fromkeys(rates)]


def tuned_sweeps(part: Part, tuning_seeds: Sequence[int]) -> list[np.ndarray]:
    """For each of `MATCHED_KLS`, the sweep with the highest mean reward at this KL.

    By the runs on the tuning seeds alone, among the learning rates whose betas reach
    the KL on all of them.  If there is none, all settings.
    """
    if part["seeds"][: len(tuning_seeds)] != list(tuning_seeds):
        raise ValueError(f"Expected seeds {tuning_seeds} first, got {part['seeds']}.")
    found = sweeps(part)
    at = np.stack([rewards_at(part, own, tuning_seeds) for own in found], axis=1)
    tuned = []
    for n, kl in enumerate(MATCHED_KLS):
        reached = np.flatnonzero(np.isfinite(at[..., n]).all(axis=0))
        rewards = at[:, reached, n]
        if reached.size:
            best = choose_setting(np.full_like(rewards, kl), rewards, most_kl=kl)
            tuned.append(found[reached[best]])
        else:
            tuned.append(np.concatenate(found))
    return tuned


def tuned_setting(part: Part, tuning_seeds: Sequence[int]) -> int:
    """The setting with the most reward at a mean KL of at most `MOST_KL`.

    By the runs on the tuning seeds alone, in the sweep for this KL.  If there is none,
    the setting with the smallest KL.
    """
    kl, reward = (values[: len(tuning_seeds)] for values in points(part))
    kept = tuned_sweeps(part, tuning_seeds)[-1]
    kept = kept[np.isfinite(kl[:, kept]).all(axis=0)]
    kl, reward = kl[:, kept], reward[:, kept]
    if not (kl.mean(axis=0) <= MOST_KL).any():
        return int(kept[np.argmin(kl.mean(axis=0))])
    return int(kept[choose_setting(kl, reward, most_kl=MOST_KL)])


def rewards_at(part: Part, settings: np.ndarray, seeds: Sequence[int]) -> np.ndarray:
    """Reward at `MATCHED_KLS` along settings, [seeds, KLs]; NaN if not reached."""
    kl, reward = points(part)
    found = []
    for row in (part["seeds"].index(seed) for seed in seeds):
        at = settings[np.isfinite(kl[row, settings])]
        found.append(
            reward_at_kl(kl[row, at], reward[row, at], np.array(MATCHED_KLS))
            if at.size
            else np.full(len(MATCHED_KLS), np.nan)
        )
    return np.array(found)


def make_rows(part: Part, tuning_seeds: Sequence[int], best: list[dict]) -> list[dict]:
    """The reported runs at the tuned learning rates, one row each."""
    chosen = tuned_setting(part, tuning_seeds)
    kept = sorted(set(np.concatenate(tuned_sweeps(part, tuning_seeds)).tolist()))
    kl, reward = points(part)
    rows = []
    for n, seed in enumerate(part["seeds"][len(tuning_seeds) :], len(tuning_seeds)):
        for setting in kept:
            finite = np.isfinite(kl[n, setting])
            rows.append(
                {
                    "method": part["method"],
                    "noise": part["noise"],
                    "seed": seed,
                    "beta": part["betas"][setting],
                    "learning_rate": part["learning_rates"][setting],
                    "reward": float(reward[n, setting]) if finite else None,
                    "kl": float(kl[n, setting]) if finite else None,
                    "tuned": setting == chosen,
                }
            )
    measured = [row for row in rows if row["kl"] is not None]
    shares = share_of_best_possible(*_columns(measured), *_columns(best))
    for row, share in zip(measured, shares):
        row["share_of_best_possible"] = float(share) if np.isfinite(share) else None
    return [{"share_of_best_possible": None} | row for row in rows]


def make_entry(
    part: Part, baseline: Part, tuning_seeds: Sequence[int], best: list[dict]
) -> dict:
    """What the tables say of one method with one kind of noise."""
    chosen = tuned_setting(part, tuning_seeds)
    seeds = part["seeds"][len(tuning_seeds) :]
    start, limits = best[0]["reward"], reward_at_kl(*_columns(best), MATCHED_KLS)
    matched = []
    for n, (own, other) in enumerate(
        zip(tuned_sweeps(part, tuning_seeds), tuned_sweeps(baseline, tuning_seeds))
    ):
        at = rewards_at(part, own, seeds)[:, n]
        difference = at - rewards_at(baseline, other, seeds)[:, n]
        reached = np.isfinite(at).all()
        mean, low, high = t_interval(difference)
        ends = [low, high] if len(seeds) >= FEWEST_SEEDS else [math.nan] * 2
        matched.append(
            {
                "kl": MATCHED_KLS[n],
                "reward": at.tolist() if reached else None,
                "share": _number((at.mean() - start) / (limits[n] - start)),
                "minus_dpo": [_number(x) for x in (mean, *ends)],
            }
        )
    return {
        "method": part["method"],
        "noise": part["noise"],
        "knows": part["knows"],
        "seeds": seeds,
        "beta": part["betas"][chosen],
        "learning_rate": part["learning_rates"][chosen],
        "matched": matched,
        "spread": spread(part, len(tuning_seeds), best),
    }


def spread(part: Part, tuning: int, best: list[dict]) -> list[float | None]:
    """Quartiles of the share of the best possible over all settings.

    Each setting counts once, with its mean share over seeds at its own KLs, if its mean
    KL is at least `LEAST_KL` and all of its KLs are on the best possible curve.
    """
    kl, reward = (values[tuning:] for values in points(part))
    largest = max(point["kl"] for point in best)
    kept = (kl.mean(axis=0) >= LEAST_KL) & (kl <= largest).all(axis=0) & (kl > 0).all(0)
    if not kept.any():
        return [None] * 3
    flat = kl[:, kept].ravel(), reward[:, kept].ravel()
    shares = share_of_best_possible(*flat, *_columns(best)).reshape(len(kl), -1)
    return [float(x) for x in np.quantile(shares.mean(axis=0), (0.25, 0.5, 0.75))]


def _columns(records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([r[key] for r in records]) for key in ("kl", "reward"))


def _number(value) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---- tables --------------------------------------------------------------------------


def entry_cells(entry: dict) -> list[object]:
    """The cells of one entry after its method, for the page."""
    cells: list[object] = []
    for matched in entry["matched"]:
        reward = matched["reward"]
        cells += [
            "–" if reward is None else report.mean_spread(reward),
            _two(matched["share"]),
            interval(matched["minus_dpo"]) if entry["method"] != BASELINE else "",
        ]
    low, _, high = entry["spread"]
    return [
        *cells,
        "" if low is None else f"{low:.2f} to {high:.2f}",
        "–" if entry["beta"] is None else f"{entry['beta']:g}",
        f"{entry['learning_rate']:g}",
        len(entry["seeds"]),
        entry["knows"],
    ]


def interval(values: Sequence[float | None]) -> str:
    """A mean difference with its 95% interval; without one if there are few seeds."""
    mean, low, high = values
    if mean is None:
        return "–"
    ends = f" ({low:+.2f} to {high:+.2f})" if low is not None else ""
    return f"{mean:+.2f}{ends}".replace("-", "−")


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def page_table(entries: list[dict]) -> report.Table:
    """All entries, to sort and filter."""
    matched = [
        title
        for kl in MATCHED_KLS
        for title in (f"reward at KL {kl:g}", "share", "minus DPO")
    ]
    return report.Table(
        ["method", "noise", *matched, "spread of the share", "beta", "learning rate"]
        + ["seeds", "knows"],
        [[e["method"], e["noise"], *entry_cells(e)] for e in entries],
        caption="Reward at matched KL: along the betas at the tuned learning rate, "
        "mean ± standard deviation over seeds; share of the best possible "
        "reward at this KL; difference from tuned DPO on the same seeds, "
        "with a 95% t interval if there are five. Spread: quartiles of the "
        "share over all betas and learning rates, at their own KLs. Beta "
        "and learning rate: tuned on other seeds. Knows: what the method "
        "knows in addition to the pairs and their annotators. –: not "
        "reached, or no beta",
    )


def overview(entries: list[dict], *, kl: int = 1) -> list[list[str]]:
    """One row per method: share at a matched KL for each noise, and what it knows.

    The number of stars says on which side of DPO the interval of the difference is.
    Methods are sorted by their mean share; those that do not reach the KL are last.
    """
    noises = list(dict.fromkeys(e["noise"] for e in entries))
    table: dict[str, dict[str, dict]] = {}
    for entry in entries:
        table.setdefault(entry["method"], {})[entry["noise"]] = entry
    rows = []
    for method, found in table.items():
        shares = [
            found[n]["matched"][kl]["share"] if n in found else None for n in noises
        ]
        mean = [share for share in shares if share is not None]
        cells = [marked(found[n]["matched"][kl]) if n in found else "" for n in noises]
        knows = next(iter(found.values()))["knows"]
        count = len(next(iter(found.values()))["seeds"])
        order = (-len(mean), -float(np.mean(mean)) if mean else 0.0, method)
        rows.append((order, [method, *cells, str(count), knows]))
    return [row for _, row in sorted(rows)]


def marked(matched: dict) -> str:
    """A share, with + or − if the interval of the difference from DPO excludes 0."""
    _, low, high = matched["minus_dpo"]
    sign = "" if low is None else " +" if low > 0 else " −" if high < 0 else ""
    return _two(matched["share"]) + sign


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |\n"
    return line(columns) + line(["---"] * len(columns)) + "".join(map(line, rows))


# ---- the page ------------------------------------------------------------------------


def write_results(
    out: Path,
    parts: list[Part],
    best: list[dict],
    *,
    tuning_seeds: Sequence[int],
    about: str,
) -> None:
    """`leaderboard.json`, `table.json`, `table.md`, the figures, and `report.html`."""
    baselines = {p["noise"]: p for p in parts if p["method"] == BASELINE}
    rows = [row for part in parts for row in make_rows(part, tuning_seeds, best)]
    write_json(out / "leaderboard.json", rows)
    entries = [
        make_entry(part, baselines[part["noise"]], tuning_seeds, best)
        for part in parts
        if part["noise"] in baselines
    ]
    noises = list(dict.fromkeys(part["noise"] for part in parts))
    write_json(
        out / "table.json",
        {
            "matched_kls": MATCHED_KLS,
            "best_possible": best,
            "entries": entries,
            "exceptions": EXCEPTIONS,
        },
    )
    columns = ["method", *noises, "seeds", "knows"]
    full = [e for e in entries if e["method"] in FULL]
    detail = [[e["method"], e["noise"], *entry_cells(e)] for e in full]
    (out / "table.md").write_text(
        markdown(columns, overview(entries))
        + "\n"
        + markdown(page_table([]).columns, detail)
    )
    write_page(out, rows, entries, best, about)


def write_page(
    out: Path, rows: list[dict], entries: list[dict], best: list[dict], about: str
) -> None:
    """The figures and `report.html`."""
    noises = list(dict.fromkeys(entry["noise"] for entry in entries))
    rates = {(e["method"], e["noise"]): e["learning_rate"] for e in entries}
    figures = []
    for noise in noises:
        shown = [
            row | {"arm": row["method"]}
            for name in DRAWN
            for row in rows
            if (row["method"], row["noise"]) == (name, noise)
            and row["learning_rate"] == rates[name, noise]
            and row["kl"] is not None
        ]
        if not shown:
            continue
        path = out / f"frontier-{noise.replace(' ', '-').replace('%', '')}.png"
        seeds = len({row["seed"] for row in shown})
        report.frontiers(path, drawn(shown, draws=seeds), best=best, title=noise)
        figures.append(report.Figure(path, f"Reward against KL; noise: {noise}."))
    columns = ["method", *noises, "seeds", "knows"]
    share = report.Table(
        columns,
        overview(entries),
        caption=f"Share of the best possible reward at KL {MATCHED_KLS[1]:g}. + and −: "
        "the 95% interval of the difference from tuned DPO excludes 0",
    )
    table = report.Browse(page_table(entries), [e["noise"] for e in entries], "Noise")
    missing = [[name, reason] for name, reason in EXCEPTIONS.items()]
    sections = [
        report.Section(
            "Share of the best possible", [report.Browse(share, [""] * len(share.rows))]
        ),
        report.Section("Frontiers", figures),
        report.Section("All figures", [table]),
        report.Section(
            "Not in the table", [report.Table(["function", "because"], missing)]
        ),
        report.Section(
            "What was done",
            ["From the experiment's file:\n\n" + textwrap.indent(about, "    ")],
        ),
    ]
    report.write_html(
        out / "report.html",
        "Preference losses and objectives at matched KL",
        sections,
        summary=f"{len({e['method'] for e in entries})} methods, {len(noises)} kinds "
        "of label noise. Exact rewards and KLs of log-linear policies that are trained "
        "by stochastic gradient steps.",
    )


def read_part(path: Path) -> Part:
    """All runs of one method with one kind of noise."""
    return json.loads(path.read_text())

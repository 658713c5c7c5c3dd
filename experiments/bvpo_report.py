"""The tables, figures, and report of `bvpo.py`."""

import dataclasses
import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.reasoning_errors import GRID, KINDS
from jaxpref import report
from jaxpref.files import write_json, write_whole
from jaxpref.objectives.trace_mixture import AUTO
from jaxpref.report.style import FAINT, MATPLOTLIB, PALETTE

_BLUE, _BRICK, _GREEN, _OCHRE = PALETTE[:4]
_MSE = (
    "Mean squared error of the mixed gradient about the true marginal gradient, by "
    "alpha; thin lines are seeds, the dotted line is the closed form. The cross is auto"
    " at its mean alpha; the triangle is the lowest point of the closed form."
)
_LAW = (
    "Variance of the mixed gradient over resampled traces of one batch, measured, and "
    "alpha squared times the exact variance of the trace gradient."
)
_REWARD = (
    "Exact gold reward on prompts held out, after training; a dot is a seed, bars are "
    "one standard deviation. The dotted line is the model before training."
)
_SOLUTIONS = (
    "Variance of the mixed gradient over resampled real solutions, and alpha squared "
    "times that at alpha = 1."
)


# ---- tables ------------------------------------------------------------------------


def error_table(gradients: list[dict], place: str) -> report.Table:
    """Mean squared errors by kind: alpha 0, 0.5, 1, and auto."""
    found = [g for g in gradients if g["place"] == place]
    rows = []
    for kind in KINDS:
        of = [g["kinds"][kind] for g in found]
        errors = np.array([x["errors"] for x in of])
        ends = [errors[:, GRID.index(a)] for a in (0.0, 0.5, 1.0)]
        auto = np.array([x["auto"] for x in of])
        best = np.minimum(np.minimum(*ends[:2]), ends[2])
        cells = [report.mean_spread(x, digits=1) for x in (*ends, auto)]
        cells += [
            report.mean_spread(auto / best, digits=3),
            report.mean_spread([x["best_alpha"] for x in of]),
            report.mean_spread([x["auto_alpha"] for x in of]),
        ]
        rows.append([kind, *cells])
    return report.Table(
        [
            place,
            *("alpha 0", "alpha 0.5", "alpha 1", "auto"),
            *("auto / best", "closed alpha", "auto's alpha"),
        ],
        rows,
        caption="mean squared error of the gradient, mean ± standard deviation over "
        f"the seeds {', '.join(str(x['seed']) for x in found)}; best: the least of "
        "the three fixed ones; what is resampled names the row",
    )


def reward_table(reference: dict, trained: list[dict]) -> report.Table:
    """One row per alpha: exact final gold rewards."""
    keys = ("reward", "empty_reward", "language")
    auto = {r["seed"]: r["reward"] for r in trained if r["alpha"] == AUTO}
    rows = [["before training", *(f"{reference[k]:.3f}" for k in keys), None]]
    for alpha in dict.fromkeys(r["alpha"] for r in trained):
        runs = [r for r in trained if r["alpha"] == alpha]
        cells = [report.mean_spread([r[k] for r in runs], digits=3) for k in keys]
        gains = [auto[r["seed"]] - r["reward"] for r in runs]
        cells.append(None if alpha == AUTO else report.mean_spread(gains, digits=3))
        rows.append([f"alpha {alpha}", *cells])
    return report.Table(
        ["", "gold reward", "with an empty trace", "in the language", "auto gains"],
        rows,
        caption="probability of the right answer on prompts held out, exact; mean ± "
        "standard deviation over seeds; the probability of a text of the world; and by "
        "how much auto's reward is higher, with the same seed",
    )


def solution_table(real: dict) -> report.Table:
    """Variances over real traces, before and after the short run."""
    rows = []
    for place, x in real["places"].items():
        at = {a: x["variance"][GRID.index(a)] for a in (1.0, 0.5)}
        cells = [x["trace_norm_sq"], x["empty_norm_sq"], x["bias_sq"], at[1.0]]
        cells += [at[0.5], x["best_alpha"]]
        rows.append([f"{place} training", *(f"{c:.3g}" for c in cells)])
    return report.Table(
        [
            *("", "||mean g_t||²", "||g_e||²", "||b_e||²"),
            *("variance, alpha 1", "alpha 0.5", "alpha from them"),
        ],
        rows,
        caption=f"{real['model']}: {real['questions']} questions with {real['traces']} "
        f"right solutions ({real['cut']} traces cut); one batch of all questions",
    )


# ---- figures -----------------------------------------------------------------------


def draw_errors(path: Path, gradients: list[dict]) -> None:
    """Mean squared error against alpha, one panel per setting and kind."""
    places = list(dict.fromkeys(g["place"] for g in gradients))
    fine = np.linspace(0, 1, 101)
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(8.4, 3.1 * len(places) + 0.4), layout="constrained")
        panels = figure.subplots(len(places), len(KINDS), squeeze=False)
        for place, row in zip(places, panels):
            for kind, axes in zip(KINDS, row):
                of = [g["kinds"][kind] for g in gradients if g["place"] == place]
                errors = np.array([x["errors"] for x in of])
                axes.plot(GRID, errors.T, color=_BLUE, lw=0.8, alpha=0.3)
                axes.plot(
                    GRID, errors.mean(axis=0), color=_BLUE, marker="o", ms=4,
                    label="measured",
                )  # fmt: skip
                truth = {
                    k: np.mean([x["truth"][k] for x in of]) for k in of[0]["truth"]
                }
                law = parabola(fine, **truth)
                axes.plot(fine, law, color=FAINT, ls=":", label="closed form")
                axes.scatter(
                    fine[law.argmin()], law.min(), marker="^", s=60, color=_GREEN,
                    zorder=4, label="its lowest point",
                )  # fmt: skip
                auto = [[x["auto_alpha"], x["auto"]] for x in of]
                (x, y), spread = np.mean(auto, axis=0), np.std(auto, axis=0)
                axes.errorbar(
                    x, y, xerr=spread[0], yerr=spread[1], color=_BRICK, marker="x",
                    ms=8, mew=2, lw=1.2, zorder=5, ls="", label="auto",
                )  # fmt: skip
                axes.set_ylim(bottom=0)
                axes.set_title(f"{place}\n{kind} resampled")
        for axes in panels[-1]:
            axes.set_xlabel("alpha")
        for axes in panels[:, 0]:
            axes.set_ylabel("squared error")
        _legend(figure, panels[0, 0])
        _save(path, figure)


def draw_variances(path: Path, curves: dict[str, tuple[list, list]]) -> None:
    """Variance against alpha: (measured, law) of each panel."""
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(8.4, 3.3), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for (title, (measured, law)), axes in zip(curves.items(), panels):
            fine = np.linspace(0, 1, 101)
            axes.plot(fine, fine**2 * law[-1], color=FAINT, ls=":", label="alpha² law")
            axes.plot(GRID, measured, "o", color=_BLUE, ms=5, label="measured")
            axes.set(xlabel="alpha", title=title)
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("variance over traces")
        _legend(figure, panels[0])
        _save(path, figure)


def draw_rewards(path: Path, reference: dict, trained: list[dict]) -> None:
    """Final gold reward by alpha, with traces and without."""
    names = list(dict.fromkeys(str(r["alpha"]) for r in trained))
    titles = {"reward": "with a trace", "empty_reward": "with an empty trace"}
    with matplotlib.rc_context(MATPLOTLIB):
        figure = Figure(figsize=(8.4, 3.3), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for (key, title), axes in zip(titles.items(), panels):
            axes.axhline(reference[key], color=FAINT, ls=":")
            for at, name in enumerate(names):
                values = [r[key] for r in trained if str(r["alpha"]) == name]
                color = _BRICK if name == AUTO else _BLUE
                axes.scatter([at] * len(values), values, s=12, color=color, alpha=0.4)
                spread = np.std(values, ddof=1) if len(values) > 1 else 0
                axes.errorbar(
                    at, np.mean(values), yerr=spread, color=color, marker="o", ms=7,
                    mec="white", capsize=3, lw=1.4,
                )  # fmt: skip
            axes.set_xticks(range(len(names)), names)
            axes.set(title=title, xlabel="alpha")
        panels[0].set_ylabel("gold reward")
        _save(path, figure)


def parabola(alpha, *, trace_variance, empty_variance, covariance, **biases):
    """Theorem 2 in numpy, for a plotted line."""
    rest = 1 - alpha
    return (
        alpha**2 * (trace_variance + biases["trace_bias_sq"])
        + rest**2 * (empty_variance + biases["empty_bias_sq"])
        + 2 * alpha * rest * (covariance + biases["bias_dot"])
    )


def _legend(figure: Figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=9)


def _save(path: Path, figure: Figure) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


# ---- the page ----------------------------------------------------------------------


def write_results(
    out: Path, *, protocol, reference, gradients, trained, learned, real, seconds, about
) -> None:
    """`results.json`, the figures and `report.html`; prints the tables.

    `seconds` is None where more than one process made them; `about` says what was done.
    """
    results = {
        "protocol": dataclasses.asdict(protocol),
        "reference": reference,
        "gradients": gradients,
        "trained": trained,
        "learned": learned,
        "solutions": real,
        "seconds": seconds,
    }
    write_json(out / "results.json", results)
    places = list(dict.fromkeys(g["place"] for g in gradients))
    tables = [error_table(gradients, place) for place in places]
    tables += [reward_table(reference, trained), solution_table(real)]
    for table in tables:
        print()
        for row in [table.columns, *table.rows]:
            print("  ".join(f"{cell or '–':<17}" for cell in row).rstrip())

    draw_errors(out / "errors.png", gradients)
    mean = lambda place, key: np.mean(
        [g["variances"][key] for g in gradients if g["place"] == place], axis=0
    )
    ends = places[0], places[-1]
    curves = {p: (mean(p, "measured"), mean(p, "law")) for p in ends}
    draw_variances(out / "variances.png", curves)
    draw_rewards(out / "rewards.png", reference, trained)
    report.training_curves(
        out / "alpha.png",
        [{"arm": "auto", **x} for x in learned],
        {
            "bvpo/alpha": "alpha",
            "bvpo/trace_variance": "variance of the trace gradient",
            "bvpo/bias_sq": "bias² of the empty gradient",
        },
        title="What auto learns in training",
    )
    draw_variances(
        out / "solutions.png",
        {
            f"{place} training": (
                x["variance"],
                [a**2 * x["variance"][-1] for a in GRID],
            )
            for place, x in real["places"].items()
        },
    )
    figure = lambda name, caption: report.Figure(out / name, caption)
    *errors, rewards, solutions = tables
    parts = {
        "Error of the gradient": [*errors, figure("errors.png", _MSE)],
        "Variance law": [figure("variances.png", _LAW)],
        "Final reward": [
            rewards,
            figure("rewards.png", _REWARD),
            figure("alpha.png", "Mean over seeds; bands are one standard deviation."),
        ],
        "Real solutions": [
            "Questions of the GSM8K test set: never score GSM8K test on a model trained"
            " on them. Gradients are sketches of 512 projections; a trace is drawn from"
            " the right solutions of a question that give the same answer.",
            solutions,
            figure("solutions.png", _SOLUTIONS),
        ],
        "What was done": [
            "From the experiment's file:\n\n" + textwrap.indent(about, "    ")
        ],
    }
    report.write_html(
        out / "report.html",
        "Reasoning traces: noisy gradients, biased ones, and their mixture",
        [report.Section(title, content) for title, content in parts.items()],
        summary=(
            "Run by more than one process (resumed)."
            if seconds is None
            else f"Made in {seconds / 60:.1f} minutes."
        ),
    )
    print(f"\nreport: {out / 'report.html'}")

"""The report of a sweep: its settings, its frontier, and its runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.report.html import Browse, Figure, Section, Table, write_html
from jaxpref.report.plots import frontiers
from jaxpref.report.progress import counted, shown

Content = Mapping[str, Any]
"""What `sweep.json` holds."""

TITLES = {
    "accuracy": "accuracy",
    "kl": "KL",
    "reward": "reward",
    "loss": "loss",
    "margin": "margin",
    "heldout_log_ratio": "log-ratio",
}
"""The metrics of the tables, and their headings."""
AXES = {
    "kl": "KL to the reference, on the policy's own answers (nats)",
    "heldout_log_ratio": (
        "mean log-ratio of held-out answers to the model before training (nats)"
    ),
    "reward": "mean reward of the policy's own answers",
    "accuracy": "held-out accuracy",
}
"""Labels of the figure's axes."""
COMPARED = ("accuracy", "kl", "reward")
"""The metrics whose intervals are shown."""
NAMED = ("loss", "objective")


def write_sweep(out: str | Path, content: Content) -> None:
    """Writes `OUT/report.html` and, if there is something to compare, `frontier.png`.

    Args:
      out: folder of the sweep.
      content: what `sweep.json` holds.

    Raises:
      InputError: if a file cannot be written.
    """
    out = Path(out)
    result: list = []
    if content["frontier"] is not None:
        result.append(_frontier(out / "frontier.png", content["frontier"]))
    columns, rows = setting_rows(content)
    result.append(Table(columns, rows, _caption(content)))
    if intervals := _intervals(content):
        result.append(intervals)
    sections = [Section("Result", result)]
    if content["chosen"]:
        sections.append(Section("Chosen settings", [chosen_text(content)]))
    sections.append(Section("Runs", [_runs(content)]))
    if failed := [run for run in content["runs"] if run["status"] == "failed"]:
        table = Table(["run", "error"], [[x["name"], x["error"]] for x in failed])
        sections.append(Section(f"Failed runs: {len(failed)}", [table]))
    sections.append(Section("What the numbers mean", [_meaning(content)]))
    sections.append(Section("Command", [f"    {content['command']}"]))
    write_html(out / "report.html", "Sweep", sections, summary=_lead(content))


def setting_rows(content: Content) -> tuple[list[str], list[list[str]]]:
    """The table of settings: headings, and mean ± standard deviation over runs."""
    options = [n for n in content["over"] if not n.rpartition(".")[2] == "seed"]
    found = content["settings"]
    metrics = [name for name in TITLES if any(name in s for s in found)]
    rows = []
    for setting in found:
        runs = f"{setting['runs']}"
        if setting["failed"]:
            runs += f", {setting['failed']} failed"
        cells = [_cell(name, setting.get(name)) for name in metrics]
        rows.append([*(setting["options"].get(n, "") for n in options), runs, *cells])
    if (start := content["reference_reward"]) is not None:
        cells = {"kl": "0", "reward": _number("reward", start)}
        blank = [""] * len(options)  # of the options and the runs, one has the name
        rows.append(["reference", *blank, *(cells.get(n, "") for n in metrics)])
    return [*options, "runs", *(TITLES[name] for name in metrics)], rows


def chosen_text(content: Content) -> str:
    """The setting that the tuning rule chooses for each method, in sentences."""
    name = content["frontier"]["y"]
    what = "reward" if name == "reward" else "held-out accuracy"
    lines = [
        f"The setting of each method with the highest {what} among those whose mean KL "
        f"is at most {content['most_kl']:g}:"
    ]
    for found in content["chosen"]:
        method = _label(found["method"]) or "all runs"
        if "none" in found:
            lines.append(f"{method}: none. {found['none']}")
            continue
        lines.append(
            f"{method}: {_label(found['setting']) or 'its only setting'}, with a KL of "
            f"{_number('kl', found['kl'])} and a {what} of "
            f"{_number(name, found['value'])}."
        )
    lines.append(
        "These numbers are those by which the setting was chosen, so they are too "
        "good. Measure the chosen setting on other seeds and other held-out data."
    )
    return "\n\n".join(lines)


def _label(options: Mapping[str, str]) -> str:
    return ", ".join(
        value if name in NAMED else f"{name}={value}" for name, value in options.items()
    )


def _frontier(path: Path, frontier: Content) -> Figure:
    x, y = frontier["x"], frontier["y"]
    frontiers(
        path,
        frontier["points"],
        x=x,
        y=y,
        setting="setting",
        x_label=AXES[x],
        y_label=AXES[y],
    )
    caption = "A small dot is a run. A line goes through the means of its settings"
    if frontier["along"]:
        caption += f", the values of `{frontier['along']}`"
    caption += "; bars are standard deviations over runs."
    if x != "kl":
        caption += (
            " The horizontal axis is not a KL: it says how far the policy moved on the "
            "answers of the data, not on its own."
        )
    return Figure(path, caption)


def _caption(content: Content) -> str:
    text = f"Means over the runs of a setting, on {_pairs(content)}"
    if any(setting["runs"] > 1 for setting in content["settings"]):
        text += "; ±: standard deviation over its runs"
    return text + "."


def _intervals(content: Content) -> Table | None:
    """The 95% t intervals of the settings with several runs; None without any."""
    several = [setting for setting in content["settings"] if setting["runs"] > 1]
    metrics = [name for name in COMPARED if any(name in s for s in several)]
    if not several or not metrics:
        return None
    rows = []
    for setting in several:
        ends = (setting.get(name) for name in metrics)
        cells = zip(metrics, ends)
        rows.append([_label(setting["options"]) or "all runs", *map(_ends, cells)])
    return Table(
        ["95% t intervals of the means", *(TITLES[name] for name in metrics)],
        rows,
        "Over the seeds of a setting. All its runs are evaluated on the same pairs and "
        "prompts, so the intervals do not cover the choice of these.",
    )


def _ends(cell: tuple[str, Content | None]) -> str:
    name, found = cell
    if found is None or found["low"] is None:
        return "–"
    return f"{_number(name, found['low'])} to {_number(name, found['high'])}"


def _runs(content: Content) -> Browse:
    """All runs, to sort and to search."""
    runs = content["runs"]
    metrics = [n for n in TITLES if any(run.get(n) is not None for run in runs)]
    errors = [n for n in metrics if any(f"{n}_error" in run for run in runs)]
    rows = []
    for run in runs:
        options = [run["options"].get(name, "") for name in content["over"]]
        rows.append([*options, *(_with_error(name, run) for name in metrics)])
    mark = lambda name: " (standard error)" if name in errors else ""
    table = Table(
        [*content["over"], *(TITLES[name] + mark(name) for name in metrics)],
        rows,
        f"Each run has a folder named after its options, such as `{runs[0]['name']}`, "
        "with a report of its own. Standard errors are over the prompts.",
    )
    return Browse(table, [run["status"] for run in runs], "Status ")


def _with_error(name: str, run: Content) -> str | None:
    """A metric of a run, with its standard error if it has one."""
    value, error = run.get(name), run.get(f"{name}_error")
    if value is None:
        return None
    text = _number(name, value)
    return text if error is None else f"{text} ({_number(name, error)})"


def _meaning(content: Content) -> str:
    parts = [
        "Accuracy, loss, margin, and log-ratio are measured on held-out pairs. "
        "Accuracy: the share of pairs ranked as labeled, by the policy's implicit "
        "reward. Loss: that of the run's own objective, so it compares only runs with "
        "the same loss and beta. Margin: the mean difference of the rewards, in the "
        "units of the loss; it grows with beta.",
        "Log-ratio: the mean over the held-out answers, chosen and rejected, of the "
        "log-probability after training minus that before training. It is not a KL.",
    ]
    sampled = [run for run in content["runs"] if run.get("samples")]
    if sampled:
        ended = sum(run["ended"] for run in sampled) / len(sampled)
        prompts = counted(sampled[0]["samples"], "held-out prompt")
        parts.append(
            f"KL to the reference: each policy answers {prompts} once, at temperature "
            "1. At every token of its answer, the KL of its next-token distribution "
            "from that of the reference is computed over the whole vocabulary, and "
            "these are summed. "
            f"Answers are cut after {content['kl_tokens']} tokens "
            f"({shown('accuracy', ended)} end before); this is the KL of cut answers."
        )
    if any(run.get("reward") is not None for run in sampled):
        parts.append(
            f"Reward: the mean score of the same answers by `{content['reward_model']}`"
            ". A policy can raise it without becoming better, so compare rewards at "
            "the same KL only."
        )
    return "\n\n".join(parts)


def _lead(content: Content) -> str:
    runs = content["runs"]
    failed = sum(run["status"] == "failed" for run in runs)
    words = f"{counted(len(runs), 'run')}, compared on {_pairs(content)}."
    return words + (f" {counted(failed, 'run')} failed." if failed else "")


def _pairs(content: Content) -> str:
    count = content["heldout_pairs"]
    if count is None:
        return "held-out pairs that are not the same for all"
    return counted(count, "held-out pair")


def _cell(name: str, found: Content | None) -> str:
    if found is None:
        return "–"
    text = _number(name, found["mean"])
    if found["deviation"] is not None:
        text += f" ± {_number(name, found['deviation'])}"
    return text


def _number(name: str, value: float) -> str:
    return shown(name, value).replace("-", "−")

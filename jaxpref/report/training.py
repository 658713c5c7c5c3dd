"""The report of a training run: its options, curves, and speed."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.report.by_source import is_of_source, source_section
from jaxpref.report.curves import Line, Panel, available, both, draw, sides
from jaxpref.report.html import Figure, Section, Table, write_html
from jaxpref.report.noise import auto_choice
from jaxpref.report.progress import (
    SHOWN,
    Record,
    best_criterion,
    counted,
    evaluations,
    is_evaluation,
    notable_evaluations,
    pairs_per_second,
    shown,
)
from jaxpref.report.samples import samples_section
from jaxpref.report.style import PALETTE

FLIP_RATE = Panel(
    "estimated flip rate of the labels",
    (
        Line(
            "noise/flip_rate",
            "estimate",
            PALETTE[2],
            ("noise/flip_rate_lower", "noise/flip_rate_upper"),
        ),
    ),
    percent=True,
    noisy=False,
)
OVERVIEW = (
    both("loss", "loss"),
    both("rewards/accuracies", "reward accuracy", percent=True, reference=0.5),
    both("rewards/margins", "reward margin", reference=0.0),
    FLIP_RATE,
)
"""Panels of `curves.png`."""
REWARDS = (sides("rewards", "rewards"), sides("logps", "log-probabilities (nats)"))
OPTIMIZATION = (
    both("grad_norm", "gradient norm"),
    both("learning_rate", "learning rate", noisy=False),
)
SPEED = (
    both("pairs_per_second", "pairs per second"),
    both("tokens_per_second", "tokens per second"),
    both("token_utilization", "tokens that are not padding", percent=True),
    both("data_wait_fraction", "time spent waiting for data", percent=True),
)
KNOWN = {
    metric
    for panel in (*OVERVIEW, *REWARDS, *OPTIMIZATION, *SPEED)
    for line in panel.lines
    for metric in (line.metric, *(line.band or ()))
} | {"noise/identified"}
"""Metrics with a predefined panel; every other one gets a panel named after it."""
LEADING = ("eval_rewards/accuracies", "eval_rewards/mean", "eval_loss")
"""The first of these that an evaluation has is in the summary of the page."""
LISTED = 20
"""Maximum number of evaluations in the table."""


def write_training(out: str | Path, *, command: str = "") -> None:
    """Writes `OUT/report.html` and `OUT/curves.png`.

    Short, interrupted, and resumed runs are supported, and so are metrics that are
    missing or not finite.

    Args:
      out: folder of the run, with `metrics.jsonl` and `config.json`.
      command: the command line, to be shown on the page.

    Raises:
      InputError: if a file of the run cannot be read, or the report cannot be written.
    """
    out = Path(out)
    config = _read_config(out / "config.json")
    records = read_records(out / "metrics.jsonl")
    best = best_criterion(config.get("keep_best"), records)
    with tempfile.TemporaryDirectory() as folder:
        sections = []
        if overview := available(OVERVIEW, records):
            draw(out / "curves.png", overview, records)
            sections.append(_overview(out, records, best))
        if by_source := source_section(records):
            sections.append(by_source)
        for title, panels, caption in _figures(records):
            if panels := available(panels, records):
                path = Path(folder) / f"{len(sections)}.png"
                draw(path, panels, records)
                sections.append(Section(title, [Figure(path, caption)]))
        if answers := samples_section(out / "samples.jsonl"):
            sections.append(answers)
        if skipped := skipped_steps(records):
            sections.append(_skipped(skipped, config))
        sections.append(_settings(config, command))
        write_html(
            out / "report.html",
            _title(config),
            sections,
            summary=_lead(config, records, best),
        )


def read_records(path: Path) -> list[Record]:
    """The lines of a `metrics.jsonl`, in order of their steps.

    The last line of a killed run may be incomplete and is then skipped.  If a step was
    logged twice, by a run that was interrupted and resumed, the later line counts.

    Raises:
      InputError: if the file cannot be read, or a line before the last is malformed.
    """
    lines = _read(path).splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError("step is not a whole number")
            found[record["step"], is_evaluation(record)] = record
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number < len(lines):
                raise InputError(
                    f"{path}: line {number}: not a line of metrics ({error}); remove it"
                ) from error
    return [found[key] for key in sorted(found)]


def skipped_steps(records: Sequence[Record]) -> list[Record]:
    """The training steps whose loss or gradient was not finite."""
    return [
        record
        for record in records
        if any(record.get(name, 0) is None for name in ("loss", "grad_norm"))
    ]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The config's numbers and strings, by dotted name."""
    found = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _overview(out: Path, records: Sequence[Record], best: str) -> Section:
    caption = (
        "Held-out pairs are the same in every evaluation. Training batches are "
        "measured before their update; if there are many, the faint line shows each "
        "one and the strong line a running mean. Thin lines mark an accuracy of 50% "
        "and a margin of 0. Rewards are the policy's implicit rewards, or the scores "
        "of a reward model."
    )
    parts: list = [Figure(out / "curves.png", caption)]
    if rows := _evaluation_rows(records, best):
        titles = [SHOWN[name] for name in _measured(records)]
        caption = (
            f"Evaluations on the held-out pairs; the best one by `{best}`. A dash "
            "means not finite, or not yet determined by the pairs."
        )
        parts.append(Table(["step", *titles, ""], rows, caption))
    return Section("Training and evaluation", parts)


def _measured(records: Sequence[Record]) -> list[str]:
    found = evaluations(records)
    return [name for name in SHOWN if any(name in record for record in found)]


def _evaluation_rows(records: Sequence[Record], best: str) -> list[list]:
    found, names = evaluations(records), _measured(records)
    notable = notable_evaluations(records, best=best)
    # If there are too many, evenly spaced ones, in addition to the notable ones.
    every = max(1, -(-len(found) // LISTED))
    listed = {id(record) for record in [*found[::every], *notable.values()]}
    return [
        [
            record["step"],
            *(_cell(name, record) for name in names),
            "best" if record is notable.get("best") else "",
        ]
        for record in found
        if id(record) in listed
    ]


def _cell(name: str, record: Record) -> str | None:
    undetermined = (
        name.endswith("flip_rate") and record.get("eval_noise/identified") == 0
    )
    if record.get(name) is None or undetermined:
        return None
    return shown(SHOWN[name], record[name]).replace("-", "−")


def _figures(
    records: Sequence[Record],
) -> list[tuple[str, Sequence[Panel], str]]:
    """Titles, panels, and captions of the figures after the overview."""
    others = {
        name.removeprefix("eval_"): None
        for record in records
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }
    others = [x for x in others if x not in KNOWN and not is_of_source(x)]
    more = [name for name in others if not name.startswith("noise/")]
    # Metrics of the objective's state, which evaluations report too.
    estimates = [
        Panel(name, (Line(name, "estimate", PALETTE[2]),), noisy=False)
        for name in others
        if name.startswith("noise/")
    ]
    return [
        (
            "Rewards and log-probabilities",
            REWARDS,
            "Means over the better and over the worse answers.",
        ),
        ("Label noise", [FLIP_RATE, *estimates], _noise_caption(records)),
        (
            "Optimization",
            OPTIMIZATION,
            "The gradient norm is taken before clipping. A gap is a skipped step.",
        ),
        (
            "Speed",
            SPEED,
            "Training steps only, without compilation, evaluations, and checkpoints.",
        ),
        (
            "Other metrics",
            [both(name, name) for name in more],
            "Other metrics, by their names in `metrics.jsonl`.",
        ),
    ]


def _noise_caption(records: Sequence[Record]) -> str:
    chosen = auto_choice(records)
    return _flip_rate(records) + (f" Labels: {chosen}." if chosen else "")


def _flip_rate(records: Sequence[Record]) -> str:
    last = next((r for r in records[::-1] if "noise/flip_rate" in r), {})
    if last.get("noise/flip_rate") is None:
        return "What the objective estimates about the labels."
    step, rate = last["step"], shown("flip rate", last["noise/flip_rate"])
    ends = [last.get(f"noise/flip_rate_{end}") for end in ("lower", "upper")]
    interval = ""
    if None not in ends:
        interval = " (95% interval {} to {})".format(
            *(shown("flip rate", x) for x in ends)
        )
    if last.get("noise/identified") == 0:
        return (
            f"At step {step} the pairs do not yet determine the flip rate{interval}; "
            "quote the interval, not the estimate."
        )
    return f"Estimated flip rate at step {step}: {rate}{interval}."


def _skipped(skipped: Sequence[Record], config: Mapping[str, Any]) -> Section:
    rows = [[r["step"], r.get("loss"), r.get("grad_norm")] for r in skipped[:LISTED]]
    more = len(skipped) - len(rows)
    every = config.get("log_every", 1)
    text = (
        "The loss or the gradient of these steps was not finite, so the parameters "
        "were not updated."
    )
    if every > 1:
        text += f" Only one step in {every} was logged: there may be others."
    caption = "A dash is a number that was not finite."
    if more:
        caption += f" {more} more steps are not listed."
    return Section(
        f"Skipped steps: {len(skipped)}",
        [text, Table(["step", "loss", "gradient norm"], rows, caption)],
    )


def _settings(config: Mapping[str, Any], command: str) -> Section:
    rows = [[name, _setting(value)] for name, value in flat(config).items()]
    parts: list = [f"Command:\n\n    {command}\n"] if command else []
    return Section("Settings", [*parts, Table(["setting", "value"], rows)])


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(config: Mapping[str, Any]) -> str:
    loss = config.get("loss")
    name = loss.get("name") if isinstance(loss, Mapping) else loss
    base = lambda field: Path(str(config[field])).name
    words = base("model") if config.get("model") else "A model"
    words += f" trained with {name}" if name else " trained"
    return words + (f" on {base('data')}" if config.get("data") else "")


def _lead(config: Mapping[str, Any], records: Sequence[Record], best: str) -> str:
    done = max((record["step"] for record in records), default=0)
    # Without --max-steps, only the run itself knows how many steps it will make.
    asked = config.get("max_steps") or done
    words = [
        f"{counted(done, 'step')}."
        if done >= asked
        else f"{done} of {asked} steps so far."
    ]
    notable = notable_evaluations(records, best=best)
    first, last = notable.get("first"), notable.get("last")
    name = next(
        (name for name in LEADING if first and name in first),
        None,
    )
    if first and name:
        what = SHOWN[name]
        at = [
            f"{shown(what, r.get(name))} at step {r['step']}"
            for r in (first, last)
            if r
        ]
        words.append(f"Held-out {what}: {', '.join(at)}.")
    speed = pairs_per_second(records)
    if speed is not None:
        words.append(f"{speed:.3g} pairs per second.")
    if skipped := skipped_steps(records):
        words.append(f"Skipped: {counted(len(skipped), 'step')}.")
    return " ".join(words)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); name the "
            "folder of a training run"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise InputError(
            f"{path}: not the config of a run ({error}); put it back"
        ) from error
    return config

"""The report of `jaxpref rounds`: reward against KL, round by round."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.report.drawing import drawing
from jaxpref.report.html import Figure, Section, SideBySide, Table, write_html
from jaxpref.report.style import INK, PALETTE

Content = Mapping[str, Any]
"""What `rounds.json` holds."""
COLUMNS = {
    "prompts": "prompts",
    "pairs": "pairs",
    "reward": "reward",
    "unscored": "without a reward",
    "win_rate": "win rate",
    "kl": "KL (nats)",
    "words": "words",
    "ended": "ended",
    "flip_rate": "labels against judge",
}
"""The numbers of the table, and their headings."""
SHARES = ("unscored", "win_rate", "ended", "flip_rate")
WITH_INTERVALS = ("reward", "win_rate", "kl")
MEANING = """\
Prompts and pairs are those that the round was trained on. The other numbers are means \
over answers to the same held-out prompts, one each, at temperature 1, with 95% \
bootstrap intervals over prompts.

The KL divergence is from the model before training, estimated from these answers; it \
may come out below 0 when it is small. The win rate is against the model of round 0; \
equal rewards count one half, and \
an answer without a reward, such as an empty one, loses. Ended is the share of answers \
that were not cut off.

Labels against the judge are the share of the round's pairs that the judge would order \
the other way."""


def write_rounds(out: str | Path, content: Content, *, command: str) -> None:
    """Writes `OUT/report.html` and, if rewards and KL are known, `frontier.png`.

    Args:
      out: folder of the rounds.
      content: what `rounds.json` holds.
      command: the command line.

    Raises:
      InputError: if a file cannot be written.
    """
    out = Path(out)
    rounds = content["rounds"]
    result: list = []
    if sum("reward" in one for one in rounds) > 1:
        result.append(_figure(out / "frontier.png", rounds))
    columns, rows = round_rows(content)
    result.append(Table(columns, rows))
    sections = [Section("Result", result), Section("What the numbers mean", [MEANING])]
    if examples := content["examples"]:
        sections.append(Section("Answers", [_example(one) for one in examples]))
    sections.append(Section("Command", [f"    {command}"]))
    lead = f"Recipe {content['recipe']}, {len(rounds) - 1} rounds. {_lead(rounds)}"
    write_html(out / "report.html", "Rounds", sections, summary=lead.strip())


def round_rows(content: Content) -> tuple[list[str], list[list[str]]]:
    """The table of rounds: headings and cells."""
    rounds = content["rounds"]
    names = [name for name in COLUMNS if any(name in one for one in rounds)]
    rows = [[str(one["round"]), *(_cell(one, x) for x in names)] for one in rounds]
    return ["round", *(COLUMNS[name] for name in names)], rows


def _cell(one: Content, name: str) -> str:
    if (value := one.get(name)) is None:
        return "–"
    if name in ("prompts", "pairs"):
        return f"{value:,}"
    shown = _percent if name in SHARES else "{:.3g}".format
    if name not in WITH_INTERVALS:
        return shown(value)
    return (
        f"{shown(value)} ({shown(one[f'{name}_low'])} to {shown(one[f'{name}_high'])})"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _lead(rounds: list[Content]) -> str:
    known = [one for one in rounds if "reward" in one]
    if len(known) < 2:
        return ""
    first, last = known[0], known[-1]
    text = f"The mean reward goes from {first['reward']:.3g} to {last['reward']:.3g}"
    if "kl" in last:
        text += f", at a KL of {last['kl']:.3g} nats from the model before training"
    if "win_rate" in last:
        text += f"; the last model wins {_percent(last['win_rate'])} against the first"
    return f"{text}."


def _figure(path: Path, rounds: list[Content]) -> Figure:
    known = [one for one in rounds if "reward" in one]
    x = [one.get("kl", 0.0) for one in known]
    y = [one["reward"] for one in known]
    ends = [[one["reward"] - one["reward_low"] for one in known],
            [one["reward_high"] - one["reward"] for one in known]]  # fmt: skip
    with drawing(path, size=(6.6, 4.0)) as figure:
        axes = figure.add_subplot()
        axes.errorbar(x, y, yerr=ends, color=PALETTE[0], lw=1.2, marker="o", ms=7)
        for one, a, b in zip(known, x, y):
            axes.annotate(
                str(one["round"]), (a, b), (7, 6), textcoords="offset points", color=INK
            )
        axes.set(xlabel="KL from the model before training (nats)", ylabel="reward")
    return Figure(
        path,
        "Mean reward of held-out answers against KL; the numbers are rounds, the bars "
        "95% intervals over prompts.",
    )


def _example(one: Content) -> SideBySide:
    columns = []
    for answer in one["answers"]:
        reward = f" ({answer['reward']:.3g})" if "reward" in answer else ""
        columns.append((f"Round {answer['round']}{reward}", answer["text"]))
    if len(columns) > 3:
        columns = [columns[0], columns[len(columns) // 2], columns[-1]]
    return SideBySide(columns, above=one["prompt"])

"""Answers to the same prompts at several steps of a run, side by side."""

import json
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.report.html import Section, SideBySide

STEPS = 3
"""Steps that are shown: the first, one in the middle, and the last."""


def samples_section(path: Path) -> Section | None:
    """The answers in a run's `samples.jsonl`; None without any.

    The last line of a killed run may be incomplete and is then skipped.

    Raises:
      InputError: if another line is malformed.
    """
    by_prompt: dict[str, dict[int, Any]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            found = json.loads(line)
            if "reward" in found:  # sampled in training, of other prompts in each step
                continue
            by_prompt.setdefault(found["id"], {})[int(found["step"])] = found
        except (ValueError, KeyError, TypeError) as error:
            if line.endswith("\n"):
                raise InputError(
                    f"{path}: line {number}: not an answer ({error}); remove it"
                ) from error
    parts = [_side_by_side(steps) for steps in by_prompt.values()]
    if not parts:
        return None
    text = (
        "Greedy answers to held-out prompts (`--eval-samples`); `samples.jsonl` has "
        "those of all evaluations. The number is the log-probability in nats."
    )
    return Section("Answers during training", [text, *parts])


def _lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    # Not splitlines: an answer may hold other line breaks.
    lines = path.read_text("utf-8", "replace").split("\n")
    return [f"{line}\n" for line in lines[:-1]] + [x for x in lines[-1:] if x]


def _side_by_side(steps: dict[int, Any]) -> SideBySide:
    known = sorted(steps)
    last = len(known) - 1
    chosen = dict.fromkeys(known[round(n * last / (STEPS - 1))] for n in range(STEPS))
    columns = []
    for step in chosen:
        found = steps[step]
        cut = "" if found["ended"] else ", cut"
        columns.append((f"Step {step} ({found['logp']:.1f}{cut})", found["output"]))
    return SideBySide(columns, above=steps[known[0]]["prompt"])

"""The numbers of all rounds, read from their files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.evaluation import ANSWERS, JUDGED, LOG_RATIOS, SCORED

EXAMPLES = 12
"""Held-out prompts whose answers the report shows."""


def summarize(config: RoundsConfig, last: int) -> dict[str, Any]:
    """The contents of `rounds.json`.

    Args:
      config: the options.
      last: the last round that is done.
    """
    out = Path(config.out)
    rounds, first = [], None
    for n in range(last + 1):
        folder = out / f"round_{n}"
        about: dict[str, Any] = {"round": n, **_counts(folder)}
        about |= _answers(folder, first)
        about |= _labels(folder)
        if first is None:
            first = _scores(folder)
        rounds.append(about)
    return {
        "recipe": config.recipe,
        "model": config.model,
        "judge": config.gold,
        "rounds": rounds,
        "examples": _examples(out, last),
    }


def _counts(folder: Path) -> dict[str, int]:
    names = {"prompts": "prompts.jsonl", "pairs": "pairs.jsonl"}
    return {
        name: len(read_lines(folder / file))
        for name, file in names.items()
        if (folder / file).is_file()
    }


def _answers(
    folder: Path, first: Float[np.ndarray, " prompts"] | None
) -> dict[str, float]:
    """What is known of the held-out answers, with intervals over prompts."""
    if not (records := read_lines(folder / ANSWERS)):
        return {}
    answers = [record["completions"][0] for record in records]
    values = {
        "words": np.array([len(one["text"].split()) for one in answers], float),
        "ended": np.array([one["ended"] for one in answers], float),
    }
    if (scores := _scores(folder)) is not None:
        values["reward"] = scores
        if first is not None:
            # An answer without a reward, such as an empty one, loses.
            lowest = lambda x: np.where(np.isnan(x), -np.inf, x)
            ours, theirs = lowest(scores), lowest(first)
            values["win_rate"] = 0.5 * (ours > theirs) + 0.5 * (ours >= theirs)
        if np.isnan(scores).any():
            values["unscored"] = np.isnan(scores).astype(float)
    if ratios := read_lines(folder / LOG_RATIOS):
        values["kl"] = _first_scores(ratios)
    found: dict[str, float] = {}
    for name, array in values.items():
        known = array[np.isfinite(array)]
        if len(known):
            mean = lambda w, x=known, name=name: {name: float(w @ x / w.sum())}
            found |= prompt_bootstrap(mean, np.arange(len(known)))
    return found


def _labels(folder: Path) -> dict[str, float]:
    """The share of the round's labels that the judge contradicts."""
    pairs = read_lines(folder / JUDGED)
    sides = [(pair["chosen_score"], pair["rejected_score"]) for pair in pairs]
    gaps = np.array([a - b for a, b in sides if None not in (a, b)])
    decided = gaps[gaps != 0]
    return {"flip_rate": float(np.mean(decided < 0))} if len(decided) else {}


def _examples(out: Path, last: int) -> list[dict[str, Any]]:
    """The answers of all rounds to some held-out prompts."""
    found: list[dict[str, Any]] = []
    for n in range(last + 1):
        folder = out / f"round_{n}"
        scores = _scores(folder)
        for k, record in enumerate(read_lines(folder / ANSWERS)[:EXAMPLES]):
            if n == 0:
                prompt = record["prompt"]
                text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                found.append({"prompt": text, "answers": []})
            one: dict[str, Any] = {"round": n, "text": record["completions"][0]["text"]}
            if scores is not None and np.isfinite(scores[k]):
                one["reward"] = float(scores[k])
            found[k]["answers"].append(one)
    return found


def _scores(folder: Path) -> Float[np.ndarray, " prompts"] | None:
    records = read_lines(folder / SCORED)
    return _first_scores(records) if records else None


def _first_scores(records: list[Any]) -> Float[np.ndarray, " prompts"]:
    found = [record["scores"][0] for record in records]
    return np.array([np.nan if x is None else x for x in found])


def read_lines(path: Path) -> list[Any]:
    """The records of a JSONL file; none if it does not exist."""
    if not path.is_file():
        return []
    # Not `splitlines`, which also splits at line separators within a text.
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]

"""`jaxpref compare`: which of several models answers better?"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpref.errors import InputError
from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.compare.answers import (
    Key,
    ModelAnswers,
    after,
    read_models,
    shared_keys,
)
from jaxpref.evaluate.compare.config import CompareConfig
from jaxpref.evaluate.compare.divergence import divergences
from jaxpref.evaluate.compare.length_control import length_controlled_win_rate
from jaxpref.evaluate.compare.style_control import (
    STYLE,
    Strengths,
    bradley_terry,
    style_differences,
    style_features,
)
from jaxpref.evaluate.compare.verdicts import (
    Verdicts,
    judged,
    read_verdicts,
    without_empty,
)
from jaxpref.evaluate.compare.win_rate import consistent, swap_metrics, win_rate
from jaxpref.files import check_output_folder, write_json, write_whole
from jaxpref.rewards import reward_of
from jaxpref.runtime.processes import log

SUMMARY, VERDICTS = "compare.json", "verdicts.jsonl"
FILES = (SUMMARY, VERDICTS, "compare.html")
"""Names of the files that a comparison may write."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a comparison found."""

    summary: dict[str, Any]
    """The contents of `compare.json`."""
    verdicts: list[dict[str, Any]]
    """The contents of `verdicts.jsonl`."""


def run(config: CompareConfig) -> Comparison:
    """Compares the models and writes `compare.json` and `verdicts.jsonl`.

    Raises:
      InputError: for anything that the caller can fix.
    """
    reads = {"--answers": config.answers, "--verdicts": config.verdicts}
    reads |= {f"--{x}": getattr(config, x) for x in ("judge", "gold", "reference")}
    out = check_output_folder("--out", config.out, FILES, reads)
    _check_foreign(out)
    whole = read_models(config.answers)
    keys = shared_keys(whole)
    models = [after(one, config.answer_after) for one in whole]
    gold = None
    if config.verdicts is not None:
        verdicts = read_verdicts(config.verdicts, models, keys)
    else:
        verdicts = _judged("judge", config, models, keys)
    if config.gold is not None:
        gold = _judged("gold", config, models, keys)
    table = Table(models, keys, verdicts, gold)
    if config.answer_after is not None:
        _log_empty(config, table)
    kl = divergences(whole, keys, config.reference, config.models)
    found = Comparison(_summary(config, table, kl), _lines(config, table))
    if jax.process_index() == 0:
        write_json(out / SUMMARY, found.summary)
        # As ASCII: an answer may hold half of a surrogate pair.
        lines = (json.dumps(x) + "\n" for x in found.verdicts)
        write_whole(out / VERDICTS, "".join(lines))
    return found


@dataclasses.dataclass(frozen=True)
class Table:
    """The answers and the verdicts on them."""

    models: Sequence[ModelAnswers]
    keys: Sequence[Key]
    verdicts: Verdicts
    gold: Verdicts | None

    def texts(self, i: int) -> list[str]:
        """The answers of a model."""
        return [self.models[i].answers[key].text for key in self.keys]

    @property
    def prompts(self) -> np.ndarray:
        """A number that comparisons on the same prompt share, [prompts]."""
        return np.unique([key.prompt for key in self.keys], return_inverse=True)[1]


def _judged(
    option: str,
    config: CompareConfig,
    models: Sequence[ModelAnswers],
    keys: Sequence[Key],
) -> Verdicts:
    word, margin = getattr(config, option), config.tie_margin
    reward = reward_of(word, config.models, config.rewards)
    name = f"--{option} {word}"
    found = judged(reward, models, keys, tie_margin=margin, name=name)
    return found if config.answer_after is None else without_empty(found, models, keys)


def _log_empty(config: CompareConfig, table: "Table") -> None:
    """Says how many answers have nothing after --answer-after."""
    for i, one in enumerate(table.models):
        if count := sum(not text for text in table.texts(i)):
            log(
                f"{one.name}: {count:,} of {len(table.keys):,} answers have no text "
                f"after --answer-after {config.answer_after!r}"
            )


def _summary(
    config: CompareConfig, table: Table, kl: dict[str, float | None]
) -> dict[str, Any]:
    last = len(table.models) - 1
    pairs = [_pair(config, table, i, last) for i in range(last)]
    models = []
    for i, one in enumerate(table.models):
        texts = table.texts(i)
        about: dict[str, Any] = {"name": one.name, "answers": len(one.answers)}
        about["characters"] = float(np.mean([len(x) for x in texts]))
        if config.answer_after is not None:
            about["without_answer"] = sum(not x for x in texts)
        about["words"] = float(np.mean([len(x.split()) for x in texts]))
        if table.verdicts.rewards is not None:
            about["reward"] = float(np.nanmean(table.verdicts.rewards[:, i]))
        models.append(about | {"kl": kl[one.name]})
    summary = {
        "judge": config.judge or config.verdicts,
        "prompts": len({key.prompt for key in table.keys}),
        "comparisons": len(table.keys),
        **pairs[0],
        "kl": kl,
        "models": models,
    }
    if last > 1:
        summary |= {"pairs": pairs, "bradley_terry": _strengths(table)}
    return summary


def _pair(config: CompareConfig, table: Table, i: int, j: int) -> dict[str, Any]:
    """A model against the baseline."""
    verdicts, one, two = table.verdicts, table.models[i], table.models[j]
    p = verdicts.preferences(i, j)
    known = ~np.isnan(p)
    if not known.any():
        raise InputError(
            f"{one.path} and {two.path}: no verdict on any prompt; the judge can read "
            "none of these answers"
        )
    p, w, prompts = p[known], verdicts.weights[known, i, j], table.prompts[known]
    margin = config.tie_margin if verdicts.probabilities else 0.0
    found = dict(win_rate(p, prompts, weights=w, tie_margin=margin))
    ends = lambda name: [found.pop(f"{name}_low"), found.pop(f"{name}_high")]
    found |= {f"{x}_interval": ends(x) for x in ("win_rate", "discrete_win_rate")}
    texts = [np.array(table.texts(n), object)[known] for n in (i, j)]
    lengths = [[len(x) for x in own] for own in texts]
    difficulties = [one.answers[key].difficulty for key in table.keys]
    given = None not in difficulties
    fitted = length_controlled_win_rate(
        p,
        *map(np.array, lengths),
        prompts=prompts,
        difficulties=np.array(difficulties, float)[known] if given else None,
        weights=w,
    )
    found |= {
        "length_controlled_win_rate": fitted.win_rate,
        "length_controlled_win_rate_interval": list(fitted.interval),
        "length_control": {
            x: getattr(fitted, x) for x in ("model", "length", "difficulty", "penalty")
        },
    }
    if verdicts.depends_on_order:
        orders = verdicts.first[known, i, j], 1 - verdicts.first[known, j, i]
        swapped = consistent(*orders)
        found |= swap_metrics(*orders)
        found["win_rate_if_consistent"] = float(np.average(swapped, weights=w))
    if table.gold is not None:
        found["judge_minus_gold"] = _against_gold(table, i, j, p, known)
    pair = {"model": one.name, "baseline": two.name, "not_judged": int(np.sum(~known))}
    return pair | found


def _against_gold(
    table: Table, i: int, j: int, p: np.ndarray, known: np.ndarray
) -> dict[str, Any]:
    """How much higher the judge rates the model than the gold judge does.

    It is the difference of their win rates.  If the judge wrote the answers, this is
    its self-preference (Panickssery et al. 2024, arXiv:2404.13076).
    """
    assert table.gold is not None
    q = table.gold.preferences(i, j)[known]
    both = ~np.isnan(q)
    if not both.any():
        raise InputError(
            "--gold: has no verdict on any prompt on which the judge has one; it can "
            "read none of these answers"
        )
    delta, own = (p - q)[both], table.verdicts.weights[known, i, j][both]
    mean = lambda times: {"difference": float(np.average(delta, weights=times * own))}
    value, low, high = prompt_bootstrap(mean, table.prompts[known][both]).values()
    agree = np.sign(p[both] - 0.5) == np.sign(q[both] - 0.5)
    return {
        "difference": value,
        "interval": [low, high],
        "gold_win_rate": float(np.average(q[both], weights=own)),
        "agreement": float(np.average(agree, weights=own)),
    }


def _strengths(table: Table) -> dict[str, Any]:
    """Bradley-Terry over all models, without and with control for style."""
    features = [style_features(table.texts(i)) for i in range(len(table.models))]
    battles, preferences, differences, prompts, weights = [], [], [], [], []
    for i, j in itertools.combinations(range(len(table.models)), 2):
        p = table.verdicts.preferences(i, j)
        known = ~np.isnan(p)
        battles.append(np.tile([i, j], (known.sum(), 1)))
        preferences.append(p[known])
        differences.append(np.stack([features[i], features[j]])[:, known])
        prompts.append(table.prompts[known])
        weights.append(table.verdicts.weights[known, i, j])
    one, two = np.concatenate(differences, axis=1)
    style = style_differences(one, two)
    joined = [np.concatenate(x) for x in (battles, preferences, prompts)]
    options = {"models": len(table.models), "weights": np.concatenate(weights)}
    plain = bradley_terry(*joined, **options)
    controlled = bradley_terry(*joined, style=style, **options)
    names = [one.name for one in table.models]
    return {
        "plain": _ratings(names, plain),
        "style_controlled": _ratings(names, controlled),
        "style": dict(zip(STYLE, map(float, controlled.coefficients))),
    }


def _ratings(names: Sequence[str], found: Strengths) -> dict[str, Any]:
    columns = zip(names, found.ratings, found.low, found.high)
    return {
        name: {"rating": float(x), "interval": [float(low), float(high)]}
        for name, x, low, high in columns
    }


def _lines(config: CompareConfig, table: Table) -> list[dict[str, Any]]:
    """Annotations of AlpacaEval, the baseline first; with the orders if they matter."""
    last, found = len(table.models) - 1, []
    for i in range(last):
        p = table.verdicts.preferences(i, last)
        names = {"generator_1": table.models[last].name}
        names["generator_2"] = table.models[i].name
        for n, key in enumerate(table.keys):
            line = {
                "instruction": key.prompt,
                "output_1": table.models[last].answers[key].text,
                "output_2": table.models[i].answers[key].text,
                **names,
                "annotator": config.judge or config.verdicts,
                "preference": None if np.isnan(p[n]) else 1 + float(p[n]),
            }
            if table.verdicts.depends_on_order and not np.isnan(p[n]):
                line["preference_first"] = float(table.verdicts.first[n, last, i])
                line["preference_second"] = 1 - float(table.verdicts.first[n, i, last])
            if table.verdicts.rewards is not None and not np.isnan(p[n]):
                rewards = table.verdicts.rewards[n, [last, i]].tolist()
                line["rewards"] = [None if math.isnan(x) else x for x in rewards]
            found.append(line)
    return found


def _check_foreign(out: Path) -> None:
    """Refuses a folder with files of these names that no comparison wrote."""
    there = [name for name in FILES if (out / name).exists()]
    try:
        ours = "win_rate" in json.loads((out / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, TypeError):
        ours = False
    if there and not ours:
        raise InputError(
            f"--out {out}: its {there[0]} was not written by `jaxpref compare`, which "
            "would overwrite it; use another folder"
        )

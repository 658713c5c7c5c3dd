"""What `jaxpref evaluate` writes of pairs, of labeled or rated answers, and of lists.

For each kind of records: the name of the file with a line per record, the metrics, and
the line of a record.  Rewards and scores are float32 [N, K], as the dataset has them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxpref.data import Kind, PreferenceDataset
from jaxpref.data.columns import RATING, rated
from jaxpref.errors import InputError
from jaxpref.evaluate.answers import answer_metrics, weighted_auroc
from jaxpref.evaluate.lists import list_metrics, per_list
from jaxpref.evaluate.metrics import accuracy, preference_metrics, wilson_interval

Scores = Mapping[str, np.ndarray]
"""The scores that rewards come from, by name; float32 [N, K] each."""
SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Results:
    """What is measured of one kind of records, and where it is listed."""

    file: str
    """The name of the file with a line per record."""
    field: str
    """A field that all of its lines have, besides `id` and `row`."""
    metrics: Callable[[PreferenceDataset, np.ndarray, Scores], dict[str, float]]
    """`metrics(records, rewards, scores)`, raising InputError if there are none."""
    lines: Callable[[PreferenceDataset, np.ndarray, Scores], list[dict[str, Any]]]
    """`lines(records, rewards, scores)`, one per record."""
    hits: Callable[[PreferenceDataset, np.ndarray], np.ndarray] | None = None
    """`hits(records, rewards)`: how right the rewards are about each record, from 0 to
    1, float64 [N]; their mean is `rewards/accuracies`.  None for ratings, which are not
    right or wrong."""


def results_of(kind: Kind) -> Results:
    """The results of a kind: pairs, labeled or rated answers, or lists."""
    if rated(kind.numbers):
        return RATED
    return {2: PAIRS, 1: ANSWERS, None: LISTS}[kind.sides]


# ---- pairs ---------------------------------------------------------------------------


def _pair_metrics(
    pairs: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> dict[str, float]:
    """`preference_metrics`, the accuracy by length alone, and means of the scores."""
    lengths = pairs.completion_lengths
    # What a model has to beat to have understood anything; a tie counts half.
    share = accuracy(lengths[:, 0] - lengths[:, 1])
    low, high = wilson_interval(share, len(pairs))
    name = "length_only/accuracies"
    metrics = preference_metrics(rewards[:, 0] - rewards[:, 1])
    metrics |= {name: share, f"{name}_low": low, f"{name}_high": high}
    for name, table in _of_model(rewards, scores).items():
        for k, side in enumerate(SIDES):
            metrics[f"{name}/{side}"] = float(table[:, k].mean())
    return metrics


def _pair_hits(pairs: PreferenceDataset, rewards: np.ndarray) -> np.ndarray:
    """Whether the chosen answer has the higher reward; a tie is 1/2."""
    return 0.5 + 0.5 * np.sign(rewards[:, 0].astype(np.float64) - rewards[:, 1])


def _pair_lines(
    pairs: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> list[dict[str, Any]]:
    margins = rewards[:, 0] - rewards[:, 1]
    return [
        {
            **_place(pairs, n),
            **{
                f"{name}_{side}": float(table[n, k])
                for name, table in scores.items()
                for k, side in enumerate(SIDES)
            },
            "length_chosen": int(pairs.completion_lengths[n, 0]),
            "length_rejected": int(pairs.completion_lengths[n, 1]),
            "margin": float(margins[n]),
            "correct": None if margins[n] == 0 else bool(margins[n] > 0),
            **_about(pairs, n),
        }
        for n in range(len(pairs))
    ]


# ---- labeled answers -----------------------------------------------------------------


def _answer_metrics(
    answers: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> dict[str, float]:
    """`answer_metrics`, the AUROC of the length, and means of the scores by label."""
    desirable = answers.columns["desirable"] > 0.5
    if len(set(desirable.tolist())) < 2:
        raise InputError(
            f"field 'label': all {len(answers)} answers have the label "
            f"{str(bool(desirable[0])).lower()}; evaluate on answers with both labels"
        )
    metrics = answer_metrics(rewards[:, 0], desirable, answers.columns["prompt"])
    by_length = weighted_auroc(answers.completion_lengths[:, 0], desirable)
    metrics["length_only/auroc"] = by_length(np.ones(len(answers)))
    for name, table in _of_model(rewards, scores).items():
        metrics[f"{name}/desirable"] = float(table[desirable, 0].mean())
        metrics[f"{name}/undesirable"] = float(table[~desirable, 0].mean())
    return metrics


def _answer_hits(answers: PreferenceDataset, rewards: np.ndarray) -> np.ndarray:
    """Whether an answer is on the right side of the threshold; see `answer_metrics`."""
    desirable = answers.columns["desirable"] > 0.5
    values = rewards[:, 0].astype(np.float64)
    threshold = (values[desirable].mean() + values[~desirable].mean()) / 2
    return 0.5 + 0.5 * np.sign(values - threshold) * (2 * desirable - 1)


def _answer_lines(
    answers: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> list[dict[str, Any]]:
    return [
        {
            **_place(answers, n),
            **{name: float(table[n, 0]) for name, table in scores.items()},
            "length": int(answers.completion_lengths[n, 0]),
            "reward": float(rewards[n, 0]),
            "desirable": bool(answers.columns["desirable"][n] > 0.5),
            **_about(answers, n),
        }
        for n in range(len(answers))
    ]


# ---- rated answers -------------------------------------------------------------------


def _rated_metrics(
    answers: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> dict[str, float]:
    """Pearson's correlation and the mean distance of each attribute that is rated.

    Without two different ratings, there is no correlation.
    """
    metrics = {}
    for name, table in scores.items():
        ratings = answers.columns[RATING + name]
        there = ~np.isnan(ratings)
        if not there.any():
            continue
        found, given = table[there, 0].astype(float), ratings[there].astype(float)
        if np.ptp(found) and np.ptp(given):
            metrics[f"{name}/pearson"] = float(np.corrcoef(found, given)[0, 1])
        metrics[f"{name}/mae"] = float(np.abs(found - given).mean())
        metrics[f"{name}/ratings"] = float(there.sum())
    if not metrics:
        raise InputError(
            f"no record has a rating of {', '.join(scores)}; rename the fields with "
            f"--fields {next(iter(scores))}=FIELD"
        )
    return metrics


def _rated_lines(
    answers: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> list[dict[str, Any]]:
    given = {name: answers.columns[RATING + name] for name in scores}
    known = lambda x: None if np.isnan(x) else float(x)
    return [
        {
            **_place(answers, n),
            "predicted": {name: float(x[n, 0]) for name, x in scores.items()},
            "ratings": {name: known(x[n]) for name, x in given.items()},
            "length": int(answers.completion_lengths[n, 0]),
            **_about(answers, n),
        }
        for n in range(len(answers))
    ]


# ---- lists ---------------------------------------------------------------------------


def _list_metrics(
    lists: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> dict[str, float]:
    """`list_metrics`, the accuracy by length alone, and means of the scores."""
    exists, qualities = lists.completion_lengths > 0, lists.columns["qualities"]
    metrics = list_metrics(rewards, qualities, exists, lists.columns["prompt"])
    by_length = per_list(lists.completion_lengths, qualities, exists)["accuracies"]
    metrics["length_only/accuracies"] = float(by_length.mean())
    last = np.arange(len(lists)), exists.sum(axis=1) - 1
    for name, table in _of_model(rewards, scores).items():
        metrics[f"{name}/best"] = float(table[:, 0].mean())
        metrics[f"{name}/worst"] = float(table[last].mean())
    return metrics


def _list_hits(lists: PreferenceDataset, rewards: np.ndarray) -> np.ndarray:
    """The share of the pairs of a list that are in the right order."""
    exists, qualities = lists.completion_lengths > 0, lists.columns["qualities"]
    return per_list(rewards, qualities, exists)["accuracies"]


def _list_lines(
    lists: PreferenceDataset, rewards: np.ndarray, scores: Scores
) -> list[dict[str, Any]]:
    exists, qualities = lists.completion_lengths > 0, lists.columns["qualities"]
    found = per_list(rewards, qualities, exists)
    tables = {**scores, "lengths": lists.completion_lengths}
    tables |= {"rewards": rewards, "qualities": qualities}
    return [
        {
            **_place(lists, n),
            **{name: x[n][exists[n]].tolist() for name, x in tables.items()},
            **{name: float(values[n]) for name, values in found.items()},
            **_about(lists, n),
        }
        for n in range(len(lists))
    ]


# ---- all -----------------------------------------------------------------------------


def _of_model(rewards: np.ndarray, scores: Scores) -> dict[str, np.ndarray]:
    """Rewards and scores by name, without those of the reference."""
    own = {name: x for name, x in scores.items() if name != "reference_logps"}
    return {"rewards": rewards} | own


def _place(records: PreferenceDataset, n: int) -> dict[str, Any]:
    return {"id": str(records.ids[n]), "row": int(records.columns["row"][n]) + 1}


def _about(records: PreferenceDataset, n: int) -> dict[str, Any]:
    annotator = int(records.columns["annotator"][n])
    names = records.annotator_names
    return {
        "flip": bool(records.columns["is_flipped"][n]),
        "annotator": names[annotator] if annotator >= 0 else None,
    }


PAIRS = Results("eval_pairs.jsonl", "margin", _pair_metrics, _pair_lines, _pair_hits)
ANSWERS = Results(
    "eval_answers.jsonl", "desirable", _answer_metrics, _answer_lines, _answer_hits
)
RATED = Results("eval_ratings.jsonl", "ratings", _rated_metrics, _rated_lines)
LISTS = Results("eval_lists.jsonl", "qualities", _list_metrics, _list_lines, _list_hits)
ALL = (PAIRS, ANSWERS, RATED, LISTS)

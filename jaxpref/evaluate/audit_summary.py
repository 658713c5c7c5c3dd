"""The contents of `audit.jsonl` and `summary.json`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref.data import PreferenceDataset
from jaxpref.evaluate import baselines
from jaxpref.evaluate.agreement import agreement, with_others
from jaxpref.evaluate.audit_config import AuditConfig
from jaxpref.evaluate.estimate import ASSUMPTION, VERIFIED, Estimate
from jaxpref.evaluate.flips import auroc, known_flips
from jaxpref.evaluate.judges import Judgment
from jaxpref.evaluate.metrics import accuracy, wilson_interval
from jaxpref.evaluate.power import pairs_needed, votes_needed
from jaxpref.evaluate.review import actions, gains, rule
from jaxpref.evaluate.verdicts import DROP, RIGHT, WRONG
from jaxpref.evaluate.votes import Votes

ACTION_OF = {RIGHT: "keep", WRONG: "relabel", DROP: "drop"}
"""The action on a label, by the verdict on it."""


def rows_of(
    judged: Estimate,
    found: Judgment,
    votes: Votes,
    said: np.ndarray,
    pairs: PreferenceDataset,
    order: np.ndarray,
    config: AuditConfig,
) -> list[dict[str, Any]]:
    """The records of `audit.jsonl`.

    Args:
      judged: the estimates.
      found: the margins.
      votes: the labels as votes.
      said: the verdict on each label, "" without one; [N].
      pairs: the pairs.
      order: the pairs, most suspicious first.
      config: the options.
    """
    does = actions(
        judged.posterior,
        order,
        action=config.acts,
        threshold=config.limit,
        top=config.action_top,
    )
    for verdict, action in ACTION_OF.items():
        if not (config.acts == "soft" and verdict != DROP):
            does = np.where(said == verdict, action, does)
    gain = np.where(said == "", gains(judged.posterior, does, votes.texts), 0.0)
    rank, names = np.argsort(order) + 1, votes.annotator_names
    return [
        {
            "id": str(pairs.ids[n]),
            "row": int(pairs.columns["row"][n]) + 1,
            "rank": int(rank[n]),
            "p_correct": float(judged.posterior[n]),
            "margin": float(judged.margins[n]),
            "length_margin": float(found.alone["length"][n]),
            "annotator": names[n],
            "action": str(does[n]),
            "gain": float(gain[n]),
            **({"verdict": str(said[n])} if said[n] else {}),
        }
        for n in range(len(pairs))
    ]


def summarize(
    judged: Estimate,
    found: Judgment,
    votes: Votes,
    prompts: Sequence[str],
    report: Mapping[str, int],
) -> dict[str, Any]:
    """What an audit estimates about the labels."""
    wrong = 1 - judged.posterior
    total = lambda values: np.bincount(votes.annotators, values, len(votes.names))
    suspicious, expected = total(wrong > 0.5), total(wrong)
    others = with_others(votes)
    annotators = [
        {
            "annotator": name,
            "reliability": float(judged.reliability[k]),
            "interval": [float(judged.lower[k]), float(judged.upper[k])],
            "count": int(judged.counts[k]),
            "suspicious": int(suspicious[k]),
            "expected_wrong": float(expected[k]),
            "others": others.get(k),
        }
        for k, name in enumerate(votes.names)
    ]
    return {
        "pairs": len(found.margins),
        "items": int(votes.items.max()) + 1,
        "prompts": len(set(prompts)),
        "flip_rate": judged.flip_rate,
        "flip_rate_interval": list(judged.flip_rate_interval),
        "assumption": ASSUMPTION if found.trusted is None else VERIFIED,
        "identified": judged.identified,
        "reason": judged.reason,
        "assumed_flip_rate": judged.assumed_flip_rate,
        "temperature": judged.temperature,
        "answer_strengths": (
            None if judged.strengths is None else dataclasses.asdict(judged.strengths)
        ),
        "model": _agreement(found.margins),
        "length_only": _agreement(found.alone["length"]),
        "agreement": agreement(votes),
        "annotators": sorted(annotators, key=lambda a: (a["reliability"], -a["count"])),
        "rows": report["rows"],
        "not_judged": {
            name.removeprefix("dropped: "): count
            for name, count in sorted(report.items())
            if name.startswith("dropped: ") and count
        },
        **(
            {}
            if found.trusted is None
            else {"trusted": {"pairs": len(found.trusted), **_agreement(found.trusted)}}
        ),
    }


def acted(
    judged: Estimate, rows: Sequence[Mapping[str, Any]], config: AuditConfig
) -> dict[str, Any]:
    """What was done to the file."""
    count = sum(row["action"] != "keep" for row in rows)
    chosen = {"threshold": config.limit, "top": config.action_top}
    return {
        "expected_wrong": float((1 - judged.posterior).sum()),
        "acted_on": {
            "action": config.acts,
            "pairs": count,
            "rule": rule(config.acts, count, len(rows), **chosen),
            **chosen,
        },
    }


def compared(
    found: Judgment,
    posterior: np.ndarray,
    beside: Mapping[str, baselines.Ranking],
    flips: np.ndarray,
) -> dict[str, Any]:
    """The audit beside its baselines and its own judges, for `summary.json`.

    Args:
      found: the margins.
      posterior: the probability that each label is right; [N].
      beside: the baselines, from `baselines.rankings`.
      flips: labels known to be flipped; [N].  The AUROC of a ranking is that of its
        finding these, and None if there are none.
    """
    known = bool(flips.any())
    area = lambda scores: auroc(-scores, flips) if known else None
    of = lambda margins: _agreement(margins) | {"auroc": area(margins)}
    records: dict[str, Any] = {"length": of(found.alone["length"])}
    records |= dict.fromkeys(baselines.NEEDS)
    for name, ranking in beside.items():
        records[name] = {"auroc": area(ranking.scores)}
        if ranking.wrong is None:
            records[name] = of(ranking.scores)
        else:
            records[name]["wrong_labels"] = ranking.wrong
    summary: dict[str, Any] = {
        "baselines": records,
        "features": {
            name: of(margins) | {"weight": found.weights[name]}
            for name, margins in found.alone.items()
        },
    }
    if absent := baselines.missing():
        summary["baselines_missing"] = baselines.say_missing(absent)
    if known:
        summary["known_flips"] = known_flips(posterior, found.margins, flips)
    return summary


def worth(
    looks: np.ndarray, posterior: np.ndarray, gain: np.ndarray, texts: np.ndarray
) -> dict[str, Any]:
    """What reviewing some labels is expected to gain, compared with random ones.

    Args:
      looks: the labels to review, as indices.
      posterior: the probability that each label is right; [N].
      gain: see `review.gains`; [N].
      texts: which labels judge the same two texts; [N].
    """
    _, first = np.unique(texts, return_index=True)
    return {
        "pairs": len(looks),
        "expected_wrong": float(np.sum(1 - posterior[looks])),
        "expected_wrong_at_random": float(np.mean(1 - posterior) * len(looks)),
        "expected_gain": float(gain[looks].sum()),
        "expected_gain_at_random": float(gain[first].mean() * len(looks)),
    }


def power(judged: Estimate, votes: Votes, width: float) -> dict[str, Any]:
    """How many pairs or votes would give an interval of the flip rate of a width."""
    known = judged.flip_rate if judged.identified else judged.assumed_flip_rate
    # At a rate of 0, the interval has one end only.
    rate = min(max(known or 0.0, 0.01), 0.49)
    low, high = judged.flip_rate_interval
    return {
        "flip_rate": rate,
        "width": width,
        "now": {"pairs": int(votes.items.max()) + 1, "width": high - low},
        "needed": pairs_needed(judged.margins, flip_rate=rate, width=width),
        "votes_per_annotator": votes_needed(
            judged.margins, flip_rate=rate, width=width
        ),
    }


def checked(said: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """How a person's verdicts compare with the probabilities before them.

    Args:
      said: the verdict on each label, "" without one; [N].
      before: the probability that each label is right; [N].
    """
    decided = (said == RIGHT) | (said == WRONG)
    return {
        **{name: int(np.sum(said == name)) for name in ACTION_OF},
        "expected_wrong": float(np.sum(1 - before[decided])),
    }


def _agreement(margins: np.ndarray) -> dict[str, Any]:
    share = accuracy(margins)
    return {"accuracy": share, "interval": wilson_interval(share, len(margins))}

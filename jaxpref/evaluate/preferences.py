"""What a file prefers: Bradley-Terry weights of interpretable features of answers.

A label prefers the first of two answers with probability s(w . x), where x is the
difference of their features (see `surface`), in units of its root mean square over all
pairs.  exp(w) is the factor by which one more unit of a feature multiplies the odds of
being preferred.  Each feature has two weights: on its own, with only the confounders
held fixed, and with all other features held fixed.  Intervals allow for several labels
on one prompt.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxpref.evaluate.crossfit import scaled, sigmoid
from jaxpref.evaluate.review import plain_cell
from jaxpref.evaluate.surface import MEANINGS, NAMES

SPREAD = 10.0
"""Standard deviation of the Gaussian prior of a weight, which keeps weights finite."""
FEWEST = 30
"""How many labels an annotator or a source needs for weights of its own."""
DIFFERING = 20
"""In how many labels a feature must differ; with fewer, the interval is not valid."""
LISTED = 20
"""How many annotators and sources have weights of their own, by number of labels."""
PER_FEATURE = 10
"""How many labels per feature the weights beside all other features need."""
FIELDS = (
    *("feature", "meaning", "labels", "more", "weight", "low", "high"),
    *("joint", "joint_low", "joint_high", "q"),
)
"""What is recorded of each feature."""
STRATA = ("annotator", "source")
"""Confounders that are not features."""


@dataclasses.dataclass(frozen=True)
class Labels:
    """N labels and what may have influenced them."""

    differences: Float[np.ndarray, "labels features"]
    """x: features of the preferred answer minus the other's; see `differences`."""
    prompts: Sequence[str]
    """A key per label; labels with the same one are not independent."""
    annotator: Sequence[str | None]
    """Who gave the label; None if nobody is named."""
    source: Sequence[str | None]
    """Where the pair comes from; None if nothing is named."""

    def where(self, chosen: np.ndarray) -> "Labels":
        """The labels at these places."""
        places = np.flatnonzero(chosen)
        pick = lambda values: [values[n] for n in places]
        return Labels(
            self.differences[places],
            pick(self.prompts),
            pick(self.annotator),
            pick(self.source),
        )


class Weights(NamedTuple):
    """Estimated weights of some columns."""

    weight: np.ndarray
    """float64 [columns]."""
    deviation: np.ndarray
    """float64 [columns]; standard deviations, robust to clusters."""


def differences(
    described: Float[np.ndarray, "labels 2 features"],
) -> Float[np.ndarray, "labels features"]:
    """Preferred minus other answer, with a mean square of 1 per column."""
    return scaled(described[:, 0] - described[:, 1])


def preferences(
    labels: Labels,
    model: Float[np.ndarray, " labels"],
    *,
    confounders: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The weights of all features for all labels, by annotator, source, and model.

    Args:
      labels: N labels.
      model: a model's own margins for the preferred answers; its ranking is treated as
        another set of labels.  Zeros are left out.
      confounders: names of features that are held fixed in the weights, or "annotator"
        or "source": the weights are then estimated within each annotator or source and
        averaged over these, so that one with many labels does not dominate.

    Returns:
      One record per scope (`by` and `name`) and feature: `feature`, `meaning`,
      `labels` in which it differs, the share `more` of these that prefer the answer
      with more of it, `weight` with `low` and `high` (95%), the same beside all other
      features (`joint`, `joint_low`, `joint_high`; None with fewer than `PER_FEATURE`
      labels per feature), and `q`, the false discovery rate among the features of
      the scope whose `q` is at most as large (Benjamini and Hochberg, 1995).
    """
    side = np.sign(model)
    own = dataclasses.replace(labels, differences=labels.differences * side[:, None])
    scopes = [("all labels", "", labels)]
    for by in STRATA:
        for name in _frequent(getattr(labels, by)):
            chosen = np.array([x == name for x in getattr(labels, by)])
            scopes.append((by, name, labels.where(chosen)))
    scopes.append(("model", "log-prob per token", own.where(side != 0)))
    found = []
    for by, name, part in scopes:
        if len(part.prompts) >= FEWEST:
            records = _of_scope(part, confounders)
            found += [{"by": by, "name": name} | record for record in records]
    return found


def _frequent(names: Sequence[str | None]) -> list[str]:
    """Names with enough labels, most frequent first; none if there is only one."""
    known, counts = np.unique([x for x in names if x is not None], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    if len(known) < 2:
        return []
    return [str(known[n]) for n in order[:LISTED] if counts[n] >= FEWEST]


def _of_scope(labels: Labels, confounders: Sequence[str]) -> list[dict[str, Any]]:
    x, total = labels.differences, len(labels.prompts)
    _, clusters = np.unique(labels.prompts, return_inverse=True)
    held = [NAMES.index(name) for name in confounders if name not in STRATA]
    strata = _strata(labels, [name for name in confounders if name in STRATA])
    single = [
        _within(x[:, [j, *(k for k in held if k != j)]], clusters, strata)
        for j in range(len(NAMES))
    ]
    joint = None
    if total >= PER_FEATURE * len(NAMES):
        joint = bradley_terry(x, clusters)
    records = []
    for j, (weight, deviation) in enumerate(single):
        differs = x[:, j] != 0
        known = int(differs.sum()) >= DIFFERING
        size = abs(weight) / deviation / math.sqrt(2) if known else 0.0
        records.append(
            {
                "feature": NAMES[j],
                "meaning": MEANINGS[NAMES[j]],
                "labels": int(differs.sum()),
                "more": float(np.mean(x[differs, j] > 0)) if differs.any() else None,
                **_interval("", (weight, deviation) if known else None),
                **_interval(
                    "joint_",
                    None if joint is None or not known else (joint[0][j], joint[1][j]),
                ),
                "q": math.erfc(size),
            }
        )
    for record, q in zip(records, false_discoveries([r["q"] for r in records])):
        record["q"] = q
    return records


def _interval(
    prefix: str, found: tuple[float, float] | None
) -> dict[str, float | None]:
    """A weight and its 95% interval, or three times None."""
    names = (prefix.rstrip("_") or "weight", f"{prefix}low", f"{prefix}high")
    if found is None:
        return dict.fromkeys(names)
    weight, deviation = found
    ends = (weight, weight - 1.96 * deviation, weight + 1.96 * deviation)
    return {name: float(end) for name, end in zip(names, ends)}


def _strata(labels: Labels, names: Sequence[str]) -> np.ndarray | None:
    """A number per label for each annotator or source; the rare ones share one."""
    if not names:
        return None
    keys = [repr(key) for key in zip(*(getattr(labels, name) for name in names))]
    _, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.where(counts[index] >= FEWEST, index, -1)


def _within(
    x: np.ndarray, clusters: np.ndarray, strata: np.ndarray | None
) -> tuple[float, float]:
    """The first column's weight and its deviation, averaged over the strata."""
    if strata is None:
        found = bradley_terry(x, clusters)
        return float(found.weight[0]), float(found.deviation[0])
    parts = [strata == n for n in np.unique(strata)]
    fits = [
        bradley_terry(x[part], clusters[part]) for part in parts if x[part, 0].any()
    ]
    if not fits:
        return 0.0, SPREAD
    return random_effects(
        np.array([fit.weight[0] for fit in fits]),
        np.array([fit.deviation[0] for fit in fits]),
    )


def bradley_terry(
    x: Float[np.ndarray, "labels columns"], clusters: np.ndarray
) -> Weights:
    """Maximum-likelihood weights with deviations that are robust to clusters.

        min over w   sum of softplus(-w . x)  +  |w|^2 / (2 SPREAD^2)

    by Newton's method.  The deviations are those of H^-1 M H^-1, with the Hessian H,
    and M the sum over clusters of the outer products of their gradients.

    Args:
      x: differences, preferred answer minus the other.
      clusters: which labels are not independent, 0, 1, ...; [labels].

    References:
      Liang and Zeger, "Longitudinal data analysis using generalized linear models",
      1986.
    """
    prior = np.eye(x.shape[1]) / SPREAD**2
    weight = np.zeros(x.shape[1])
    loss = lambda w: np.logaddexp(0, -x @ w).sum() + w @ prior @ w / 2
    for _ in range(50):
        wrong = sigmoid(-x @ weight)
        gradient = -x.T @ wrong + prior @ weight
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x + prior
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(weight - size * step) > loss(weight) and size > 1e-4:
            size /= 2
        weight = weight - size * step
        if np.abs(size * step).max() < 1e-8:
            break
    wrong = sigmoid(-x @ weight)
    hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x + prior
    _, index = np.unique(clusters, return_inverse=True)
    groups = int(index.max()) + 1
    scores = np.zeros((groups, x.shape[1]))
    np.add.at(scores, index, x * wrong[:, None])
    inverse = np.linalg.inv(hessian)
    middle = scores.T @ scores * groups / max(1, groups - 1)
    return Weights(weight, np.sqrt(np.diag(inverse @ middle @ inverse)))


def random_effects(
    weights: Float[np.ndarray, " strata"], deviations: Float[np.ndarray, " strata"]
) -> tuple[float, float]:
    """The mean of weights that differ between strata, and its deviation.

    References:
      DerSimonian and Laird, "Meta-analysis in clinical trials", 1986.
    """
    precision = 1 / np.maximum(deviations, 1e-6) ** 2
    total = precision.sum()
    mean = precision @ weights / total
    surplus = precision @ (weights - mean) ** 2 - (len(weights) - 1)
    scale = total - (precision**2).sum() / total
    between = max(0.0, surplus / scale) if scale > 0 else 0.0
    precision = 1 / (1 / precision + between)
    return float(precision @ weights / precision.sum()), float(precision.sum() ** -0.5)


def false_discoveries(chances: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values."""
    p = np.asarray(chances)
    order = np.argsort(p)
    scaled_up = p[order] * len(p) / np.arange(1, len(p) + 1)
    smallest = np.minimum.accumulate(scaled_up[::-1])[::-1]
    found = np.empty(len(p))
    found[order] = np.minimum(smallest, 1.0)
    return [float(q) for q in found]


def preferences_csv(records: Sequence[Mapping[str, Any]]) -> bytes:
    """`preferences.csv`: the records of `preferences`, as a spreadsheet."""
    file = io.StringIO()
    names = ("by", "name", *FIELDS)
    writer = csv.writer(file)
    writer.writerow(names)
    for record in records:
        cells = (record[name] for name in names)
        writer.writerow(plain_cell(x) if isinstance(x, str) else x for x in cells)
    return file.getvalue().encode("utf-8-sig")

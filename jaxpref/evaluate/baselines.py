"""Baselines: what twenty lines of scikit-learn and cleanlab say about the labels.

An audit is worth its model only if it ranks labels better than these.  They need the
`audit` extra; without it, `missing` says which are not computed.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxpref.data.hashing import hash_uniforms
from jaxpref.evaluate.crossfit import prompt_folds
from jaxpref.evaluate.metrics import accuracy, wilson_interval

NEEDS = {"tfidf_lengths": "scikit-learn", "confident_learning": "cleanlab"}
"""The baselines of the `audit` extra, with the package each needs."""
TEXT_FOLDS = 5
"""Folds of `text_baseline`."""
MODULES = {"scikit-learn": "sklearn", "cleanlab": "cleanlab"}


def missing() -> tuple[str, ...]:
    """The baselines whose packages are not installed."""
    absent = {
        x for x, name in MODULES.items() if importlib.util.find_spec(name) is None
    }
    if "scikit-learn" in absent:  # cleanlab judges the probabilities of the first
        return tuple(NEEDS)
    return tuple(name for name, package in NEEDS.items() if package in absent)


def say_missing(names: Sequence[str]) -> str:
    """How to get these baselines, in a sentence."""
    packages = " and ".join(dict.fromkeys(NEEDS[name] for name in names))
    return (
        f"Baselines not computed: {', '.join(names)}. They need {packages}; "
        'pip install "jaxpref[audit]"'
    )


class Ranking(NamedTuple):
    """What a baseline says about N labels."""

    scores: Float[np.ndarray, " pairs"]
    """float64 [N]; lower for labels that are more probably wrong."""
    wrong: int | None = None
    """How many labels it finds wrong; None if its scores are margins."""


def rankings(
    answers: Sequence[tuple[str, str]], folds: Int[np.ndarray, " pairs"]
) -> dict[str, Ranking]:
    """The baselines whose packages are installed, by name; see `tfidf_lengths`."""
    absent = missing()
    if "tfidf_lengths" in absent:
        return {}
    margins = tfidf_lengths(answers, folds)
    found = {"tfidf_lengths": Ranking(margins)}
    if "confident_learning" not in absent:
        found["confident_learning"] = Ranking(*confident_learning(margins))
    return found


def tfidf_lengths(
    answers: Sequence[tuple[str, str]], folds: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Margins of a logistic regression on TF-IDF and lengths, out of fold.

    The settings are scikit-learn's defaults, except that the term frequencies are
    sublinear, words may have one letter, and there is no intercept, since which answer
    comes first means nothing.  The lengths are log(1 + characters) and log(1 + words).

    Args:
      answers: the preferred and the other answer of each pair.
      folds: fold of each pair; a pair is judged by a fit to the other folds.

    Returns:
      float64 [pairs]; the log-odds that the preferred answer is preferred.
    """
    import scipy.sparse

    # An extra, which is not installed everywhere.
    text = importlib.import_module("sklearn.feature_extraction.text")
    linear = importlib.import_module("sklearn.linear_model")

    texts = [answer for pair in answers for answer in pair]
    reader = text.TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    words = reader.fit_transform(texts)
    sizes = [[len(answer), len(answer.split())] for answer in texts]
    both = scipy.sparse.hstack([words, np.log1p(sizes)]).tocsr()
    columns = both[::2] - both[1::2]
    sides = orientations(len(answers))
    oriented = columns.multiply(sides[:, None]).tocsr()
    margins = np.zeros(len(answers))
    for fold in np.unique(folds):
        train = np.flatnonzero(folds != fold)
        test = np.flatnonzero(folds == fold)
        if len(np.unique(sides[train])) < 2:
            continue
        model = linear.LogisticRegression(fit_intercept=False, max_iter=1000)
        model.fit(oriented[train], sides[train])
        margins[test] = columns[test] @ model.coef_[0]
    return margins


def confident_learning(
    margins: Float[np.ndarray, " pairs"],
) -> tuple[Float[np.ndarray, " pairs"], int]:
    """The quality of each label by cleanlab, and how many labels it finds wrong.

    Confident learning compares given labels with probabilities out of fold.  A pair
    becomes an example of a class by a fixed random order of its answers: the label says
    whether the first is preferred.

    Args:
      margins: of any model, out of fold, positive where it agrees with the label.

    Returns:
      cleanlab's label quality, adjusted for the thresholds of the classes, [pairs], and
      the number of labels it estimates to be wrong.

    References:
      Northcutt, Jiang and Chuang, "Confident Learning", 2021, arXiv:1911.00068.
    """
    count = importlib.import_module("cleanlab.count")
    rank = importlib.import_module("cleanlab.rank")
    sides = orientations(len(margins))
    first = 1 / (1 + np.exp(-np.clip(sides * margins, -500, 500)))
    labels, chances = (sides > 0).astype(int), np.stack([1 - first, first], axis=1)
    if len(np.unique(labels)) < 2:
        return np.zeros(len(margins)), 0
    quality = rank.get_label_quality_scores(labels, chances, adjust_pred_probs=True)
    return quality, int(count.num_label_issues(labels, chances))


def text_baseline(
    answers: Sequence[tuple[str, str]], prompts: Sequence[str]
) -> dict[str, float] | None:
    """The accuracy of `tfidf_lengths` on pairs, out of fold, with Wilson's interval.

    Args:
      answers: the chosen and the rejected answer of each pair.
      prompts: a text that pairs with the same prompt share; they share a fold.

    Returns:
      `tfidf_lengths/accuracies`, and the ends of its 95% interval in `..._low` and
      `..._high`; None if scikit-learn is not installed.
    """
    if "tfidf_lengths" in missing():
        return None
    folds = prompt_folds(prompts, folds=TEXT_FOLDS, seed=0)
    share = accuracy(tfidf_lengths(answers, folds))
    low, high = wilson_interval(share, len(answers))
    name = "tfidf_lengths/accuracies"
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def orientations(count: int) -> Int[np.ndarray, " pairs"]:
    """+1 or -1 per pair, at random but always the same: which answer comes first."""
    uniforms = hash_uniforms(map(str, range(count)), salt="first answer")
    return np.where(uniforms < 0.5, 1, -1)

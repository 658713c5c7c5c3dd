"""Greedy soups: which models belong into the mean, by accuracy on preference pairs."""

import dataclasses
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model that was tried."""

    model: int
    """Its index."""
    accuracy: float
    """Its own accuracy."""
    with_soup: float
    """The accuracy of the mean of the models kept before and this one."""
    kept: bool
    """Whether that is at least the accuracy without it."""


def greedy_soup(
    accuracies: Sequence[float], accuracy_of: Callable[[Sequence[int]], float]
) -> list[Trial]:
    """Chooses models whose uniform mean is at least as accurate as the best model.

    The models are tried from the most accurate to the least, and in the given order if
    they are equal.  The first is kept; each other one is kept if the mean with it is
    at least as accurate as the mean without it.

    Args:
      accuracies: the accuracy of each model, in [0, 1].
      accuracy_of: gives the accuracy of the uniform mean of models, by their indices;
        called once for each model but the first.

    Returns:
      The trials, in their order.

    References:
      Wortsman et al., "Model soups", arXiv:2203.05482, recipe 1.
    """
    order = sorted(range(len(accuracies)), key=lambda index: -accuracies[index])
    best, kept = accuracies[order[0]], [order[0]]
    trials = [Trial(order[0], best, best, True)]
    for model in order[1:]:
        found = accuracy_of([*kept, model])
        trials.append(Trial(model, accuracies[model], found, found >= best))
        if found >= best:
            best, kept = found, [*kept, model]
    return trials


def table(trials: Sequence[Trial], names: Sequence[str]) -> str:
    """The trials in columns: model, its accuracy, that of the mean with it, kept."""
    shown = [("model", "accuracy", "mean with it", "kept")] + [
        (
            names[trial.model],
            f"{trial.accuracy:.4f}",
            f"{trial.with_soup:.4f}",
            "yes" if trial.kept else "no",
        )
        for trial in trials
    ]
    width = max(len(row[0]) for row in shown)
    return "\n".join(f"{a:{width}}  {b:>8}  {c:>12}  {d}" for a, b, c, d in shown)

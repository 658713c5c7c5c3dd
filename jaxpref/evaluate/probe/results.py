"""What a probe reports: accuracies on held-out votes, heads and annotators."""

import dataclasses
from typing import Any

import numpy as np

from jaxpref.data import PreferenceDataset
from jaxpref.evaluate.bootstrap import prompt_bootstrap
from jaxpref.evaluate.crossfit import CrossFit
from jaxpref.evaluate.paired import paired_metrics
from jaxpref.evaluate.probe import fits
from jaxpref.evaluate.probe.config import PROMPT, ProbeConfig


@dataclasses.dataclass(frozen=True)
class Table:
    """N votes with their features."""

    pairs: PreferenceDataset
    differences: fits.Differences
    """Preferred minus other answer; columns with a mean square of 1."""
    scales: np.ndarray
    """[D + columns]; the features were divided by these."""
    contexts: np.ndarray
    """[N, D]; features of the prompts, with mean 0 and variance 1."""
    folds: fits.Folds
    inner: fits.Folds
    """For selecting the penalty."""
    annotators: np.ndarray
    """[N]; index into `names`."""
    names: tuple[str | None, ...]


def one_head_metrics(table: Table, single: CrossFit) -> dict[str, Any]:
    """What one head achieves, and the length alone."""
    lengths = table.pairs.completion_lengths
    by_length = right(lengths[:, 0] - lengths[:, 1])
    prompts = table.pairs.columns["prompt"]
    return {
        "votes": len(table.pairs),
        "prompts": len(np.unique(prompts)),
        "annotators": len(table.pairs.annotator_names),
        "bradley_terry": _accuracy(right(single.margins), prompts)
        | {"penalties": single.penalties.tolist()},
        "length_only": _accuracy(by_length, prompts),
    }


def column_metrics(
    table: Table, config: ProbeConfig, single: CrossFit, head: np.ndarray
) -> dict[str, Any]:
    """What the columns add to the states, and their coefficients."""
    count = len(config.columns)
    states = table.differences[:, :-count]
    without = fits.one_head(states, table.folds, table.inner)
    prompts = table.pairs.columns["prompt"]
    coefficients = (float(x) for x in head[-count:])
    return {
        "columns": dict(zip(config.columns, coefficients, strict=True)),
        "with_columns": dict(
            paired_metrics(right(single.margins), right(without.margins), prompts)
        ),
    }


def several_heads_metrics(
    margins: np.ndarray, base: np.ndarray, table: Table
) -> dict[str, Any]:
    """Several heads against one, on held-out votes."""
    prompts = table.pairs.columns["prompt"]
    loss = lambda x: float(np.mean(np.logaddexp(0, -x)))
    return {
        **paired_metrics(right(margins), right(base), prompts),
        "loss": loss(margins),
        "baseline_loss": loss(base),
    }


def head_sizes(
    weights: np.ndarray, table: Table, config: ProbeConfig
) -> list[dict[str, float]]:
    """How much each head counts on average, and for whom it counts most."""
    most = weights.argmax(axis=1)
    of = table.annotators if config.mixed_by != PROMPT else np.arange(len(weights))
    who = "prompts" if config.mixed_by == PROMPT else "annotators"
    keys = (
        table.pairs.columns["prompt"] if config.mixed_by == PROMPT else table.annotators
    )
    return [
        {
            "share": float(weights[of, k].mean()),
            who: len(np.unique(keys[most[of] == k])),
            "votes": int(np.sum(most[of] == k)),
        }
        for k in range(weights.shape[1])
    ]


def memberships(weights: np.ndarray, table: Table) -> list[dict[str, Any]]:
    """The weights of each annotator."""
    votes = np.bincount(table.annotators, minlength=len(table.names))
    return [
        {"annotator": name, "votes": int(n), "weights": [float(x) for x in of]}
        for name, n, of in zip(table.names, votes, weights)
    ]


def vote_lines(
    table: Table, single: np.ndarray, margins: np.ndarray
) -> list[dict[str, Any]]:
    """The held-out margins of each vote."""
    pairs = table.pairs
    return [
        {
            "id": str(pairs.ids[n]),
            "row": int(pairs.columns["row"][n]) + 1,
            "annotator": table.names[table.annotators[n]],
            "margin": float(margins[n]),
            "bradley_terry_margin": float(single[n]),
        }
        for n in range(len(pairs))
    ]


def _accuracy(hits: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """The share of the votes, with its 95% bootstrap interval over prompts."""
    mean = lambda weights: {"accuracy": weights @ hits / weights.sum()}
    names = "accuracy", "low", "high"
    return dict(zip(names, prompt_bootstrap(mean, prompts).values(), strict=True))


def right(margins: np.ndarray) -> np.ndarray:
    """Whether each vote agrees with the heads; a tie is 1/2."""
    return 0.5 + 0.5 * np.sign(margins)

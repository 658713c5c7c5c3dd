"""How far a language model's ranking of pairs is from what DPO could reach."""

import jax
import numpy as np
from jaxtyping import Float

from jaxpref import losses

Sides = Float[np.ndarray, "pairs 2"]
PerPair = Float[np.ndarray, " pairs"]


def ranking_metrics(
    logps: Sides, reference_logps: Sides | None, *, beta: float
) -> tuple[dict[str, float], dict[str, PerPair]]:
    """Ranking accuracies by log-probabilities, and the difficulty of each pair.

    A policy may have rewards that are right for almost every pair, and still write the
    rejected answer rather than the chosen one, if its reference does so by far.

    Args:
      logps: log-probabilities of the chosen and the rejected answer, summed over
        tokens, in nats; [pairs, 2].
      reference_logps: those of the reference; None if there is none.
      beta: inverse temperature of the KL penalty.

    Returns:
      Means by name: `ranking/accuracies` of the model; and with a reference,
      `ranking/reference_accuracies`, `ranking/idealized_accuracies` of the policy that
      minimizes DPO perfectly if every label is right, and `ranking/difficulty`.  And
      per pair, [pairs] by name, `difficulty`: how small the DPO loss of the pair must
      be for the model to rank it as labeled.

    References:
      Chen et al., "Preference Learning Algorithms Do Not Learn Preference Rankings",
      2024, arXiv:2405.19534, Theorems 3.1 and 4.1.
    """
    accuracy = lambda table: losses.ranking_accuracy(*jax.numpy.asarray(table).T)
    values = {"accuracies": accuracy(logps)}
    if reference_logps is None:
        return _means(values), {}
    chosen, rejected = jax.numpy.asarray(reference_logps).T
    certain = jax.numpy.ones_like(chosen)
    difficulty = losses.ranking_difficulty(chosen, rejected, beta=beta)
    values |= {
        "reference_accuracies": accuracy(reference_logps),
        "idealized_accuracies": losses.idealized_ranking_accuracy(
            chosen, rejected, certain, beta=beta
        ),
        "difficulty": difficulty,
    }
    return _means(values), {"difficulty": np.asarray(difficulty, np.float64)}


def _means(values: dict[str, jax.Array]) -> dict[str, float]:
    return {f"ranking/{name}": float(x.mean()) for name, x in values.items()}

"""Held-out margins of linear reward heads on frozen features.

A margin is the reward of the answer that a vote prefers minus that of the other one, in
nats.  Features are differences between these answers, with a mean square of 1.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxpref.data.hashing import hash_uniforms
from jaxpref.evaluate.crossfit import CrossFit, cross_fit, fit_path
from jaxpref.noise import mixture_heads, prototypes

Differences = Float[np.ndarray, "votes features"]
Some = Bool[np.ndarray, " votes"]
Folds = Int[np.ndarray, " votes"]
STARTS = 4
"""Random starts of several heads."""
PENALTIES = tuple(10.0 ** (power / 2) for power in (-3, -1, 1, 3))
"""Candidate penalties of several heads."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Several heads, and how much each counts."""

    heads: Float[np.ndarray, "heads features"]
    """Nats per unit of the features."""
    weights: Float[np.ndarray, "groups heads"]
    """How much each counts: for each annotator, or for each vote if its prompt says
    so."""
    margins: Float[np.ndarray, " votes"]
    """The margin of every vote, whether the heads were fitted to it or not."""


def one_head(differences: Differences, folds: Folds, inner: Folds) -> CrossFit:
    """A Bradley-Terry model; see `cross_fit`."""
    return cross_fit(differences, folds, inner)


def final_head(differences: Differences, found: CrossFit) -> Float[np.ndarray, " D"]:
    """The head fitted to all votes, with the median of the folds' penalties."""
    penalty = float(np.nanmedian(found.penalties))
    return fit_path(differences, [penalty])[:, 0]


def by_annotator(
    differences: Differences,
    annotators: Int[np.ndarray, " votes"],
    learned: Some,
    *,
    num_annotators: int,
    num_heads: int,
    penalty: float,
    seed: int,
) -> Heads:
    """PAL with linear prototypes, fitted to the votes `learned`.

    Minimizes the mean loss of the votes plus penalty / 2 times the heads' squared
    norms, as for one head.  The weights of annotators are then estimated again, with a
    prior that keeps those with few votes near equal weights.
    """
    first, where = jnp.asarray(differences, jnp.float32), jnp.asarray(learned)
    found = prototypes.fit(
        first,
        jnp.zeros_like(first),
        jnp.asarray(annotators),
        jax.random.key(seed),
        num_annotators=num_annotators,
        num_prototypes=num_heads,
        margins=prototypes.linear_margins,
        where=where,
        starts=STARTS,
        decay=penalty * float(learned.sum()),
    )
    return placed(
        np.asarray(found.prototypes),
        differences,
        annotators,
        learned,
        num_annotators=num_annotators,
    )


def placed(
    heads: Float[np.ndarray, "heads features"],
    differences: Differences,
    annotators: Int[np.ndarray, " votes"],
    learned: Some,
    *,
    num_annotators: int,
) -> Heads:
    """Fixed heads, with the weights of all annotators from their votes `learned`."""
    margins = jnp.asarray(differences @ heads.T, jnp.float32)
    weights = prototypes.weights_of(
        margins,
        jnp.asarray(annotators),
        num_annotators=num_annotators,
        where=jnp.asarray(learned),
    )
    mixed = prototypes.mixed_margins(margins, weights, jnp.asarray(annotators))
    return Heads(heads, np.asarray(weights), np.asarray(mixed, np.float64))


def by_prompt(
    differences: Differences,
    contexts: Float[np.ndarray, "votes context"],
    learned: Some,
    *,
    num_heads: int,
    penalty: float,
    seed: int,
) -> Heads:
    """MiCRo, fitted to the votes `learned`; see `mixture_heads.fit`."""
    first = jnp.asarray(differences, jnp.float32)
    about = jnp.asarray(contexts, jnp.float32)
    found = mixture_heads.fit(
        first,
        jnp.zeros_like(first),
        about,
        jax.random.key(seed),
        num_heads=num_heads,
        where=jnp.asarray(learned),
        starts=STARTS,
        decay=penalty * float(learned.sum()),
    )
    router = mixture_heads.log_router(about, found.router, found.bias)
    margins = mixture_heads.mixture_logits(first @ found.heads.T, router)
    return Heads(
        np.asarray(found.heads),
        np.asarray(jnp.exp(router)),
        np.asarray(margins, np.float64),
    )


def best_penalty(
    fit: Callable[[Some, float], Heads], learned: Some, inner: Folds
) -> float:
    """The penalty under which the first inner fold of the learned votes is most likely.

    Several heads need their own: those who want different things may have nothing in
    common that one head could learn.

    Args:
      fit: fits heads to some votes with a penalty.
      learned: votes that may be used.
      inner: a fold of each vote, by prompt.
    """
    held = learned & (inner == inner[learned].min())
    if not (learned & ~held).any():
        return PENALTIES[-1]
    losses = [
        np.mean(np.logaddexp(0, -fit(learned & ~held, penalty).margins[held]))
        for penalty in PENALTIES
    ]
    return PENALTIES[int(np.argmin(losses))]


def first_votes(
    annotators: Int[np.ndarray, " votes"], among: Some, count: int, *, seed: int
) -> Some:
    """`count` votes of each annotator, or as many as there are, chosen at random."""
    order = np.random.default_rng(seed).permutation(len(annotators))
    order = order[among[order]]
    order = order[np.argsort(annotators[order], kind="stable")]
    starts = np.searchsorted(annotators[order], annotators[order], side="left")
    found = np.zeros(len(annotators), bool)
    found[order[np.arange(len(order)) - starts < count]] = True
    return found


def annotator_folds(names: Sequence[str | None], *, folds: int, seed: int) -> Folds:
    """Assigns annotators to folds, as equal in size as possible."""
    uniforms = hash_uniforms(map(str, names), salt=f"annotators {seed}")
    found = np.empty(len(names), np.int64)
    found[np.argsort(uniforms)] = np.arange(len(names)) % folds
    return found

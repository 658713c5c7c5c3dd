"""PAL: annotators who want different things, each a mixture of a few prototypes.

Annotators may contradict each other without being wrong.  Each has weights w over K
prototypes that all share, and prefers the answer that suits the mixture:

    m_k     margin of a pair for prototype k, the logit that the first answer is better
    m       sum_k w_ak m_k, that of annotator a; w_ak >= 0, sum_k w_ak = 1
    P       s(m), the probability that a prefers the first answer

In PAL-A, prototypes are points p_k among the answers' features f, and the ideal point
of a is p_a = sum_k w_ak p_k: the answer nearer to it is better.  Because the weights
sum to 1, that is the mixture above:

    m_k = |f_2 - p_k|^2 - |f_1 - p_k|^2,    m = |f_2 - p_a|^2 - |f_1 - p_a|^2

In PAL-B, prototypes are directions g_k(x) that depend on the prompt, and
m_k = <f_1 - f_2, g_k(x)>.  If they do not, they are linear reward heads: with one of
them, this is a Bradley-Terry model.

Votes are on frozen features, for example the hidden states of a language model.  Mask
padding with `where`.

Source: Chen, Chen, Rege, and Vinayak, "PAL: Pluralistic Alignment Framework for
Learning from Heterogeneous Preferences", 2024, arXiv:2406.08469, models A and B.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref.noise._adam import adam

__all__ = [
    "Fit",
    "direction_margins",
    "fit",
    "ideal_point_margins",
    "linear_margins",
    "mixed_margins",
    "weights_of",
]

Mask = Bool[Array, " votes"] | None


def ideal_point_margins(
    first: Float[Array, "votes features"],
    second: Float[Array, "votes features"],
    prototypes: Float[Array, "prototypes features"],
) -> Float[Array, "votes prototypes"]:
    """The margins of PAL-A: m_k = |f_2 - p_k|^2 - |f_1 - p_k|^2, nats."""
    distances = lambda f: jnp.sum(jnp.square(f[:, None] - prototypes), axis=-1)
    return distances(second) - distances(first)


def linear_margins(
    first: Float[Array, "votes features"],
    second: Float[Array, "votes features"],
    prototypes: Float[Array, "prototypes features"],
) -> Float[Array, "votes prototypes"]:
    """The margins of PAL-B if g_k is the same for all prompts, in nats."""
    return (first - second) @ prototypes.T


def direction_margins(
    first: Float[Array, "votes features"],
    second: Float[Array, "votes features"],
    directions: Float[Array, "votes prototypes features"],
) -> Float[Array, "votes prototypes"]:
    """The margins of PAL-B: m_k = <f_1 - f_2, g_k(x)>, nats.

    Args:
      first: f_1, features of the first answers.
      second: f_2, those of the second ones.
      directions: g_k(x), one for each prototype and the prompt of each vote.
    """
    return jnp.einsum("nd,nkd->nk", first - second, directions)


def mixed_margins(
    margins: Float[Array, "votes prototypes"],
    weights: Float[Array, "annotators prototypes"],
    annotators: Int[Array, " votes"],
) -> Float[Array, " votes"]:
    """M = sum_k w_ak m_k, the margin of each vote for its annotator, nats."""
    return jnp.sum(weights[annotators] * margins, axis=-1)


@functools.partial(jax.jit, static_argnames=("num_annotators", "steps"))
def weights_of(
    margins: Float[Array, "votes prototypes"],
    annotators: Int[Array, " votes"],
    *,
    num_annotators: int,
    where: Mask = None,
    concentration: float = 1.1,
    steps: int = 200,
) -> Float[Array, "annotators prototypes"]:
    """The weights of annotators for fixed prototypes, by maximum a posteriori.

        maximize  sum_votes log s(sum_k w_ak m_k) + sum_k (concentration - 1) log w_ak

    on the simplex, where it is concave.  Annotators are independent of each other, so
    this also places new ones from a few votes, without touching the rest.  Solved by
    Adam in the logits of the weights.  Without votes, all weights are equal.

    Args:
      margins: m_k of the answer that the vote prefers over the other, nats.
      annotators: who gave each vote, from 0 to `num_annotators` - 1.
      num_annotators: A.
      where: which votes are real; all by default.
      concentration: of the symmetric Dirichlet prior, > 1 so that no weight is 0.
      steps: steps of Adam.
    """
    real = jnp.ones(annotators.shape, bool) if where is None else where
    margins = jnp.where(real[:, None], margins, 0)

    def penalized(logits):
        log_weights = jax.nn.log_softmax(logits, axis=-1)
        mixed = mixed_margins(margins, jnp.exp(log_weights), annotators)
        losses = jnp.where(real, jax.nn.softplus(-mixed), 0)
        return jnp.sum(losses) - (concentration - 1) * jnp.sum(log_weights)

    zeros = jnp.zeros((num_annotators, margins.shape[-1]))
    found = adam(jax.grad(penalized), zeros, steps=steps, learning_rate=0.1)
    return jax.nn.softmax(found, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`."""

    prototypes: Float[Array, "prototypes features"]
    """p_k, in the units of the features."""
    weights: Float[Array, "annotators prototypes"]
    """w, what each annotator is a mixture of."""
    margins: Float[Array, " votes"]
    """m of each vote, positive where it is what the fit expects of its annotator."""
    loss: Float[Array, ""]
    """Mean of -log s(m) over the votes, nats."""


@functools.partial(
    jax.jit,
    static_argnames=("num_annotators", "num_prototypes", "margins", "starts", "steps"),
)
def fit(
    preferred: Float[Array, "votes features"],
    other: Float[Array, "votes features"],
    annotators: Int[Array, " votes"],
    key: PRNGKeyArray,
    *,
    num_annotators: int,
    num_prototypes: int,
    margins: Callable[..., Array] = ideal_point_margins,
    where: Mask = None,
    starts: int = 8,
    steps: int = 300,
    learning_rate: float = 0.1,
    decay: float = 1.0,
) -> Fit:
    """Prototypes and the weights of all annotators from their votes.

        minimize  sum_votes -log s(m) + decay / 2 sum_k |p_k|^2

    by Adam, in the prototypes and the logits of the weights together.  That is not
    convex, so several starts are made and the best one is kept.  Which prototype comes
    first is arbitrary.

    Args:
      preferred: features of the answers that the votes prefer.
      other: features of the other answers.
      annotators: who gave each vote, from 0 to `num_annotators` - 1.
      key: a JAX random key, for the starts.
      num_annotators: A.
      num_prototypes: K.
      margins: `ideal_point_margins` (PAL-A) or `linear_margins`.
      where: which votes are real; all by default.
      starts: number of random starts.
      steps: steps of Adam.
      learning_rate: of Adam, in units of the features and of logits.
      decay: precision of the normal prior of the prototypes around 0, >= 0.
    """
    real = jnp.ones(annotators.shape, bool) if where is None else where
    # The features of padding may be anything.
    first, second = (jnp.where(real[:, None], x, 0) for x in (preferred, other))

    def margins_of(params):
        of_prototypes = margins(first, second, params["prototypes"])
        weights = jax.nn.softmax(params["logits"], axis=-1)
        return mixed_margins(of_prototypes, weights, annotators)

    def loss_of(params):
        losses = jnp.where(real, jax.nn.softplus(-margins_of(params)), 0)
        return jnp.sum(losses) / jnp.maximum(jnp.sum(real), 1)

    def penalized(params):
        prior = decay / 2 * jnp.sum(jnp.square(params["prototypes"]))
        return loss_of(params) + prior / jnp.maximum(jnp.sum(real), 1)

    def one_start(key):
        of_points, of_logits = jax.random.split(key)
        points = jax.random.normal(of_points, (num_prototypes, first.shape[-1]))
        logits = jax.random.normal(of_logits, (num_annotators, num_prototypes))
        params = adam(
            jax.grad(penalized), {"prototypes": points, "logits": 0.1 * logits},
            steps=steps, learning_rate=learning_rate,
        )  # fmt: skip
        return params, penalized(params)

    all_params, found = jax.vmap(one_start)(jax.random.split(key, starts))
    best = jax.tree.map(lambda x: x[jnp.argmin(found)], all_params)
    weights = jax.nn.softmax(best["logits"], axis=-1)
    return Fit(best["prototypes"], weights, margins_of(best), loss_of(best))

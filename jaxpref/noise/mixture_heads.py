"""MiCRo: several reward heads, and a router that says which one a context asks for.

Labels without annotators may still follow different preferences.  With K heads w_k on
the features f of an answer, and a router on the features c of a context, such as a
prompt or an instruction,

    m_k     <f_1 - f_2, w_k>, the margin of a pair for head k, nats
    pi_k    softmax_k(<c, v_k> + b_k), P(the label follows head k | context)
    P       sum_k pi_k s(m_k), the probability that the first answer is preferred

This mixes probabilities, and so describes labels of which each follows one head;
`prototypes` mixes margins, and so describes annotators between two views.

Source: Shen et al., "MiCRo: Mixture Modeling and Context-aware Routing for Personalized
Preference Learning", 2025, arXiv:2505.24846: the mixture, and the adaptation of the
router to a user.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxpref.noise._adam import adam

__all__ = ["Fit", "adapted", "fit", "log_router", "mixture_logits", "responsibilities"]

Mask = Bool[Array, " pairs"] | None
Heads = Float[Array, "pairs heads"]
"""One number for each pair and head."""


def log_router(
    contexts: Float[Array, "pairs context"],
    router: Float[Array, "context heads"],
    bias: Float[Array, " heads"],
) -> Heads:
    """Log pi_k, the log-probabilities of the heads for each context."""
    return jax.nn.log_softmax(contexts @ router + bias, axis=-1)


def responsibilities(margins: Heads, log_priors: Heads) -> Heads:
    """P(head k | label, context), the E-step: proportional to pi_k s(m_k).

    Args:
      margins: m_k of the preferred answer over the other, nats.
      log_priors: log pi_k.
    """
    return jax.nn.softmax(log_priors + jax.nn.log_sigmoid(margins), axis=-1)


def mixture_logits(margins: Heads, log_priors: Heads) -> Float[Array, " pairs"]:
    """The logit of sum_k pi_k s(m_k), positive where the first answer is preferred."""
    likely = lambda m: jax.nn.logsumexp(log_priors + jax.nn.log_sigmoid(m), axis=-1)
    return likely(margins) - likely(-margins)


def adapted(
    log_priors: Float[Array, " heads"],
    margins: Float[Array, "votes heads"],
    *,
    rate: float = 1.0,
) -> Float[Array, " heads"]:
    """The router of one user after some votes, as log-probabilities.

        log pi_k + rate sum_votes log s(m_k), normalized

    With a rate of 1, it is the posterior of the head that the user follows; a smaller
    one trusts the votes less.

    Args:
      log_priors: log pi_k of the user's context.
      margins: m_k of the answers that the user prefers over the others, nats.
      rate: what a vote counts, >= 0.
    """
    evidence = jnp.sum(jax.nn.log_sigmoid(margins), axis=0)
    return jax.nn.log_softmax(log_priors + rate * evidence)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`."""

    heads: Float[Array, "heads features"]
    """w_k, nats per unit of the features."""
    router: Float[Array, "context heads"]
    """v_k."""
    bias: Float[Array, " heads"]
    """b_k."""
    responsibilities: Heads
    """P(head k | label, context) of each pair."""
    loss: Float[Array, ""]
    """Mean of -log P over the pairs, nats."""


@functools.partial(jax.jit, static_argnames=("num_heads", "starts", "steps"))
def fit(
    preferred: Float[Array, "pairs features"],
    other: Float[Array, "pairs features"],
    contexts: Float[Array, "pairs context"],
    key: PRNGKeyArray,
    *,
    num_heads: int,
    where: Mask = None,
    starts: int = 8,
    steps: int = 400,
    learning_rate: float = 0.05,
    decay: float = 1.0,
) -> Fit:
    """Heads and router from the labels of pairs, by generalized EM.

        minimize  sum_pairs -log P + decay / 2 (sum_k |w_k|^2 + sum_k |v_k|^2)

    Each step computes the responsibilities and improves heads and router by a step of
    Adam on the expected log-likelihood, which has the same gradient as log P.  It is
    not convex, so several starts are made and the best one is kept.  Which head comes
    first is arbitrary.

    Args:
      preferred: features of the answers that are preferred.
      other: features of the other answers.
      contexts: features of each pair's context.
      key: a JAX random key, for the starts.
      num_heads: K.
      where: which pairs are real; all by default.
      starts: number of random starts.
      steps: steps of Adam.
      learning_rate: of Adam.
      decay: precision of the normal priors of w and v around 0, >= 0.
    """
    real = jnp.ones(len(preferred), bool) if where is None else where
    # The features of padding may be anything.
    blank = lambda x: jnp.where(real[:, None], x, 0)
    difference, about = blank(preferred) - blank(other), blank(contexts)
    count = jnp.maximum(jnp.sum(real), 1)

    def parts(params):
        margins = difference @ params["heads"].T
        return margins, log_router(about, params["router"], params["bias"])

    def loss_of(params):
        margins, log_priors = parts(params)
        joint = log_priors + jax.nn.log_sigmoid(margins)
        return -jnp.sum(jnp.where(real, jax.nn.logsumexp(joint, axis=-1), 0)) / count

    def prior(params):
        square = lambda name: jnp.sum(jnp.square(params[name]))
        return decay / 2 * (square("heads") + square("router")) / count

    def expected(params, found):
        """The M-step's objective, for the responsibilities of the E-step."""
        margins, log_priors = parts(params)
        joint = found * (log_priors + jax.nn.log_sigmoid(margins))
        return -jnp.sum(jnp.where(real[:, None], joint, 0)) / count + prior(params)

    def gradient(params):
        found = responsibilities(*parts(params))
        return jax.grad(expected)(params, found)

    def one_start(key):
        start = {
            "heads": jax.random.normal(key, (num_heads, difference.shape[-1])),
            "router": jnp.zeros((about.shape[-1], num_heads)),
            "bias": jnp.zeros(num_heads),
        }
        params = adam(gradient, start, steps=steps, learning_rate=learning_rate)
        return params, loss_of(params) + prior(params)

    all_params, found = jax.vmap(one_start)(jax.random.split(key, starts))
    best = jax.tree.map(lambda x: x[jnp.argmin(found)], all_params)
    return Fit(
        **best, responsibilities=responsibilities(*parts(best)), loss=loss_of(best)
    )

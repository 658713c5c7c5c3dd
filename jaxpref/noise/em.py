"""Expectation maximization for label noise: correct votes and annotator reliabilities.

A vote is one annotator's label of one pair.  The model predicts the probability of the
label.  Annotator k is right with probability eta_k, its reliability, on every pair:

    z        logit of the model's probability that the vote is right: its margin,
             positive where the model agrees with the vote; p = s(z)
    eta      reliability of the vote's annotator; 1 - eta is its flip rate
    P(vote)  = eta p + (1 - eta) (1 - p)
    w        = P(right | vote) = s(z + logit eta), the E-step
    eta_k    = mean of w over the votes of k, the M-step

z must come from a model that has not been trained on the vote (held out or
cross-fitted) and must be calibrated (`jaxpref.noise.calibration`).  Otherwise the
estimate is biased: an overconfident model makes annotators look worse, and an
underconfident one makes them look better.  (model, eta) and (-model, 1 - eta) explain
the votes equally well.  The model determines which it is, so margins with the wrong
sign give 1 - eta.

Ties are not votes: leave them out, or mask them with `where`.

Source: Cao et al., "Robust Preference Optimization: Aligning Language Models with Noisy
Preference Feedback" (RE-PO), 2025, arXiv:2509.24159, Eq. 3 to 7.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpref.losses._common import Mask, Number, PerPair, Scalar
from jaxpref.noise import _common
from jaxpref.noise.em_fit import PRIOR, START, Fit, Prior, fit
from jaxpref.noise.em_prior import pooled_prior

__all__ = [
    "PRIOR",
    "START",
    "Fit",
    "Prior",
    "estimate",
    "fit",
    "likelihood_loss",
    "pooled_prior",
    "posterior",
    "tally",
    "update",
    "votes_posterior",
    "weighted_loss",
]

Votes = Int[Array, "*batch"]
"""The annotator of each vote."""


def posterior(margin_logits: PerPair, reliability: Number) -> PerPair:
    """The E-step for one vote per pair: the probability that each vote is right.

        w = p eta / (p eta + (1 - p) (1 - eta)) = s(z + logit eta)

    z = 0, an uninformative model, gives eta; eta = 1/2 gives p; eta = 1 gives 1.  If
    model and annotator are both certain and contradict each other, it is 1/2.

    Args:
      margin_logits: z, nats; [*batch].
      reliability: eta in [0, 1], one number or one per vote; broadcasts.

    Returns:
      Probabilities, at least float32; [*batch].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import em
      >>> print(em.posterior(jnp.array([40.0, 0.0, -40.0]), 0.75).round(2))
      [1.   0.75 0.  ]

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 4.
    """
    margins = _common.floating(margin_logits)
    return jax.nn.sigmoid(
        _common.finite(margins) + _common.logit(reliability, margins.dtype)
    )


def votes_posterior(
    margin_logits: PerPair,
    reliability: Number,
    votes: Int[Array, "*batch V"],
) -> Float[Array, "*batch V"]:
    """The E-step for several votes per pair, which share one latent truth.

        w_v = P(v right | all votes) = s(o_v (z + sum over u of o_u logit eta_u))

    Given the truth, the votes are independent (Dawid and Skene), and s(z), the model's
    probability that the first answer is better, is its prior.  A single vote for the
    first answer gives `posterior`.

    Args:
      margin_logits: z, nats, for the first answer; [*batch].
      reliability: eta in [0, 1]; one number or one per vote; broadcasts to `votes`.
      votes: o, 1 for the first answer, -1 for the second, 0 where there is no vote;
        [*batch, V].

    Returns:
      Probabilities, at least float32; [*batch, V]; 1/2 where there is no vote.

    References:
      Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the
      EM Algorithm", 1979; the prior is that of RE-PO, 2025, arXiv:2509.24159, Eq. 4.
    """
    margins = _common.floating(margin_logits)
    signs = jnp.asarray(votes, margins.dtype)
    evidence = jnp.sum(signs * _common.logit(reliability, margins.dtype), axis=-1)
    truth = _common.finite(margins) + _common.finite(evidence)
    return jax.nn.sigmoid(signs * truth[..., None])


def likelihood_loss(margin_logits: PerPair, weights: PerPair) -> PerPair:
    """The M-step of the model in RE-PO: the expected NLL of the latent label.

        loss = -w log s(z) - (1 - w) log s(-z),    no gradient through w

    Its gradient in z is s(z) - w.  For DPO, where z is the implicit reward margin, it
    equals `weighted_loss`.  Other losses are replaced by the logistic loss of their
    Gibbs logits (`jaxpref.losses.gibbs_logits`).  This drops terms that both orders of
    the answers share, e.g. CPO's likelihood term.

    Args:
      margin_logits: z, nats; [*batch].
      weights: w in [0, 1], the probability that the label is right; [*batch].

    Returns:
      One loss per vote, at least float32, >= 0; [*batch].

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 5.
    """
    z = _common.floating(margin_logits)
    w = jax.lax.stop_gradient(jnp.asarray(weights, z.dtype))
    # As softplus(z) - softplus(-z) = z, a single log-sigmoid suffices, and the result
    # is finite for every finite z and all w.
    return -jax.nn.log_sigmoid(z) + (1 - w) * z


def weighted_loss(
    loss_pair: PerPair, loss_exchanged: PerPair, weights: PerPair
) -> PerPair:
    """The M-step of the model with the original loss.

        loss = w loss(pair) + (1 - w) loss(swapped),    no gradient through w

    Args:
      loss_pair: the base loss of the pair as labeled; [*batch].
      loss_exchanged: the base loss with chosen and rejected exchanged; [*batch].
      weights: w in [0, 1], the probability that the label is right; [*batch].

    Returns:
      One loss per vote, [*batch]; w = 1 is the base loss.

    References:
      Another reading of RE-PO, 2025, arXiv:2509.24159, Eq. 5; its gradient is the same
      for logistic losses with loss(swapped) - loss(pair) = z, such as DPO.
    """
    loss_pair = _common.floating(loss_pair)
    w = jax.lax.stop_gradient(jnp.asarray(weights, loss_pair.dtype))
    return w * loss_pair + (1 - w) * loss_exchanged


def update(
    reliability: Float[Array, " annotators"],
    weights: PerPair,
    annotators: Votes,
    *,
    momentum: Scalar = 0.9,
    prior: Prior | None = None,
    where: Mask = None,
) -> Float[Array, " annotators"]:
    """The M-step of the reliabilities over one batch: a moving average.

        eta_k <- m eta_k + (1 - m) (a + sum of w) / (a + b + votes)

    The sums are over the votes of k in the global batch, regardless of its sharding.
    Annotators absent from the batch keep their value, bit for bit.  A single vote moves
    an annotator as far as a hundred votes in one batch; in `tally` it does not.

    Args:
      reliability: eta, one per annotator; -1 in `annotators` means the last one.
      weights: w, posterior probabilities that the votes are right; [*batch].
      annotators: int index of the annotator of each vote; -1 if unknown; [*batch].
      momentum: m, the weight of the old value; RE-PO's alpha is 1 - m.
      prior: None for the paper's mean, or (a, b): right and wrong votes added to every
        batch.
      where: which votes are real, [*batch]; None if all are.  The other votes are
        ignored, even if they hold NaN.

    Returns:
      The new reliabilities, in the dtype of the old ones.

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 7.
    """
    a, b = prior or (0.0, 0.0)
    right, votes = _common.sums(weights, annotators, where, reliability)
    mean = (a + right) / jnp.maximum(a + b + votes, 1e-12)
    moved = momentum * reliability + (1 - momentum) * mean
    return jnp.where(votes > 0, moved, reliability)


def tally(
    right: Float[Array, " annotators"],
    wrong: Float[Array, " annotators"],
    weights: PerPair,
    annotators: Votes,
    *,
    memory: Scalar = float("inf"),
    where: Mask = None,
) -> tuple[jax.Array, jax.Array]:
    """Soft counts of right and wrong votes, batch by batch: the M-step of online EM.

        right_k <- exp(-n_k / memory) right_k + sum of w
        wrong_k <- exp(-n_k / memory) wrong_k + sum of (1 - w)

    n_k is the number of votes of k in the global batch.  Counts decay with the votes of
    the same annotator, not with batches.  So rare annotators are not forgotten, and the
    batch size does not matter.  `estimate` converts counts to reliabilities.

    Args:
      right: soft counts so far, initially 0; -1 in `annotators` means the last one.
      wrong: the same for wrong votes.
      weights: w, posterior probabilities that the votes are right; [*batch].
      annotators: int index of the annotator of each vote; -1 if unknown; [*batch].
      memory: number of votes after which an old one's weight is 1/e;
        infinity for no decay.
      where: which votes are real, [*batch]; None if all are.

    Returns:
      The new counts; those of absent annotators are the old ones, bit for bit.

    References:
      Cappé and Moulines, "Online EM Algorithm for Latent Data Models", 2009,
      arXiv:0712.4273, for the idea.
    """
    new_right, votes = _common.sums(weights, annotators, where, right)
    decay = jnp.exp(-votes / memory)
    return decay * right + new_right, decay * wrong + (votes - new_right)


def estimate(
    right: Float[Array, " annotators"],
    wrong: Float[Array, " annotators"],
    *,
    prior: Prior = PRIOR,
) -> Float[Array, " annotators"]:
    """Reliabilities from soft counts: (a + right) / (a + b + right + wrong).

    Args:
      right: soft counts of right votes, one per annotator.
      wrong: soft counts of wrong votes, one per annotator.
      prior: (a, b), right and wrong votes added for every annotator; a + b > 0.

    Returns:
      Reliabilities, one per annotator; a / (a + b) for those without votes.

    Raises:
      ValueError: if `prior` is not made of two numbers >= 0 with a sum > 0.
    """
    a, b = _common.pseudo_counts(prior)
    if a + b == 0:
        raise ValueError(f"Expected a prior with a + b > 0, got {prior}.")
    return (a + right) / (a + b + right + wrong)

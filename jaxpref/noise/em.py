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

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses._common import Mask, PerPair, Rate, Scalar, is_number
from jaxpref.noise import _common
from jaxpref.sharding import replicated

START = 0.9
"""RE-PO's initial reliability."""
PRIOR = (9.0, 1.0)
"""Right and wrong pseudo-votes: ten votes at the initial reliability."""
Prior = tuple[Scalar, Scalar]
"""Right and wrong pseudo-votes (a, b): numbers, or traced scalars."""
Votes = Int[Array, "*batch"]
"""The annotator of each vote."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`, replicated on all devices."""

    reliability: Float[Array, " annotators"]
    """P(a vote of this annotator is right); the mode of its posterior."""
    lower: Float[Array, " annotators"]
    """Lower end of the credible interval of the reliability."""
    upper: Float[Array, " annotators"]
    """Upper end of the credible interval."""
    posterior: Float[Array, " votes"]
    """P(this vote is right | all votes); meaningless where not real."""
    evidence: Float[Array, " votes"]
    """The logit that the vote is right, ignoring its annotator: from the margin and the
    other votes on the item.  `posterior` is s(evidence + logit reliability)."""
    counts: Float[Array, " annotators"]
    """Votes of each annotator."""
    log_likelihood: Float[Array, ""]
    """log P(votes) at the estimated reliabilities, nats, without the prior."""
    iterations: Int[Array, ""]
    """Number of M-steps."""
    converged: Bool[Array, ""]
    """Whether the estimated distance to the fixed point is below the tolerance."""


def posterior(margin_logits: PerPair, reliability: Rate) -> PerPair:
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

        loss = w loss(pair) + (1 - w) loss(exchanged),    no gradient through w

    Args:
      loss_pair: the base loss of the pair as labeled; [*batch].
      loss_exchanged: the base loss with chosen and rejected exchanged; [*batch].
      weights: w in [0, 1], the probability that the label is right; [*batch].

    Returns:
      One loss per vote, [*batch]; w = 1 is the base loss.

    References:
      Another reading of RE-PO, 2025, arXiv:2509.24159, Eq. 5; its gradient is the same
      for logistic losses with loss(exchanged) - loss(pair) = z, such as DPO.
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
      memory: number of votes after which an old one counts 1/e; infinity for no decay.
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


def fit(
    margin_logits: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    items: Int[Array, " votes"] | None = None,
    num_annotators: int,
    orientation: Int[Array, " votes"] | None = None,
    where: Bool[Array, " votes"] | None = None,
    prior: Prior | None = PRIOR,
    start: float = START,
    level: float = 0.95,
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
) -> Fit:
    """Estimates annotator reliabilities by EM over a whole dataset, to convergence.

        L_i   = M_i + sum over the votes n on item i of d_n logit eta_n
        w_n   = s(d_n L_i)
        eta_k = (a + sum of w over the votes of k) / (a + b + their number)

    d_n is +1 if the vote prefers the first answer of its item and -1 if the second, and
    M_i = d_n z_n is the item's margin (the mean, if its votes have different margins).
    Votes on one item share a latent truth, so they are evidence about each other.  The
    steps never lower the log-likelihood plus the log-prior
    a log eta_k + b log(1 - eta_k), summed over annotators.

    The credible interval is the equal-tailed interval of the posterior of eta_k given
    the other reliabilities, on a grid; it is exact with one vote per item.  Coverage of
    95% intervals for 1000 annotators with 10, 100, or 1000 votes and a flat prior:
    0.936 to 0.980 with one vote per item, and 0.905 to 0.966 with five.  The exception
    is 0.823 at 10 votes of reliability 0.6, where the others' reliabilities are just as
    uncertain.  A Beta of the summed posteriors, which treats them as counts, covered
    0.557 to 0.859 and 0.780 to 0.965, and a normal from the curvature 0.930 to 0.992
    and 0.807 to 0.999 (`python -m tests.noise.simulations`, seed 0).

    Args:
      margin_logits: z, nats, positive where the model agrees with the vote; [votes].
      annotators: int index of the annotator; -1 if unknown.  All unknown annotators are
        treated as one, the last of `num_annotators`; [votes].
      items: which votes judge the same pair; any integers; None if each has its own.
      num_annotators: K, the number of names, plus 1 if some are unknown.
      orientation: d, +1 or -1; None for the signs of the margins (+1 for 0).  That is
        correct if the votes on an item have the same nonzero margin up to its sign.
        Needed to fit without a model, all margins 0 (Dawid and Skene's estimator with
        two labels and one rate per annotator).
      where: which votes are real (ties are not); None if all are.
      prior: (a, b), right and wrong votes added for every annotator: a Beta(a + 1,
        b + 1) prior.  None for maximum likelihood, where annotators without a vote keep
        `start`.
      start: initial reliability without a prior; with a prior it is a / (a + b).
      level: probability of the credible intervals.
      max_iterations: maximum number of M-steps.
      tolerance: distance in eta from the fixed point at which to stop, estimated from
        the last two steps, because EM is slow if margins are small.

    Returns:
      `Fit`.

    Raises:
      ValueError: if shapes differ, there is no vote, an option is out of range, or,
        outside `jit`, `annotators` holds an index below -1 or beyond the last, or both
        -1 and the last.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.noise import em
      >>> margins = jnp.array([4.0, 4.0, 4.0, -4.0] * 50)  # 1 of 4 contradicted
      >>> found = em.fit(margins, jnp.full(200, -1), num_annotators=1, prior=None)
      >>> print(found.reliability.round(2))
      [0.76]

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 3, 4 and 6.
      Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the
      EM Algorithm", 1979, for several votes on an item.
    """
    margins = _common.floating(margin_logits)
    annotators = jnp.asarray(annotators)
    given = {"annotators": annotators, "items": items}
    given |= {"orientation": orientation, "where": where}
    for name, array in given.items():
        if array is not None and jnp.shape(array) != margins.shape:
            raise ValueError(
                f"Expected {name} of shape {margins.shape}, got {jnp.shape(array)}."
            )
    if margins.ndim != 1 or not margins.size:
        raise ValueError(f"Expected one vote or more, [votes], got {margins.shape}.")
    if num_annotators < 1 or max_iterations < 1:
        raise ValueError(
            "Expected num_annotators and max_iterations >= 1, got "
            f"{num_annotators} and {max_iterations}."
        )
    for name, share in (("level", level), ("start", start)):
        if is_number(share) and not 0 < share < 1:
            raise ValueError(f"Expected {name} in (0, 1), got {share}.")
    a, b = (0.0, 0.0) if prior is None else _common.pseudo_counts(prior)
    where = jnp.ones(margins.shape, bool) if where is None else jnp.asarray(where, bool)
    _common.check_annotators(annotators, where, num_annotators)
    return _fit(
        margins,
        annotators,
        items,
        orientation,
        where,
        a=a,
        b=b,
        start=start,
        level=level,
        tolerance=tolerance,
        num_annotators=num_annotators,
        max_iterations=max_iterations,
    )


@functools.partial(jax.jit, static_argnames=("num_annotators", "max_iterations"))
def _fit(
    margins,
    annotators,
    items,
    orientation,
    where,
    *,
    a,
    b,
    start,
    level,
    tolerance,
    num_annotators,
    max_iterations,
) -> Fit:
    # Scores are small, so replicate everything on every device.
    margins, annotators, where = map(replicated, (margins, annotators, where))
    dtype = margins.dtype
    a, b, start = (jnp.asarray(x, dtype) for x in (a, b, start))
    annotators = jnp.where(annotators < 0, num_annotators - 1, annotators)
    real = where.astype(dtype)
    per_annotator = lambda x: jax.ops.segment_sum(x, annotators, num_annotators)
    counts = per_annotator(where.astype(jnp.int32))
    votes = counts.astype(dtype)

    # Masked before any nonlinearity, so that padding cannot cause NaN.
    margins = _common.finite(jnp.where(where, margins, 0))
    if items is None:
        sign, on_item, judged = jnp.ones_like(margins), lambda x: x, where
    else:
        sign = jnp.where(margins < 0, -1, 1)
        sign = sign if orientation is None else jnp.sign(replicated(orientation))
        sign = sign.astype(dtype)
        _, ids = jnp.unique(
            replicated(jnp.asarray(items)), return_inverse=True, size=margins.size
        )
        per_item = lambda x: jax.ops.segment_sum(x, ids, margins.size)
        on_item = lambda x: per_item(x)[ids]
        judges = on_item(real)
        margins = sign * on_item(real * sign * margins / jnp.maximum(judges, 1))
        # The first real vote on an item represents it in the likelihood.
        position = jnp.arange(margins.size)
        first = jax.ops.segment_min(
            jnp.where(where, position, margins.size), ids, margins.size
        )
        judged = where & (first[ids] == position)

    # Keep eta away from 0 and 1, where a contradiction has probability 0.
    least = jnp.finfo(dtype).eps
    bounded = lambda eta: jnp.clip(eta, least, 1 - least)

    def evidence(eta):
        """Logit that each vote is right, from the margin and the item's other votes."""
        logits = real * sign * _common.logit(eta, dtype)[annotators]
        return margins + sign * (on_item(logits) - logits)

    def e_step(eta):
        return jax.nn.sigmoid(evidence(eta) + _common.logit(eta, dtype)[annotators])

    def m_step(eta):
        # Sum w - eta instead of w: near the fixed point the terms cancel instead of
        # growing with the votes, which preserves precision in float32.
        surplus = per_annotator(real * (e_step(eta) - eta[annotators]))
        prior = a * (1 - eta) - b * eta
        return bounded(eta + (prior + surplus) / jnp.maximum(a + b + votes, least))

    def step(carry):
        eta, moved, _, iterations = carry
        new = m_step(eta)
        now = jnp.abs(new - eta)
        # The steps shrink by a factor r, so the remaining distance is r / (1 - r) times
        # the last step.  Steps at the level of rounding errors no longer shrink.
        ratio = jnp.clip(now / jnp.maximum(moved, least), 0, 1 - 1e-4)
        left = jnp.where(now <= 4 * least, 0, now * ratio / (1 - ratio))
        done = (iterations > 0) & (jnp.max(left) <= tolerance)
        return new, now, done, iterations + 1

    def going(carry):
        return ~carry[2] & (carry[3] < max_iterations)

    eta = jnp.where((a > 0) & (b > 0), a / jnp.maximum(a + b, least), start)
    eta = bounded(jnp.full(num_annotators, eta, dtype))
    carry = (eta, jnp.ones_like(eta), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    eta, _, converged, iterations = jax.lax.while_loop(going, step, carry)

    known = evidence(eta)
    lower, upper = _common.credible_interval(known, eta, annotators, real, a, b, level)
    own = jnp.log(eta)[annotators], jnp.log1p(-eta)[annotators]
    right, wrong = (jnp.where(sign > 0, x, y) for x, y in (own, own[::-1]))
    first_better = jax.nn.log_sigmoid(sign * margins) + on_item(real * right)
    second_better = jax.nn.log_sigmoid(-sign * margins) + on_item(real * wrong)
    log_likelihoods = jnp.logaddexp(first_better, second_better)
    return Fit(
        reliability=eta,
        lower=lower,
        upper=upper,
        posterior=jax.nn.sigmoid(known + _common.logit(eta, dtype)[annotators]),
        evidence=known,
        counts=counts,
        log_likelihood=jnp.sum(jnp.where(judged, log_likelihoods, 0)),
        iterations=iterations,
        converged=converged,
    )

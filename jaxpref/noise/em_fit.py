"""EM over a whole dataset of votes, to convergence.

The model, its notation, and what it requires of the margins are in `jaxpref.noise.em`,
which also has the steps for one batch.  Several votes on an item share its truth.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpref.losses._common import Scalar, is_number
from jaxpref.noise import _common, _em_interval
from jaxpref.noise.em_prior import START, pooled_prior
from jaxpref.sharding import replicated

PRIOR = (9.0, 1.0)
"""Right and wrong pseudo-votes: ten votes at the initial reliability."""
POOLINGS = 3
"""How often the pooled prior and the reliabilities are estimated alternately."""
Prior = tuple[Scalar, Scalar]
"""Right and wrong pseudo-votes (a, b): numbers, or traced scalars."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `fit`, replicated on all devices."""

    reliability: Float[Array, " annotators"]
    """P(a vote of this annotator is right); the mode of its posterior."""
    lower: Float[Array, " annotators"]
    """Lower end of the interval of the reliability."""
    upper: Float[Array, " annotators"]
    """Upper end of the interval."""
    posterior: Float[Array, " votes"]
    """P(this vote is right | all votes); meaningless where not real."""
    evidence: Float[Array, " votes"]
    """The logit that the vote is right, ignoring its annotator: from the margin and the
    other votes on the item.  `posterior` is s(evidence + logit reliability)."""
    counts: Float[Array, " annotators"]
    """Votes of each annotator."""
    prior: tuple[Float[Array, ""], Float[Array, ""]]
    """(a, b), the right and wrong pseudo-votes: as given, or as estimated."""
    log_likelihood: Float[Array, ""]
    """log P(votes) at the estimated reliabilities, nats, without the prior."""
    iterations: Int[Array, ""]
    """Number of M-steps."""
    converged: Bool[Array, ""]
    """Whether the estimated distance to the fixed point is below the tolerance."""


def fit(
    margin_logits: Float[Array, " votes"],
    annotators: Int[Array, " votes"],
    *,
    items: Int[Array, " votes"] | None = None,
    num_annotators: int,
    orientation: Int[Array, " votes"] | None = None,
    where: Bool[Array, " votes"] | None = None,
    prior: Prior | None = None,
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

    Without a `prior`, it is estimated from all annotators (`em.pooled_prior`), which
    moves annotators with few votes toward the others.

    The interval is that of the posterior of eta_k under a flat prior, or under `prior`
    if it is given, on a grid.  It ignores the pooled prior, because with that,
    annotators who are unlike the others would be covered too rarely.  It allows for the
    unknown reliabilities of the others: each enters by its posterior mean given its
    votes on other items (belief propagation), which is exact if items connect
    annotators in a tree.  The coverage is in `docs/noise.md`
    (`python -m tests.noise.simulations`).

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
        b + 1) prior.  None to estimate it.  (0, 0) for maximum likelihood, where
        annotators without a vote keep `start`.
      start: initial reliability if the prior is (0, 0); otherwise a / (a + b).
      level: probability of the intervals.
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
      >>> found = em.fit(margins, jnp.full(200, -1), num_annotators=1)
      >>> print(found.reliability.round(2))
      [0.76]

    References:
      RE-PO, 2025, arXiv:2509.24159, Eq. 3, 4 and 6.
      Dawid and Skene, "Maximum Likelihood Estimation of Observer Error-Rates Using the
      EM Algorithm", 1979, for several votes on an item.  The intervals are ours.
    """
    margins, annotators = _common.floating(margin_logits), jnp.asarray(annotators)
    _check_shapes(
        margins,
        annotators=annotators,
        items=items,
        orientation=orientation,
        where=where,
    )
    _check_options(num_annotators, max_iterations, level=level, start=start)
    prior = prior if prior is None else _common.pseudo_counts(prior)
    where = jnp.ones(margins.shape, bool) if where is None else jnp.asarray(where, bool)
    _common.check_annotators(annotators, where, num_annotators)
    return _fit(
        (margins, annotators, where),
        (items, orientation),
        prior,
        start=start,
        level=level,
        tolerance=tolerance,
        num_annotators=num_annotators,
        max_iterations=max_iterations,
    )


def _check_shapes(margins: jax.Array, **arrays) -> None:
    """Raises ValueError unless there are votes, and all arrays are [votes] or None."""
    for name, array in arrays.items():
        if array is not None and jnp.shape(array) != margins.shape:
            raise ValueError(
                f"Expected {name} of shape {margins.shape}, got {jnp.shape(array)}."
            )
    if margins.ndim != 1 or not margins.size:
        raise ValueError(f"Expected one vote or more, [votes], got {margins.shape}.")


def _check_options(num_annotators: int, max_iterations: int, **shares) -> None:
    """Raises ValueError if an option is out of range; arrays pass unchecked."""
    if num_annotators < 1 or max_iterations < 1:
        raise ValueError(
            "Expected num_annotators and max_iterations >= 1, got "
            f"{num_annotators} and {max_iterations}."
        )
    for name, share in shares.items():
        if is_number(share) and not 0 < share < 1:
            raise ValueError(f"Expected {name} in (0, 1), got {share}.")


@functools.partial(jax.jit, static_argnames=("num_annotators", "max_iterations"))
def _fit(
    arrays, of_items, prior, *, num_annotators, start, level, tolerance, max_iterations
):
    # Scores are small, so replicate everything on every device.
    margins, annotators, where = map(replicated, arrays)
    items, orientation = (
        x if x is None else replicated(jnp.asarray(x)) for x in of_items
    )
    dtype = margins.dtype
    start = jnp.asarray(start, dtype)
    annotators = jnp.where(annotators < 0, num_annotators - 1, annotators)
    counts = jax.ops.segment_sum(where.astype(jnp.int32), annotators, num_annotators)
    votes = _votes(margins, annotators, items, orientation, where)
    counted = counts.astype(dtype)
    find = functools.partial(_mode, votes, counted, tolerance, max_iterations)
    if prior is None:
        a, b = _estimated_prior(votes, where, find, num_annotators, dtype)
        own = jnp.zeros((), dtype), jnp.zeros((), dtype)
    else:
        a, b = own = tuple(jnp.asarray(x, dtype) for x in prior)
    eta, iterations, converged = find(a, b, _first(start, a, b, counted))
    marginal = _marginal_evidence(votes, eta, a, b)
    lower, upper = _em_interval.interval(
        _em_interval.posterior(marginal, eta, annotators, votes.real, *own), eta, level
    )
    return Fit(
        reliability=eta,
        lower=lower,
        upper=upper,
        posterior=_e_step(votes, eta),
        evidence=_evidence(votes, eta),
        counts=counts,
        prior=(a, b),
        log_likelihood=_log_likelihood(votes, eta),
        iterations=iterations,
        converged=converged,
    )


def _mode(votes, counts, tolerance, max_iterations, a, b, eta):
    """The reliabilities that maximize the posterior; see `_fixed_point`."""
    m_step = functools.partial(_m_step, votes, counts, a, b)
    return _fixed_point(m_step, eta, tolerance, max_iterations)


def _first(start, a, b, counts) -> jax.Array:
    """Where EM starts: at the mean of a prior, or at `start`."""
    least = jnp.finfo(start.dtype).eps
    eta = jnp.where((a > 0) & (b > 0), a / jnp.maximum(a + b, least), start)
    return _bounded(jnp.full(counts.shape, eta, start.dtype))


def _estimated_prior(votes, where, find, num_annotators, dtype):
    """The pooled prior, which depends on reliabilities that depend on the prior."""

    def pool(_, carry):
        prior, eta = carry
        eta, *_ = find(*prior, eta)
        pooled = pooled_prior(
            _marginal_evidence(votes, eta, *prior),
            votes.annotators,
            num_annotators=num_annotators,
            where=where,
        )
        return pooled, eta

    a, b = (jnp.asarray(x, dtype) for x in PRIOR)
    eta = jnp.full(num_annotators, a / (a + b), dtype)
    (c, d), _ = jax.lax.fori_loop(0, POOLINGS, pool, ((a, b), eta))
    known = jnp.any(where)
    return jnp.where(known, c, a), jnp.where(known, d, b)


def _marginal_evidence(votes, eta, a, b) -> jax.Array:
    """The evidence for each vote, averaged over the reliabilities of other voters."""
    if votes.alone:
        return votes.margins
    return _em_interval.marginal_evidence(
        functools.partial(_evidence_from, votes),
        eta,
        votes.annotators,
        votes.real,
        a,
        b,
    )


@dataclasses.dataclass(frozen=True)
class _Votes:
    """The votes, [votes], and the items they judge."""

    margins: jax.Array
    """d M of the vote's item: positive where the model agrees with the vote."""
    sign: jax.Array
    """d, 1 or -1: which answer of its item the vote prefers."""
    annotators: jax.Array
    real: jax.Array
    """1 or 0: whether the vote is real."""
    judged: jax.Array
    """Which votes represent their items in the likelihood: a real one for each item."""
    on_item: Callable[[jax.Array], jax.Array]
    """For each vote, the sum over the votes on the same item."""
    alone: bool
    """Whether every item has a single vote."""


def _votes(margins, annotators, items, orientation, where) -> _Votes:
    """Masks the votes and groups them by item; without items, each has its own."""
    real = where.astype(margins.dtype)
    # Masked before any nonlinearity, so that padding cannot cause NaN.
    margins = _common.finite(jnp.where(where, margins, 0))
    if items is None:
        one = jnp.ones_like(margins)
        return _Votes(margins, one, annotators, real, where, lambda x: x, True)
    sign = jnp.where(margins < 0, -1, 1)
    sign = sign if orientation is None else jnp.sign(orientation)
    sign = sign.astype(margins.dtype)
    _, ids = jnp.unique(items, return_inverse=True, size=margins.size)
    on_item = lambda x: jax.ops.segment_sum(x, ids, margins.size)[ids]
    mean = on_item(real * sign * margins / jnp.maximum(on_item(real), 1))
    # The first real vote on an item represents it.
    position = jnp.arange(margins.size)
    first = jax.ops.segment_min(
        jnp.where(where, position, margins.size), ids, margins.size
    )
    judged = where & (first[ids] == position)
    return _Votes(sign * mean, sign, annotators, real, judged, on_item, False)


def _evidence(votes: _Votes, eta: jax.Array) -> jax.Array:
    """Logit that each vote is right, from the margin and the item's other votes."""
    return _evidence_from(votes, _common.logit(eta, eta.dtype)[votes.annotators])


def _evidence_from(votes: _Votes, own: jax.Array) -> jax.Array:
    """The same from the logit that each vote's annotator is right."""
    logits = votes.real * votes.sign * own
    return votes.margins + votes.sign * (votes.on_item(logits) - logits)


def _e_step(votes: _Votes, eta: jax.Array) -> jax.Array:
    """P(each vote is right | all votes)."""
    own = _common.logit(eta, eta.dtype)[votes.annotators]
    return jax.nn.sigmoid(_evidence(votes, eta) + own)


def _m_step(votes: _Votes, counts, a, b, eta: jax.Array) -> jax.Array:
    """The next reliabilities, given the votes of each annotator and the prior."""
    # Sum w - eta instead of w: near the fixed point the terms cancel instead of growing
    # with the votes, which preserves precision in float32.
    surplus = votes.real * (_e_step(votes, eta) - eta[votes.annotators])
    surplus = jax.ops.segment_sum(surplus, votes.annotators, eta.size)
    prior = a * (1 - eta) - b * eta
    least = jnp.finfo(eta.dtype).eps
    return _bounded(eta + (prior + surplus) / jnp.maximum(a + b + counts, least))


def _bounded(eta: jax.Array) -> jax.Array:
    """Keeps eta away from 0 and 1, where a contradiction has probability 0."""
    least = jnp.finfo(eta.dtype).eps
    return jnp.clip(eta, least, 1 - least)


def _fixed_point(
    m_step: Callable[[jax.Array], jax.Array], eta: jax.Array, tolerance, max_iterations
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Repeats the M-step from `eta` to its fixed point.

    Returns:
      The fixed point, the number of steps, and whether it is within the tolerance.
    """
    least = jnp.finfo(eta.dtype).eps

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

    carry = (eta, jnp.ones_like(eta), jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    eta, _, converged, iterations = jax.lax.while_loop(going, step, carry)
    return eta, iterations, converged


def _log_likelihood(votes: _Votes, eta: jax.Array) -> jax.Array:
    """The log-probability of the votes: each item mixes its two possible truths."""
    own = jnp.log(eta)[votes.annotators], jnp.log1p(-eta)[votes.annotators]
    right, wrong = (jnp.where(votes.sign > 0, x, y) for x, y in (own, own[::-1]))
    margins = votes.sign * votes.margins
    first_better = jax.nn.log_sigmoid(margins) + votes.on_item(votes.real * right)
    second_better = jax.nn.log_sigmoid(-margins) + votes.on_item(votes.real * wrong)
    of_items = jnp.logaddexp(first_better, second_better)
    return jnp.sum(jnp.where(votes.judged, of_items, 0))

"""DPO with labels that may be wrong.

The first three losses use a known flip rate e.  `cdpo` smooths the label.  `rdpo`
corrects the loss, so that its mean over flips is the clean DPO loss.  `forward_dpo`
corrects the model of the label, which gives the likelihood of the observed label.
`ropo` needs no rate: it adds a loss whose mean gradient keeps its direction under
flips.

Flips at one rate for all pairs mostly shrink the margins that DPO learns, which a
smaller beta makes up for.  So compare these losses with DPO at the same KL to the
reference, not at the same beta, as in `experiments/exact_frontier.py`.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair

__all__ = ["cdpo", "forward_dpo", "rdpo", "ropo"]


def cdpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    flip_rate: Number,
) -> PerPair:
    """Conservative DPO: cross-entropy with the label smoothed by the flip rate.

        loss = -(1 - e) log s(h) - e log s(-h)  =  -log s(h) + e h

    The minimum is at the finite margin h = log((1 - e) / e).  Smoothing shrinks the
    margin: under flips at rate e, its minimizer is closer to 0 than DPO's, not closer
    to the truth.  Gradient in h: -(s(-h) - e).

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      flip_rate: e in [0, 1/2), the probability that a label is wrong; one number, or an
        array that broadcasts to one per pair.  0 is exactly DPO.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, a Python `beta` is not > 0, or a Python
        `flip_rate` is outside [0, 1/2).  Values in arrays are not checked.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import cdpo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> loss = cdpo(margin, zero, zero, zero, beta=1.0, flip_rate=0.25)
      >>> [f"{x:.4f}" for x in loss]
      ['0.7986', '2.2986']

    References:
      Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023,
      https://ericmitchell.ai/cdpo.pdf, Eq. 3.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return _common.logistic_loss(h) + _common.rates(flip_rate, h) * h


def rdpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    flip_rate: Number,
) -> PerPair:
    """Provably robust DPO: its mean over label flips is the DPO loss of clean labels.

        loss = [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e)
             = -log s(h) - e / (1 - 2e) h

    Unbounded below: the loss may be negative and, on separable data, decreases without
    limit as h grows.  Stop early, or use `forward_dpo`, which is bounded.  Its variance
    grows like 1 / (1 - 2e)^2.  Gradient in h: -(s(-h) + e / (1 - 2e)).

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      flip_rate: e in [0, 1/2), the probability that a label is wrong; one number, or an
        array that broadcasts to one per pair.  0 is exactly DPO.

    Returns:
      One loss per pair, [*batch], at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, a Python `beta` is not > 0, or a Python
        `flip_rate` is outside [0, 1/2).  Values in arrays are not checked; 1/2 in an
        array gives infinities or NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import rdpo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> right, wrong = rdpo(margin, zero, zero, zero, beta=1.0, flip_rate=0.25)
      >>> print(f"{0.75 * right + 0.25 * wrong:.4f}")  # what dpo gives the right label
      0.0486

    References:
      Ray Chowdhury, Kini and Natarajan, "Provably Robust DPO: Aligning Language Models
      with Noisy Feedback", 2024, arXiv:2403.00409, the unbiased loss.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    # The second form of the equation: in the first, two logistic losses nearly cancel,
    # and the division by 1 - 2e amplifies the error.
    return _common.logistic_loss(h) - _common.correction(flip_rate, h) * h


def forward_dpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    flip_rate: Number,
) -> PerPair:
    """Forward-corrected DPO: the likelihood of the observed, possibly flipped, label.

        loss = -log((1 - e) s(h) + e s(-h))

    Bounded between -log(1 - e) and -log e.  Redescending: for e > 0, a pair that the
    policy strongly contradicts is treated as a flip, and its gradient vanishes.  Not
    convex in h.  Gradient in h: -(1 - 2e) s(h) s(-h) / ((1 - e) s(h) + e s(-h)).

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      flip_rate: e, the probability that a label is wrong; one number in [0, 1/2), or an
        array that broadcasts to one per pair.  0 is exactly DPO.  Arrays may hold any
        values in [0, 1]: at 1/2 the pair has no gradient, and above 1/2 the label is
        inverted.  Differentiable in `flip_rate` on (0, 1).

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes do not fit, a Python `beta` is not > 0, or a Python
        `flip_rate` is outside [0, 1/2).  Values in arrays are not checked.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import forward_dpo
      >>> zero, margin = jnp.zeros(2), jnp.array([40.0, -40.0])
      >>> loss = forward_dpo(margin, zero, zero, zero, beta=1.0, flip_rate=0.25)
      >>> [f"{x:.4f}" for x in loss]  # -log(1 - e), -log e
      ['0.2877', '1.3863']

    References:
      Xu et al., "When Human Preferences Flip: An Instance-Dependent Robust Loss for
      RLHF" (FA-DPO), 2025, arXiv:2512.00709; as the marginal likelihood of a label with
      reliability 1 - e, RE-PO, 2025, arXiv:2509.24159, Eq. 11.
    """
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    return _common.flipped_logistic_loss(h, _common.rates(flip_rate, h))


def ropo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.1,
    alpha: Number = 14.0,
) -> PerPair:
    """Robust preference optimization: DPO plus a noise-tolerant loss.

        loss = 4 alpha / (1 + alpha)^2 [-log s(h) + alpha s(-h)]

    The second term is symmetric, s(-h) + s(h) = 1: flips at any rate e < 1/2 scale its
    mean gradient but keep its direction.  For alpha >= 1, the weight of a pair (minus
    the gradient in h) is at most 1.  It is 1 at s(-h) = (1 + alpha) / (2 alpha), and
    decreases to 4 alpha / (1 + alpha)^2 for contradicted pairs.  This is only the loss;
    the paper's filtering and rejection sampling are data processing.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      alpha: weight of the noise-tolerant term relative to DPO's, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `alpha` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import ropo
      >>> zero, margin = jnp.zeros(2), jnp.array([3.0, -3.0])
      >>> loss = ropo(margin, zero, zero, zero, beta=1.0)
      >>> [f"{x:.4f}" for x in loss]
      ['0.1773', '4.0780']

    References:
      Liang et al., "ROPO: Robust Preference Optimization for Large Language Models",
      2024, arXiv:2404.04102, the robust loss.
      nissymori/SymPO, alignment/train/trainers.py, `ROPOTrainer`, and
      alignment/config/loss/ropo.yaml for alpha (not the authors' code).
    """
    _common.positive("alpha", alpha)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    alpha = _common.per_pair("alpha", alpha, h)
    scale = 4 * alpha / jnp.square(1 + alpha)
    return scale * (_common.logistic_loss(h) + alpha * jax.nn.sigmoid(-h))

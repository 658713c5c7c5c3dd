"""Pairwise losses without a reference model."""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Number, PerPair
from jaxpref.losses._sequence import log_odds

__all__ = ["alpha_po", "cpo", "mapo", "orpo", "simpo"]


@_common.reward_per_token
def simpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 2.0,
    gamma: Number = 0.5,
) -> PerPair:
    """Simple preference optimization: no reference, average log-probs, a target margin.

        loss = -log s(beta log pi(y_w|x) / |y_w| - beta log pi(y_l|x) / |y_l| - gamma)

    `gamma` is the margin, as in the paper's objective, not the ratio gamma/beta that
    the authors tune.  The defaults are those of their training code (ratio 0.25).

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: scale of the rewards, > 0.
      gamma: target reward margin, >= 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `beta` is not > 0 or `gamma` not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import simpo
      >>> lengths = jnp.array([4, 10])
      >>> print(simpo(-1.0 * lengths, -2.0 * lengths, lengths, lengths, gamma=2.0))
      [0.6931472 0.6931472]

    References:
      Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward",
      2024, arXiv:2405.14734, the SimPO objective.
    """
    chosen, rejected = _averages(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    return _beyond_target(chosen - rejected, beta, gamma)


@_common.reward_per_token
def alpha_po(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    alpha: Number = 0.25,
    beta: Number = 2.5,
    gamma: Number = 0.25,
) -> PerPair:
    """AlphaPO: SimPO with a parameter for the shape of the reward.

        loss = -log s(beta (r_w - r_l) - gamma)
        r = (1 - p^-alpha) / alpha,    log p = log pi(y|x) / |y|

    alpha = 0 gives SimPO's r = log p, and alpha = -1 the linear reward.  The derivative
    dr/dlog p is p^-alpha: for alpha > 0 it grows as the answer becomes less likely.
    The exponent -alpha log p is clipped at 80, so that float32 gradients do not
    overflow.  The defaults are those reported for Mistral-7B-Instruct (tuned as gamma /
    beta = 0.1).

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      alpha: shape of the reward, any finite number.
      beta: scale of the rewards, > 0.
      gamma: target reward margin, >= 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `alpha` is not finite, `beta` not > 0 or
        `gamma` not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import alpha_po
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(alpha_po(logps, logps, lengths, lengths, gamma=0.0))
      [0.6931472 0.6931472]

    References:
      Gupta et al., "AlphaPO: Reward Shape Matters for LLM Alignment", 2025,
      arXiv:2501.03884, the AlphaPO objective.
      Code: huggingface/trl, trl/experimental/cpo/cpo_trainer.py, `cpo_loss`.
    """
    _common.finite("alpha", alpha)
    chosen, rejected = _averages(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    alpha = _common.per_pair("alpha", alpha, chosen)

    def reward(logp):
        # expm1 prevents cancellation for small alpha; alpha = 0 is the limit.
        power = jnp.expm1(jnp.minimum(-alpha * logp, 80))
        return jnp.where(alpha == 0, logp, -power / jnp.where(alpha == 0, 1, alpha))

    return _beyond_target(reward(chosen) - reward(rejected), beta, gamma)


def cpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    *,
    beta: Number = 0.1,
    nll_weight: Number = 1.0,
) -> PerPair:
    """Contrastive preference optimization: no reference, plus a likelihood term.

        loss = -log s(beta (log pi(y_w|x) - log pi(y_l|x))) - c log pi(y_w|x) / |y_w|

    DPO with a uniform reference, kept near the data by the likelihood of the chosen
    answer.  The preference term uses sums.  The likelihood term, with weight c =
    `nll_weight`, is a mean over tokens, as in the authors' and TRL's code; the paper
    writes a sum.  Their mean is over all chosen tokens of a batch, and here it is over
    the tokens of each answer.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      beta: scale of the log-prob margin, > 0.
      nll_weight: weight of the likelihood term, >= 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `beta` is not > 0 or `nll_weight` not
        >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import cpo
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(cpo(logps, logps, lengths))
      [3.6931472 3.6931472]

    References:
      Xu et al., "Contrastive Preference Optimization: Pushing the Boundaries of LLM
      Performance in Machine Translation", 2024, arXiv:2401.08417, the CPO objective.
      Code: fe1ixxu/ALMA, utils/cpo_trainer.py, `cpo_loss` and `get_batch_metrics`.
    """
    _common.positive("beta", beta)
    _common.not_negative("nll_weight", nll_weight)
    chosen, rejected = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    average = _common.per_token(chosen, chosen_lengths, "chosen_lengths")
    beta = _common.per_pair("beta", beta, chosen)
    weight = _common.per_pair("nll_weight", nll_weight, chosen)
    return _common.logistic_loss(beta * (chosen - rejected)) - weight * average


@_common.reward_per_token
def orpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Odds-ratio preference optimization: fine-tuning plus a preference term.

        loss = -a_w - beta log s(log odds(a_w) - log odds(a_l))
        log odds(a) = a - log(1 - exp(a)),    a = log pi(y|x) / |y|

    `beta` is the paper's lambda, as in TRL: the weight of the preference term, not a
    temperature.  The likelihood term is a mean over the answer's tokens.  In the odds,
    averages are clipped at -1e-6, because the odds diverge at 0; see `log_odds`.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: weight of the odds-ratio term (lambda), > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import orpo
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(orpo(logps, logps, lengths, lengths))
      [3.0693147 3.0693147]

    References:
      Hong, Lee and Thorne, "ORPO: Monolithic Preference Optimization without Reference
      Model", 2024, arXiv:2403.07691, Eqs. 4 and 7.
      Code: xfactlab/orpo, src/orpo_trainer.py, `compute_loss`.
    """
    chosen, rejected = _averages(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    return _likelihood_and_margin(
        chosen, log_odds(chosen) - log_odds(rejected), weight=beta
    )


@_common.reward_per_token
def mapo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    rejected_lengths: Lengths,
    *,
    beta: Number = 0.1,
    scale: Number = 1.0,
) -> PerPair:
    """Margin-aware preference optimization, adapted from diffusion to language models.

        loss = x_w - beta log s(scale (g(x_w) - g(x_l)))
        g(x) = x / (exp(x) - 1),    x = -log pi(y|x) / |y|

    g decreases from 1 at x = 0 to 0, so the margin is in (-1, 1), and the gradient of
    an unlikely answer vanishes.  Adapted from the authors' loss for diffusion models:
    the negative log-likelihood per token replaces the squared error of the noise, and
    `scale` (1 by default) replaces the number of denoising steps.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      rejected_lengths: |y_l|, completion tokens; 0 counts as 1; [*batch].
      beta: weight of the margin term, > 0.
      scale: factor of the margin, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, or a Python `beta` or `scale` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import mapo
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(mapo(logps, logps, lengths, lengths))
      [3.0693147 3.0693147]

    References:
      Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models
      without Reference", 2024, arXiv:2406.06424, the MaPO objective.
      Code: mapo-t2i/mapo, utils.py, `compute_loss`.
    """
    _common.positive("scale", scale)
    chosen, rejected = _averages(
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
    )
    margin = _x_over_expm1(-chosen) - _x_over_expm1(-rejected)
    return _likelihood_and_margin(
        chosen, _common.per_pair("scale", scale, margin) * margin, weight=beta
    )


def _averages(
    policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths
) -> tuple[jax.Array, jax.Array]:
    """Computes log pi per token of each answer, promoted and checked."""
    chosen, rejected = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
    )
    return (
        _common.per_token(chosen, chosen_lengths, "chosen_lengths"),
        _common.per_token(rejected, rejected_lengths, "rejected_lengths"),
    )


def _beyond_target(difference: jax.Array, beta, gamma) -> jax.Array:
    """Logistic loss of a scaled reward difference that should exceed gamma."""
    _common.positive("beta", beta)
    _common.not_negative("gamma", gamma)
    beta = _common.per_pair("beta", beta, difference)
    gamma = _common.per_pair("gamma", gamma, difference)
    return _common.logistic_loss(beta * difference - gamma)


def _likelihood_and_margin(
    average: jax.Array, margin: jax.Array, *, weight
) -> jax.Array:
    """Negative log-likelihood per token plus the weighted logistic loss of a margin."""
    _common.positive("beta", weight)
    weight = _common.per_pair("beta", weight, margin)
    return weight * _common.logistic_loss(margin) - average


def _x_over_expm1(x: jax.Array) -> jax.Array:
    """X / (exp(x) - 1), finite with finite gradients for every finite x; 1 at 0."""
    t = jnp.abs(x)
    small = t < 0.25
    # Bernoulli series: near 0 the quotient's gradient is a difference of large terms.
    t2 = jnp.where(small, t, 0) ** 2
    series = 1 - t / 2 + t2 / 12 * (1 - t2 / 60 * (1 - t2 / 42 * (1 - t2 / 40)))
    away = jnp.where(small, 1.0, t)
    quotient = away * jnp.exp(-away) / -jnp.expm1(-away)
    # g(-t) = t + g(t), so only decaying exponentials are needed.
    return jnp.maximum(-x, 0) + jnp.where(small, series, quotient)

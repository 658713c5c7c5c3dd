"""Losses of demonstrations, and preference losses with an added likelihood term.

`rpo` and `iterative_rpo` are DPO plus `sft` with different weights and normalization.
Write other mixtures as sums.  For example, mixed preference optimization (MPO) weights
a preference, a quality, and a generation loss by 0.8, 0.2, and 1 (Wang et al.,
"Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed
Preference Optimization", 2024, arXiv:2411.10442):

    >>> import jax.numpy as jnp
    >>> from jaxpref.losses import bco_pair, dpo, sft
    >>> logps = [jnp.array([x]) for x in (-12.0, -40.0, -20.0, -30.0)]
    >>> quality = bco_pair(*logps, beta=0.1)
    >>> loss = 0.8 * dpo(*logps) + 0.2 * quality + 1.0 * sft(logps[0])
    >>> [f"{x:.4f}" for x in loss]
    ['12.2593']
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Lengths, Number, PerPair

__all__ = ["iterative_rpo", "rpo", "sft", "sft_hellinger", "sft_pearson"]


def sft(policy_chosen_logps: PerPair) -> PerPair:
    """Negative log-likelihood of the chosen completion: supervised fine-tuning.

        loss = -log pi(y_w|x)

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].

    Returns:
      One loss per completion in nats, [*batch], at least float32.  To weight all tokens
      equally, divide the sum by the number of tokens, not of completions.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sft
      >>> logps, lengths = jnp.array([-12.0, -30.0]), jnp.array([4, 10])
      >>> print(sft(logps).sum() / lengths.sum())
      3.0

    References:
      Maximum likelihood; as the chosen-answer term of preference losses: Pang et al.,
      "Iterative Reasoning Preference Optimization", 2024, arXiv:2404.19733.
    """
    return _nll(policy_chosen_logps)


def sft_pearson(
    policy_chosen_logps: PerPair,
    reference_chosen_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Fine-tuning on demonstrations with Pearson's chi-squared divergence.

        loss = -r + r^2 / 4,    r = beta log pi(y|x)/ref(y|x)

    Imitation as distribution matching: `sft` is the total variation, whose conjugate is
    linear, so that nothing holds the policy near the reference.  With another
    divergence f, the loss is f*(-r) with the conjugate f*, and the implicit reward r of
    a demonstration stops growing; here at 2.

    Args:
      policy_chosen_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_chosen_logps: log ref(y|x) under the frozen reference; [*batch].
      beta: scale of the implicit reward, > 0; the default is that of DPO.

    Returns:
      One loss per completion, [*batch], at least float32; >= -1.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sft_pearson
      >>> print(sft_pearson(jnp.array([-10.0, 10.0]), jnp.zeros(2)))
      [ 1.25 -0.75]

    References:
      Wang et al., "Implicit Reward as the Bridge: A Unified View of SFT and DPO
      Connections", 2025, arXiv:2507.00018, for the objectives from f-divergences.
      The conjugate f*(t) = t + t^2 / 4, and the prompt's value at 0: our derivation.
      Nowozin et al., 2016, arXiv:1606.00709, table 2, has the conjugates.
    """
    r = _implicit_reward(policy_chosen_logps, reference_chosen_logps, beta)
    return jnp.square(r) / 4 - r


def sft_hellinger(
    policy_chosen_logps: PerPair,
    reference_chosen_logps: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Fine-tuning on demonstrations with the squared Hellinger distance.

        loss = -r / (1 + r),    r = beta log pi(y|x)/ref(y|x)

    See `sft_pearson` for the derivation.  The gradient falls with 1 / (1 + r)^2, so
    demonstrations that the policy already prefers count less.  The conjugate is
    infinite for r <= -1.  Below r = -1/2 the loss continues as a line with the same
    value and derivative, so that it is finite, convex, and never loses its gradient.

    Args:
      policy_chosen_logps: log pi(y|x) summed over completion tokens, nats; [*batch].
      reference_chosen_logps: log ref(y|x) under the frozen reference; [*batch].
      beta: scale of the implicit reward, > 0; the default is that of DPO.

    Returns:
      One loss per completion, [*batch], at least float32; above -1.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sft_hellinger
      >>> print(sft_hellinger(jnp.array([-10.0, 10.0]), jnp.zeros(2)))
      [ 3.  -0.5]

    References:
      Wang et al., "Implicit Reward as the Bridge: A Unified View of SFT and DPO
      Connections", 2025, arXiv:2507.00018, for the objectives from f-divergences.
      The conjugate f*(t) = t / (1 - t), the prompt's value at 0, and the line: ours.
      Nowozin et al., 2016, arXiv:1606.00709, table 2, has the conjugates.
    """
    r = _implicit_reward(policy_chosen_logps, reference_chosen_logps, beta)
    inside = jnp.maximum(r, -0.5)
    return -inside / (1 + inside) - 4 * (r - inside)


def _implicit_reward(policy_chosen_logps, reference_chosen_logps, beta) -> jax.Array:
    """The implicit reward beta log pi(y|x)/ref(y|x), promoted and checked."""
    _common.positive("beta", beta)
    policy, reference = _common.promoted(
        policy_chosen_logps=policy_chosen_logps,
        reference_chosen_logps=reference_chosen_logps,
    )
    return _common.per_pair("beta", beta, policy) * (policy - reference)


def rpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    *,
    beta: Number = 0.01,
    eta: Number = 0.005,
) -> PerPair:
    """Regularized preference optimization: DPO plus the chosen answer's likelihood.

        loss = -log s(h) - eta beta log pi(y_w|x),    h = beta D

    The likelihood of a baseline policy's answers, here the chosen ones, comes from an
    adversary over reward models.  It keeps the policy away from answers that only seem
    good because the data does not cover them.  The likelihood is a sum over tokens, as
    in the paper's main results, and is weighted by eta beta, not by eta alone.

    Unlike in DPO, the chosen answer of a pair with a large margin still has a gradient.
    With a flipped label, this gradient raises the worse answer just as much.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      eta: strength of the regularizer relative to the KL penalty, >= 0; 0 is DPO.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `eta` is not
        >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import rpo
      >>> logps = jnp.array([-200.0])
      >>> [f"{x:.4f}" for x in rpo(logps, logps, logps, logps)]
      ['0.7031']

    References:
      Liu et al., "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is
      Implicitly an Adversarial Regularizer", 2024, arXiv:2405.16436, the RPO objective.
      Authors' code: YSLIU627/Regularized-Preference-Optimization,
      alignment-handbook/scripts/rpo_trainer.py and recipes/zephyr-7b-beta/rpo.
    """
    _common.not_negative("eta", eta)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    weight = _common.per_pair("eta", eta, h) * _common.per_pair("beta", beta, h)
    return _common.logistic_loss(h) + weight * _nll(policy_chosen_logps)


def iterative_rpo(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_lengths: Lengths,
    *,
    beta: Number = 0.1,
    alpha: Number = 1.0,
) -> PerPair:
    """Iterative reasoning preference optimization: DPO plus the likelihood per token.

        loss = -log s(h) - alpha log pi(y_w|x) / |y_w|,    h = beta D

    The likelihood is averaged over the tokens of each chosen answer, so that long
    answers do not get more weight than short ones.  The iterations, in which the
    trained policy samples new pairs, are up to the caller.

    Args:
      policy_chosen_logps: log pi(y_w|x) SUMMED over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_lengths: |y_w|, completion tokens; 0 counts as 1; [*batch].
      beta: inverse temperature of the KL penalty, > 0.
      alpha: weight of the likelihood per token, >= 0; 0 is DPO.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if a log-prob array is not floating point.
      ValueError: if shapes differ, a Python `beta` is not > 0 or a Python `alpha` is
        not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import iterative_rpo
      >>> logps, lengths = jnp.array([-200.0]), jnp.array([100])
      >>> [f"{x:.4f}" for x in iterative_rpo(logps, logps, logps, logps, lengths)]
      ['2.6931']

    References:
      Pang et al., "Iterative Reasoning Preference Optimization", 2024,
      arXiv:2404.19733, the DPO + NLL objective.
    """
    _common.not_negative("alpha", alpha)
    h = _common.reward_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
    )
    nll = _nll(policy_chosen_logps)
    nll = _common.per_token(nll, chosen_lengths, "chosen_lengths")
    return _common.logistic_loss(h) + _common.per_pair("alpha", alpha, h) * nll


def _nll(policy_chosen_logps) -> jax.Array:
    """-log pi(y_w|x), promoted and checked."""
    (chosen,) = _common.promoted(policy_chosen_logps=policy_chosen_logps)
    return -chosen

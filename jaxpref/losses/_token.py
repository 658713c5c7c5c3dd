"""Pairwise losses with token-level divergences from the reference.

In addition to log-probs they read sequential divergences: KL(ref || pi) summed over the
positions of a completion.  See `token_kls` and `sum_by_completion`.
"""

import jax
import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import Number, PerPair
from jaxpref.losses._sequence import Owners, TokenValues, owned_tokens

__all__ = ["activation_masks", "sparse_po", "tdpo1", "tdpo2"]


def tdpo1(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_kls: PerPair,
    rejected_kls: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """Token-level DPO, first form: the margin minus the difference of divergences.

        loss = -log s(beta (D - (KL_l - KL_w)))

    Derived from a KL constraint on every token instead of on whole answers.  Equal
    divergences give DPO.  Gradients flow through all terms, which increases the
    divergence of the chosen answer and decreases that of the rejected one.  `tdpo2`
    prevents the former.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_kls: KL_w, KL(ref || pi) summed over the positions of y_w, nats; [*batch].
      rejected_kls: KL_l, the same way; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import tdpo1
      >>> logps, kls = jnp.array([-12.0, -30.0]), jnp.array([1.0, 2.0])
      >>> print(tdpo1(logps, logps, logps, logps, kls, kls))
      [0.6931472 0.6931472]

    References:
      Zeng et al., "Token-level Direct Preference Optimization", 2024, arXiv:2404.11999,
      the TDPO1 objective.
      Code: Vance0124/Token-level-Direct-Preference-Optimization, trainers.py,
      `tdpo_loss`.
    """
    chosen, rejected, kl_w, kl_l = _log_ratios_and_kls(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_kls,
        rejected_kls,
    )
    return _logistic(chosen - rejected - (kl_l - kl_w), beta)


def tdpo2(
    policy_chosen_logps: PerPair,
    policy_rejected_logps: PerPair,
    reference_chosen_logps: PerPair,
    reference_rejected_logps: PerPair,
    chosen_kls: PerPair,
    rejected_kls: PerPair,
    *,
    alpha: Number = 0.5,
    beta: Number = 0.1,
) -> PerPair:
    """Token-level DPO, second form: no gradient through the chosen divergence.

        loss = -log s(beta (D - alpha (KL_l - sg[KL_w])))

    sg[.] stops gradients, so nothing pushes the policy away from the reference on the
    chosen answer.  `alpha` is the weight of the divergences.  alpha = 0 gives DPO.

    Args:
      policy_chosen_logps: log pi(y_w|x) summed over completion tokens, nats; [*batch].
      policy_rejected_logps: log pi(y_l|x), the same way; [*batch].
      reference_chosen_logps: log ref(y_w|x) under the frozen reference; [*batch].
      reference_rejected_logps: log ref(y_l|x) under the frozen reference; [*batch].
      chosen_kls: KL_w, KL(ref || pi) summed over the positions of y_w, nats; [*batch].
      rejected_kls: KL_l, the same way; [*batch].
      alpha: weight of the divergences, >= 0.
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or a Python `beta` is not > 0 or `alpha` not >= 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import tdpo2
      >>> logps, kls = jnp.array([-12.0, -30.0]), jnp.array([1.0, 2.0])
      >>> print(tdpo2(logps, logps, logps, logps, kls, kls))
      [0.6931472 0.6931472]

    References:
      Zeng et al., "Token-level Direct Preference Optimization", 2024, arXiv:2404.11999,
      the TDPO2 objective.
      Code: Vance0124/Token-level-Direct-Preference-Optimization, trainers.py,
      `tdpo_loss`.
    """
    _common.not_negative("alpha", alpha)
    chosen, rejected, kl_w, kl_l = _log_ratios_and_kls(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_kls,
        rejected_kls,
    )
    alpha = _common.per_pair("alpha", alpha, chosen)
    difference = kl_l - jax.lax.stop_gradient(kl_w)
    return _logistic(chosen - rejected - alpha * difference, beta)


def sparse_po(
    chosen_masked_log_ratios: PerPair,
    rejected_masked_log_ratios: PerPair,
    chosen_masked_kls: PerPair,
    rejected_masked_kls: PerPair,
    *,
    beta: Number = 0.1,
) -> PerPair:
    """SparsePO: token-level DPO with masks that weight each token's reward and KL.

        loss = -log s(beta (u - d))
        u = sum_t m_u(t) log pi(t)/ref(t) over y_w, minus the same over y_l
        d = sum_t m_d(t) KL(ref || pi)(t) over y_l, minus the same over y_w

    The caller provides the masks m_u and m_d, >= 0, fixed or learned.  Compute the sums
    with `sum_weighted_by_completion`, through which the masks get gradients.  Masks of
    1 give `tdpo1`; m_d = 0 and m_u = 1 give DPO.  The paper also adds a sparsity
    penalty to the loss: the sum of the masks times a weight (0 by default).

    Args:
      chosen_masked_log_ratios: sum of m_u log pi/ref over tokens of y_w; [*batch].
      rejected_masked_log_ratios: the same over y_l; [*batch].
      chosen_masked_kls: sum of m_d KL(ref || pi) over positions of y_w; [*batch].
      rejected_masked_kls: the same over y_l; [*batch].
      beta: inverse temperature of the KL penalty, > 0.

    Returns:
      One loss per pair, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or a Python `beta` is not > 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import sparse_po
      >>> ratios, kls = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
      >>> print(sparse_po(ratios, ratios, kls, kls))
      [0.6931472 0.6931472]

    References:
      Christopoulou et al., "SparsePO: Controlling Preference Alignment of LLMs via
      Sparse Token Masks", 2024, arXiv:2410.05102, the SparsePO objective.
      Code: huawei-noah/HEBO, SparsePO/src/trainers/sparse_trainer.py.
    """
    chosen, rejected, kl_w, kl_l = _common.promoted(
        chosen_masked_log_ratios=chosen_masked_log_ratios,
        rejected_masked_log_ratios=rejected_masked_log_ratios,
        chosen_masked_kls=chosen_masked_kls,
        rejected_masked_kls=rejected_masked_kls,
    )
    return _logistic(chosen - rejected - (kl_l - kl_w), beta)


def activation_masks(
    activations: TokenValues, completions: Owners, *, num_completions: int
) -> TokenValues:
    """SparsePO's masks without parameters: activations rescaled to [0, 1].

        m(t) = (a(t) - min a) / (max a - min a)   over the tokens of a completion

    a(t) is the mean over the features of an activation of the reference where token t
    is predicted.  The mask of several activations, such as those of all layers, is the
    mean of their masks.  Standardizing a(t) first, as the paper does, changes nothing.

    Args:
      activations: a(t) of each target token; [*rows, Q, P].
      completions: index of the completion that each target belongs to, below
        `num_completions`; -1 for padding; [*rows, Q, P].
      num_completions: completions per row, including empty ones; static.

    Returns:
      One mask per token, [*rows, Q, P], at least float32.  1 for all tokens of a
      completion whose activations are equal, and 0 for padding.

    Raises:
      TypeError: if `activations` is not floating point or `completions` not integer.
      ValueError: if shapes differ, have less than two axes, or `num_completions` < 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import activation_masks
      >>> activations = jnp.array([[1.0, 3.0, 2.0, 7.0]])
      >>> owner = jnp.array([[0, 0, 0, -1]])
      >>> print(activation_masks(activations, owner, num_completions=1))
      [[0.  1.  0.5 0. ]]

    References:
      Christopoulou et al., "SparsePO: Controlling Preference Alignment of LLMs via
      Sparse Token Masks", 2024, arXiv:2410.05102, the activation-based mask (MaPO).
      Code: huawei-noah/HEBO, SparsePO/src/trainers/mapo_trainer.py, `zn_rescale`.
    """
    (values,) = _common.promoted(activations=activations)
    own = owned_tokens(values, completions, num_completions)
    wide, tokens = values[..., None], (-3, -2)
    low = jnp.min(jnp.where(own, wide, jnp.inf), axis=tokens, keepdims=True)
    high = jnp.max(jnp.where(own, wide, -jnp.inf), axis=tokens, keepdims=True)
    # Empty completions have no token that reads these.
    of_token = lambda x: jnp.sum(jnp.where(own, x, 0), axis=-1)
    low, high = of_token(low), of_token(high)
    varies = high > low
    mask = jnp.where(varies, values - low, 1) / jnp.where(varies, high - low, 1)
    return jnp.where(jnp.asarray(completions) >= 0, mask, 0)


def _log_ratios_and_kls(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    chosen_kls,
    rejected_kls,
) -> tuple[jax.Array, ...]:
    """Computes log pi/ref and divergence of each answer, promoted and checked."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, kl_w, kl_l = (
        _common.promoted(
            policy_chosen_logps=policy_chosen_logps,
            policy_rejected_logps=policy_rejected_logps,
            reference_chosen_logps=reference_chosen_logps,
            reference_rejected_logps=reference_rejected_logps,
            chosen_kls=chosen_kls,
            rejected_kls=rejected_kls,
        )
    )
    chosen, rejected = _common.log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected
    )
    return chosen, rejected, kl_w, kl_l


def _logistic(margin: jax.Array, beta) -> jax.Array:
    _common.positive("beta", beta)
    return _common.logistic_loss(_common.per_pair("beta", beta, margin) * margin)

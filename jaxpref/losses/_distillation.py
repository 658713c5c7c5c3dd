"""Losses of whole distributions over the vocabulary: distillation from teachers.

They read logits, the last axis of which is the vocabulary.  `jaxpref train` computes
them for some positions at a time, so that no array of all positions and all of the
vocabulary is ever in memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpref.losses import _common
from jaxpref.losses._common import Scalar

__all__ = ["align_distil", "align_distil_weights"]

Logits = Float[Array, "*batch V"]
PerToken = Float[Array, "*batch"]


def align_distil_weights(
    teacher_logits: Logits,
    reverse_logits: Logits,
    *,
    scale: Scalar = 10.0,
    floor: Scalar = 1e-3,
) -> PerToken:
    """AlignDistil's weight of extrapolation, from the distance of two models.

        a = scale sum_v |p(v) - q(v)| + floor

    p and q are the distributions of the next token under a model trained by DPO and
    under one trained by DPO on swapped answers.  Where they agree, the token does not
    matter to the preference.

    Args:
      teacher_logits: logits of the model trained by DPO; [*batch, V].
      reverse_logits: logits of the model trained on swapped answers; [*batch, V].
      scale: weight of twice the total variation distance, >= 0.
      floor: weight where the models agree, > 0.

    Returns:
      One weight per token, [*batch], at least float32; > 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ, or `scale` or `floor` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import align_distil_weights
      >>> teacher, reverse = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> print(align_distil_weights(teacher, reverse))
      [0.001]

    References:
      Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive
      Policy Distillation", 2025, arXiv:2503.02832.
      Code: songmzhang/AlignDistil, aligndistil_offpolicy_trainer.py, whose scripts set
      the scale (`beta2`) to 10 for given answers and to 15 for sampled ones.
    """
    teacher, reverse = _common.promoted(
        teacher_logits=teacher_logits, reverse_logits=reverse_logits
    )
    _common.not_negative("scale", scale)
    _common.positive("floor", floor)
    p, q = (jnp.exp(_log_softmax(z)) for z in (teacher, reverse))
    distances = jnp.sum(jnp.abs(p - q), axis=-1)
    of = lambda name, value: _common.scalar(name, value, distances)
    return of("scale", scale) * distances + of("floor", floor)


def align_distil(
    policy_logits: Logits,
    teacher_logits: Logits,
    reverse_logits: Logits,
    *,
    scale: Scalar = 10.0,
    floor: Scalar = 1e-3,
    beta: Scalar = 0.1,
) -> PerToken:
    """AlignDistil: distillation from a teacher that extrapolates DPO at each token.

        loss = beta / a KL(pi || softmax(z + a (z - z_reverse)))

    z are the logits of a model trained by DPO, z_reverse those of one trained by DPO on
    swapped answers, and a is `align_distil_weights`.  RLHF with the reward of DPO is
    equivalent to such a distillation.  The divergence from the teacher has a large
    weight where the two models agree, which keeps the policy near the DPO model there.

    Args:
      policy_logits: logits of the trained model; [*batch, V].
      teacher_logits: logits of the model trained by DPO; [*batch, V].
      reverse_logits: logits of the model trained on swapped answers; [*batch, V].
      scale: weight of twice the total variation distance in a, >= 0.
      floor: a where the two models agree, > 0.
      beta: the beta with which they were trained, > 0; it scales the loss.

    Returns:
      One loss per token, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if shapes differ or an option is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import align_distil
      >>> policy, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
      >>> print(align_distil(policy, teacher, jnp.array([[0.0, 1.0]])))
      [0.09791041]

    References:
      Zhang et al., "AlignDistil: Token-Level Language Model Alignment as Adaptive
      Policy Distillation", 2025, arXiv:2503.02832.
      Code: songmzhang/AlignDistil, aligndistil_offpolicy_trainer.py.
    """
    policy, teacher, reverse = _common.promoted(
        policy_logits=policy_logits,
        teacher_logits=teacher_logits,
        reverse_logits=reverse_logits,
    )
    _common.positive("beta", beta)
    weights = align_distil_weights(teacher, reverse, scale=scale, floor=floor)
    target = _log_softmax(teacher + weights[..., None] * (teacher - reverse))
    log_p = _log_softmax(policy)
    kls = jnp.sum(jnp.exp(log_p) * (log_p - target), axis=-1)
    return _common.scalar("beta", beta, kls) / weights * kls


def _log_softmax(z: jax.Array) -> jax.Array:
    # By reductions alone, so that the vocabulary can be sharded.
    return z - jax.nn.logsumexp(z, axis=-1, keepdims=True)

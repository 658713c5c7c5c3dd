"""Estimators of the KL divergence from a policy to its reference.

None of these is a training objective.  Each function returns one estimate per sample,
which the caller averages.
"""

import jax.numpy as jnp

from jaxpref.losses import _common
from jaxpref.losses._common import PerPair

__all__ = ["kl_k1", "kl_k2", "kl_k3"]


def kl_k1(log_ratios: PerPair) -> PerPair:
    """The simple estimator of KL(pi||ref) from a sample of pi.

        k1 = l,    l = log pi(y|x) / ref(y|x),  y ~ pi

    Unbiased, but has high variance and is often negative, although the KL is not.

    Args:
      log_ratios: l, log pi minus log ref of samples from pi, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k1
      >>> print(kl_k1(jnp.array([0.5, -0.5])))
      [ 0.5 -0.5]

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return log_ratios


def kl_k2(log_ratios: PerPair) -> PerPair:
    """The squared estimator of KL(pi||ref) from a sample of pi.

        k2 = l^2 / 2,    l = log pi(y|x) / ref(y|x),  y ~ pi

    Has low variance and is >= 0, but is biased (little, if the two are close).

    Args:
      log_ratios: l, log pi minus log ref of samples from pi, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k2
      >>> print(kl_k2(jnp.array([0.5, -0.5])))
      [0.125 0.125]

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return 0.5 * jnp.square(log_ratios)


def kl_k3(log_ratios: PerPair) -> PerPair:
    """The unbiased, nonnegative estimator of KL(pi||ref) from a sample of pi.

        k3 = exp(-l) - 1 + l,    l = log pi(y|x) / ref(y|x),  y ~ pi

    k1 with a control variate: exp(-l) - 1 = ref/pi - 1 has mean 0 under pi.  The
    exponent -l is clipped at 80 to prevent overflow in float32.

    Args:
      log_ratios: l, log pi minus log ref of samples from pi, nats; [*batch].

    Returns:
      One estimate per sample in nats, [*batch], at least float32; >= 0.

    Raises:
      TypeError: if the array is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.losses import kl_k3
      >>> [f"{x:.4f}" for x in kl_k3(jnp.array([0.5, -0.5]))]
      ['0.1065', '0.1487']

    References:
      Schulman, "Approximating KL Divergence", 2020,
      http://joschu.net/blog/kl-approx.html.
    """
    (log_ratios,) = _common.promoted(log_ratios=log_ratios)
    return jnp.expm1(jnp.minimum(-log_ratios, 80)) + log_ratios

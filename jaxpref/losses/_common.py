"""Helpers shared by all losses: promotion, static checks, and the log-ratio margin."""

import numbers
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

PerPair = Float[Array, "*batch"]
"""One number per pair, with any batch axes."""
Lengths = Real[Array, "*batch"]
"""Number of completion tokens, integer or float."""
Scalar = float | int | Float[Array, ""]
"""One number for all pairs: a Python number, whose range is checked, or a traced
scalar, which is not checked."""
Number = float | int | Float[Array, "*#batch"]
"""One number for all pairs, or an array that broadcasts to one per pair.  The range of
Python numbers is checked, that of arrays is not."""
Mask = Bool[Array, "*batch"] | None
"""Which pairs are real; None if all are."""


def reward_per_token(loss):
    """Declares that a loss's implicit reward is an average over completion tokens.

    Training then logs rewards in the loss's own convention.
    """
    loss.reward_per_token = True
    return loss


def promoted(**arrays) -> tuple[jax.Array, ...]:
    """Casts the arrays to their common dtype, at least float32.

    Raises:
      TypeError: if an array is not floating point.
      ValueError: if the shapes differ.
    """
    values = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, value in values.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"Expected {name} to be floating point, got {value.dtype}.")
    same_shape(**values)
    dtype = jnp.result_type(jnp.float32, *(value.dtype for value in values.values()))
    return tuple(value.astype(dtype) for value in values.values())


def same_shape(**arrays) -> None:
    """Raises a ValueError with all shapes unless they are equal."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"Expected arrays of one shape, got {listed}.")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a Python or NumPy number, no array: only those are checked."""
    return isinstance(value, numbers.Real)


def not_text(name: str, value) -> None:
    """Raises ValueError for text, which NumPy could take for a number."""
    if isinstance(value, str):
        raise ValueError(f"Expected {name} to be one number, got {value!r}.")


def one_number(name: str, value) -> None:
    """Raises ValueError for text, and for arrays with axes, which would broadcast."""
    not_text(name, value)
    if jnp.ndim(value):
        shape = jnp.shape(value)
        raise ValueError(f"Expected {name} to be one number, got shape {shape}.")


def positive(name: str, value) -> None:
    """Raises ValueError if a Python number is not above 0; arrays pass unchecked."""
    not_text(name, value)
    if is_number(value) and not 0 < value < float("inf"):
        raise ValueError(f"Expected {name} > 0 and finite, got {value}.")


def not_negative(name: str, value) -> None:
    """Raises ValueError if a Python number is below 0; arrays pass unchecked."""
    not_text(name, value)
    if is_number(value) and not 0 <= value < float("inf"):
        raise ValueError(f"Expected {name} >= 0 and finite, got {value}.")


def between(name: str, value, low: float, high: float) -> None:
    """Raises ValueError if a Python number is outside the open (low, high)."""
    not_text(name, value)
    if is_number(value) and not low < value < high:
        raise ValueError(f"Expected {name} in ({low}, {high}), got {value}.")


def fraction(name: str, value) -> None:
    """Raises ValueError if a Python number is outside the closed [0, 1]."""
    not_text(name, value)
    if is_number(value) and not 0 <= value <= 1:
        raise ValueError(f"Expected {name} in [0, 1], got {value}.")


def finite(name: str, value) -> None:
    """Raises ValueError if a Python number is not finite; arrays pass unchecked."""
    not_text(name, value)
    if is_number(value) and not abs(value) < float("inf"):
        raise ValueError(f"Expected {name} finite, got {value}.")


def rates(flip_rate: Any, like: jax.Array) -> jax.Array:
    """`flip_rate` as `per_pair` returns it.

    Raises:
      ValueError: also if a Python number is outside [0, 1/2).
    """
    if is_number(flip_rate) and not 0 <= flip_rate < 0.5:
        raise ValueError(f"Expected flip_rate in [0, 0.5), got {flip_rate}.")
    return per_pair("flip_rate", flip_rate, like)


def correction(flip_rate, like: jax.Array) -> jax.Array:
    """The factor e / (1 - 2e) that corrects for flips, with the checks of `rates`.

    Python numbers are divided in float64: in float32, 1 - 2e loses precision near 1/2.
    """
    rate = rates(flip_rate, like)
    if is_number(flip_rate):
        flip_rate = float(flip_rate)
        return jnp.asarray(flip_rate / (1 - 2 * flip_rate), like.dtype)
    return rate / (1 - 2 * rate)


def log_ratios(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
) -> tuple[jax.Array, jax.Array]:
    """Computes log pi/ref of each answer, promoted and checked."""
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = promoted(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    # Subtract the reference first: both are large and nearly equal, so this loses
    # little precision, and the difference is exactly 0 where they agree.
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def reward_margin(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
) -> jax.Array:
    """The implicit reward margin h = beta D, promoted and checked."""
    positive("beta", beta)
    chosen, rejected = log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return per_pair("beta", beta, chosen) * (chosen - rejected)


def answer_rewards(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
) -> tuple[jax.Array, jax.Array]:
    """The implicit reward of each answer, beta log pi/ref, promoted and checked."""
    positive("beta", beta)
    chosen, rejected = log_ratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    beta = per_pair("beta", beta, chosen)
    return beta * chosen, beta * rejected


def reward_difference(chosen_rewards, rejected_rewards) -> jax.Array:
    """r_w - r_l, promoted and checked."""
    chosen, rejected = promoted(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return chosen - rejected


def per_token(logps: jax.Array, lengths, name: str) -> jax.Array:
    """Sums divided by lengths; a length of 0 counts as 1, so that 0/0 cannot arise."""
    same_shape(logps=logps, **{name: lengths})
    return logps / jnp.maximum(jnp.asarray(lengths, logps.dtype), 1)


def logistic_loss(z: jax.Array) -> jax.Array:
    """-log s(z), finite with finite gradients for every finite z."""
    return -jax.nn.log_sigmoid(z)


def flipped_logistic_loss(z: jax.Array, rate: jax.Array) -> jax.Array:
    """-log((1 - e) s(z) + e s(-z)), for a label that is wrong at the rate e."""
    # In log space s(z) cannot underflow.  At e = 0 the second term is log 0 = -inf,
    # which logaddexp drops exactly, in the value and in the gradient.
    correct = jnp.log1p(-rate) + jax.nn.log_sigmoid(z)
    flipped = jnp.log(rate) + jax.nn.log_sigmoid(-z)
    return -jnp.logaddexp(correct, flipped)


def clipped_exp(x: jax.Array) -> jax.Array:
    """exp(x), clipped at exp(80) so that float32 gradients do not overflow."""
    return jnp.exp(jnp.minimum(x, 80))


def scalar(name: str, value, like: jax.Array) -> jax.Array:
    """Casts one number to the dtype of `like`.

    Raises:
      ValueError: if it has axes, which would broadcast against the pairs.
    """
    one_number(name, value)
    return jnp.asarray(value, like.dtype)


def per_pair(name: str, value, like: jax.Array) -> jax.Array:
    """One number, or one per pair, in the dtype of `like`.

    Raises:
      ValueError: if it is text, or does not broadcast to the shape of `like`.
    """
    not_text(name, value)
    shape = jnp.shape(value)
    padded = (1,) * (like.ndim - len(shape)) + shape
    if len(padded) > like.ndim or any(
        own not in (1, pair) for own, pair in zip(padded, like.shape)
    ):
        raise ValueError(
            f"Expected {name} to broadcast to the pairs' shape {like.shape}, "
            f"got shape {shape}."
        )
    return jnp.asarray(value, like.dtype)


def mask(where, like: jax.Array) -> jax.Array:
    """`where` as booleans in the shape of `like`; all true if it is None.

    Raises:
      ValueError: if the shapes differ.
    """
    if where is None:
        return jnp.ones_like(like, bool)
    same_shape(pairs=like, where=where)
    return jnp.asarray(where, bool)


def mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean over the real pairs, over all axes; 0 if there are none.

    Coupled losses are defined on the global batch: under `jit` the sum runs over all
    devices.
    """
    total = jnp.sum(jnp.where(where, values, 0))
    return total / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)

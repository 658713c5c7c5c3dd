"""BVPO: the mixture of a noisy and a biased gradient with the least squared error.

For a model that writes a reasoning trace before its answer, there are two estimates of
the gradient mu of the marginal loss.  g_t uses sampled traces and is noisy.  g_e uses
an empty trace; it is biased but has low variance.  The mixture

    g = alpha g_t + (1 - alpha) g_e

has, with b_t = E g_t - mu, b_e = E g_e - mu, covariances S_t, S_e and S_te between the
two, the mean squared error (theorem 2)

    E ||g - mu||^2 = ||alpha b_t + (1 - alpha) b_e||^2
                     + alpha^2 tr S_t + (1 - alpha)^2 tr S_e
                     + 2 alpha (1 - alpha) tr S_te

a parabola in alpha.  Its six coefficients are the `Ingredients`, and `optimal_alpha` is
its minimum.  `ingredients` estimates them from repeated draws or their sketches, and
`running` averages them over steps.  Conditional on the data, g_e is not random, and the
variance of g is alpha^2 tr S_t (theorem 1).

The mixture is linear.  So for a constant alpha it is the gradient of the mixed loss
alpha L_t + (1 - alpha) L_e, in one backward pass and without this module.

Accuracy of alpha: mean |alpha - alpha*| with K = 4 Gaussian draws of g_t, all used,
and one of g_e, with `ingredients` averaged over 1 / 10 / 100 steps, for several ratios
||b_e||^2 / tr S_t.  The noise is "flat", with equal variances in all coordinates, or
"steep", with variances like 1 / i; b_e is drawn from the same distribution.

    parameters                ratio 0.01        0.1          1         10
    10, flat               .08/.06/.02 .13/.09/.04 .21/.07/.02 .02/.01/.00
    10, steep              .12/.07/.03 .17/.10/.05 .29/.10/.03 .04/.01/.00
    1,000, flat            .03/.01/.00 .04/.01/.00 .02/.01/.00 .00/.00/.00
    1,000, steep           .09/.05/.02 .11/.06/.02 .08/.03/.01 .01/.00/.00
    100,000, steep, as
      sketches of 64       .10/.05/.02 .12/.06/.02 .10/.04/.01 .02/.01/.00
      sketches of 256      .07/.04/.01 .10/.06/.01 .06/.02/.01 .01/.00/.00

(`python -m tests.gradients.simulations`, seeds 0 to 39, for 100,000 parameters 0 to
19; standard errors up to 0.03 after 1 step, 0.015 after 10, 0.005 after 100; seven
minutes on two cores; it also covers K = 2, 8, 16 and excess errors.)

At ratios from 0.1 to 10, the best mixture beats the better of the two gradients by
at least 10%.  There, ten steps give alpha within 0.1 on average (barely so with 10
steep parameters), and a single step often does not.  A larger K does not help much,
because the noise of the mean hides b_e.  At a ratio of 0.01, alpha* is 0.01, and an
alpha that is off by 0.05 increases the error considerably over its minimum (by 63%
with 1,000 steep parameters after 10 steps, 7% after 100).  So average over 100
steps or more.

References:
  Zhu et al., "BVPO", 2025, arXiv:2510.05095, Eq. 2 and theorems 1 and 2.  The paper
  fixes alpha at 0.5 and does not estimate it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxpref.gradients._ingredients import Ingredients, ingredients
from jaxpref.gradients._sketches import direction, sketch
from jaxpref.losses import _common
from jaxpref.losses._common import Scalar

__all__ = [
    "Ingredients",
    "RunningState",
    "Transform",
    "auto_mix",
    "direction",
    "ingredients",
    "mean_squared_error",
    "mix",
    "optimal_alpha",
    "running",
    "sketch",
]

Number = float | int | Float[Array, "*#batch"]
"""A number, or an array that broadcasts."""


def mix(trace_gradient: PyTree, empty_gradient: PyTree, alpha: Scalar) -> PyTree:
    """The mixture of two gradients.

        out = alpha g_t + (1 - alpha) g_e

    Args:
      trace_gradient: g_t, a pytree of floating-point arrays.
      empty_gradient: g_e, in the same structure and shapes.
      alpha: one number in [0, 1], may be traced.

    Returns:
      A pytree in the common dtype of each pair of leaves, computed in at least float32.

    Raises:
      TypeError: if a leaf is not floating point.
      ValueError: if structures or shapes differ, or a Python `alpha` is outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.gradients.bvpo import mix
      >>> mix({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, 0.25)["w"].tolist()
      [0.25, 0.25]

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, Eq. 2.
    """
    _common.fraction("alpha", alpha)

    def one(trace, empty):
        dtype = jnp.result_type(trace, empty)
        trace, empty = _common.promoted(trace_gradient=trace, empty_gradient=empty)
        share = jnp.asarray(alpha, trace.dtype)
        return (share * trace + (1 - share) * empty).astype(dtype)

    return jax.tree.map(one, trace_gradient, empty_gradient)


def optimal_alpha(
    *,
    trace_variance: Number,
    empty_variance: Number,
    covariance: Number,
    trace_bias_sq: Number,
    empty_bias_sq: Number,
    bias_dot: Number,
) -> Float[Array, "*batch"]:
    """The alpha with the least mean squared error.

                tr S_e - tr S_te + ||b_e||^2 - <b_t, b_e>
        out = ---------------------------------------------,  clipped to [0, 1]
              tr S_t + tr S_e - 2 tr S_te + ||b_t - b_e||^2

    Never worse than either gradient.  If b_t = 0 and g_e is not random, it is
    ||b_e||^2 / (||b_e||^2 + tr S_t).  If the denominator E ||g_t - g_e||^2 is 0, all
    mixtures are equal, and it is 1/2.

    Variances and squared norms below 0, which estimates may be, are set to 0.

    Args:
      trace_variance: tr S_t, the trace of the covariance matrix of g_t.
      empty_variance: tr S_e.
      covariance: tr S_te.
      trace_bias_sq: ||b_t||^2.
      empty_bias_sq: ||b_e||^2.
      bias_dot: <b_t, b_e>.
        All in the same unit; numbers or arrays that broadcast, may be traced.

    Returns:
      alpha in [0, 1], at least float32; [*batch].

    Examples:
      >>> from jaxpref.gradients.bvpo import optimal_alpha
      >>> zeros = {"empty_variance": 0, "covariance": 0, "trace_bias_sq": 0}
      >>> alpha = optimal_alpha(
      ...     trace_variance=3.0, empty_bias_sq=1.0, bias_dot=0, **zeros
      ... )
      >>> float(alpha)
      0.25

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, theorem 2 (its denominator derived).
    """
    s_t, s_e, s_te, t, e, dot = _floating(
        trace_variance,
        empty_variance,
        covariance,
        trace_bias_sq,
        empty_bias_sq,
        bias_dot,
    )
    s_t, s_e, t, e = (jnp.maximum(x, 0) for x in (s_t, s_e, t, e))
    gain = (s_e - s_te) + (e - dot)
    total = (s_t + s_e - 2 * s_te) + (t + e - 2 * dot)
    # Ignore differences at the level of rounding errors.
    least = 4 * jnp.finfo(total.dtype).eps * (s_t + s_e + t + e)
    differ = total > least
    return jnp.where(differ, jnp.clip(gain / jnp.where(differ, total, 1), 0, 1), 0.5)


def mean_squared_error(
    alpha: Number,
    *,
    trace_variance: Number,
    empty_variance: Number,
    covariance: Number,
    trace_bias_sq: Number,
    empty_bias_sq: Number,
    bias_dot: Number,
) -> Float[Array, "*batch"]:
    """The mean squared error of the mixture; see the module's docstring.

    Linear in the six quantities, so unbiased estimates of them give an unbiased
    estimate, which may be negative.

    Args:
      alpha: the share of the trace gradient.
      trace_variance: tr S_t, the trace of the covariance matrix of g_t.
      empty_variance: tr S_e.
      covariance: tr S_te.
      trace_bias_sq: ||b_t||^2.
      empty_bias_sq: ||b_e||^2.
      bias_dot: <b_t, b_e>.
        All in the same unit; numbers or arrays that broadcast, may be traced.

    Returns:
      One number per alpha in that unit, at least float32; [*batch].

    References:
      Zhu et al., "BVPO", 2025, arXiv:2510.05095, theorem 2.
    """
    a, s_t, s_e, s_te, t, e, dot = _floating(
        alpha,
        trace_variance,
        empty_variance,
        covariance,
        trace_bias_sq,
        empty_bias_sq,
        bias_dot,
    )
    return a**2 * (t + s_t) + (1 - a) ** 2 * (e + s_e) + 2 * a * (1 - a) * (dot + s_te)


class Transform(NamedTuple):
    """A pair of pure functions, like `optax.GradientTransformation`."""

    init: Callable
    """Creates the state."""
    update: Callable
    """`update(inputs, state, ...) -> (outputs, state)`."""


class RunningState(NamedTuple):
    """The state of `running`; a pytree of seven numbers."""

    means: Ingredients
    """Bias-corrected averages over the steps so far."""
    weight: Float[Array, ""]
    """1 - decay^steps; 0 before the first estimate."""


def running(*, decay: float, initial_alpha: float = 0.5) -> Transform:
    """Computes alpha from moving averages of the ingredients.

        means <- means + (1 - decay) / weight (found - means)
        weight <- decay weight + (1 - decay),  before the means
        alpha = optimal_alpha(means)

    The ingredients are averaged rather than alpha, because an average of ratios is
    biased, while a ratio of averages hardly is.  The average spans about 1 / (1 -
    decay) steps; `ingredients` documents how many are needed.  A step whose ingredients
    are not all finite changes nothing.

    This alpha depends on the draws that it mixes, with a weight of 1 - decay.  Without
    averaging (decay 0), K = 4, 1,000 parameters with steep noise, and ||b_e||^2 =
    tr S_t, the error of the mixture exceeds the minimum by 8.1%, and by 6.0% with the
    alpha of the previous step (`python -m tests.gradients.simulations`, 4000 steps,
    seed 0).

    Args:
      decay: weight of the old averages, in [0, 1); 0 uses only the current step.
      initial_alpha: alpha before the first estimate.

    Returns:
      `init() -> state` and `update(ingredients, state) -> (alpha, state)`.  This alpha
      uses the ingredients of the current step.  For an alpha that does not, apply
      `optimal_alpha(**vars(state.means))` to the previous state.

    Raises:
      ValueError: if a Python number is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxpref.gradients import bvpo
      >>> average = bvpo.running(decay=0.9)
      >>> found = bvpo.ingredients(jnp.array([[1.0], [3.0]]), jnp.array([[5.0]]))
      >>> alpha, state = average.update(found, average.init())
      >>> print(f"{alpha:.2f} of {state.means.empty_bias_sq:.0f}")
      0.80 of 8
    """
    _decay(decay)
    _common.fraction("initial_alpha", initial_alpha)

    def init():
        zero = lambda: jnp.zeros(())
        fields = dataclasses.fields(Ingredients)
        return RunningState(Ingredients(**{f.name: zero() for f in fields}), zero())

    def update(found: Ingredients, state: RunningState):
        known = jnp.all(jnp.isfinite(jnp.stack(_floating(*vars(found).values()))))
        weight = decay * state.weight + (1 - decay)
        pace = jnp.where(known, (1 - decay) / weight, 0).astype(weight.dtype)
        weight = jnp.where(known, weight, state.weight)

        def toward(mean, new):
            new = jnp.where(known, new, 0).astype(mean.dtype)
            return mean + pace * (new - mean)

        means = jax.tree.map(toward, state.means, found)
        alpha = jnp.where(weight > 0, optimal_alpha(**vars(means)), initial_alpha)
        return alpha, RunningState(means, weight)

    return Transform(init, update)


def auto_mix(
    *, decay: float, initial_alpha: float = 0.5, paired: bool = False
) -> Transform:
    """Mixes stacked draws of both gradients optimally.

        out = alpha mean_t + (1 - alpha) mean_e

    alpha comes from `running` on the exact `ingredients` of every step.  This is an
    optax gradient transformation, to be placed first in `optax.chain`.  It holds all
    draws at once, so it is for small models.  For large models, sketch each draw, add
    it to its mean, and use `ingredients` of the sketches, `running`, and `mix`.

    Args:
      decay: as in `running`.
      initial_alpha: as in `running`.
      paired: as in `ingredients`.

    Returns:
      `init(params) -> state` and `update((trace_draws, empty_draws), state, params) ->
      (gradient, state)`.  The draws are as in `ingredients`, and the gradient lacks
      their leading axis.

    Raises:
      ValueError: as `running` and `ingredients` do.
    """
    average = running(decay=decay, initial_alpha=initial_alpha)

    def init(params):
        del params
        return average.init()

    def update(updates, state, params=None):
        del params
        trace_draws, empty_draws = updates
        trace_size, empty_size = (len(jax.tree.leaves(x)[0]) for x in updates)
        found = ingredients(
            trace_draws,
            empty_draws,
            paired=paired,
            trace_size=trace_size,
            empty_size=empty_size,
        )
        alpha, state = average.update(found, state)
        mean = lambda draws: jax.tree.map(lambda x: jnp.mean(x, axis=0), draws)
        return mix(mean(trace_draws), mean(empty_draws), alpha), state

    return Transform(init, update)


def _floating(*values) -> list[jax.Array]:
    """Numbers or arrays in their common dtype, at least float32."""
    dtype = jnp.promote_types(jnp.result_type(*values), jnp.float32)
    return [jnp.asarray(value, dtype) for value in values]


def _decay(decay) -> None:
    _common.fraction("decay", decay)
    if _common.is_number(decay) and decay == 1:
        raise ValueError("Expected decay < 1, got 1: the averages would never change.")

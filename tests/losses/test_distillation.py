"""AlignDistil against NumPy, written from the authors' equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxpref import losses
from jaxpref.models.logprobs import STATISTICS, Statistic, token_statistics

OPTIONS = {"scale": 3.0, "floor": 0.02, "beta": 0.3}


def weight(teacher, reverse, *, scale, floor):
    return scale * np.abs(softmax(teacher) - softmax(reverse)).sum() + floor


def loss(policy, teacher, reverse, *, scale, floor, beta):
    """One token, logits [V]."""
    a = weight(teacher, reverse, scale=scale, floor=floor)
    target = softmax((1 + a) * teacher - a * reverse)
    p = softmax(policy)
    return beta / a * sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, target))


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 2, (3, 2, 4, 7))


def test_value_and_gradient_are_the_papers(logits):
    flat = logits.reshape(3, -1, 7)
    expected = np.array([loss(*z, **OPTIONS) for z in flat.swapaxes(0, 1)])
    own = {"scale": 3.0, "floor": 0.02}
    weights = np.array([weight(*z, **own) for z in flat[1:].swapaxes(0, 1)])
    weights_of = functools.partial(losses.align_distil_weights, **own)

    @jax.jit
    def values_and_gradient(policy, *others):
        total = lambda z: jnp.sum(losses.align_distil(z, *others, **OPTIONS))
        values = losses.align_distil(policy, *others, **OPTIONS)
        return values, weights_of(*others), jax.grad(total)(policy)

    with jax.enable_x64(True):
        exact, found, gradient = values_and_gradient(*jnp.asarray(logits))
    assert exact.shape == (2, 4) and exact.dtype == jnp.float64
    np.testing.assert_allclose(exact.ravel(), expected, rtol=1e-12)
    np.testing.assert_allclose(found.ravel(), weights, rtol=1e-12)
    single = losses.align_distil(*jnp.asarray(logits, jnp.float32), **OPTIONS)
    np.testing.assert_allclose(single.ravel(), expected, rtol=1e-5)
    # The gradient by central differences, one logit at a time.
    step = 1e-5
    for token in range(8):
        for v in range(7):
            moved = [flat[:, token].copy() for _ in range(2)]
            moved[0][0, v] += step
            moved[1][0, v] -= step
            up, down = (loss(*z, **OPTIONS) for z in moved)
            ours = gradient.reshape(-1, 7)[token, v]
            assert ours == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-8)


def test_where_the_models_agree_it_distils_the_teacher(logits):
    policy, teacher, _ = jnp.asarray(logits, jnp.float32)
    found = losses.align_distil(policy, teacher, teacher + 3.0)
    p, q = log_softmax(logits[0], -1), log_softmax(logits[1], -1)
    kls = (np.exp(p) * (p - q)).sum(-1)
    # 0.1 / floor, and the weight is exact up to the rounding of the distance.
    np.testing.assert_allclose(found, 0.1 / 1e-3 * kls, rtol=5e-3)
    assert np.abs(losses.align_distil(teacher, teacher, teacher)).max() < 1e-4


def test_options_out_of_range_are_refused(logits):
    for option, value in {"scale": -1, "floor": 0, "beta": 0}.items():
        with pytest.raises(ValueError, match=f"Expected {option}"):
            losses.align_distil(*jnp.asarray(logits), **{option: value})


def test_in_chunks_over_positions(logits):
    """Statistics of three models equal those of all logits at once."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(3, 2, 6, 5)).astype(np.float32)
    heads = rng.normal(size=(3, 5, 7)).astype(np.float32)
    predictors = rng.integers(0, 6, (2, 4)).astype(np.int32)
    statistic = Statistic(
        "distillation",
        lambda z, t, others: losses.align_distil(
            z, others["teacher"], others["reverse"], **OPTIONS
        ),
        ("teacher", "reverse"),
    )
    found = token_statistics(
        ("logps", "distillation"),
        *map(jnp.asarray, (hidden[0], heads[0], predictors, 0 * predictors)),
        others={"reverse": (hidden[2], heads[2]), "teacher": (hidden[1], heads[1])},
        among=STATISTICS | {"distillation": statistic},
        chunk_size=3,
    )
    z = np.einsum("mbtd,mdv->mbtv", hidden.astype(float), heads.astype(float))
    at = np.take_along_axis(z, predictors[None, ..., None], axis=2)
    for row in range(2):
        for place in range(4):
            expected = loss(*at[:, row, place], **OPTIONS)
            ours = float(found["distillation"][row, place])
            assert ours == pytest.approx(expected, rel=2e-4)

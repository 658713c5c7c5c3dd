"""Losses of single answers, and their reference points and weights."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from jaxpref import losses
from tests.losses.meshes import sharded
from tests.losses.row import EXTREMES

ANSWERS = 16
# Both classes meet every extreme.
DESIRABLE = np.arange(ANSWERS) % 3 > 0
KL, SHIFT = 1.75, -0.375


def drawn(seed=0):
    """Policy and reference log-probs that float32 holds exactly, extremes first."""
    rng = np.random.default_rng(seed)
    policy, reference = np.round(rng.uniform(-8, 0, (2, ANSWERS)) * 2**10) / 2**10
    policy[: len(EXTREMES)] = EXTREMES
    return policy, reference


# Oracles: two cases where the papers have two.


def kto(policy, reference, desirable, kl, *, beta, w_d=1.0, w_u=1.0):
    value = np.where(
        desirable,
        w_d * expit(beta * (policy - reference - kl)),
        w_u * expit(beta * (kl - (policy - reference))),
    )
    return np.where(desirable, w_d, w_u) - value


def bco(policy, reference, desirable, shift, *, beta):
    rewards = beta * (policy - reference)
    return np.where(desirable, -log_expit(rewards - shift), -log_expit(shift - rewards))


def apo(policy, reference, desirable, *, beta):
    s = expit(beta * (policy - reference))
    return np.where(desirable, 1 - s, s)


WEIGHTED = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.25}
CASES = [
    pytest.param(losses.kto, kto, (KL,), {}, {"beta": 0.1}, id="kto"),
    pytest.param(
        losses.kto, kto, (KL,), WEIGHTED, {"beta": 0.5, "w_d": 1.5, "w_u": 0.25},
        id="kto-weighted",
    ),
    pytest.param(losses.bco, bco, (SHIFT,), {}, {"beta": 0.01}, id="bco"),
    pytest.param(losses.bco, bco, (SHIFT,), {"beta": 1.0}, {"beta": 1.0}, id="bco-1"),
    pytest.param(losses.apo_zero_unpaired, apo, (), {}, {"beta": 0.1}, id="apo"),
]  # fmt: skip
every_case = pytest.mark.parametrize(
    ("loss", "oracle", "numbers", "options", "theirs"), CASES
)


def both(loss, numbers, options):
    """`(policy, reference, desirable) -> losses, gradients in the policy log-probs`."""

    def function(policy, reference, desirable):
        run = lambda p: loss(p, reference, desirable, *numbers, **options)
        return run(policy), jax.grad(lambda p: jnp.sum(run(p)))(policy)

    return function


@every_case
def test_values_and_gradients(loss, oracle, numbers, options, theirs):
    policy, reference = drawn()
    wide = lambda x: np.asarray(x, np.longdouble)
    exact = lambda p: oracle(wide(p), wide(reference), DESIRABLE, *numbers, **theirs)
    step = 2.0**-17
    derivative = (exact(policy + step) - exact(policy - step)) / (2 * step)
    expected, derivative = exact(policy).astype(float), derivative.astype(float)
    run = both(loss, numbers, options)
    with jax.enable_x64(True):
        value, gradient = jax.jit(run)(
            *map(jnp.asarray, (policy, reference, DESIRABLE))
        )
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(gradient, derivative, rtol=1e-7, atol=1e-9)
    single = [jnp.asarray(a, jnp.float32) for a in (policy, reference)]
    labels = jnp.asarray(DESIRABLE)
    arrays = *single, labels
    results = [
        run(*arrays),
        jax.jit(run)(*arrays),
        sharded(run, *arrays),
        jax.jit(jax.vmap(run))(*arrays),
    ]
    for value, gradient in results:
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient, derivative, rtol=1e-5, atol=1e-7)
    half = [a.astype(jnp.bfloat16) for a in single]
    value, gradient = jax.jit(run)(*half, labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


@every_case
def test_invalid_arguments(loss, oracle, numbers, options, theirs):
    bare = functools.partial(inspect.unwrap(loss), **options)
    logps, labels = jnp.zeros(4), jnp.zeros(4, bool)
    with pytest.raises(ValueError, match=r"one shape, got .*reference_logps \(3,\)"):
        bare(logps, logps[:3], labels, *numbers)
    with pytest.raises(ValueError, match=r"one shape, got .*desirable \(3,\)"):
        bare(logps, logps, labels[:3], *numbers)
    with pytest.raises(TypeError, match="desirable to be boolean, got int32"):
        bare(logps, logps, jnp.ones(4, int), *numbers)
    with pytest.raises(TypeError, match="policy_logps to be floating"):
        bare(labels, logps, labels, *numbers)
    for beta in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"beta > 0 and finite, got {beta}"):
            loss(logps, logps, labels, *numbers, beta=beta)


def test_numbers_out_of_range():
    logps, labels = jnp.zeros(4), jnp.zeros(4, bool)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=f"Expected {name} >= 0"):
            losses.kto(logps, logps, labels, 0.0, **{name: float("nan")})
    with pytest.raises(ValueError, match="kl >= 0 and finite, got -1"):
        losses.kto(logps, logps, labels, -1)
    with pytest.raises(ValueError, match="running_shift finite, got nan"):
        losses.bco(logps, logps, labels, float("nan"))
    with pytest.raises(ValueError, match="low <= high, got 2.0 and 1.0"):
        losses.udm_weights(logps, low=2.0, high=1.0)
    with pytest.raises(ValueError, match="low >= 0 and finite, got nan"):
        losses.udm_weights(logps, low=float("nan"))
    with pytest.raises(TypeError, match="probabilities to be floating"):
        inspect.unwrap(losses.udm_weights)(labels)


def test_reference_points_are_scalars_in_full_precision():
    logps, labels = jnp.full(2, 1.2345), jnp.array([True, False])
    for loss, name in ((losses.kto, "kl"), (losses.bco, "running_shift")):
        half = jnp.bfloat16(1.2345)
        value = loss(logps, 0 * logps, labels, half, beta=0.1)
        whole = loss(logps, 0 * logps, labels, half.astype(jnp.float32), beta=0.1)
        np.testing.assert_array_equal(value, whole)
        for shape in ((2,), (2, 1)):
            message = rf"{name} to be one number, got shape \({shape[0]},"
            with pytest.raises(ValueError, match=message):
                inspect.unwrap(loss)(logps, logps, labels, jnp.zeros(shape))


def test_lists_and_numpy_numbers_are_accepted():
    logps, labels = [-3.0, -4.0], [True, False]
    bare = inspect.unwrap
    for value in (
        bare(losses.kto)(logps, logps, labels, np.float32(0)),
        bare(losses.apo_zero_unpaired)(logps, logps, labels),
    ):
        np.testing.assert_array_equal(value, [0.5, 0.5])
    assert bare(losses.bco_shift)(logps, labels) == -3.5
    with pytest.raises(ValueError, match="low <= high, got 2.0 and 1.0"):
        bare(losses.udm_weights)(logps, low=np.float32(2), high=np.float32(1))


def test_no_gradient_through_reference_points():
    policy, reference = (jnp.asarray(a, jnp.float32) for a in drawn())
    labels = jnp.asarray(DESIRABLE)

    def total(kl, shift):
        return (
            losses.kto(policy, reference, labels, kl).sum()
            + losses.bco(policy, reference, labels, shift).sum()
        )

    for derivative in jax.grad(total, argnums=(0, 1))(jnp.float32(1), jnp.float32(1)):
        assert derivative == 0
    for mean in (
        lambda p: losses.kto_kl(p, reference),
        lambda p: losses.bco_shift(p, labels),
        lambda p: losses.udm_weights(p).sum(),
    ):
        np.testing.assert_array_equal(jax.grad(mean)(policy), 0)


def test_kto_kl():
    reference, policy = drawn()
    real = np.arange(ANSWERS) % 4 > 0
    expected = max(0.0, (policy - reference)[real].mean())
    assert expected > 0
    poisoned = [
        jnp.where(real, jnp.asarray(a, jnp.float32), jnp.nan)
        for a in (policy, reference)
    ]
    real = jnp.asarray(real)
    kl = lambda p, r, w: losses.kto_kl(p, r, where=w)
    for value in (
        kl(*poisoned, real),
        sharded(kl, *poisoned, real),
        kl(*(a.reshape(2, 4, 2) for a in poisoned), real.reshape(2, 4, 2)),
    ):
        assert value.shape == () and value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Never below 0, and 0 if nothing is real.
    assert losses.kto_kl(poisoned[1] - 1e3, poisoned[1], where=real) == 0
    assert kl(*poisoned, jnp.zeros(ANSWERS, bool)) == 0
    with pytest.raises(ValueError, match=r"one shape, got .*where \(3,\)"):
        inspect.unwrap(losses.kto_kl)(*poisoned, where=real[:3])


def test_bco_shift():
    rewards, _ = drawn(1)
    real = np.arange(ANSWERS) % 4 > 0
    expected = (
        rewards[real & DESIRABLE].mean() + rewards[real & ~DESIRABLE].mean()
    ) / 2
    poisoned = jnp.where(real, jnp.asarray(rewards, jnp.float32), jnp.nan)
    shift = lambda r, d, w: losses.bco_shift(r, d, where=w)
    masks = jnp.asarray(DESIRABLE), jnp.asarray(real)
    for value in (shift(poisoned, *masks), sharded(shift, poisoned, *masks)):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    # With a single class: its own mean, not half of it; with nothing: 0.
    only = jnp.full(ANSWERS, True)
    for label in (only, ~only):
        value = losses.bco_shift(poisoned, label, where=masks[1])
        np.testing.assert_allclose(value, rewards[real].mean(), rtol=1e-6)
    assert losses.bco_shift(poisoned, only, where=~only) == 0
    with pytest.raises(TypeError, match="desirable to be boolean"):
        inspect.unwrap(losses.bco_shift)(poisoned, jnp.ones(ANSWERS))
    with pytest.raises(ValueError, match=r"where \(3,\)"):
        inspect.unwrap(losses.bco_shift)(poisoned, only, where=only[:3])


def test_udm_weights():
    f = np.array([0.0, 0.1, 1 / 3, 0.5, 0.75, 0.9, 0.95, 1.0])
    with np.errstate(divide="ignore"):
        ratios = f / (1 - f)
    expected = np.clip(ratios, 0.5, 10)
    weights = losses.udm_weights(jnp.asarray(f, jnp.float32))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    values = sharded(losses.udm_weights, jnp.asarray(f, jnp.float32))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    low_cut = losses.udm_weights(jnp.asarray(f[:-1], jnp.float32), low=0, high=2)
    np.testing.assert_allclose(low_cut, np.minimum(ratios, 2)[:-1], rtol=1e-6)
    assert losses.udm_weights(jnp.asarray(f, jnp.bfloat16)).dtype == jnp.float32


# What they promise.


def test_bco_of_a_pair_bounds_its_dpo_loss():
    """P10: for every shift, with the smallest gap midway between the two rewards."""
    rng = np.random.default_rng(2)
    with jax.enable_x64(True):
        pc, pr, rc, rr = jnp.asarray(rng.uniform(-40, 0, (4, 200)))
        dpo = losses.dpo(pc, pr, rc, rr, beta=0.3)
        yes, no = jnp.ones(200, bool), jnp.zeros(200, bool)

        def gap(shift):
            run = jax.vmap(functools.partial(losses.bco, beta=0.3))
            return run(pc, rc, yes, shift) + run(pr, rr, no, shift) - dpo

        middle = 0.15 * ((pc - rc) + (pr - rr))
        least = gap(middle)
        assert (least > 0).all()
        for away in (-20.0, -1.0, -1e-3, 1e-3, 1.0, 20.0):
            assert (gap(middle + away) > least).all()
        # With d = (r_w + r_l) / 2 both halves are those of h / 2.
        np.testing.assert_allclose(
            least + dpo, -2 * jax.nn.log_sigmoid(0.15 * (pc - rc - pr + rr)), rtol=1e-9
        )


def test_apo_of_a_pair_is_the_sum_of_its_halves():
    policy, reference = (jnp.asarray(a, jnp.float32) for a in drawn())
    other, its_reference = (jnp.asarray(a, jnp.float32) for a in drawn(5))
    halves = losses.apo_zero_unpaired(
        policy, reference, jnp.ones(ANSWERS, bool)
    ) + losses.apo_zero_unpaired(other, its_reference, jnp.zeros(ANSWERS, bool))
    paired = losses.apo_zero(policy, other, reference, its_reference)
    np.testing.assert_allclose(halves, paired, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_gradients_vanish_far_from_the_reference_point(desirable):
    """Bounded by the weight, with the largest gradient at the reference point."""
    ratios = jnp.linspace(-200, 200, 401)
    zero, labels = jnp.zeros(401), jnp.full(401, desirable)
    loss = lambda r: losses.kto(r, zero, labels, 20.0, beta=0.2)
    value = loss(ratios)
    derivative = np.abs(jax.grad(lambda r: loss(r).sum())(ratios))
    assert (value >= 0).all() and (value <= 1).all()
    assert ratios[derivative.argmax()] == 20
    np.testing.assert_allclose(derivative[[0, -1]], 0, atol=1e-15)


@pytest.mark.parametrize("desirable", [True, False])
def test_one_class_may_be_absent(desirable):
    policy, reference = (jnp.asarray(a, jnp.float32) for a in drawn())
    labels = jnp.full(ANSWERS, desirable)

    def total(p):
        shift = losses.bco_shift(p - reference, labels)
        kl = losses.kto_kl(p, reference)
        return (
            losses.bco(p, reference, labels, shift)
            + losses.kto(p, reference, labels, kl)
        ).sum()

    value, derivative = jax.value_and_grad(total)(policy)
    assert np.isfinite(value) and np.isfinite(derivative).all()

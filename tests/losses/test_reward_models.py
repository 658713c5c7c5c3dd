"""Properties of reward-model losses beyond the battery, including unpaired ones."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from scipy.special import logit

from jaxpref import losses
from tests.losses.row import logistic
from tests.losses.test_battery import on_device

DIFFERENCES = np.concatenate([np.linspace(-8, 8, 33), [-1e3, 1e3]])


def place(array, spec):
    """Replicated on all eight devices; call under a mesh with explicit axes."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(array, jax.NamedSharding(mesh, spec))


def explicit_mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)


# Bradley-Terry.


def test_bradley_terry_of_implicit_rewards_is_dpo():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logps = on_device(rng.uniform(-40, 0, (4, 16)), jnp.float64)
        rewards = functools.partial(losses.implicit_rewards, beta=0.3)
        ours = losses.bradley_terry(
            rewards(logps[0], logps[2]), rewards(logps[1], logps[3])
        )
        np.testing.assert_allclose(ours, losses.dpo(*logps, beta=0.3), rtol=1e-12)


def test_strength_1_and_margin_0_are_bradley_terry():
    rng = np.random.default_rng(0)
    chosen, rejected = on_device(rng.normal(size=(2, 16)), jnp.float32)
    base = losses.bradley_terry(chosen, rejected)
    ones, zeros = jnp.ones(16, int), jnp.zeros(16, int)
    for loss, labels in (
        (losses.scaled_bradley_terry, ones),
        (losses.margin_bradley_terry, zeros),
    ):
        np.testing.assert_array_equal(loss(chosen, rejected, labels), base)
    # Integer strengths are equivalent to repetitions.
    thrice = losses.scaled_bradley_terry(chosen, rejected, 3 * ones)
    np.testing.assert_allclose(thrice, base + base + base, rtol=1e-6)


def test_center_rewards_fixes_the_constant():
    """Gradient descent on the sum of both terms preserves the order, with mean 0."""
    probability = 0.8

    def risk(rewards, weight):
        chosen, rejected = rewards[:1], rewards[1:]
        kept = losses.bradley_terry(chosen, rejected)
        flipped = losses.bradley_terry(rejected, chosen)
        mixed = probability * kept + (1 - probability) * flipped
        return (mixed + weight * losses.center_rewards(chosen, rejected))[0]

    with jax.enable_x64(True):
        for weight, mean in ((0.0, 2.0), (0.01, 0.0)):
            step = jax.jit(jax.grad(functools.partial(risk, weight=weight)))
            rewards = jnp.array([3.0, 1.0])
            for _ in range(2000):
                rewards = rewards - step(rewards)
            np.testing.assert_allclose(rewards.mean(), mean, atol=1e-6)
            np.testing.assert_allclose(
                rewards[0] - rewards[1], logit(probability), rtol=1e-6
            )


# Under flips.

LABELS = {
    "bradley_terry": (),
    "margin_bradley_terry": (1.5,),
    "scaled_bradley_terry": (3.0,),
    "rao_kupper": (0.0,),
    "davidson": (0.0,),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_unbiased_reward_losses_are_clean_on_average(name, rate):
    """P1 for reward models: (1 - e) loss(pair) + e loss(exchanged) = clean loss."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        chosen, rejected = on_device(4 * rng.normal(size=(2, 16)), jnp.float64)
        labels = [jnp.full(16, value) for value in LABELS[name]]
        corrected = losses.unbiased(getattr(losses, name), rate)
        kept = corrected(chosen, rejected, *labels)
        flipped = corrected(rejected, chosen, *labels)
        clean = getattr(losses, name)(chosen, rejected, *labels)
        mean = (1 - rate) * kept + rate * flipped
        np.testing.assert_allclose(mean, clean, rtol=1e-12, atol=1e-12)


def test_corrected_bradley_terry_is_corrected_dpo():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logps = on_device(rng.uniform(-40, 0, (4, 16)), jnp.float64)
        rewards = functools.partial(losses.implicit_rewards, beta=0.3)
        pair = rewards(logps[0], logps[2]), rewards(logps[1], logps[3])
        for correct, name in (
            (losses.unbiased, "rdpo"),
            (losses.forward_corrected, "forward_dpo"),
        ):
            ours = correct(losses.bradley_terry, 0.2)(*pair)
            theirs = getattr(losses, name)(*logps, beta=0.3, flip_rate=0.2)
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


# Ties.

TIES = {"rao_kupper": ("theta", [1.01, 1.5, 3.0, 50.0], lambda x: (x - 1) / (x + 1))}
TIES["davidson"] = ("nu", [0.01, 0.5, 2.0, 50.0], lambda x: x / (2 + x))
each_tie_model = pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, (_, values, _) in TIES.items() for v in values]
)


def test_rao_kupper_with_a_theta_that_rounds_to_1():
    """Without ties it is Bradley-Terry; a tie is improbable but not impossible."""
    chosen, rejected = jnp.array([2.0, 0.0]), jnp.zeros(2)
    ours = losses.rao_kupper(chosen, rejected, jnp.array([0.0, 1.0]), theta=1 + 1e-9)
    win = losses.bradley_terry(chosen, rejected)[0]
    np.testing.assert_allclose(ours, [win, -np.log(2e-9 / 4)], rtol=1e-6)


@each_tie_model
def test_win_tie_and_loss_sum_to_1(name, value):
    option, _, tie_of_equals = TIES[name]
    with jax.enable_x64(True):
        loss = functools.partial(getattr(losses, name), **{option: value})
        d, zero = jnp.asarray(DIFFERENCES), jnp.zeros(len(DIFFERENCES))
        chances = [
            jnp.exp(-loss(d, zero, zero)),
            jnp.exp(-loss(zero, d, zero)),
            jnp.exp(-loss(d, zero, zero + 1)),
        ]
        np.testing.assert_allclose(sum(chances), 1, rtol=1e-12)
        # A tie is symmetric, and most likely between equal rewards.
        tie = loss(d, zero, zero + 1)
        np.testing.assert_allclose(tie, loss(zero, d, zero + 1), rtol=1e-12, atol=1e-12)
        assert int(jnp.argmin(tie)) == int(np.argmin(np.abs(DIFFERENCES)))
        equal = jnp.exp(-loss(*jnp.zeros((2, 1)), jnp.ones(1)))
        np.testing.assert_allclose(equal, tie_of_equals(value), rtol=1e-12)


@each_tie_model
def test_only_davidson_keeps_the_odds(name, value):
    """Luce's axiom: P(win) / P(loss) = exp(d), ties or not."""
    with jax.enable_x64(True):
        loss = functools.partial(getattr(losses, name), **{TIES[name][0]: value})
        d, zero = jnp.linspace(-3, 3, 13), jnp.zeros(13)
        log_odds = loss(zero, d, zero) - loss(d, zero, zero)
    keeps = np.allclose(log_odds, d, rtol=1e-10, atol=1e-10)
    assert keeps == (name == "davidson")


@pytest.mark.parametrize(("name", "option"), [(n, t[0]) for n, t in TIES.items()])
def test_rare_ties_are_bradley_terry(name, option):
    nearly = {option: 1 + 1e-9 if name == "rao_kupper" else 1e-9}
    with jax.enable_x64(True):
        d, zero = jnp.linspace(-8, 8, 33), jnp.zeros(33)
        loss = getattr(losses, name)(d, zero, zero, **nearly)
        np.testing.assert_allclose(loss, losses.bradley_terry(d, zero), rtol=1e-6)
        learned = lambda value: getattr(losses, name)(d, zero, zero + 0.5, **value)
        check_grads(jax.jit(learned), ({option: 2.5},), order=1, modes=("rev",))


def test_labels_may_be_integers():
    chosen, rejected = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    for name in ("rao_kupper", "davidson", "scaled_bradley_terry"):
        loss = getattr(losses, name)
        whole = loss(chosen, rejected, jnp.array([0, 1]))
        np.testing.assert_array_equal(
            whole, loss(chosen, rejected, jnp.array([0.0, 1.0]))
        )


@pytest.mark.parametrize("theta", [1, 1.0, 0.5, float("nan"), float("inf")])
def test_rao_kupper_rejects_invalid_theta(theta):
    with pytest.raises(ValueError, match=rf"theta in \(1.0, inf\), got {theta}"):
        losses.rao_kupper(*jnp.zeros((3, 2)), theta=theta)


@pytest.mark.parametrize("nu", [0, -1.0, float("nan"), float("inf")])
def test_davidson_rejects_invalid_nu(nu):
    with pytest.raises(ValueError, match=f"nu > 0 and finite, got {nu}"):
        losses.davidson(*jnp.zeros((3, 2)), nu=nu)


# Regression.


def test_reward_regression():
    rng = np.random.default_rng(0)
    rewards, targets = rng.normal(size=(2, 8, 5))
    expected = (rewards - targets) ** 2
    with jax.enable_x64(True):
        exact = losses.reward_regression(*on_device([rewards, targets], jnp.float64))
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-14)
    arrays = on_device([rewards, targets], jnp.float32)
    np.testing.assert_allclose(losses.reward_regression(*arrays), expected, rtol=1e-5)
    half = on_device([rewards, targets], jnp.bfloat16)
    assert losses.reward_regression(*half).dtype == jnp.float32
    gradient = jax.grad(lambda r: losses.reward_regression(r, arrays[1]).sum())(
        arrays[0]
    )
    np.testing.assert_allclose(gradient, 2 * (rewards - targets), rtol=1e-5, atol=1e-6)
    with jax.set_mesh(explicit_mesh()):
        spec = PartitionSpec(("data", "fsdp"), None)
        value = jax.jit(losses.reward_regression)(*(place(a, spec) for a in arrays))
        assert jax.typeof(value).sharding.spec == spec
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_reward_regression_rejects_invalid_arguments():
    loss = inspect.unwrap(losses.reward_regression)
    with pytest.raises(ValueError, match=r"one shape, got .*targets \(3,\)"):
        loss(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(TypeError, match="rewards to be floating point, got int32"):
        loss(jnp.zeros(2, int), jnp.zeros(2))


def test_attribute_regression_averages_over_what_is_rated():
    rng = np.random.default_rng(0)
    found, ratings = rng.normal(size=(2, 6, 4))
    ratings[rng.random((6, 4)) < 0.4] = np.nan
    ratings[2] = np.nan  # no rating at all
    ratings[3] = 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        expected = np.nan_to_num(np.nanmean((found - ratings) ** 2, axis=1))
    arrays = on_device([found, ratings], jnp.float32)
    np.testing.assert_allclose(
        jax.jit(losses.attribute_regression)(*arrays), expected, rtol=1e-5
    )
    gradient = jax.grad(lambda x: losses.attribute_regression(x, arrays[1]).sum())(
        arrays[0]
    )
    there = ~np.isnan(ratings)
    counts = np.maximum(there.sum(1, keepdims=True), 1)
    expected = np.where(there, 2 * (found - np.nan_to_num(ratings)), 0) / counts
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    whole = losses.attribute_regression(arrays[0][3:4, :1], arrays[1][3:4, :1])
    single = losses.reward_regression(arrays[0][3:4, 0], arrays[1][3:4, 0])
    np.testing.assert_allclose(whole, single, rtol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        inspect.unwrap(losses.attribute_regression)(
            jnp.zeros((2, 3)), jnp.zeros((2, 4))
        )


# General preferences.


def rotation(planes):
    """R = blocks [[0, -1], [1, 0]], as a matrix."""
    return np.kron(np.eye(planes), np.array([[0.0, -1.0], [1.0, 0.0]]))


@pytest.mark.parametrize("planes", [1, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_general_preference_is_the_papers(planes, scaled):
    """P15: s(a, b) = <R a, b>, s(a, b) = -s(b, a), s(a, a) = 0."""
    rng = np.random.default_rng(planes)
    chosen, rejected = rng.normal(size=(2, 8, 3, 2 * planes))
    scales = rng.uniform(0, 2, (8, 3, planes)) if scaled else np.ones((8, 3, planes))
    doubled = np.repeat(scales, 2, axis=-1)
    expected = np.einsum(
        "...i,ij,...j->...", doubled * rejected, rotation(planes), chosen
    )
    options = lambda dtype: (
        {"eigenscales": jnp.asarray(scales, dtype)} if scaled else {}
    )
    with jax.enable_x64(True):
        w, l = on_device([chosen, rejected], jnp.float64)
        score = functools.partial(losses.skew_symmetric_score, **options(jnp.float64))
        np.testing.assert_allclose(score(w, l), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(score(w, l), -score(l, w))
        np.testing.assert_array_equal(score(w, w), 0)
        loss = functools.partial(
            losses.general_preference, **options(jnp.float64), tau=0.5
        )
        np.testing.assert_allclose(loss(w, l), logistic(expected / 0.5), rtol=1e-12)
        default = losses.general_preference(w, l, **options(jnp.float64))
        np.testing.assert_allclose(default, logistic(expected / 0.1), rtol=1e-10)
        check_grads(jax.jit(loss), (w, l), order=1, modes=("fwd", "rev"))
    arrays = on_device([chosen, rejected], jnp.float32)
    both = jax.jit(
        jax.value_and_grad(
            lambda *a: losses.general_preference(*a, **options(jnp.float32)).sum(),
            argnums=(0, 1),
        )
    )
    single = losses.general_preference(*arrays, **options(jnp.float32))
    np.testing.assert_allclose(single, default, rtol=1e-4, atol=1e-5)
    eager = both(*arrays)
    with jax.set_mesh(explicit_mesh()):
        spec = PartitionSpec(("data", "fsdp"), None, None)
        placed = [place(a, spec) for a in arrays]
        jitted = jax.jit(losses.general_preference)(*placed)
        assert jax.typeof(jitted).sharding.spec == PartitionSpec(spec[0], None)
        sharded = both(*placed)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, sharded, eager)


def test_rock_paper_scissors():
    """Three answers at angles of 120 degrees form a cycle; rewards cannot."""
    turns = np.arange(3) * 2 * np.pi / 3
    circle = jnp.asarray(np.stack([np.cos(turns), np.sin(turns)], axis=-1))
    following = jnp.roll(circle, -1, axis=0)
    score = losses.skew_symmetric_score(circle, following)
    np.testing.assert_allclose(score, np.sqrt(3) / 2, rtol=1e-6)
    assert (losses.general_preference(circle, following) < 1e-3).all()
    # With rewards, one of three pairs in a cycle is misordered, or all are equal.
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(100, 3)))
    loss = losses.bradley_terry(rewards, jnp.roll(rewards, -1, axis=1))
    assert (loss.max(axis=1) >= np.log(2)).all()


def test_enough_planes_represent_any_matrix():
    """Two planes represent a random skew-symmetric matrix of five answers exactly."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(5, 5))
    table = half - half.T
    # Of the Hermitian i A = sum v_p c_p v_p^H, in conjugate pairs: A is the sum over
    # c_p > 0 of 2 c_p Im(v_p v_p^H), one plane each.
    values, vectors = np.linalg.eigh(1j * table)
    scales, vectors = values[values > 1e-9], vectors[:, values > 1e-9]
    planes = np.sqrt(2) * np.stack([vectors.imag, vectors.real], axis=-1)
    with jax.enable_x64(True):
        rows = jnp.asarray(np.repeat(planes.reshape(5, 1, -1), 5, axis=1))
        score = losses.skew_symmetric_score(
            rows,
            rows.swapaxes(0, 1),
            eigenscales=jnp.broadcast_to(jnp.asarray(scales), (5, 5, len(scales))),
        )
    np.testing.assert_allclose(score, table, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_general_preference_at_extremes(dtype):
    large = jnp.asarray([[1e4, 1.0], [-1e4, 1.0], [0.0, 0.0]], dtype)
    other = jnp.asarray([[1.0, 1e2], [1.0, 1e2], [0.0, 0.0]], dtype)
    total = lambda w: losses.general_preference(w, other).sum()
    value, gradient = jax.value_and_grad(total)(large)
    assert np.isfinite(np.asarray(value, np.float32))
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_general_preference_rejects_invalid_arguments():
    for function in (losses.general_preference, losses.skew_symmetric_score):
        function = inspect.unwrap(function)
        with pytest.raises(ValueError, match=r"even length, got shape \(4, 3\)"):
            function(*jnp.zeros((2, 4, 3)))
        with pytest.raises(ValueError, match=r"rejected_embeddings \(4, 6\)"):
            function(jnp.zeros((4, 2)), jnp.zeros((4, 6)))
        with pytest.raises(ValueError, match=r"one shape, got .*eigenscales \(4, 2\)"):
            function(*jnp.zeros((2, 4, 2)), eigenscales=jnp.zeros((4, 2)))
        with pytest.raises(TypeError, match="chosen_embeddings to be floating"):
            function(*jnp.zeros((2, 4, 2), int))
    for tau in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"tau > 0 and finite, got {tau}"):
            losses.general_preference(*jnp.zeros((2, 4, 2)), tau=tau)

"""Ranking, displacement, calibration, and divergence, against their definitions."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from scipy.special import expit, log_expit, log_softmax, logit

from jaxpref import losses
from jaxpref.evaluate import metrics
from tests.losses.row import LOG2
from tests.losses.test_battery import on_device
from tests.losses.test_reward_models import explicit_mesh, place

SPEC = PartitionSpec(("data", "fsdp"))


# Ranking, arXiv:2405.19534.


def test_ranking_accuracy_counts_ties_as_the_paper_does():
    chosen = jnp.array([-1.0, -2.0, -3.0, jnp.nan, -jnp.inf])
    rejected = jnp.array([-2.0, -2.0, -2.0, -2.0, -jnp.inf])
    accuracy = losses.ranking_accuracy(chosen, rejected)
    np.testing.assert_array_equal(accuracy, [1, 1, 0, np.nan, 1])
    half = losses.reward_accuracies(chosen[:3], rejected[:3])
    np.testing.assert_array_equal(half, [1, 0.5, 0])


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_idealized_ranking_is_that_of_the_optimum_of_dpo(beta):
    """P11, Theorem 3.1: two answers per prompt, minimized by gradient descent."""
    with jax.enable_x64(True):
        shares = jnp.array([0.99, 0.9, 0.8, 0.6, 0.55, 0.3])
        # Slightly above and below what each share can reverse.
        least = -jnp.asarray(logit(shares)) / beta
        reference = jnp.concatenate([least + 0.1, least - 0.1])
        shares = jnp.concatenate([shares, shares])
        table = lambda difference: jnp.stack(
            [jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)]
        )

        def risk(difference):
            policy, frozen = table(difference), table(reference)
            kept = losses.dpo(*policy, *frozen, beta=beta)
            flipped = losses.dpo(*policy[::-1], *frozen[::-1], beta=beta)
            return jnp.sum(shares * kept + (1 - shares) * flipped)

        # The risk is convex, with a curvature of at most beta^2 / 4.
        step = lambda _, d: d - 4 / beta**2 * jax.grad(risk)(d)
        difference = jax.lax.fori_loop(0, 2000, step, jnp.zeros(12))
        optimum = reference + logit(shares) / beta
        np.testing.assert_allclose(difference, optimum, rtol=1e-9, atol=1e-9)
        learned = losses.ranking_accuracy(*table(difference))
        ideal = losses.idealized_ranking_accuracy(*table(reference), shares, beta=beta)
        np.testing.assert_array_equal(learned, [1] * 6 + [0] * 6)
        np.testing.assert_array_equal(ideal, learned)


def test_idealized_ranking_of_unanimous_annotators():
    """A share of 1 is clipped to 1 - eps, so a confident reference still wins."""
    limit = logit(1 - 1e-3) / 0.1
    chosen = jnp.array([0.0, 0.0, 0.0])
    rejected = jnp.array([limit - 0.1, limit + 0.1, -limit - 0.1])
    shares = jnp.array([1.0, 1.0, 0.0])
    ideal = losses.idealized_ranking_accuracy(chosen, rejected, shares)
    np.testing.assert_array_equal(ideal, [1, 0, 1])
    ideal = losses.idealized_ranking_accuracy(chosen, rejected, shares, eps=1e-6)
    np.testing.assert_array_equal(ideal, [1, 1, 0])
    missing = losses.idealized_ranking_accuracy(chosen, rejected, shares * jnp.nan)
    assert np.isnan(missing).all()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ranking_difficulty_is_the_threshold_of_the_loss(beta):
    """P11, Theorem 4.1: ranked as labeled exactly if DPO is at most this."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logps = on_device(rng.uniform(-60, 0, (4, 4000)), jnp.float64)
        loss = losses.dpo(*logps, beta=beta)
        threshold = losses.ranking_difficulty(*logps[2:], beta=beta)
        ranked = losses.ranking_accuracy(*logps[:2]) == 1
        np.testing.assert_array_equal(ranked, loss <= threshold)
        assert 0.2 < ranked.mean() < 0.8
        c = np.asarray(logps[3] - logps[2])
        np.testing.assert_allclose(threshold, -log_expit(beta * c), rtol=1e-12)
        # Proposition 2.6: if the reference ranks correctly, a loss of .6 suffices.
        sure = (logps[2] >= logps[3]) & (loss <= 0.6)
        assert sure.any() and ranked[sure].all()
    undecided = losses.ranking_difficulty(jnp.zeros(1), jnp.zeros(1), beta=beta)
    np.testing.assert_allclose(undecided, LOG2, rtol=1e-6)


def test_ranking_at_extremes():
    for dtype in (jnp.float32, jnp.bfloat16):
        far = jnp.asarray([-1e4, 0.0, -1e4], dtype)
        near = jnp.asarray([0.0, -1e4, -1e4], dtype)
        values = [
            losses.ranking_accuracy(far, near),
            losses.idealized_ranking_accuracy(
                far, near, jnp.asarray([1, 0, 0.5], dtype)
            ),
            losses.ranking_difficulty(far, near),
        ]
        for value in values:
            assert value.dtype == jnp.float32 and np.isfinite(value).all()


# CHES, arXiv:2410.08847.


def test_ches():
    """From hidden states, as the authors compute it, with different lengths."""
    rng = np.random.default_rng(0)
    width, lengths = 6, np.array([[3, 7], [1, 4], [5, 5]])
    states = [[rng.normal(size=(n, width)) for n in row] for row in lengths]
    sums = [np.stack([row[k].sum(axis=0) for row in states]) for k in (0, 1)]
    means = [np.stack([row[k].mean(axis=0) for row in states]) for k in (0, 1)]
    expected = [
        np.array([w @ l - np.linalg.norm(w) ** 2 for w, l in zip(*pair)])
        for pair in (sums, means)
    ]
    counts = [jnp.asarray(n) for n in lengths.T]
    with jax.enable_x64(True):
        wide = on_device(sums, jnp.float64)
        scores = losses.ches(*wide), losses.length_normalized_ches(*wide, *counts)
        for score, value in zip(scores, expected):
            assert score.dtype == jnp.float64
            np.testing.assert_allclose(score, value, rtol=1e-12)
    single = on_device(sums, jnp.float32)
    scores = losses.ches(*single), losses.length_normalized_ches(*single, *counts)
    for score, value in zip(scores, expected):
        np.testing.assert_allclose(score, value, rtol=1e-5, atol=1e-5)
    # An answer against itself, and an answer without tokens.
    np.testing.assert_array_equal(losses.ches(single[0], single[0]), 0)
    empty = losses.length_normalized_ches(*single, counts[0] * 0, counts[1])
    assert np.isfinite(empty).all()


def test_ches_rejects_invalid_arguments():
    score = inspect.unwrap(losses.length_normalized_ches)
    sums, lengths = jnp.ones((2, 4, 3)), jnp.ones(4)
    with pytest.raises(ValueError, match=r"chosen_lengths of shape \(4,\), got \(3,\)"):
        score(*sums, jnp.ones(3), lengths)
    with pytest.raises(ValueError, match=r"rejected_lengths of shape \(4,\), got \(\)"):
        score(*sums, lengths, 2.0)
    with pytest.raises(ValueError, match=r"rejected_hidden_sums \(4, 2\)"):
        inspect.unwrap(losses.ches)(sums[0], sums[1, :, :2])


# Calibration.


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_equals_that_of_the_evaluation(bins):
    """The same bins as the evaluation's numpy functions, whose outcomes are all 1."""
    rng = np.random.default_rng(0)
    margins = np.concatenate([rng.normal(size=500) * 3, np.zeros(5), [40.0, -40.0]])
    with jax.enable_x64(True):
        probabilities = jnp.asarray(expit(margins))
        outcomes = jnp.ones(len(margins), int)
        error = losses.expected_calibration_error(probabilities, outcomes, bins=bins)
        expected = metrics.expected_calibration_error(margins, bins=bins)
        np.testing.assert_allclose(error, expected, rtol=1e-12)
        brier = losses.brier_score(probabilities, outcomes)
        np.testing.assert_allclose(brier.mean(), metrics.brier_score(margins))
        # Exchanging the answers gives the same.
        other = losses.expected_calibration_error(
            1 - probabilities, 1 - outcomes, bins=bins
        )
        np.testing.assert_allclose(other, error, rtol=1e-9)
        turned = losses.brier_score(1 - probabilities, 1 - outcomes)
        np.testing.assert_allclose(turned, brier, atol=1e-12)


def test_calibration_of_a_calibrated_model():
    """Nearly 0 for calibrated probabilities, but not for overconfident ones."""
    rng = np.random.default_rng(0)
    margins = rng.normal(size=200_000) * 1.5
    outcomes = jnp.asarray(rng.random(len(margins)) < expit(margins), jnp.float32)
    right, sure = (jnp.asarray(expit(k * margins), jnp.float32) for k in (1, 3))
    error = losses.expected_calibration_error
    assert error(right, outcomes) < 0.01 < 0.1 < error(sure, outcomes)
    assert losses.brier_score(right, outcomes).mean() < 0.25
    score = functools.partial(losses.brier_score, outcomes=outcomes)
    assert score(right).mean() < score(sure).mean()


def test_calibration_of_ties_and_undecided_predictions():
    half = jnp.full(4, 0.5)
    outcomes = jnp.array([1.0, 0.0, 0.5, 1.0])
    assert losses.expected_calibration_error(half, outcomes) == 0
    tied = losses.expected_calibration_error(jnp.full(2, 0.75), jnp.full(2, 0.5))
    np.testing.assert_allclose(tied, 0.25)
    np.testing.assert_allclose(losses.brier_score(half, outcomes)[:3], [0.25, 0.25, 0])


def test_calibration_of_padding_and_nan():
    rng = np.random.default_rng(0)
    margins = rng.normal(size=24)
    outcomes = jnp.asarray(rng.integers(0, 2, 24), jnp.float32)
    probabilities = jnp.asarray(expit(margins), jnp.float32)
    where = jnp.arange(24) % 3 > 0
    error = losses.expected_calibration_error
    poisoned = jnp.where(where, probabilities, jnp.nan)
    alone = error(probabilities[where], outcomes[where])
    nan = jnp.where(where, outcomes, jnp.nan)
    np.testing.assert_allclose(error(poisoned, nan, where=where), alone, rtol=1e-6)
    assert error(poisoned, outcomes, where=jnp.zeros(24, bool)) == 0
    assert np.isnan(error(poisoned, outcomes))
    assert np.isnan(error(probabilities, nan))
    cube = [x.reshape(2, 4, 3) for x in (probabilities, outcomes, where)]
    np.testing.assert_allclose(error(*cube[:2], where=cube[2]), alone, rtol=1e-6)


def test_calibration_rejects_invalid_arguments():
    error = inspect.unwrap(losses.expected_calibration_error)
    with pytest.raises(ValueError, match="bins >= 1, got 0"):
        error(jnp.zeros(2), jnp.zeros(2), bins=0)
    with pytest.raises(ValueError, match=r"one shape, got .*outcomes \(3,\)"):
        error(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"one shape, got .*where \(3,\)"):
        error(jnp.zeros(2), jnp.zeros(2), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"one shape, got .*outcomes \(3,\)"):
        inspect.unwrap(losses.brier_score)(jnp.zeros(2), jnp.zeros(3))
    with pytest.raises(TypeError, match="probabilities to be floating"):
        error(jnp.ones(2, int), jnp.ones(2))


# Estimators of KL.


def test_kl_estimators_on_a_table():
    """Expectations over all answers: k1 and k3 are unbiased, k2 is to second order."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        base = rng.normal(size=50)
        for distance, rtol in ((1.0, None), (0.1, 0.1), (0.001, 0.001)):
            log_pi = log_softmax(base + distance * rng.normal(size=50))
            log_ref = log_softmax(base)
            pi, ratios = np.exp(log_pi), jnp.asarray(log_pi - log_ref)
            kl = np.sum(pi * (log_pi - log_ref))
            k1, k2, k3 = (
                np.sum(pi * np.asarray(k(ratios)))
                for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3)
            )
            np.testing.assert_allclose([k1, k3], kl, rtol=1e-9, atol=1e-14)
            if rtol is None:
                assert abs(k2 - kl) > 0.01 * kl
            else:
                np.testing.assert_allclose(k2, kl, rtol=rtol)
            one, three = (
                np.sum(pi * (np.asarray(k(ratios)) - kl) ** 2)
                for k in (losses.kl_k1, losses.kl_k3)
            )
            assert three < one  # variance


def test_kl_estimators_are_nonnegative_and_finite():
    rng = np.random.default_rng(0)
    far = 10.0 ** np.arange(-9, 5)
    steps = np.concatenate([-far, [0.0], far, rng.normal(size=10_000) * 0.01])
    for dtype in (jnp.float32, jnp.bfloat16):
        ratios = jnp.asarray(steps, dtype)
        for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3):
            value = k(ratios)
            gradient = jax.grad(lambda x: k(x).sum())(ratios)  # noqa: B023
            assert value.dtype == jnp.float32 and gradient.dtype == dtype
            assert np.isfinite(value).all()
            assert np.isfinite(np.asarray(gradient, np.float32)).all()
            assert k is losses.kl_k1 or (value >= 0).all()
    with jax.enable_x64(True):
        ratios = jnp.asarray(steps[np.abs(steps) < 50])
        l = np.asarray(ratios, np.longdouble)
        np.testing.assert_allclose(losses.kl_k1(ratios), l.astype(float), rtol=1e-15)
        np.testing.assert_allclose(losses.kl_k2(ratios), l**2 / 2, rtol=1e-15)
        k3 = np.exp(np.minimum(-l, 80)) - 1 + l
        np.testing.assert_allclose(
            losses.kl_k3(ratios), k3.astype(float), rtol=1e-9, atol=1e-17
        )
        check_grads(jax.jit(losses.kl_k3), (ratios[:5] * 0 + 0.3,), order=1)


# All of them.

CALLS = {
    "ranking_accuracy": (2, {}),
    "idealized_ranking_accuracy": (3, {"beta": 0.5}),
    "ranking_difficulty": (2, {"beta": 0.5}),
    "ches": (2, {}),
    "length_normalized_ches": (4, {}),
    "brier_score": (2, {}),
    "expected_calibration_error": (2, {"bins": 4}),
    "kl_k1": (1, {}),
    "kl_k2": (1, {}),
    "kl_k3": (1, {}),
}


def inputs_of(name):
    rng = np.random.default_rng(0)
    function = getattr(losses, name)
    parameters = list(inspect.signature(function).parameters)[: CALLS[name][0]]
    arrays = []
    for parameter in parameters:
        if "hidden" in parameter:
            arrays.append(rng.normal(size=(16, 4)))
        elif "probabilities" in parameter:
            arrays.append(rng.uniform(size=16))
        elif "outcomes" in parameter:
            arrays.append(rng.integers(0, 2, 16).astype(float))
        elif "lengths" in parameter:
            arrays.append(rng.integers(1, 9, 16).astype(float))
        else:
            arrays.append(rng.normal(size=16))
    return functools.partial(function, **CALLS[name][1]), on_device(arrays, jnp.float32)


@pytest.mark.parametrize("name", CALLS)
def test_jit_vmap_and_sharded_agree_with_eager(name):
    function, arrays = inputs_of(name)
    eager = function(*arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    close(jax.jit(function)(*arrays), eager)
    stacked = [jnp.stack([a, a]) for a in arrays]
    close(jax.vmap(function)(*stacked)[1], eager)
    with jax.set_mesh(explicit_mesh()):
        spec = lambda a: PartitionSpec(*SPEC, *[None] * (a.ndim - 1))
        sharded = jax.jit(function)(*(place(a, spec(a)) for a in arrays))
        if eager.ndim:
            assert jax.typeof(sharded).sharding.spec == SPEC
    close(sharded, eager)


@pytest.mark.parametrize("name", ["idealized_ranking_accuracy", "ranking_difficulty"])
@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf")])
def test_ranking_rejects_invalid_beta(name, beta):
    function, arrays = inputs_of(name)
    with pytest.raises(ValueError, match=f"beta > 0 and finite, got {beta}"):
        function(*arrays, beta=beta)


@pytest.mark.parametrize("eps", [0, 0.5, -1.0, float("nan")])
def test_ranking_rejects_invalid_eps(eps):
    function, arrays = inputs_of("idealized_ranking_accuracy")
    with pytest.raises(ValueError, match=rf"eps in \(0.0, 0.5\), got {eps}"):
        function(*arrays, eps=eps)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_types_and_shapes_are_rejected(name):
    function, arrays = inputs_of(name)
    function = functools.partial(inspect.unwrap(function.func), **function.keywords)
    with pytest.raises(TypeError, match="to be floating point, got int32"):
        function(*(a.astype(jnp.int32) for a in arrays))
    if len(arrays) > 1:
        with pytest.raises(ValueError, match=r"\(3,"):
            function(arrays[0][:3], *arrays[1:])

"""Advantages and policy gradients: against loops in NumPy, and against enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses

ALPHABET, LONGEST, ANSWERS = 2, 2, 3
"""Tokens besides the end, tokens of an answer, answers of a group."""


def groups(seed=0, shape=(5, 6)):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=shape)
    where = rng.random(shape) < 0.7
    where[0], where[1], where[2] = True, False, False
    where[2, 3] = True
    rewards[3] = -1000.3  # all equal, and not a float32
    return rewards, where


@pytest.mark.parametrize("masked", [False, True])
def test_advantages_of_groups(masked):
    rewards, where = groups()
    if not masked:
        where = np.ones_like(where)
    poisoned = jnp.asarray(np.where(where, rewards, np.nan), jnp.float32)
    mask = {"where": jnp.asarray(where)} if masked else {}
    found = {
        f.__name__: np.asarray(f(poisoned, **mask))
        for f in (losses.centered, losses.leave_one_out, losses.group_normalized)
    }
    informative = losses.informative_groups(poisoned, **mask)
    for g, (row, own) in enumerate(zip(rewards, where)):
        kept = row[own]
        for k in range(len(row)):
            others = np.delete(row, k)[np.delete(own, k)]
            expected = dict.fromkeys(found, 0.0)
            if own[k]:
                expected["centered"] = row[k] - kept.mean()
                if len(others):
                    expected["leave_one_out"] = row[k] - others.mean()
                spread = np.std(kept, ddof=1) if len(kept) > 1 else 0.0
                scaled = expected["centered"] / (spread + 1e-4)
                expected["group_normalized"] = scaled
            for name, value in expected.items():
                if g == 3:
                    assert found[name][g, k] == 0
                else:
                    np.testing.assert_allclose(
                        found[name][g, k], value, rtol=1e-5, atol=1e-5
                    )
        assert bool(informative[g]) == (len(set(kept.tolist())) > 1)


def test_no_gradient_flows_through_advantages():
    rewards = jnp.asarray(groups()[0], jnp.float32)
    gae = lambda rewards: losses.gae(rewards, rewards)
    functions = losses.centered, losses.leave_one_out, losses.group_normalized, gae
    functions += (losses.whitened,)
    squares = lambda r: sum(jnp.sum(function(r) ** 2) for function in functions)
    assert not np.any(jax.grad(squares)(rewards))


@pytest.mark.parametrize(("discount", "trace"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_is_the_double_sum(discount, trace):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 7))
    lengths = np.array([7, 4, 0])
    where = np.arange(7) < lengths[:, None]
    found = losses.gae(
        jnp.asarray(np.where(where, rewards, np.nan), jnp.float32),
        jnp.asarray(np.where(where, values, np.nan), jnp.float32),
        discount=discount,
        trace=trace,
        completions=jnp.where(where, 0, -1),
    )
    expected = np.zeros_like(rewards)
    for b, length in enumerate(lengths):
        for t in range(length):
            for u in range(t, length):
                following = values[b, u + 1] if u + 1 < length else 0.0
                error = rewards[b, u] + discount * following - values[b, u]
                expected[b, t] += (discount * trace) ** (u - t) * error
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if trace == 1.0:  # the return minus the value
        returns = np.where(where, rewards, 0)[:, ::-1].cumsum(1)[:, ::-1]
        expected = np.where(where, returns - values, 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gae_of_several_answers_in_a_row():
    """Packed rows: nothing flows from one answer to another."""
    rng = np.random.default_rng(1)
    rewards, values = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 9)))
    owners = jnp.array([4, 4, 4, 0, 5, 5, 5, 5, -1])
    found = losses.gae(rewards, values, trace=0.7, completions=owners)
    for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
        alone = losses.gae(rewards[part], values[part], trace=0.7)
        np.testing.assert_allclose(found[part], alone, rtol=1e-6)
    assert found[8] == 0


def test_overlong_penalty_by_hand():
    lengths = jnp.arange(0, 31, 5)
    found = losses.overlong_penalty(lengths, longest=20, buffer=10)
    np.testing.assert_allclose(found, [0, 0, 0, -0.5, -1, -1, -1])
    with pytest.raises(ValueError, match="buffer from 1 to 20, got 30"):
        losses.overlong_penalty(lengths, longest=20, buffer=30)


def test_unflipped_rewards_are_unbiased():
    """The mean over the verifier's errors is the right reward, for both answers."""
    e0, e1 = 0.1, 0.3
    zero, one = losses.unflipped_rewards(
        jnp.array([0.0, 1.0]), false_positive_rate=e0, false_negative_rate=e1
    )
    np.testing.assert_allclose((1 - e0) * zero + e0 * one, 0, atol=1e-6)
    np.testing.assert_allclose(e1 * zero + (1 - e1) * one, 1, rtol=1e-6)
    with pytest.raises(ValueError, match="sum of both rates below 1, got 1.0"):
        losses.unflipped_rewards(
            jnp.ones(1), false_positive_rate=0.5, false_negative_rate=0.5
        )


def test_clipped_surrogate_and_its_gradient():
    """Values by hand; no gradient where the ratio has passed the bound."""
    ratios = np.array([0.5, 0.9, 1.0, 1.15, 1.5])
    bounds = {"clip_low": 0.2, "clip_high": 0.1}

    def surrogate(logps, advantage):
        given = logps, jnp.zeros(5), jnp.full(5, advantage)
        return jnp.sum(losses.clipped_policy_gradient(*given, **bounds))

    for advantage in (2.0, -2.0):
        logps = jnp.log(jnp.asarray(ratios, jnp.float32))
        bounded = np.clip(ratios, 0.8, 1.1)
        expected = -np.minimum(ratios * advantage, bounded * advantage)
        value, gradient = jax.value_and_grad(surrogate)(logps, advantage)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-6)
        free = ratios <= 1.1 if advantage > 0 else ratios >= 0.8
        # d/dlogp of -w A is -w A.
        expected = np.where(free, -ratios * advantage, 0)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_win_rates_are_means_over_the_other_answers():
    rewards, where = groups()
    poisoned = jnp.asarray(np.where(where, rewards, np.nan), jnp.float32)
    found = losses.win_rates(poisoned, where=jnp.asarray(where))
    for g, (row, own) in enumerate(zip(rewards, where)):
        for k in range(len(row)):
            others = np.delete(row, k)[np.delete(own, k)]
            known = own[k] and len(others)
            wins = 1 / (1 + np.exp(others - row[k]))
            expected = wins.mean() if known else 0.5
            np.testing.assert_allclose(found[g, k], expected, rtol=1e-5)


def test_self_play_errors_are_least_after_a_step_of_multiplicative_weights():
    """Where log pi/pi_old is (P - 1/2) / beta; before it, a policy gradient."""
    old, rates, beta = jnp.array([-1.0, -2.0]), jnp.array([0.9, 0.2]), 0.5
    error = lambda logps: jnp.sum(losses.self_play_error(logps, old, rates, beta=beta))
    best = old + (rates - 0.5) / beta
    gradient = jax.jit(jax.grad(error))
    np.testing.assert_allclose(gradient(best), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(old), -2 * (rates - 0.5), rtol=1e-5)
    # Beta times the squared error, less its value on policy.
    assert error(old) == 0
    target = np.array([0.8, -0.6])
    square = lambda x: beta * np.sum(np.square(np.asarray(x - old) - target))
    other = jnp.array([-0.7, -2.4])
    expected = square(other) - square(old)
    np.testing.assert_allclose(error(other), expected, rtol=1e-5)


def test_preference_score_errors_are_least_after_the_step_that_maximizes_the_score():
    """Over all policies of three answers, of E[s] - beta KL(pi, pi_old).

    The neglected normalization is that of pi_old exp(s / beta).
    """
    old, beta = np.log([0.5, 0.3, 0.2]), 0.7
    table = np.array([[0.0, 1.2, -0.4], [-1.2, 0.0, 2.0], [0.4, -2.0, 0.0]])
    scores = table @ np.exp(old)  # against an answer of the sampler
    fixed = jnp.array(old), jnp.array(scores)
    error = lambda logps: jnp.sum(
        losses.preference_score_error(logps, *fixed, beta=beta)
    )
    least = old + scores / beta
    np.testing.assert_allclose(jax.grad(error)(jnp.array(least)), 0, atol=1e-5)
    np.testing.assert_allclose(error(jnp.array(least)), -sum(scores**2) / beta, 1e-5)
    assert error(jnp.array(old)) == 0
    best = np.exp(least) / np.exp(least).sum()
    gain = lambda pi: pi @ scores - beta * pi @ (np.log(pi) - old)
    rng = np.random.default_rng(0)
    others = rng.dirichlet(np.ones(3), 200)
    assert all(gain(best) >= gain(pi) for pi in others)
    # With a probability in place of the score, it is SPPO's.
    policy = jnp.array([-0.7, -2.4])
    sampler, rates = jnp.array([-1.0, -2.0]), jnp.array([0.9, 0.2])
    np.testing.assert_allclose(
        losses.preference_score_error(policy, sampler, rates - 0.5, beta=beta),
        losses.self_play_error(policy, sampler, rates, beta=beta),
        rtol=1e-6,
    )


def test_whitened_advantages():
    rng = np.random.default_rng(0)
    values, mask = rng.normal(3, 2, (4, 5)), rng.random((4, 5)) < 0.6
    given = jnp.array(np.where(mask, values, np.nan))
    found = losses.whitened(given, where=jnp.array(mask))
    known = values[mask]
    expected = np.where(mask, (values - known.mean()) / known.std(), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for value in (0.1, 37.7, 100.1):  # rounding of the mean is not standardized
        equal = jnp.full(1000, value, jnp.float32)
        np.testing.assert_array_equal(losses.whitened(equal), 0)
    none = losses.whitened(equal, where=jnp.zeros(1000, bool))
    np.testing.assert_array_equal(none, 0)


def test_clipped_value_error_by_hand():
    found = losses.clipped_value_error(
        jnp.array([0.1, 0.5, 0.5]),
        jnp.array([0.0, 0.0, 0.0]),
        jnp.array([1.0, 1.0, 0.0]),
    )
    np.testing.assert_allclose(found, [0.405, 0.32, 0.125], rtol=1e-6)


def test_from_tokens_to_answers_and_back():
    owners = jnp.array([[0, 0, 2, 2, 2, -1]])
    values = jnp.array([[1.0, 3.0, 1.0, 2.0, 6.0, jnp.nan]])
    means = losses.mean_by_completion(values, owners, num_completions=3)
    np.testing.assert_allclose(means, [2, 0, 3])
    back = losses.of_each_token(jnp.array([5.0, 7.0, 9.0]), owners)
    np.testing.assert_allclose(back, [[5, 5, 9, 9, 9, 0]])


# ---- the expected policy gradient, by enumeration of all groups -------------------


def answers() -> list[tuple[int, ...]]:
    """Every answer of a tabular policy: tokens up to the end, or to the maximum."""
    end, found = ALPHABET, []
    for size in range(1, LONGEST + 1):
        for tokens in itertools.product(range(ALPHABET + 1), repeat=size):
            inner = end not in tokens[:-1]
            if inner and (tokens[-1] == end or size == LONGEST):
                found.append(tokens)
    return found


def table(params, where: tuple[int, ...]):
    """Log-probabilities of the token after some tokens."""
    return jax.nn.log_softmax(params[len(where)][sum(where)])


def tabular():
    """Parameters, the token log-probs of all answers [n, T], their mask and rewards."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(LONGEST, ALPHABET + 1, ALPHABET + 1)))
    known = answers()
    mask = np.array([[t < len(y) for t in range(LONGEST)] for y in known])

    def logps(params):
        rows = []
        for y in known:
            own = [table(params, y[:t])[y[t]] for t in range(len(y))]
            rows.append(jnp.stack(own + [jnp.zeros(())] * (LONGEST - len(y))))
        return jnp.stack(rows)

    return params, logps, mask, rng.normal(size=len(known))


def expected_over_groups(value_of_group):
    """The gradient of a loss, averaged exactly over all groups of answers."""
    params, logps, mask, rewards = tabular()
    known = range(len(mask))
    members = np.array(list(itertools.product(known, repeat=ANSWERS)))
    p = np.exp(np.asarray(logps(params)).sum(1))
    probability = np.prod(p[members], axis=1)
    assert abs(probability.sum() - 1) < 1e-6

    def loss(params):
        of_groups = logps(params)[members]  # [G, K, T]
        old = jax.lax.stop_gradient(of_groups)
        values = value_of_group(of_groups, old, mask[members], rewards[members])
        return jnp.sum(probability * values)

    return jax.grad(loss)(params)


def exact_gradient():
    """Minus the gradient of the expected reward."""
    params, logps, _, rewards = tabular()
    return jax.grad(lambda p: -jnp.sum(jnp.exp(logps(p).sum(1)) * rewards))(params)


def of_tokens(advantages_of):
    def value(new, old, mask, rewards):
        advantages = advantages_of(jnp.asarray(rewards))[..., None]
        advantages = jnp.broadcast_to(advantages, new.shape)
        found = losses.clipped_policy_gradient(new, old, advantages)
        return jnp.mean(jnp.sum(jnp.where(mask, found, 0), -1), -1)

    return value


def of_answers(new, old, mask, rewards):
    advantages = losses.leave_one_out(jnp.asarray(rewards))
    found = losses.policy_gradient(new.sum(-1), old.sum(-1), advantages)
    return jnp.mean(found, -1)


@pytest.mark.parametrize(
    ("value", "factor"),
    [
        (of_answers, 1),
        (of_tokens(losses.leave_one_out), 1),
        # The group's mean contains the answer itself.
        (of_tokens(losses.centered), 1 - 1 / ANSWERS),
    ],
    ids=["rloo", "leave_one_out", "centered"],
)
def test_the_expected_gradient_is_that_of_the_expected_reward(value, factor):
    with jax.enable_x64(True):
        found = np.asarray(expected_over_groups(value))
        exact = np.asarray(exact_gradient())
    np.testing.assert_allclose(found, factor * exact, rtol=1e-9, atol=1e-12)


def true_values() -> np.ndarray:
    """The expected reward after each prefix of each answer, [n, T], by enumeration."""
    params, logps, mask, rewards = tabular()
    known, p = answers(), np.exp(np.asarray(logps(params)).sum(1))
    values = np.zeros(mask.shape)
    for n, t in zip(*np.nonzero(mask)):
        same = np.array([y[:t] == known[n][:t] and len(y) > t for y in known])
        values[n, t] = np.sum(p * rewards * same) / np.sum(p * same)
    return values


@pytest.mark.parametrize(
    ("trace", "true", "is_exact"),
    [(1.0, False, True), (0.5, True, True), (0.0, True, True), (0.5, False, False)],
)
def test_the_expected_gradient_with_generalized_advantages(trace, true, is_exact):
    """Exact with any values if lambda is 1, and with the true ones for any lambda.

    Values depend on the prefix, not on the token: prefixes are numbered by their sums.
    """
    with jax.enable_x64(True):
        params, logps, mask, rewards = tabular()
        values = true_values()
        if not true:
            prefix = [[sum(y[:t]) + 2.0 * t for t in range(LONGEST)] for y in answers()]
            values = np.cos(np.array(prefix))
        ends = mask & ~np.pad(mask[:, 1:], ((0, 0), (0, 1)))
        found = losses.gae(
            jnp.asarray(np.where(ends, rewards[:, None], 0)),
            jnp.asarray(values),
            trace=trace,
            completions=jnp.where(mask, 0, -1),
        )
        p = np.exp(np.asarray(logps(params)).sum(1))

        def loss(params):
            of_token = logps(params)
            old = jax.lax.stop_gradient(of_token)
            terms = losses.clipped_policy_gradient(of_token, old, found)
            return jnp.sum(p[:, None] * jnp.where(mask, terms, 0))

        error = np.abs(np.asarray(jax.grad(loss)(params) - exact_gradient())).max()
    assert error < 1e-12 if is_exact else error > 1e-2


def test_normalized_advantages_change_the_direction():
    """Prompt by prompt, GRPO's gradient is another one; it is not only rescaled."""
    with jax.enable_x64(True):
        found = expected_over_groups(of_tokens(losses.group_normalized))
        found, exact = (np.asarray(x).ravel() for x in (found, exact_gradient()))
    cosine = found @ exact / np.linalg.norm(found) / np.linalg.norm(exact)
    assert 0.9 < cosine < 1 - 1e-4

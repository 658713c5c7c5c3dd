"""The battery every loss passes; what is expected of each is in losses_table.py."""

import doctest
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads
from scipy.special import expit, logit

from jaxpref import losses
from jaxpref.losses import _preference, _rewards, _robust, _sequence
from tests.losses_table import LOG2, TABLE, Row

PAIRS = 16
EXTREMES = np.array([1e4, -1e4, 1e3, -1e3, 30.0, -30.0])

CASES = [
    pytest.param(row, options, id="-".join([row.name, *map(str, options.values())]))
    for row in TABLE
    for options in row.options
]


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


def each_case(holds):
    cases = [case for case in CASES if holds(case.values[0])]
    return pytest.mark.parametrize(("row", "options"), cases)


every_case = each_case(lambda row: True)
every_row = each(TABLE)
flip_rows = [row for row in TABLE if row.base is not None]
every_flip_row = each(flip_rows)


def arrays_of(row: Row, *, extreme=True, seed=0) -> list[np.ndarray]:
    """Inputs that float32 holds exactly, six of the pairs with a margin up to 1e4."""
    rng = np.random.default_rng(seed)
    logps = {}
    for name in row.reads:
        if name.endswith("lengths"):
            # Powers of two keep every quotient exact.
            logps[name] = 2.0 ** rng.integers(0, 5, PAIRS)
        else:
            logps[name] = np.round(rng.uniform(-8, 0, PAIRS) * 2**10) / 2**10
    if extreme:
        logps["policy_chosen_logps"][: len(EXTREMES)] = EXTREMES
    return [logps[name] for name in row.reads]


def swapped(row: Row, arrays):
    """The same pairs with chosen and rejected exchanged."""
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    values = dict(zip(row.reads, arrays))
    other = lambda name: "_".join(exchange.get(w, w) for w in name.split("_"))
    return [values[other(name)] for name in row.reads]


def on_device(arrays, dtype):
    return [jnp.asarray(array, dtype) for array in arrays]


def policy_gradient(loss, arrays, **options):
    """Gradient of the summed loss in the first array, the policy's chosen log-probs."""
    total = lambda first, *rest: jnp.sum(loss(first, *rest, **options))
    return jax.grad(total)(*arrays)


def scores_and_steps(row: Row, arrays, options):
    """Scores, and how far one more nat on the chosen answer moves them."""
    options = defaults_of(row.loss) | options
    score = row.score(*arrays, **options)
    moved = row.score(arrays[0] + 1.0, *arrays[1:], **options)
    return score, moved - score


def defaults_of(loss) -> dict:
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_every_loss_has_a_row():
    functions = [getattr(losses, name) for name in losses.__all__]
    takes_policy = lambda f: "policy_chosen_logps" in inspect.signature(f).parameters
    assert {f.__name__ for f in functions if takes_policy(f)} == {r.name for r in TABLE}


@every_case
def test_value_is_the_papers(row, options):
    arrays = arrays_of(row)
    score = row.score(*arrays, **(defaults_of(row.loss) | options))
    expected = row.value(score, **options)
    with jax.enable_x64(True):
        exact = row.loss(*on_device(arrays, jnp.float64), **options)
        assert exact.dtype == jnp.float64
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-12)
    single = row.loss(*on_device(arrays, jnp.float32), **options)
    np.testing.assert_allclose(single, expected, rtol=2e-6, atol=2e-6)


@every_case
def test_gradient_is_the_papers_weight(row, options):
    arrays = arrays_of(row)
    score, step = scores_and_steps(row, arrays, options)
    expected = row.slope(score, **options) * step
    with jax.enable_x64(True):
        exact = policy_gradient(row.loss, on_device(arrays, jnp.float64), **options)
        np.testing.assert_allclose(exact, expected, rtol=1e-10, atol=1e-12)
    single = policy_gradient(row.loss, on_device(arrays, jnp.float32), **options)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_gradient_at_extremes(row, options):
    """Finite at margins of +-1e4 in float32 and bfloat16, and at the stated limits."""
    for dtype in (jnp.float32, jnp.bfloat16):
        arrays = on_device(arrays_of(row), dtype)
        for value in (
            row.loss(*arrays, **options),
            policy_gradient(row.loss, arrays, **options),
        ):
            assert np.isfinite(np.asarray(value, np.float32)).all()
    if row.extremes is None:
        return
    arrays = arrays_of(row)
    _, step = scores_and_steps(row, arrays, options)
    slopes = policy_gradient(row.loss, on_device(arrays, jnp.float32), **options) / step
    left, right = row.extremes(**options)
    np.testing.assert_allclose(slopes[:2], [right, left], rtol=1e-6, atol=1e-6)


@every_row
def test_gradient_matches_finite_differences(row):
    logps = sum(name.endswith("logps") for name in row.reads)
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(row, extreme=False), jnp.float64)
        on_logps = lambda *a: row.loss(*a, *arrays[logps:], **row.options[-1])
        # jit: check_grads passes numpy arrays.
        check_grads(jax.jit(on_logps), arrays[:logps], order=1, modes=("fwd", "rev"))


@each_case(lambda row: row.at_reference is not None)
def test_policy_equal_to_reference(row, options):
    arrays = dict(zip(row.reads, on_device(arrays_of(row, extreme=False), jnp.float32)))
    for name in row.reads:
        if name.startswith("policy"):
            arrays[name.replace("policy", "reference")] = arrays[name]
    value = row.loss(**arrays, **options)
    np.testing.assert_allclose(value, row.at_reference(**options), rtol=2e-7)


@each_case(lambda row: row.mirror is not None)
def test_swapping_the_answers(row, options):
    arrays = arrays_of(row, extreme=False)
    with jax.enable_x64(True):
        loss = row.loss(*on_device(arrays, jnp.float64), **options)
        other = row.loss(*on_device(swapped(row, arrays), jnp.float64), **options)
    score = row.score(*arrays, **(defaults_of(row.loss) | options))
    residual = row.mirror(np.asarray(loss), np.asarray(other), score, **options)
    np.testing.assert_allclose(residual, 0, atol=1e-10)


@every_row
def test_jit_vmap_sharded_and_eager_agree(row):
    options = row.options[-1]
    loss = functools.partial(row.loss, **options)
    arrays = on_device(arrays_of(row), jnp.float32)
    both = lambda *a: (loss(*a), policy_gradient(row.loss, a, **options))
    eager = both(*arrays)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, jax.jit(both)(*arrays), eager)
    jax.tree.map(close, jax.jit(jax.vmap(both))(*arrays), eager)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp"))
        sharding = jax.NamedSharding(mesh, spec)
        sharded = jax.jit(both)(*(jax.device_put(a, sharding) for a in arrays))
        assert all(jax.typeof(value).sharding.spec == spec for value in sharded)
    jax.tree.map(close, sharded, eager)


@every_row
def test_dtype_is_at_least_float32(row):
    options = row.options[-1]
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        arrays = on_device(arrays_of(row, extreme=False), dtype)
        assert row.loss(*arrays, **options).dtype == jnp.float32
        assert policy_gradient(row.loss, arrays, **options).dtype == dtype
    half = on_device(arrays_of(row, extreme=False), jnp.bfloat16)
    whole = row.loss(*(array.astype(jnp.float32) for array in half), **options)
    np.testing.assert_array_equal(row.loss(*half, **options), whole)


@every_row
def test_leading_axes_are_free(row):
    options = row.options[-1]
    arrays = on_device(arrays_of(row), jnp.float32)
    flat = row.loss(*arrays, **options)
    cube = row.loss(*(array.reshape(2, 4, 2) for array in arrays), **options)
    np.testing.assert_array_equal(cube.reshape(-1), flat)
    single = row.loss(*(array[0] for array in arrays), **options)
    assert single.shape == () and single == flat[0]


# Flip rates.


@every_flip_row
def test_flip_rate_zero_is_the_base_loss_to_the_bit(row):
    arrays = on_device(arrays_of(row), jnp.float32)
    for rate in (0, 0.0, jnp.zeros(()), jnp.zeros(PAIRS)):
        for call in (lambda loss, **o: loss(*arrays, **o), None):
            call = call or (lambda loss, **o: policy_gradient(loss, arrays, **o))
            ours, base = call(row.loss, flip_rate=rate), call(row.base)
            # Exactly, in every bit but the sign of a zero.
            np.testing.assert_array_equal(ours, base, strict=True)


@every_flip_row
def test_one_rate_per_pair(row):
    arrays = on_device(arrays_of(row), jnp.float32)
    rates = np.linspace(0.0, 0.45, PAIRS).astype(np.float32)
    together = row.loss(*arrays, flip_rate=jnp.asarray(rates))
    for i, rate in enumerate(rates):
        alone = row.loss(*(a[i : i + 1] for a in arrays), flip_rate=float(rate))
        np.testing.assert_allclose(together[i], alone[0], rtol=2e-6, atol=1e-6)
    cube = row.loss(
        *(a.reshape(4, 4) for a in arrays), flip_rate=jnp.asarray(rates[:4])
    )
    rows = [row.loss(*(a[i::4] for a in arrays), flip_rate=float(r))
            for i, r in enumerate(rates[:4])]  # fmt: skip
    np.testing.assert_allclose(cube.T, np.stack(rows), rtol=2e-6, atol=1e-6)


@every_flip_row
@pytest.mark.parametrize("rate", [-0.1, 0.5, 0.7, 1, float("nan")])
def test_flip_rate_out_of_range_is_refused(row, rate):
    arrays = on_device(arrays_of(row), jnp.float32)
    with pytest.raises(ValueError, match=rf"flip_rate in \[0, 0.5\), got {rate}"):
        jax.eval_shape(functools.partial(row.loss, flip_rate=rate), *arrays)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.4, 0.49])
def test_rdpo_mean_over_flips_is_clean_dpo(rate):
    """P1: (1 - e) loss(pair) + e loss(swapped pair) = dpo(pair), everywhere."""
    row = next(r for r in TABLE if r.loss is losses.rdpo)
    arrays = arrays_of(row)
    with jax.enable_x64(True):
        kept = losses.rdpo(*on_device(arrays, jnp.float64), flip_rate=rate)
        flipped = losses.rdpo(
            *on_device(swapped(row, arrays), jnp.float64), flip_rate=rate
        )
        clean = losses.dpo(*on_device(arrays, jnp.float64))
        mean = (1 - rate) * kept + rate * flipped
    np.testing.assert_allclose(mean, clean, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_rdpo_and_cdpo_lean_opposite_ways(rate):
    """P2: (1 - 2e)(rdpo - dpo) + (cdpo - dpo) = 0."""
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(flip_rows[0]), jnp.float64)
        dpo = losses.dpo(*arrays)
        rdpo = losses.rdpo(*arrays, flip_rate=rate)
        cdpo = losses.cdpo(*arrays, flip_rate=rate)
        unbiased, smoothed = (1 - 2 * rate) * (rdpo - dpo), cdpo - dpo
    np.testing.assert_allclose(unbiased, -smoothed, rtol=1e-10, atol=1e-10)


MINIMISERS = {
    "dpo": lambda p, q, e: logit(q),
    "cdpo": lambda p, q, e: logit((1 - e) * q + e * (1 - q)),
    "rdpo": lambda p, q, e: logit(p),
    "forward_dpo": lambda p, q, e: logit(p),
}


@pytest.mark.parametrize("name", MINIMISERS)
@pytest.mark.parametrize(
    ("p", "rate"), list(itertools.product([0.2, 0.8, 0.95], [0.1, 0.3, 0.4]))
)
def test_population_minimiser(name, p, rate):
    """P3: where each loss ends up when P(w > l) = p and labels flip at `rate`."""
    observed = (1 - rate) * p + rate * (1 - p)
    expected = MINIMISERS[name](p, observed, rate)
    options = {"beta": 1.0} | ({} if name == "dpo" else {"flip_rate": rate})
    loss = functools.partial(getattr(losses, name), **options)
    grid = np.linspace(-6, 6, 24001)
    with jax.enable_x64(True):
        zero = jnp.zeros(grid.shape)
        risk = lambda h: (
            observed * loss(h, zero, zero, zero)
            + (1 - observed) * loss(zero, h, zero, zero)
        )
        best = grid[np.argmin(risk(jnp.asarray(grid)))]
        slope = jax.grad(lambda h: risk(h)[0])(jnp.full(grid.shape, expected))[0]
        slope = float(slope)
    assert abs(best - expected) <= 6e-4  # just over the grid's step
    assert abs(slope) < 1e-12


def test_forward_dpo_beyond_one_half():
    """P4: no gradient at e = 1/2; beyond, the label counts as inverted."""
    row = next(r for r in TABLE if r.loss is losses.forward_dpo)
    arrays = on_device(arrays_of(row), jnp.float32)
    half = policy_gradient(row.loss, arrays, flip_rate=jnp.full(PAIRS, 0.5))
    np.testing.assert_allclose(half, 0, atol=1e-8)
    over = row.loss(*arrays, flip_rate=jnp.full(PAIRS, 0.75))
    exchanged = row.loss(*swapped(row, arrays), flip_rate=0.25)
    np.testing.assert_allclose(over, exchanged, rtol=1e-6, atol=1e-6)


def test_forward_dpo_gradient_weighs_by_the_posterior():
    """P4: its gradient is w grad dpo(pair) + (1 - w) grad dpo(swapped), w held fixed.

    w = P(label right | margin) is RE-PO's E-step, logit w = h + logit(1 - e).
    """
    rate, beta = 0.3, 1.0
    row = next(r for r in TABLE if r.loss is losses.forward_dpo)
    arrays = arrays_of(row, extreme=False)
    h = row.score(*arrays, beta=beta)
    weight = expit(h + logit(1 - rate))
    with jax.enable_x64(True):
        on = on_device(arrays, jnp.float64)
        forward = policy_gradient(losses.forward_dpo, on, beta=beta, flip_rate=rate)
        kept = policy_gradient(losses.dpo, on, beta=beta)
        other = lambda pc, pr, rc, rr, **o: losses.dpo(pr, pc, rr, rc, **o)
        flipped = policy_gradient(other, on, beta=beta)
    mixed = weight * np.asarray(kept) + (1 - weight) * np.asarray(flipped)
    np.testing.assert_allclose(forward, mixed, rtol=1e-10, atol=1e-12)


def test_forward_dpo_learns_its_rate():
    """Rates per pair are differentiable, so that they can be estimated."""
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(flip_rows[0], extreme=False), jnp.float64)
        loss = lambda rate: losses.forward_dpo(*arrays, flip_rate=rate)
        check_grads(jax.jit(loss), (jnp.full(PAIRS, 0.2),), order=1, modes=("rev",))


# Wrong use.


@each([row for row in TABLE if "beta" in defaults_of(row.loss)])
@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf")])
def test_beta_out_of_range_is_refused(row, beta):
    options = row.options[-1] | {"beta": beta}
    arrays = on_device(arrays_of(row), jnp.float32)
    with pytest.raises(ValueError, match=f"beta > 0 and finite, got {beta}"):
        jax.eval_shape(functools.partial(row.loss, **options), *arrays)


def test_gamma_below_zero_is_refused():
    ones = jnp.ones(3)
    with pytest.raises(ValueError, match="gamma >= 0 and finite, got -0.5"):
        losses.simpo(-ones, -ones, ones, ones, gamma=-0.5)


@each([row for row in TABLE if len(row.reads) > 1])
def test_wrong_shapes_are_named(row):
    """What a caller sees without the run-time annotation checks of this test run."""
    loss = functools.partial(inspect.unwrap(row.loss), **row.options[-1])
    for i, name in enumerate(row.reads):
        arrays = on_device(arrays_of(row), jnp.float32)
        arrays[i] = arrays[i][:3]
        with pytest.raises(ValueError, match=rf"one shape, got .*{name} \(3,\)"):
            loss(*arrays)


@every_flip_row
@pytest.mark.parametrize("shape", [(3,), (1, PAIRS)])
def test_wrong_shape_of_flip_rate_is_named(row, shape):
    loss = inspect.unwrap(row.loss)
    with pytest.raises(ValueError, match=r"flip_rate to broadcast .* \(16,\), got"):
        loss(*on_device(arrays_of(row), jnp.float32), flip_rate=jnp.zeros(shape))


@every_row
def test_integers_are_refused(row):
    arrays = [jnp.ones(PAIRS, jnp.int32) for _ in row.reads]
    with pytest.raises(TypeError, match="policy_chosen_logps to be floating point"):
        inspect.unwrap(row.loss)(*arrays, **row.options[-1])


@pytest.mark.parametrize("name", ["ipo_averaged", "simpo"])
def test_empty_completion_is_finite(name):
    """A completion truncated to nothing has log-prob 0 and length 0: no 0/0."""
    loss, zero = getattr(losses, name), jnp.zeros(2)
    row = next(r for r in TABLE if r.loss is loss)
    arrays = [zero] * len(row.reads)
    assert np.isfinite(loss(*arrays)).all()
    assert np.isfinite(policy_gradient(loss, arrays)).all()


# Rewards and sums.


def test_rewards():
    chosen, rejected = jnp.array([1.0, 0.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0, 3.5])
    np.testing.assert_array_equal(
        losses.reward_accuracies(chosen, rejected), [1, 0, 0.5, 0]
    )
    np.testing.assert_array_equal(
        losses.reward_margins(chosen, rejected), [1, -1, 0, -0.5]
    )
    np.testing.assert_allclose(
        losses.implicit_rewards(chosen, rejected, beta=0.5), [0.5, -0.5, 0, -0.25]
    )
    assert np.isnan(losses.reward_accuracies(jnp.array([jnp.nan]), jnp.zeros(1)))
    close = jnp.array([1.0, 1.0], jnp.bfloat16), jnp.array([1.0, 0.99], jnp.bfloat16)
    assert losses.reward_margins(*close).dtype == jnp.float32
    with pytest.raises(ValueError, match="beta > 0"):
        losses.implicit_rewards(chosen, rejected, beta=0)


def test_implicit_reward_margin_is_what_dpo_scores():
    arrays = on_device(arrays_of(TABLE[0], extreme=False), jnp.float32)
    margin = losses.reward_margins(
        losses.implicit_rewards(arrays[0], arrays[2], beta=0.3),
        losses.implicit_rewards(arrays[1], arrays[3], beta=0.3),
    )
    probability = jax.nn.sigmoid(margin)
    np.testing.assert_allclose(
        losses.dpo(*arrays, beta=0.3), -jnp.log(probability), rtol=1e-5
    )


def test_sum_by_completion():
    rng = np.random.default_rng(0)
    logps = rng.normal(size=(2, 8, 3, 5))
    owner = rng.integers(-1, 4, size=logps.shape)
    expected = np.zeros((2, 8, 4))
    for a, r, q, p in np.ndindex(logps.shape):
        if owner[a, r, q, p] >= 0:
            expected[a, r, owner[a, r, q, p]] += logps[a, r, q, p]
    poisoned = jnp.asarray(np.where(owner < 0, np.nan, logps), jnp.float32)
    owner = jnp.asarray(owner, jnp.int32)
    total = functools.partial(losses.sum_by_completion, num_completions=4)
    np.testing.assert_allclose(total(poisoned, owner), expected, rtol=1e-5, atol=1e-6)
    assert total(poisoned.astype(jnp.bfloat16), owner).dtype == jnp.float32

    gradient = jax.grad(lambda x: jnp.sum(total(x, owner)[..., 1]))(poisoned)
    np.testing.assert_array_equal(gradient, owner == 1)

    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, ("data", "fsdp"))
        place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec))
        both = jax.jit(jax.value_and_grad(lambda x, o: jnp.sum(total(x, o)[..., 1])))
        value, sharded_gradient = both(place(poisoned), place(owner))
        sums = jax.jit(total)(place(poisoned), place(owner))
        assert jax.typeof(sums).sharding.spec[1] == ("data", "fsdp")
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, expected[..., 1].sum(), rtol=1e-5)
    np.testing.assert_array_equal(sharded_gradient, gradient)


def test_sum_by_completion_refuses_wrong_use():
    total = inspect.unwrap(losses.sum_by_completion)
    logps, owner = jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"one shape .* \(2, 3\), completions \(3,\)"):
        total(logps, owner[0], num_completions=2)
    with pytest.raises(ValueError, match="one shape"):
        total(logps[0], owner[0], num_completions=2)
    with pytest.raises(ValueError, match="num_completions >= 1, got 0"):
        total(logps, owner, num_completions=0)
    with pytest.raises(TypeError, match="completions to be integer"):
        total(logps, logps, num_completions=2)
    with pytest.raises(TypeError, match="token_logps to be floating"):
        total(owner, owner, num_completions=2)


@pytest.mark.parametrize(
    "module", [_preference, _rewards, _robust, _sequence], ids=lambda m: m.__name__
)
def test_docstring_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_log2_to_the_last_bit_that_matters():
    """What step 0 of every run shows."""
    logps = jnp.asarray([-123.456, -3.0])
    assert float(losses.dpo(logps, logps, logps, logps)[0]) == np.float32(LOG2)

"""Properties of the label-noise corrections, for every pairwise loss."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from jaxpref import losses
from tests.losses.arrays import PAIRS, arrays_of, differentiable, swapped
from tests.losses.row import Row
from tests.losses.table import TABLE
from tests.losses.test_battery import on_device


def exchangeable(row: Row) -> bool:
    """Whether the loss reads the same arrays for both answers."""
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    other = lambda name: "_".join(exchange.get(w, w) for w in name.split("_"))
    return all(other(name) in row.reads for name in row.reads)


ONE_BY_ONE = [row for row in TABLE if not row.coupled and exchangeable(row)]
ASKING = [row for row in TABLE if row.name in {"cpo", "iterative_rpo"}]
"""These read arrays for the chosen answer only; the correction adds the rejected."""
REFUSED = [row for row in TABLE if row not in ONE_BY_ONE + ASKING]
FOUR = next(row for row in TABLE if row.loss is losses.dpo)
every_row = pytest.mark.parametrize("row", ONE_BY_ONE, ids=lambda row: row.name)


def value_and_gradients(row, loss, arrays, **options):
    total = lambda *a: loss(*a, **options).sum()
    gradients = jax.grad(total, argnums=tuple(differentiable(row)))(*arrays)
    return loss(*arrays, **options), gradients


def test_most_losses_can_be_corrected():
    """All but those that couple the batch or read a single answer."""
    assert len(ONE_BY_ONE) > len(REFUSED)
    assert {"dpo", "ipo", "simpo", "wpo"} <= {row.name for row in ONE_BY_ONE}


@every_row
@pytest.mark.parametrize("rate", [0.1, 0.45])
def test_mean_over_flips_is_the_clean_loss(row, rate):
    """(1 - e) corrected(pair) + e corrected(exchanged) = loss(pair)."""
    options = row.options[-1]
    arrays = arrays_of(row)
    with jax.enable_x64(True):
        corrected = losses.unbiased(row.loss, rate)
        kept = corrected(*on_device(arrays, jnp.float64), **options)
        flipped = corrected(*on_device(swapped(row, arrays), jnp.float64), **options)
        clean = row.loss(*on_device(arrays, jnp.float64), **options)
        mean = (1 - rate) * kept + rate * flipped
        size = np.abs(kept) + np.abs(flipped) + 1
        assert (np.abs(mean - clean) <= 1e-13 * size).all()


@every_row
def test_gradients_of_the_mean_over_flips_are_the_clean_ones(row):
    options, rate = row.options[-1], 0.3
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(row, extreme=False), jnp.float64)
        corrected = losses.unbiased(row.loss, rate)

        def mean(*arrays, **options):
            exchanged = swapped(row, arrays)
            kept, flipped = (
                corrected(*arrays, **options),
                corrected(*exchanged, **options),
            )
            return (1 - rate) * kept + rate * flipped

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9),
            value_and_gradients(row, mean, arrays, **options),
            value_and_gradients(row, row.loss, arrays, **options),
        )


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rate_0_is_the_loss_bit_for_bit(row, dtype):
    options = row.options[-1]
    arrays = on_device(arrays_of(row), dtype)
    for rate in (0, 0.0, jnp.zeros(PAIRS)):
        jax.tree.map(
            functools.partial(np.testing.assert_array_equal, strict=True),
            value_and_gradients(
                row, losses.unbiased(row.loss, rate), arrays, **options
            ),
            value_and_gradients(row, row.loss, arrays, **options),
        )


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("correction", [losses.unbiased, losses.forward_corrected])
def test_finite_at_extremes(row, dtype, correction):
    arrays = on_device(arrays_of(row), dtype)
    corrected = correction(row.loss, 0.3)
    for value in jax.tree.leaves(
        value_and_gradients(row, corrected, arrays, **row.options[-1])
    ):
        assert np.isfinite(np.asarray(value, np.float32)).all()


@every_row
@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_forward_corrected_is_a_likelihood(row, rate):
    """exp(-corrected) of both labels sum to 1; bounded by -log(1 - e) and -log e."""
    options = row.options[-1]
    arrays = arrays_of(row)
    with jax.enable_x64(True):
        corrected = losses.forward_corrected(row.loss, rate)
        kept = corrected(*on_device(arrays, jnp.float64), **options)
        flipped = corrected(*on_device(swapped(row, arrays), jnp.float64), **options)
        np.testing.assert_allclose(np.exp(-kept) + np.exp(-flipped), 1, rtol=1e-12)
        assert (kept >= -np.log1p(-rate) - 1e-12).all()
        assert (kept <= -np.log(rate) + 1e-12).all()


PAIRS_OF_FORMS = [
    (losses.unbiased, losses.rdpo),
    (losses.forward_corrected, losses.forward_dpo),
]


@pytest.mark.parametrize(("correction", "special"), PAIRS_OF_FORMS)
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.45, "per pair"])
def test_corrected_dpo_is_rdpo_and_forward_dpo(correction, special, rate):
    """Also at margins of +-1e4, in value and gradient."""
    rate = np.linspace(0, 0.45, PAIRS) if rate == "per pair" else rate
    for x64, dtype, tolerance in (
        (True, jnp.float64, 1e-11),
        (False, jnp.float32, 2e-6),
    ):
        with jax.enable_x64(x64):
            arrays = on_device(arrays_of(FOUR), dtype)
            rates = jnp.asarray(rate, dtype) if np.ndim(rate) else rate
            jax.tree.map(
                functools.partial(
                    np.testing.assert_allclose, rtol=tolerance, atol=tolerance
                ),
                value_and_gradients(
                    FOUR, correction(losses.dpo, rates), arrays, beta=1.0
                ),
                value_and_gradients(FOUR, special, arrays, beta=1.0, flip_rate=rates),
            )


LENGTHS = np.array([4, 7, 1, 9, 2]), np.array([6, 3, 5, 1, 8])
GIBBS = [
    # P6: the logits in closed form; D is the margin, `per` the averages of log-probs.
    (losses.dpo, {"beta": 0.5}, lambda w, l: 0.5 * (w - l)),
    (losses.ipo, {"beta": 0.5}, lambda w, l: 2 * (w - l) / 0.5),
    (
        losses.cpo,
        {"beta": 0.5, "nll_weight": 0.25},
        lambda w, l: 0.5 * (w - l) + 0.25 * (w / LENGTHS[0] - l / LENGTHS[1]),
    ),
    (
        losses.simpo,
        {"beta": 2.0, "gamma": 0.7},
        lambda w, l: np.subtract(
            *(
                -np.log1p(np.exp(0.7 - sign * 2 * (w / LENGTHS[0] - l / LENGTHS[1])))
                for sign in (1, -1)
            )
        ),
    ),
]


@pytest.mark.parametrize(("loss", "options", "closed_form"), GIBBS)
def test_gibbs_logits_in_closed_form(loss, options, closed_form):
    """P6, against the label probabilities that the losses imply."""
    w, l = np.linspace(-9, -3, 5), np.array([-2.0, -8.0, -6.0, -4.5, -1.0])
    with jax.enable_x64(True):
        logits = losses.gibbs_logits(loss)
        given = {
            "policy_chosen_logps": jnp.asarray(w),
            "policy_rejected_logps": jnp.asarray(l),
            "reference_chosen_logps": jnp.zeros(5),
            "reference_rejected_logps": jnp.zeros(5),
            "chosen_lengths": jnp.asarray(LENGTHS[0]),
            "rejected_lengths": jnp.asarray(LENGTHS[1]),
        }
        reads = inspect.signature(logits).parameters
        given = {name: array for name, array in given.items() if name in reads}
        ours = logits(**given, **options)
        np.testing.assert_allclose(ours, closed_form(w, l), rtol=1e-12, atol=1e-13)
        likelihood = losses.forward_corrected(loss, 0)(**given, **options)
        expected = np.log1p(np.exp(-closed_form(w, l)))
        np.testing.assert_allclose(likelihood, expected, rtol=1e-12)


def test_gibbs_logits_of_simpo_without_target_are_its_margin():
    """Odd in the margin m; m itself at gamma 0; derivative 2 s(gamma) at m = 0."""
    with jax.enable_x64(True):
        m, zero, one = jnp.linspace(-6, 6, 13), jnp.zeros(13), jnp.ones(13)
        logits = functools.partial(losses.gibbs_logits(losses.simpo), beta=1.0)
        at = lambda m, gamma: logits(m, zero, one, one, gamma=gamma)
        np.testing.assert_allclose(at(m, 0.0), m, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(at(m, 0.7), -at(-m, 0.7), rtol=1e-12)
        gradient = jax.grad(lambda m: at(m, 0.7).sum())(zero)
        np.testing.assert_allclose(gradient, 2 / (1 + np.exp(-0.7)), rtol=1e-12)


@pytest.mark.parametrize("row", ASKING, ids=lambda row: row.name)
def test_corrections_add_missing_counterparts(row):
    """The mean over flips is the clean loss, as for losses that read both answers."""
    options, rate = row.options[-1], 0.3
    lengths = jnp.arange(1, PAIRS + 1)
    for correction in (losses.unbiased, losses.forward_corrected):
        parameters = list(inspect.signature(correction(row.loss, rate)).parameters)
        assert parameters[: len(row.reads) + 1] == [*row.reads, "rejected_lengths"]
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(row, extreme=False), jnp.float64)
        named = dict(zip(row.reads, arrays)) | {"rejected_lengths": lengths}
        exchange = {"chosen": "rejected", "rejected": "chosen"}
        other = lambda name: "_".join(exchange.get(w, w) for w in name.split("_"))
        exchanged = {other(name): array for name, array in named.items()}
        corrected = losses.unbiased(row.loss, rate)
        kept, flipped = corrected(**named, **options), corrected(**exchanged, **options)
        clean = row.loss(*arrays, **options)
        mean = (1 - rate) * kept + rate * flipped
        np.testing.assert_allclose(mean, clean, rtol=1e-10)


def test_rates_can_be_learned():
    with jax.enable_x64(True):
        arrays = on_device(arrays_of(FOUR, extreme=False), jnp.float64)
        for correction in (losses.unbiased, losses.forward_corrected):
            loss = lambda rate, c=correction: c(losses.ipo, rate)(*arrays)
            rates = jnp.full(PAIRS, 0.2)
            check_grads(jax.jit(loss), (rates,), order=1, modes=("fwd", "rev"))


@pytest.mark.parametrize("correction", [losses.unbiased, losses.forward_corrected])
def test_corrected_losses_have_names_and_signatures(correction):
    """As a training loop reads them: name, arrays, options, and defaults."""
    corrected = correction(losses.simpo, 0.2)
    assert corrected.__name__ == f"{correction.__name__}_simpo"
    assert inspect.signature(corrected) == inspect.signature(losses.simpo)
    assert "simpo" in corrected.__doc__
    arrays = on_device(
        arrays_of(next(r for r in TABLE if r.name == "simpo")), "float32"
    )
    by_name = dict(zip(inspect.signature(corrected).parameters, arrays))
    np.testing.assert_array_equal(
        corrected(*arrays, gamma=1.0), corrected(gamma=1.0, **by_name)
    )
    partial = correction(functools.partial(losses.ipo, beta=0.5), 0.2)
    assert partial.__name__ == f"{correction.__name__}_ipo"
    four = on_device(arrays_of(FOUR), jnp.float32)
    np.testing.assert_array_equal(
        partial(*four), correction(losses.ipo, 0.2)(*four, beta=0.5)
    )
    with pytest.raises(TypeError, match="missing a required argument"):
        corrected(*arrays[:2])


class Squared:
    def __call__(self, chosen_rewards, rejected_rewards):
        return jnp.square(chosen_rewards - rejected_rewards - 1)


def test_losses_may_be_objects():
    corrected = losses.unbiased(Squared(), 0.2)
    assert corrected.__name__ == "unbiased_Squared"
    ours = corrected(jnp.ones(1), jnp.zeros(1))  # (0.8 * 0 - 0.2 * 4) / 0.6
    np.testing.assert_allclose(ours, -4 / 3, rtol=1e-6)


@pytest.mark.parametrize("correction", [losses.unbiased, losses.forward_corrected])
def test_jit_vmap_and_sharded_agree(correction):
    loss = functools.partial(correction(losses.ipo, 0.2), beta=1.0)
    arrays = on_device(arrays_of(FOUR, extreme=False), jnp.float32)
    eager = loss(*arrays)
    assert eager.dtype == jnp.float32 and eager.shape == (PAIRS,)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    close(jax.jit(loss)(*arrays), eager)
    close(jax.vmap(loss)(*arrays), eager)
    close(loss(*(a.reshape(2, 8) for a in arrays)).reshape(-1), eager)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, PartitionSpec("data"))
        sharded = jax.jit(loss)(*(jax.device_put(a, sharding) for a in arrays))
        assert jax.typeof(sharded).sharding.spec == PartitionSpec("data")
    close(sharded, eager)


@pytest.mark.parametrize("correction", [losses.unbiased, losses.forward_corrected])
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_losses_that_cannot_be_corrected_are_rejected(correction, row):
    why = "couples the pairs" if row.coupled else r"reads \w+ but not \w+"
    with pytest.raises(TypeError, match=f"got {row.name}, which {why}"):
        correction(row.loss, 0.2)


def square(x):
    return x * x


@pytest.mark.parametrize("correction", [losses.unbiased, losses.forward_corrected])
def test_rates_out_of_range_are_rejected(correction):
    correction = inspect.unwrap(correction)
    for rate in (-0.1, 0.5, 1, float("nan")):
        with pytest.raises(ValueError, match=rf"flip_rate in \[0, 0.5\), got {rate}"):
            correction(losses.dpo, rate)
    arrays = on_device(arrays_of(FOUR), jnp.float32)
    with pytest.raises(ValueError, match=r"flip_rate to broadcast .* \(16,\), got"):
        correction(losses.dpo, jnp.full(3, 0.1))(*arrays)
    with pytest.raises(TypeError, match="both answers, got square, which reads x"):
        correction(square, 0.1)

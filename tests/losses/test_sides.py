"""Properties of losses with separate sides, beyond test_battery.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses

RATIOS = np.stack(np.meshgrid(np.linspace(-60, 60, 41), np.linspace(-60, 60, 41)))
CHOSEN, REJECTED = RATIOS.reshape(2, -1)


def of_ratios(loss, chosen=CHOSEN, rejected=REJECTED, **options):
    """The loss and its gradients at these log-ratios of the two sides."""
    with jax.enable_x64(True):
        chosen, rejected = jnp.asarray(chosen), jnp.asarray(rejected)
        zero = jnp.zeros_like(chosen)
        total = lambda c, r: jnp.sum(loss(c, r, zero, zero, **options))
        gradients = jax.grad(total, argnums=(0, 1))(chosen, rejected)
        value = loss(chosen, rejected, zero, zero, **options)
        return tuple(np.asarray(x) for x in (value, *gradients))


def test_bco_pair_bounds_dpo():
    """P10: the classifier's loss is an upper bound on DPO's."""
    bco, *_ = of_ratios(losses.bco_pair, beta=0.1)
    dpo, *_ = of_ratios(losses.dpo, beta=0.1)
    assert (bco > dpo).all()


def test_the_optimal_chosen_reward_of_nca_pair_is_log_2():
    for ratio, sign in ((np.log(2) - 0.1, -1), (np.log(2) + 0.1, 1)):
        _, gradient, other = of_ratios(losses.nca_pair, [ratio], [0.0], beta=1.0)
        assert np.sign(gradient) == sign and other > 0
    _, gradient, _ = of_ratios(losses.nca_pair, [np.log(2)], [0.0], beta=1.0)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)


def test_apo_is_bounded_and_moves_each_side_in_its_direction():
    zero, up, down = of_ratios(losses.apo_zero)
    assert (zero >= 0).all() and (zero <= 2).all()
    assert (up < 0).all() and (down > 0).all()
    value, _, rejected = of_ratios(losses.apo_down)
    assert (value >= 0).all() and (value <= 2).all()
    assert (rejected > 0).all()
    # For a pair with a large margin, both answers go down.
    _, chosen, rejected = of_ratios(losses.apo_down, [0.0], [-100.0])
    assert chosen > 0 and rejected > 0


def test_dpop_equals_dpo_at_the_reference():
    """If policy and reference agree, the penalty and its gradient are 0."""
    ratios = [0.0, 0.0, 2.0], [0.0, 1.0, 1.0]
    ours = of_ratios(losses.dpop, *ratios, beta=0.3)
    for mine, dpo in zip(ours, of_ratios(losses.dpo, *ratios, beta=0.3)):
        np.testing.assert_array_equal(mine, dpo)


@pytest.mark.parametrize("beta", [1e-3, 0.5])
def test_sppo_hard_has_its_minimum_at_its_targets(beta):
    target = 1 / (2 * beta)
    for value in of_ratios(losses.sppo_hard, [target], [-target], beta=beta):
        np.testing.assert_allclose(value, 0, atol=1e-12)


def test_dpop_is_dpo_where_the_chosen_answer_rose():
    risen = CHOSEN > 0
    for ours, dpo in zip(of_ratios(losses.dpop), of_ratios(losses.dpo, beta=0.3)):
        np.testing.assert_allclose(ours[risen], dpo[risen], rtol=1e-12)


def test_dpop_has_a_larger_gradient_for_a_less_likely_chosen_answer():
    """1 + penalty times that of the rejected answer."""
    _, chosen, rejected = of_ratios(losses.dpop, penalty=5.0)
    fallen = CHOSEN < 0
    np.testing.assert_allclose(chosen[fallen], -6 * rejected[fallen], rtol=1e-12)


def test_flex_dpo_gradients_have_the_given_ratio():
    flex = functools.partial(losses.flex_dpo, chosen_beta=0.2, rejected_beta=0.05)
    _, chosen, rejected = of_ratios(flex)
    np.testing.assert_allclose(chosen, -4 * rejected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["chosen_beta", "rejected_beta"])
def test_flex_dpo_rejects_betas_out_of_range(name, beta):
    options = {"chosen_beta": 0.1, "rejected_beta": 0.1} | {name: beta}
    with pytest.raises(ValueError, match=f"{name} > 0 and finite, got {beta}"):
        losses.flex_dpo(*[jnp.zeros(2)] * 4, **options)


@pytest.mark.parametrize("penalty", [-1.0, float("inf")])
def test_dpop_rejects_penalties_out_of_range(penalty):
    with pytest.raises(ValueError, match=f"penalty >= 0 and finite, got {penalty}"):
        losses.dpop(*[jnp.zeros(2)] * 4, penalty=penalty)

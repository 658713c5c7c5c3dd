"""Rewards, margins and accuracies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from tests.losses.arrays import arrays_of
from tests.losses.row import LOG2
from tests.losses.rows_pairwise import ROWS
from tests.losses.test_battery import on_device


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
    arrays = on_device(arrays_of(ROWS[0], extreme=False), jnp.float32)
    margin = losses.reward_margins(
        losses.implicit_rewards(arrays[0], arrays[2], beta=0.3),
        losses.implicit_rewards(arrays[1], arrays[3], beta=0.3),
    )
    probability = jax.nn.sigmoid(margin)
    np.testing.assert_allclose(
        losses.dpo(*arrays, beta=0.3), -jnp.log(probability), rtol=1e-5
    )


def test_dpo_at_the_reference_is_log_2():
    """The loss at step 0 of every run."""
    logps = jnp.asarray([-123.456, -3.0])
    assert float(losses.dpo(logps, logps, logps, logps)[0]) == np.float32(LOG2)

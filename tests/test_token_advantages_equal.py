"""Whitened advantages of equal values: rounding is not standardized."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.losses import whitened


@pytest.mark.parametrize("value", [37.7, 100.1])
def test_equal_advantages_are_zero(value):
    found = whitened(jnp.full((1000,), value, jnp.float32))
    np.testing.assert_array_equal(found, 0)

"""Helpers of the tests that compare batches."""

import dataclasses

import jax
import numpy as np

from jaxpref.data import PreferenceBatch


def take(iterator, count):
    """The next batches."""
    return [next(iterator) for _ in range(count)]


def joined(parts):
    """The global batch: every process's rows one after the other."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, 1), *parts)


def assert_equal(first, second):
    """Compares all fields, with their dtypes."""
    for field in dataclasses.fields(PreferenceBatch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name in ("reference", "numbers", "token_numbers"):
            assert a.keys() == b.keys()
            jax.tree.map(np.testing.assert_array_equal, a, b)
            continue
        if a is None:  # of packed rows only
            assert b is None
            continue
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=field.name)

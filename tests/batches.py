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


def batch_of_owners(owners, lengths, **fields):
    """A batch on the devices that has owners of its target tokens, but no tokens.

    Args:
      owners: int32 [A, R, Q, P]; see `PreferenceBatch.completions`.
      lengths: int32 [A, R, S, K]; tokens of each answer.
      **fields: further fields.
    """
    slots, blank = lengths.shape[:3], np.zeros((*owners.shape[:3], 0), np.int32)
    batch = PreferenceBatch(
        tokens=blank,
        lengths=np.zeros(owners.shape[:3], np.int32),
        predictors=blank,
        targets=np.zeros_like(owners),
        completions=owners,
        pair_index=np.arange(np.prod(slots), dtype=np.int32).reshape(slots),
        completion_lengths=lengths,
        reference={},
        is_flipped=np.zeros(slots, bool),
        annotator=np.full(slots, -1, np.int32),
        empty_trace=np.zeros(slots, bool),
        weights=np.ones(slots, np.float32),
        **fields,
    )
    return jax.tree.map(jax.numpy.asarray, batch)

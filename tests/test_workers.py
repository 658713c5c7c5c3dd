"""Batches made in other processes: the same ones, and the same state."""

import json

import jax
import numpy as np
import pytest

from jaxpref import data
from tests.test_packing import make_pairs


def padded(pairs, **options):
    shape = data.batch_shape(pairs)
    return data.batches(pairs, shape=shape, batch_size=4, seed=3, **options)


def packed(pairs, **options):
    shape = data.packed_shape(pairs, row_length=64, batch_size=16)
    return data.packed_batches(pairs, shape=shape, seed=3, **options)


@pytest.mark.parametrize("make", [padded, packed])
def test_processes_make_the_batches_of_one_thread(make):
    """In order, and resumed from any number of processes into any other."""
    pairs = make_pairs(40)
    expected = make(pairs)
    batches = make(pairs, processes=2)
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    for _ in range(3):
        equal(next(batches), next(expected))
    # From processes to a thread, from a thread to processes, and where it stands.
    state = json.loads(json.dumps(batches.get_state()))
    assert state == json.loads(json.dumps(expected.get_state()))
    batches.close()
    again, thread = make(pairs, processes=3), make(pairs)
    again.set_state(state)
    thread.set_state(state)
    for _ in range(4):
        batch = next(expected)
        equal(next(again), batch)
        equal(next(thread), batch)
    assert again.get_state() == expected.get_state()
    again.close()


def test_an_error_in_a_process_is_raised_here():
    pairs = make_pairs(8)
    too_few = {"reference_logps": np.zeros((8, 2), np.float32)}
    batches = padded(pairs, processes=1, reference=too_few)
    too_few["reference_logps"].resize((4, 2), refcheck=False)
    with pytest.raises(IndexError):
        for _ in range(4):
            next(batches)
    batches.close()

"""Parts of fused tensors, and matrices stored either way round, against plain numpy."""

import dataclasses
import itertools

import numpy as np
import pytest

from jaxpref.models.families import FAMILIES, TensorName
from jaxpref.models.families.family import join

PATHS = ("query", "key", "value")
D, H, G, K = 6, 4, 2, 3
rng = np.random.default_rng(0)


def family(**names):
    return dataclasses.replace(FAMILIES[0], tensors=names)


class Counted:
    """A tensor on disk, and how many of its numbers are read."""

    def __init__(self, values):
        self.values, self.count = values, 0

    def __getitem__(self, index):
        found = self.values[index]
        self.count += found.size
        return found


def by_blocks(q, k, v):
    """[D, H, K] and two of [D, G, K]: the rows of each, one after the other."""
    return np.concatenate([x.reshape(D, -1).T for x in (q, k, v)])


def by_heads(q, k, v):
    """Three of [D, H, K]: for each head, the rows of all three."""
    rows = [x[:, head].T for head in range(H) for x in (q, k, v)]
    return np.concatenate(rows)


CASES = {
    "blocks": (TensorName("w{}", 1, parts=PATHS), (H, G, G), by_blocks),
    "blocks, input-major": (
        TensorName("w{}", 1, input_major=True, parts=PATHS),
        (H, G, G),
        lambda *x: by_blocks(*x).T,
    ),
    "heads": (TensorName("w{}", 1, parts=PATHS, axis=1), (H, H, H), by_heads),
}


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_fused_matrix_are_found_and_nothing_else_is_read(case):
    name, heads, fuse = CASES[case]
    arrays = [rng.normal(size=(D, n, K)) for n in heads]
    shapes = {p: (5, *x.shape) for p, x in zip(PATHS, arrays, strict=True)}
    stored = family(**dict.fromkeys(PATHS, name)).stored(shapes)
    tensor = fuse(*arrays)
    assert all(s.stored_shape == tensor.shape for s in stored.values())
    assert stored["key"].tensors.tolist() == ["w0", "w1", "w2", "w3", "w4"]
    parts = [(stored[path], x) for path, x in zip(PATHS, arrays, strict=True)]
    np.testing.assert_array_equal(join(parts), tensor)

    rows = (slice(None), slice(0, 3), slice(3, 6))
    columns = (slice(None), slice(0, 1), slice(1, 2))
    features = (slice(None), slice(1, 3))
    for path, x in zip(PATHS, arrays, strict=True):
        for index in itertools.product(rows, columns, features):
            counted = Counted(tensor)
            found = stored[path].read(counted, index)
            np.testing.assert_array_equal(found, x[index])
            assert counted.count == found.size


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_a_fused_bias_are_found(axis):
    name = TensorName("b{}", 0, parts=PATHS, axis=axis)
    arrays = [rng.normal(size=(H, K)) for _ in PATHS]
    shapes = {path: (2, H, K) for path in PATHS}
    stored = family(**dict.fromkeys(PATHS, name)).stored(shapes)
    tensor = np.concatenate(arrays, axis).reshape(-1)
    parts = [(stored[path], x) for path, x in zip(PATHS, arrays, strict=True)]
    np.testing.assert_array_equal(join(parts), tensor)
    for path, x in zip(PATHS, arrays, strict=True):
        for heads in (slice(None), slice(2, 4)):
            found = stored[path].read(tensor, (heads, slice(None)))
            np.testing.assert_array_equal(found, x[heads])


def test_one_tensor_per_layer_and_expert():
    name = TensorName("layers.{}.experts.{}.weight", 1)
    x = rng.normal(size=(2, 3, D, K))  # layers, experts, inputs, outputs
    stored = family(up=name).stored({"up": x.shape})["up"]
    assert stored.stored_shape == (K, D)
    assert stored.tensors.shape == (2, 3)
    for layer, expert in np.ndindex(2, 3):
        tensor = stored.tensors[layer, expert]
        assert tensor == f"layers.{layer}.experts.{expert}.weight"
        np.testing.assert_array_equal(
            join([(stored, x[layer, expert])]), x[layer, expert].T
        )
    whole = (slice(None), slice(None))
    np.testing.assert_array_equal(stored.read(x[1, 2].T, whole), x[1, 2])


def test_a_matrix_of_many_inputs_is_one_range_of_columns():
    x = rng.normal(size=(H, K, D))  # the output projection of attention
    stored = family(output=TensorName("o", 2)).stored({"output": x.shape})["output"]
    index = (slice(1, 3), slice(None), slice(0, 2))
    counted = Counted(x.reshape(-1, D).T)
    np.testing.assert_array_equal(stored.read(counted, index), x[index])
    assert counted.count == x[index].size and stored.tensors.item() == "o"

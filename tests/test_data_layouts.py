"""What every layout must do, with one, two and three completions per prompt.

A new layout is one entry of `LAYOUTS`.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxpref import data
from tests.batches import assert_equal, joined, take

LAYOUTS = {
    "padded": lambda dataset, order, **sizes: data.padded_layout(
        dataset, batch_size=8, **sizes
    ),
    # Four devices, however many processes have them.
    "packed": lambda dataset, order, **sizes: data.packed_layout(
        dataset,
        order=order,
        batch_size=8,
        row_length=64,
        num_steps=20,
        shards=4,
        **sizes,
    ),
}
"""`make(dataset, order, **sizes)`: a layout of 8 pairs per step.

`sizes` are `accumulation`, `process_index` and `process_count`."""
every_layout = pytest.mark.parametrize("make_layout", LAYOUTS.values(), ids=LAYOUTS)


def lists(count, completions, *, seed=0):
    """Prompts with up to `completions` answers; every third of three is shorter."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(4, 40, rng.integers(low, high)).tolist()
    builder = data.DatasetBuilder(completions)
    for n in range(count):
        answers = [words(2, 9) for _ in range(completions)]
        if completions > 2 and n % 3 == 0:
            answers[-1] = []
        numbers = {"tie": n / count, "is_flipped": n % 2}
        builder.add([1, *words(1, 7)], answers, id=f"{n}", columns=numbers)
    return builder.build()


PAIRS = lists(30, 2)


def read_back(batch):
    """{pair: [(prompt, completion), ...]} from the arrays alone."""
    found = {}
    k = batch.completion_lengths.shape[-1]
    for a, r, s in np.argwhere(batch.pair_index >= 0):
        sides = []
        for side in range(k):
            sequence = 0 if batch.segments is not None else side
            tokens = batch.tokens[a, r, sequence]
            own = batch.completions[a, r, sequence] == s * k + side
            targets = batch.targets[a, r, sequence][own]
            predictors = batch.predictors[a, r, sequence][own]
            assert len(targets) == batch.completion_lengths[a, r, s, side]
            if not len(targets):
                sides.append(None)
                continue
            assert (tokens[predictors[1:]] == targets[:-1]).all()
            last = predictors[0]
            if batch.segments is None:
                prompt = tokens[: last + 1]
            else:
                segments = batch.segments[a, r, 0]
                mine = segments == batch.num_parts * s
                prompt = tokens[mine]
                assert np.flatnonzero(mine)[-1] == last
                answer = segments == batch.num_parts * s + 1 + side
                assert tokens[answer].tolist() == targets.tolist()
                positions = batch.positions[a, r, 0]
                whole = [*positions[mine], *positions[answer]]
                assert whole == [*range(len(prompt) + len(targets))]
            sides.append((prompt.tolist(), targets.tolist()))
        found[int(batch.pair_index[a, r, s])] = sides
    return found


@every_layout
@pytest.mark.parametrize("completions", [1, 2, 3])
def test_batches_hold_the_lists_of_their_step(make_layout, completions):
    dataset = lists(30, completions)
    order = data.uniform(dataset, 3)
    layout = make_layout(dataset, order)
    batches = layout.batches(dataset, order, threads=0)
    for step in range(5):
        batch = next(batches)
        found = read_back(batch)
        assert sorted(found) == sorted(order(step, 8).tolist())
        for n, sides in found.items():
            for side, read in enumerate(sides):
                answer = dataset.completion(n, side).tolist()
                expected = (dataset.prompt(n).tolist(), answer) if answer else None
                assert read == expected
        real = batch.pair_index >= 0
        where = batch.pair_index[real]
        assert (batch.weights == real).all()
        for values, column in (
            (batch.is_flipped, dataset.columns["is_flipped"]),
            (batch.numbers["tie"], dataset.columns["tie"]),
        ):
            assert values.dtype == column.dtype
            np.testing.assert_array_equal(values[real], column[where])
            assert not values[~real].any()


@every_layout
@pytest.mark.parametrize("completions", [1, 2, 3])
def test_the_abstract_batch_has_the_shapes_of_the_others(make_layout, completions):
    dataset = lists(30, completions)
    order = data.uniform(dataset, 3)
    table = {"one": np.zeros((30, completions), np.float32)}
    for processes in (1, 2):
        layout = make_layout(dataset, order, accumulation=2, process_count=processes)
        whole = layout.of_all_processes()
        abstract = layout.abstract_batch(numbers=["tie"], reference=["one"])
        shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        batch = next(whole.batches(dataset, order, reference=table, threads=0))
        assert shapes(abstract) == shapes(batch)
        part = next(layout.batches(dataset, order, reference=table, threads=0))
        assert part.tokens.shape[1] * processes == batch.tokens.shape[1] == layout.rows
        (evaluated, *_) = whole.eval_batches(dataset, reference=table)
        assert shapes(evaluated) == shapes(batch)
        a, rows = batch.tokens.shape[:2]
        assert f" {a} x {rows} rows of " in layout.describe()


def streams(make_layout, dataset, *, threads=0, processes=1, accumulation=1):
    """The training batches of each process."""
    order = data.uniform(dataset, 3)
    table = np.random.default_rng(0).normal(size=(len(dataset), 2)).astype(np.float32)
    return [
        make_layout(
            dataset,
            order,
            accumulation=accumulation,
            process_index=index,
            process_count=processes,
        ).batches(dataset, order, reference={"one": table}, threads=threads)
        for index in range(processes)
    ]


@every_layout
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_process_count_sees_the_same_batches(make_layout, accumulation):
    counts = (1, 2, 4)
    all_streams = [
        streams(make_layout, PAIRS, processes=count, accumulation=accumulation)
        for count in counts
    ]
    for _ in range(10):  # more than two epochs
        whole, *others = ([next(part) for part in parts] for parts in all_streams)
        rows = whole[0].tokens.shape[1]
        for count, parts in zip(counts[1:], others, strict=True):
            assert {part.tokens.shape[1] for part in parts} == {rows // count}
            assert_equal(joined(parts), whole[0])


@every_layout
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resumed_from_one_integer(make_layout, threads):
    (stream,) = streams(make_layout, PAIRS)
    expected = take(stream, 20)
    (stream,) = streams(make_layout, PAIRS, threads=threads)
    take(stream, 7)
    state = json.loads(json.dumps(stream.get_state()))
    assert state == {"next_index": 7}
    next(stream)
    (resumed,) = streams(make_layout, PAIRS, threads=threads)
    resumed.set_state(state)
    for batch, same in zip(take(resumed, 13), expected[7:], strict=True):
        assert_equal(batch, same)
    # Another process count goes on in the same place.
    halves = streams(make_layout, PAIRS, processes=2)
    for half in halves:
        half.set_state(state)
    assert_equal(joined([next(half) for half in halves]), expected[7])


def test_a_column_is_added_in_one_place():
    """A number per pair goes through the builder, splits and batches by its name."""
    builder = data.DatasetBuilder(1)
    for n in range(4):
        builder.add([1], [[5]], id=f"{n}", columns={"confidence": n / 4})
    dataset = builder.build()
    assert dataset.columns["confidence"].dtype == np.float32
    (batch,) = data.padded_layout(dataset, batch_size=4).eval_batches(dataset)
    assert batch.numbers["confidence"].ravel().tolist() == [0, 0.25, 0.5, 0.75]
    taken = dataset.take(np.array([2]))
    assert taken.columns["confidence"].tolist() == [0.5]
    other = dataclasses.replace(
        dataset, columns=dataset.columns | {"confidence": np.zeros(4, np.float32)}
    )
    assert other.digest() != dataset.digest()
    with pytest.raises(ValueError, match="columns"):
        builder.add([1], [[5]], id="5")

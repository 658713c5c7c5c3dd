"""Batches that mix traces and empty ones: two orders, the same for any processes."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxpref.data import (
    DataOptions,
    InjectOptions,
    ListSource,
    MixOptions,
    make_mixed_splits,
    make_splits,
    mixture,
    padded_layout,
    uniform,
)
from jaxpref.data.samplers import empty_places
from jaxpref.errors import InputError
from tests.batches import assert_equal, joined, take
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs
from tests.test_traces import traced

TOKENIZER = byte_tokenizer()


def plan_of(num_traces, num_empty, **options):
    return make_mixed_splits(
        ListSource(traced(num_traces)),
        TOKENIZER,
        DataOptions(**(dict(heldout_fraction=0.0) | options)),
        empty=ListSource(synthetic_pairs(num_empty)),
    )


PAIRS = plan_of(37, 23, inject=InjectOptions(flip_rate=0.3)).train


def train(pairs=PAIRS, *, seed=3, empty_share=0.5, threads=2, reference=None, **sizes):
    layout = padded_layout(PAIRS, **dict(batch_size=8) | sizes)
    order = mixture(pairs, seed, empty_share)
    return layout.batches(pairs, order, reference=reference, threads=threads)


def stream(taken, empty):
    """The pairs of one kind, in the order they came in."""
    return np.concatenate(
        [b.pair_index[b.empty_trace == empty] for b in taken]
    ).tolist()


@pytest.mark.parametrize("share, count", [(0.5, 4), (0.25, 2), (0.01, 1), (0.99, 7)])
def test_every_batch_has_the_same_number_of_each_kind(share, count):
    for batch in take(train(empty_share=share), 20):
        assert batch.empty_trace.dtype == bool and batch.empty_trace.shape == (1, 8, 1)
        assert batch.empty_trace.sum() == count
        np.testing.assert_array_equal(
            batch.empty_trace, PAIRS.columns["empty_trace"][batch.pair_index]
        )
        np.testing.assert_array_equal(
            batch.is_flipped, PAIRS.columns["is_flipped"][batch.pair_index]
        )
        assert (batch.weights == 1).all()


def test_rows_are_the_pairs_that_they_name():
    whole = next(iter(padded_layout(PAIRS, batch_size=len(PAIRS)).eval_batches(PAIRS)))
    for batch in take(train(accumulation=2), 12):
        expected = jax.tree.map(lambda x, b=batch: x[0, b.pair_index[..., 0]], whole)
        assert_equal(batch, expected)


def test_the_mix_is_the_same_everywhere_where_the_counts_allow_it():
    for size, count in itertools.product((2, 3, 8, 12, 24), range(1, 24)):
        if count >= size:
            continue
        rows = empty_places(size, count / size)
        assert rows.sum() == count
        for parts in range(1, size + 1):
            if size % parts == 0:
                each = rows.reshape(parts, -1).sum(1)
                assert each.max() - each.min() <= (count % parts != 0)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("share", [0.5, 0.375, 0.125])
def test_any_process_count_sees_the_same_batches(count, accumulation, share):
    options = dict(accumulation=accumulation, empty_share=share)
    whole = train(**options)
    parts = [
        train(process_index=p, process_count=count, **options) for p in range(count)
    ]
    for _ in range(12):  # more than two epochs of the shorter stream at half and half
        pieces = [next(part) for part in parts]
        assert pieces[0].tokens.shape[:2] == (accumulation, 8 // accumulation // count)
        assert_equal(joined(pieces), next(whole))


def test_accumulation_cuts_the_same_batch():
    for one, four in zip(take(train(), 9), take(train(accumulation=4), 9)):
        assert one.pair_index.ravel().tolist() == four.pair_index.ravel().tolist()
        assert (four.empty_trace.sum((1, 2)) == 1).all()


def test_every_epoch_of_a_kind_has_each_of_its_pairs_once():
    taken = take(train(), 40)
    for empty in (False, True):
        mine = np.flatnonzero(PAIRS.columns["empty_trace"] == empty).tolist()
        seen, size = stream(taken, empty), len(mine)
        epochs = [seen[n * size : (n + 1) * size] for n in range(4)]
        assert all(sorted(epoch) == mine for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_one_stream_does_not_depend_on_the_other():
    """Its epochs, order and share of the batch are its own."""
    other = plan_of(37, 5, inject=InjectOptions(flip_rate=0.3)).train
    assert (
        other.ids[~other.columns["empty_trace"]].tolist()
        == PAIRS.ids[~PAIRS.columns["empty_trace"]].tolist()
    )
    for empty, pairs in (
        (False, other),
        (True, plan_of(11, 23, inject=InjectOptions(flip_rate=0.3)).train),
    ):
        ids = [
            p.ids[stream(take(train(p), 30), empty)].tolist() for p in (PAIRS, pairs)
        ]
        assert ids[0] == ids[1]
    # A third of the rows, and so of the steps that an epoch takes, in the same order.
    few, many = (
        stream(take(train(batch_size=12, empty_share=s), 12), False)
        for s in (0.5, 0.25)
    )
    assert few == many[: len(few)]


def test_seeds_and_kinds_shuffle_apart():
    pairs = plan_of(23, 23).train
    orders = set()
    for seed in range(4):
        taken = take(train(pairs, seed=seed, batch_size=46), 3)
        for empty in (False, True):
            first = np.flatnonzero(pairs.columns["empty_trace"] == empty)[0]
            order = np.array(stream(taken, empty)) - first
            orders |= {tuple(order[n * 23 : (n + 1) * 23]) for n in range(3)}
    assert len(orders) == 24


def test_the_orders_are_pinned():
    """A change here changes every mixed run's order: say so in the changelog."""
    first = [batch.pair_index.ravel().tolist() for batch in take(train(), 2)]
    assert first == [[22, 54, 20, 48, 1, 40, 14, 53], [15, 45, 10, 56, 13, 55, 30, 47]]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_resumed_from_one_integer(threads):
    straight = take(train(), 20)
    iterator = train(threads=threads)
    take(iterator, 7)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": 7}
    next(iterator)
    resumed = train(threads=threads)
    resumed.set_state(state)
    for batch, expected in zip(take(resumed, 13), straight[7:]):
        assert_equal(batch, expected)
    halves = [train(process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.set_state(state)
    assert_equal(joined([next(half) for half in halves]), straight[7])


def test_reference_scores_travel_with_their_pair():
    table = np.random.default_rng(0).normal(size=(len(PAIRS), 2)).astype(np.float32)
    for batch in take(train(reference={"one": table}), 5):
        np.testing.assert_array_equal(batch.reference["one"], table[batch.pair_index])
    with pytest.raises(ValueError, match="one is"):
        train(reference={"one": table[:-1]})


def test_evaluation_sees_both_kinds():
    found = list(padded_layout(PAIRS, batch_size=8).eval_batches(PAIRS))
    empty = np.concatenate([batch.empty_trace.ravel() for batch in found])
    assert empty[: len(PAIRS)].tolist() == PAIRS.columns["empty_trace"].tolist()
    assert not empty[len(PAIRS) :].any()


def test_ordinary_batches_are_never_empty():
    plan = make_splits(ListSource(traced(20)), TOKENIZER, DataOptions())
    layout = padded_layout(plan.train, plan.heldout, batch_size=4)
    for batch in take(layout.batches(plan.train, uniform(plan.train, 0)), 3):
        assert batch.empty_trace.shape == (1, 4, 1) and not batch.empty_trace.any()
    with pytest.raises(InputError, match="no pair with an empty trace is left"):
        mixture(plan.train, 0)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="batch_size 8 is not a multiple"):
        train(accumulation=3)
    with pytest.raises(InputError, match="batch_size 1 cannot hold"):
        train(batch_size=1)
    for share in (0, 1, -0.5):
        with pytest.raises(InputError, match="empty_share"):
            MixOptions(empty_share=share)
    with pytest.raises(InputError, match="no pair with a trace is left"):
        train(plan_of(5, 5, heldout_fraction=1).train)

"""Batches: the same for any process count, resumable, and aligned with their tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxpref.data import (
    ANSWERS,
    DataOptions,
    InjectOptions,
    ListSource,
    PreferenceBatch,
    first_seen,
    make_splits,
    padded_layout,
    uniform,
)
from jaxpref.errors import InputError
from tests.batches import joined, take
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs

TOKENIZER = byte_tokenizer()
RECORDS = [
    record | {"annotator": n % 3} for n, record in enumerate(synthetic_pairs(70))
]
PLAN = make_splits(
    ListSource(RECORDS),
    TOKENIZER,
    DataOptions(inject=InjectOptions(flip_rate=0.3), heldout_fraction=0.3),
)
SHAPE = padded_layout(PLAN.train, PLAN.heldout, batch_size=1)


def layout_of(**sizes):
    return padded_layout(PLAN.train, PLAN.heldout, **dict(batch_size=8) | sizes)


def train(*, seed=3, threads=2, reference=None, **sizes):
    order = uniform(PLAN.train, seed)
    return layout_of(**sizes).batches(
        PLAN.train, order, reference=reference, threads=threads
    )


def test_shapes_dtypes_and_layout():
    batch = next(train(accumulation=2))
    t, p = SHAPE.sequence_length, SHAPE.predictions
    longest = max(PLAN.train.longest, PLAN.heldout.longest)
    assert t % 8 == 0 and p % 8 == 0 and longest <= t < longest + 8
    expected = {
        "tokens": (np.int32, (2, 4, 2, t)),
        "lengths": (np.int32, (2, 4, 2)),
        "predictors": (np.int32, (2, 4, 2, p)),
        "targets": (np.int32, (2, 4, 2, p)),
        "completions": (np.int32, (2, 4, 2, p)),
        "pair_index": (np.int32, (2, 4, 1)),
        "completion_lengths": (np.int32, (2, 4, 1, 2)),
        "is_flipped": (np.bool_, (2, 4, 1)),
        "annotator": (np.int32, (2, 4, 1)),
        "empty_trace": (np.bool_, (2, 4, 1)),
        "weights": (np.float32, (2, 4, 1)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(batch, name)
        assert (array.dtype, array.shape) == (dtype, shape), name
    assert batch.reference == {}


def test_every_row_is_its_pair_and_every_target_follows_its_predictor():
    for batch in take(train(accumulation=2), 10):
        for a, r, q in np.ndindex(batch.lengths.shape):
            n = batch.pair_index[a, r, 0]
            prompt, completion = PLAN.train.prompt(n), PLAN.train.completion(n, q)
            length, size = batch.lengths[a, r, q], len(completion)
            tokens = batch.tokens[a, r, q]
            assert tokens[:length].tolist() == [*prompt, *completion]
            assert not tokens[length:].any()
            used = batch.completions[a, r, q] >= 0
            assert used.tolist() == [True] * size + [False] * (SHAPE.predictions - size)
            assert (batch.completions[a, r, q][used] == q).all()
            targets = batch.targets[a, r, q]
            assert (tokens[batch.predictors[a, r, q] + 1] == targets)[used].all()
            # The first target is the first token of the answer, the last is EOS.
            assert targets[0] == completion[0]
            assert targets[size - 1] == TOKENIZER.eos_token_id
            assert (
                not targets[~used].any() and not batch.predictors[a, r, q][~used].any()
            )
            assert batch.completion_lengths[a, r, 0, q] == size
            record = RECORDS[PLAN.train.columns["row"][n]]
            names = ("chosen", "rejected")
            side = names[1 - q] if batch.is_flipped[a, r, 0] else names[q]
            text = TOKENIZER.decode(tokens[:length])
            assert text == f"<s>{record['prompt']}{record[side]}</s>"
            assert batch.annotator[a, r, 0] == record["annotator"]
            assert batch.weights[a, r, 0] == 1 and batch.mask[a, r, 0]


def test_accumulation_cuts_the_same_batch():
    for one, four in zip(take(train(), 9), take(train(accumulation=4), 9)):
        assert one.pair_index.ravel().tolist() == four.pair_index.ravel().tolist()


def test_every_epoch_has_every_pair_once_in_a_new_order():
    size = len(PLAN.train)
    stream = np.concatenate(
        [b.pair_index.ravel() for b in take(train(), 3 * size // 8 + 1)]
    )
    epochs = [stream[n * size : (n + 1) * size].tolist() for n in range(3)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_neighbouring_seeds_share_no_epoch():
    size = len(PLAN.train)
    orders = set()
    for seed in range(6):
        iterator = train(seed=seed, batch_size=size)
        orders |= {tuple(b.pair_index.ravel()) for b in take(iterator, 4)}
    assert len(orders) == 24


def test_the_order_is_pinned():
    """A change here changes every run's order of examples: say so in the changelog."""
    first = [batch.pair_index.ravel().tolist() for batch in take(train(), 2)]
    assert first == [[35, 3, 49, 30, 25, 44, 16, 37], [15, 1, 33, 19, 47, 17, 31, 20]]


def test_the_pairs_that_a_run_sees_are_known_beforehand():
    order = uniform(PLAN.train, 3)
    drawn = np.concatenate([b.pair_index.ravel() for b in take(train(), 20)]).tolist()
    for steps in (1, 3, 20):
        found = first_seen(order, PLAN.train, batch_size=8, num_steps=steps)
        assert found.tolist() == [*dict.fromkeys(drawn[: 8 * steps])]
    assert len(found) == len(PLAN.train)


def test_reference_scores_travel_with_their_pair():
    table = np.random.default_rng(0).normal(size=(len(PLAN.train), 2))
    table = table.astype(np.float32)
    for batch in take(train(reference={"one": table, "two": -table}), 5):
        np.testing.assert_array_equal(batch.reference["one"], table[batch.pair_index])
        np.testing.assert_array_equal(batch.reference["two"], -table[batch.pair_index])
    for wrong in (table[:-1], table[:, :1], table.astype(np.float64)):
        with pytest.raises(ValueError, match="one is"):
            train(reference={"one": wrong})


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_pair_once_and_masks_the_rest(count):
    size = len(PLAN.heldout)
    assert size % 8
    table = np.arange(2 * size, dtype=np.float32).reshape(size, 2) + 1
    parts = [
        layout_of(process_index=p, process_count=count).eval_batches(
            PLAN.heldout, reference={"one": table}
        )
        for p in range(count)
    ]
    whole = [joined(pieces) for pieces in zip(*parts, strict=True)]
    assert len(whole) == -(-size // 8)
    stream = np.concatenate([batch.pair_index.ravel() for batch in whole])
    assert stream.tolist() == [*range(size), *[-1] * (-size % 8)]
    last = whole[-1]
    empty = ~last.mask[..., 0]
    assert empty.sum() == -size % 8
    for field in dataclasses.fields(PreferenceBatch):
        filler = -1 if field.name in ("pair_index", "completions", "annotator") else 0
        for array in jax.tree.leaves(getattr(last, field.name)):
            assert (array[empty] == filler).all(), field.name
    assert (last.weights[..., 0] == ~empty).all()
    np.testing.assert_array_equal(
        last.reference["one"][~empty][:, 0], table[-(size % 8) :]
    )


def test_no_pair_to_evaluate_is_no_batch():
    plan = make_splits(ListSource(RECORDS), TOKENIZER, DataOptions(heldout_fraction=0))
    assert list(layout_of().eval_batches(plan.heldout)) == []


def test_padding_is_told_by_length_and_not_by_id():
    """EOS has id 0, which is also what padding is filled with."""
    tokenizer = byte_tokenizer(first=("</s>", "<s>"))
    plan = make_splits(ListSource(RECORDS), tokenizer, DataOptions(heldout_fraction=0))
    layout = padded_layout(plan.train, batch_size=4)
    batch = next(layout.batches(plan.train, uniform(plan.train, 0)))
    last = np.take_along_axis(batch.tokens, batch.lengths[..., None] - 1, -1)
    assert not last.any()
    ends = np.take_along_axis(
        batch.completions, batch.completion_lengths[:, :, 0, :, None] - 1, -1
    )
    assert (ends >= 0).all()


def test_plain_completions_have_one_side():
    plan = make_splits(
        ListSource(RECORDS), TOKENIZER, DataOptions(heldout_fraction=0), kind=ANSWERS
    )
    layout = padded_layout(plan.train, batch_size=4)
    assert layout.num_completions == 1
    batch = next(layout.batches(plan.train, uniform(plan.train, 0)))
    assert batch.tokens.shape[:3] == (1, 4, 1)
    assert batch.completion_lengths.shape == (1, 4, 1, 1)


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="batch_size 8 is not a multiple"):
        train(accumulation=3)
    with pytest.raises(InputError, match="x 16 processes"):
        train(process_count=16)
    empty = make_splits(
        ListSource(RECORDS), TOKENIZER, DataOptions(heldout_fraction=1)
    ).train
    with pytest.raises(InputError, match="no pair is left to train on"):
        uniform(empty, 0)
    with pytest.raises(ValueError, match="one K"):
        padded_layout(empty, batch_size=8)

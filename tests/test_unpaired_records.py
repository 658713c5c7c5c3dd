"""Single answers with labels: what is read, refused, flipped, and mismatched."""

import hashlib

import numpy as np
import pytest

from jaxpref.data import (
    ANSWERS,
    DataOptions,
    InjectOptions,
    Kind,
    ListSource,
    make_splits,
)
from jaxpref.data.mismatched import next_of_another_prompt, with_mismatched
from jaxpref.errors import InputError
from jaxpref.objectives import apo_zero_unpaired, bco, kto
from tests.answers import labeled_records
from tests.data_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer()
LABELED = Kind(1, frozenset({"desirable"}))


def splits_of(records, kind=LABELED, tokenizer=TOKENIZER, **options):
    options = DataOptions(**({"heldout_fraction": 0.0} | options))
    return make_splits(ListSource(records), tokenizer, options, kind=kind)


def test_objectives_say_what_they_read():
    assert bco().kind == apo_zero_unpaired().kind == LABELED
    assert kto().kind == Kind(1, frozenset({"desirable"}), mismatched=True)
    assert (kto().num_completions, bco().num_completions) == (2, 1)


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_the_label_is_read_from_the_field_label(label):
    record = {"prompt": "q", "completion": " a", "label": label}
    train = splits_of([record]).train
    assert train.num_completions == 1
    assert train.numbers["desirable"].tolist() == [float(label)]
    moved = {"prompt": "q", "completion": " a", "user": {"thumb": label}}
    train = splits_of([moved], columns=("desirable=user.thumb",)).train
    assert train.numbers["desirable"].tolist() == [float(label)]


def test_messages_may_have_a_label():
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    turns = [{"role": role, "content": text} for role, text in turns]
    tokenizer = byte_tokenizer(eos="<|im_end|>", template=CHATML)
    records = [{"messages": turns, "label": False}]
    train = splits_of(records, tokenizer=tokenizer).train
    assert train.numbers["desirable"].tolist() == [0.0]
    assert "b" in tokenizer.decode(train.completion(0, 0))
    prompt = tokenizer.decode(train.prompt(0))
    assert all(text in prompt for text in "qar")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "no field 'label' for desirable"),
        ({"label": "yes"}, "field 'label' must be true or false for desirable"),
        ({"label": 0.5}, "must be true or false"),
        ({"label": -1}, "must be true or false"),
    ],
)
def test_other_labels_are_refused(fields, message):
    with pytest.raises(InputError, match=f"row 1: {message}|row 1: .*{message}"):
        splits_of([{"prompt": "q", "completion": " a"} | fields])


def test_a_run_on_pairs_says_how_to_train_on_labeled_answers():
    record = {"prompt": "q", "completion": " a", "label": True}
    with pytest.raises(InputError, match="row 1: a single answer.*--loss kto, bco"):
        splits_of([record], Kind(2))
    with pytest.raises(InputError, match="field 'label' changes"):
        splits_of([record], ANSWERS)


def u(text):
    """The first 53 bits of SHA-256 as a number in [0, 1)."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 11) / 2**53


def test_injected_noise_turns_labels_into_their_opposite():
    records = labeled_records()
    clean = splits_of(records).train
    noisy = splits_of(records, inject=InjectOptions(flip_rate=0.4, seed=3)).train
    flips = np.array([u(f"flip 3\n{name}") < 0.4 for name in clean.ids])
    assert 5 < flips.sum() < 30
    np.testing.assert_array_equal(noisy.columns["is_flipped"], flips)
    expected = np.where(
        flips, 1 - clean.numbers["desirable"], clean.numbers["desirable"]
    )
    np.testing.assert_array_equal(noisy.numbers["desirable"], expected)
    np.testing.assert_array_equal(noisy.tokens, clean.tokens)
    with pytest.raises(InputError, match="prefer the longer answer need two answers"):
        splits_of(records, inject=InjectOptions(prefer_longer=0.4))


def test_a_pair_is_two_labeled_answers():
    pair = {
        "prompt": "q",
        "chosen": " good",
        "rejected": " bad",
        "ended": [True, False],
    }
    single = {"prompt": "r", "completion": " fine", "label": True}
    train = splits_of([pair, single]).train
    texts = [TOKENIZER.decode(train.completion(n, 0)) for n in range(3)]
    assert texts == [" good</s>", " bad", " fine</s>"]
    assert train.numbers["desirable"].tolist() == [1, 0, 1]
    assert train.columns["row"].tolist() == [0, 0, 1]
    # A wrong label of the pair is wrong for both answers.
    pairs = [
        {"prompt": f"q{n}", "chosen": " good", "rejected": f" bad {n}"}
        for n in range(40)
    ]
    noisy = splits_of(pairs, inject=InjectOptions(flip_rate=0.5)).train
    flips = noisy.columns["is_flipped"].reshape(40, 2)
    assert 10 < flips[:, 0].sum() < 30
    np.testing.assert_array_equal(flips[:, 0], flips[:, 1])
    plain = splits_of(pairs, Kind(2), inject=InjectOptions(flip_rate=0.5)).train
    np.testing.assert_array_equal(flips[:, 0], plain.columns["is_flipped"])


def test_every_prompt_gets_the_answer_to_another_one():
    records = labeled_records(60)
    plain = splits_of(records, heldout_fraction=0.3)
    both = splits_of(records, kto().kind, heldout_fraction=0.3)
    assert plain.digest != both.digest
    for before, after in (
        (plain.train, both.train),
        (plain.heldout, both.heldout),
    ):
        assert after.num_completions == 2 and len(after) == len(before)
        prompts, ids = before.columns["prompt"], before.ids
        # Walk around the circle until the prompt changes.
        circle = sorted(range(len(ids)), key=lambda n: u(f"mismatched\n{ids[n]}"))
        for n in range(len(ids)):
            at = (circle.index(n) + 1) % len(ids)
            while prompts[circle[at]] == prompts[n]:
                at = (at + 1) % len(ids)
            given, own = before.completion(circle[at], 0), before.completion(n, 0)
            np.testing.assert_array_equal(after.prompt(n), before.prompt(n))
            np.testing.assert_array_equal(after.completion(n, 0), own)
            np.testing.assert_array_equal(after.completion(n, 1), given)


def test_mismatched_answers_are_cut_to_fit():
    records = [
        {"prompt": "q" * 20, "completion": " a", "label": True},
        {"prompt": "r", "completion": " " + "b" * 30, "label": False},
    ]
    train = splits_of(records, kto().kind, max_length=40).train
    own = splits_of(records, max_length=40).train
    room = 40 - own.prompt_lengths[0]
    assert own.completion_lengths[1, 0] > room
    np.testing.assert_array_equal(train.completion(0, 1), own.completion(1, 0)[:room])
    assert train.longest == 40


def test_one_prompt_alone_has_no_mismatched_answer():
    assert next_of_another_prompt(np.array(["a", "b"]), np.array([7, 7])) is None
    same = [{"prompt": "q", "completion": f" {x}", "label": True} for x in "ab"]
    with pytest.raises(InputError, match="all prompts are the same"):
        splits_of(same, kto().kind)
    # A single held-out prompt gets an answer of the training data.
    one = splits_of(same[:1]).train
    others = splits_of([{"prompt": "r", "completion": " c", "label": True}]).train
    found = with_mismatched(one, 64, place="x", others=others)
    np.testing.assert_array_equal(found.completion(0, 1), others.completion(0, 0))

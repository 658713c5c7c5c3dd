"""Plans with traces: ids, splits and flips of records, and pairs of both kinds."""

import hashlib
import json
import random

import numpy as np
import pytest

from jaxpref.data import (
    ANSWERS,
    DataOptions,
    InjectOptions,
    ListSource,
    make_splits,
    padded_layout,
)
from jaxpref.errors import InputError
from tests.data_tokenizers import synthetic_pairs
from tests.test_traces import TOKENIZER, pair_texts, plan_of, record, side, traced


def uniform(text):
    """The first 53 bits of SHA-256 as a number in [0, 1)."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 11) / 2**53


def test_ids_are_hashes_with_the_trace_and_unique():
    pair = record(chosen=(["t", "v", "t"], "a"))
    names = plan_of([pair, pair]).train.ids.tolist()
    stem = lambda *extra: hashlib.sha256(
        json.dumps(["q", ["a", "b"], None, *extra]).encode()
    ).hexdigest()[:16]
    first, second = stem([["t"], ["u"]]), stem([["v"], ["u"]])
    assert names == [
        *(f"{first}-0", f"{second}-0", f"{first}-1", f"{stem()}-0"),
        *(f"{first}-2", f"{second}-1", f"{first}-3", f"{stem()}-1"),
    ]
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert plan_of([plain], mixed=False).train.ids[0] == names[3]


def test_pairs_of_a_record_keep_together_and_are_flipped_together():
    records = traced(300, traces=3, prompts=120)
    options = dict(inject=InjectOptions(flip_rate=0.3, seed=5), heldout_fraction=0.3)
    plan = plan_of(records, **options)
    train, heldout = plan.train, plan.heldout
    assert not set(train.columns["row"]) & set(heldout.columns["row"])
    assert len(train.ids) == len(set(train.ids))
    for pairs in (train, heldout):
        assert (
            pairs.columns["empty_trace"].any()
            and not pairs.columns["empty_trace"].all()
        )
        rows, counts = np.unique(pairs.columns["row"], return_counts=True)
        # Three traces on one side at least, and once more with an empty trace.
        assert (counts == 4).all() and pairs.columns["empty_trace"].sum() == len(rows)
    assert not heldout.columns["is_flipped"].any()
    share = [
        len(set(train.columns["is_flipped"][train.columns["row"] == row]))
        for row in set(train.columns["row"])
    ]
    assert set(share) == {1}
    for n in range(len(train)):
        source = records[train.columns["row"][n]]
        content = [
            source["prompt"],
            [source[x]["answer"] for x in ("chosen", "rejected")],
        ]
        content += [None, [source[x]["trace"] for x in ("chosen", "rejected")]]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] + "-0"
        assert train.columns["is_flipped"][n] == (uniform(f"flip 5\n{name}") < 0.3)
        first = train.completion(n, 0)
        wanted = source["rejected" if train.columns["is_flipped"][n] else "chosen"][
            "answer"
        ]
        assert TOKENIZER.decode(first).endswith(f"{wanted}</s>")


def by_id(pairs):
    columns = pairs.columns["is_flipped"], pairs.columns["empty_trace"]
    return dict(zip(pairs.ids, zip(pair_texts(pairs), *columns)))


def test_plans_with_traces_do_not_depend_on_the_order_of_rows():
    records = traced(100, traces=2, prompts=40)
    options = dict(inject=InjectOptions(flip_rate=0.3), heldout_fraction=0.3)
    plan = plan_of(records, **options)
    other = plan_of(random.Random(1).sample(records, 100), **options)
    for a, b in ((plan.train, other.train), (plan.heldout, other.heldout)):
        assert by_id(a) == by_id(b)


def test_digest_tells_an_empty_trace_from_the_same_tokens_in_the_prompt():
    plain = {"chosen": "a", "rejected": "b"}
    mixed = plan_of([record()], empty=[plain | {"prompt": "q"}])
    written = plan_of([record(), plain | {"prompt": "q<think></think>"}], mixed=False)
    assert mixed.train.tokens.tolist() == written.train.tokens.tolist()
    assert mixed.digest != written.digest
    assert mixed.digest == plan_of([record()], empty=[plain | {"prompt": "q"}]).digest


def test_empty_data_is_read_in_any_format_and_split_by_the_same_hash():
    empty = [
        {"prompt": f"other {n}", "chosen": "y", "rejected": f"n {n}"} for n in range(40)
    ]
    empty += [{"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "n"}]
    empty[-1]["rejected"] = "\n\nHuman: q\n\nAssistant: z"
    plan = plan_of(traced(50, traces=2), empty=empty, heldout_fraction=0.3)
    assert plan.report["with a trace"] == 100 and plan.report["rows"] == 91
    assert plan.report["with an empty trace"] == 41
    # A dialogue of one turn is on the same side as the text of that turn.
    keys = {r["prompt"]: r["prompt"] for r in empty[:-1]}
    keys["\n\nHuman: q\n\nAssistant:"] = "q"
    held = {x for x, key in keys.items() if uniform(f"heldout\n{key}") < 0.3}
    pairs = plan.heldout
    found = [
        TOKENIZER.decode(pairs.prompt(n)[1:])
        for n in np.flatnonzero(pairs.columns["empty_trace"])
    ]
    assert {x.removesuffix("<think></think>") for x in found} == held
    assert len(plan.heldout) > len(held)


def test_what_a_mixed_plan_refuses():
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="records row 1 and all.*no pair with a trace"):
        plan_of([plain])
    with pytest.raises(InputError, match="empty.jsonl row 2: field 'trace' occurs"):
        plan_of([record()], empty=[plain, record()])
    same = record(chosen=("one", "a"), rejected=("two", "a"))
    with pytest.raises(InputError, match="no pair with an empty trace is left"):
        plan_of([same])


def test_max_pairs_keeps_the_pairs_of_a_record_together():
    records = traced(10, traces=3)
    for limit, rows in ((1, 1), (4, 1), (5, 2), (39, 10), (40, 10)):
        plan = plan_of(records, max_pairs=limit)
        assert plan.train.columns["row"].tolist() == sorted([*range(rows)] * 4)
    assert len(plan_of(records, mixed=False).train) == 30
    plain = synthetic_pairs(10)
    plan = plan_of(records, empty=plain, max_pairs=6)
    assert plan.train.columns["empty_trace"].tolist() == [False] * 6 + [True] * 6


def test_supervised_examples_of_every_trace():
    records = [{"prompt": "q", "completion": side(["t", "v"], "a")}, record()]
    plan = make_splits(
        ListSource(records), TOKENIZER, DataOptions(heldout_fraction=0.0), kind=ANSWERS
    )
    texts = [TOKENIZER.decode(plan.train.completion(n, 0)) for n in range(3)]
    assert texts == [f"<think>{t}</think>a</s>" for t in "tvt"]
    (batch,) = padded_layout(plan.train, batch_size=3).eval_batches(plan.train)
    assert not batch.empty_trace.any()

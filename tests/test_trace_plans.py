"""Plans with traces: ids, splits and flips of records, and pairs of both kinds."""

import hashlib
import json
import random

import numpy as np
import pytest

from jaxpref.data import (
    DataOptions,
    InjectOptions,
    ListSource,
    batch_shape,
    batches,
    make_plan,
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
    assert not set(train.rows) & set(heldout.rows)
    assert len(train.ids) == len(set(train.ids))
    for pairs in (train, heldout):
        assert pairs.empty.any() and not pairs.empty.all()
        rows, counts = np.unique(pairs.rows, return_counts=True)
        # Three traces on one side at least, and once more with an empty trace.
        assert (counts == 4).all() and pairs.empty.sum() == len(rows)
    assert not heldout.flips.any()
    share = [len(set(train.flips[train.rows == row])) for row in set(train.rows)]
    assert set(share) == {1}
    for n in range(len(train)):
        source = records[train.rows[n]]
        content = [
            source["prompt"],
            [source[x]["answer"] for x in ("chosen", "rejected")],
        ]
        content += [None, [source[x]["trace"] for x in ("chosen", "rejected")]]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16] + "-0"
        assert train.flips[n] == (uniform(f"flip 5\n{name}") < 0.3)
        first = train.completion(n, 0)
        wanted = source["rejected" if train.flips[n] else "chosen"]["answer"]
        assert TOKENIZER.decode(first).endswith(f"{wanted}</s>")


def test_plans_with_traces_do_not_depend_on_the_order_of_rows():
    records = traced(100, traces=2, prompts=40)
    options = dict(inject=InjectOptions(flip_rate=0.3), heldout_fraction=0.3)
    plan = plan_of(records, **options)
    other = plan_of(random.Random(1).sample(records, 100), **options)
    for a, b in ((plan.train, other.train), (plan.heldout, other.heldout)):
        of = lambda p: dict(zip(p.ids, zip(pair_texts(p), p.flips, p.empty)))
        assert of(a) == of(b)


def test_digests_without_traces_are_what_they_were():
    records = [r | {"annotator": n % 2} for n, r in enumerate(synthetic_pairs(20))]
    pairs = plan_of(records, mixed=False, inject=InjectOptions(flip_rate=0.5)).train
    digest = hashlib.sha256()
    for name, kind in (
        ("tokens", "<i4"),
        ("prompt_lengths", "<i4"),
        ("completion_lengths", "<i4"),
        ("flips", "|b1"),
        ("annotators", "<i4"),
    ):
        values = getattr(pairs, name)
        digest.update(f"{name} {kind} {values.shape}".encode())
        digest.update(values.astype(kind).tobytes())
    assert pairs.digest() == digest.hexdigest()


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
    prompts = [r["prompt"] for r in empty[:-1]] + ["\n\nHuman: q\n\nAssistant:"]
    held = {x for x in prompts if uniform(f"heldout\n{x.strip()}") < 0.3}
    pairs = plan.heldout
    found = [TOKENIZER.decode(pairs.prompt(n)[1:]) for n in np.flatnonzero(pairs.empty)]
    assert {x.removesuffix("<think></think>") for x in found} == held
    assert len(plan.heldout) > len(held)


def test_what_a_mixed_plan_refuses():
    plain = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match="records row 1 and all.*no pair with a trace"):
        plan_of([plain])
    with pytest.raises(InputError, match="empty.jsonl row 2: field 'trace' stands in"):
        plan_of([record()], empty=[plain, record()])
    same = record(chosen=("one", "a"), rejected=("two", "a"))
    with pytest.raises(InputError, match="no pair with an empty trace is left"):
        plan_of([same])


def test_max_pairs_keeps_the_pairs_of_a_record_together():
    records = traced(10, traces=3)
    for limit, rows in ((1, 1), (4, 1), (5, 2), (39, 10), (40, 10)):
        plan = plan_of(records, max_pairs=limit)
        assert plan.train.rows.tolist() == sorted([*range(rows)] * 4)
    assert len(plan_of(records, mixed=False).train) == 30
    plain = synthetic_pairs(10)
    plan = plan_of(records, empty=plain, max_pairs=6)
    assert plan.train.empty.tolist() == [False] * 6 + [True] * 6


def test_supervised_examples_of_every_trace():
    records = [{"prompt": "q", "completion": side(["t", "v"], "a")}, record()]
    plan = make_plan(
        ListSource(records), TOKENIZER, DataOptions(heldout_fraction=0.0), sides=1
    )
    texts = [TOKENIZER.decode(plan.train.completion(n, 0)) for n in range(3)]
    assert texts == [f"<think>{t}</think>a</s>" for t in "tvt"]
    shape = batch_shape(plan.train)
    batch = next(batches(plan.train, shape=shape, batch_size=3, threads=0))
    assert not batch.empty.any()

"""The plan: counts on real data, ids, splits and flips that do not depend on order."""

import gzip
import hashlib
import json
import random

import numpy as np
import pytest

from jaxpref.data import (
    DataOptions,
    DatasetBuilder,
    InjectOptions,
    Kind,
    ListSource,
    load_tokenizer,
    make_splits,
    open_source,
    padded_layout,
    read_prompts,
)
from jaxpref.data.hashing import hash_uniforms
from jaxpref.data.noise import flip_symmetric
from jaxpref.data.records import PROMPTS_DIFFER
from jaxpref.data.tokenize import SAME_TOKENS
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, byte_tokenizer, ids, synthetic_pairs

TOKENIZER = byte_tokenizer()


def uniform(text):
    """The first 53 bits of SHA-256 as a number in [0, 1)."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 11) / 2**53


def plan_of(records, **options):
    sides = options.pop("sides", 2)
    return make_splits(
        ListSource(records), TOKENIZER, DataOptions(**options), kind=Kind(sides)
    )


def texts(pairs):
    """{id: (prompt, completions, flip)} read back from the tokens."""
    return {
        str(pairs.ids[n]): (
            TOKENIZER.decode(pairs.prompt(n)[1:]),
            tuple(TOKENIZER.decode(pairs.completion(n, k)) for k in range(2)),
            bool(pairs.columns["is_flipped"][n]),
        )
        for n in range(len(pairs))
    }


@pytest.fixture(scope="module")
def dialogues(shared):
    return shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"


def test_counts_on_real_dialogues(dialogues, stories260k):
    plan = make_splits(
        open_source(dialogues),
        load_tokenizer(stories260k),
        DataOptions(max_length=512, max_prompt_length=256, heldout_fraction=0.1),
    )
    report = plan.report
    assert report["rows"] == 2354
    assert report["dropped: chosen and rejected are identical"] == 2
    assert report[f"dropped: {PROMPTS_DIFFER}"] == 9
    assert report["dropped: a completion is empty"] == 4
    assert report["train"] + report["heldout"] == 2354 - 2 - 9 - 4
    assert (len(plan.train), len(plan.heldout)) == (report["train"], report["heldout"])
    for pairs in (plan.train, plan.heldout):
        lengths = pairs.prompt_lengths[:, None] + pairs.completion_lengths
        assert lengths.max() <= 512 and pairs.prompt_lengths.max() <= 256
        assert pairs.completion_lengths.min() >= 1 and pairs.prompt_lengths.min() >= 2
        assert pairs.offsets[-1] == len(pairs.tokens)
        assert all(pairs.tokens[pairs.offsets[:-1]] == 1)
        assert (pairs.tokens == 1).sum() == len(pairs)
    layout = padded_layout(plan.train, plan.heldout, batch_size=1)
    assert (layout.sequence_length, layout.num_completions) == (512, 2)
    with gzip.open(dialogues, "rt", encoding="utf-8") as file:
        lines = file.readlines()
    for n in (0, 1, len(plan.train) - 1):
        chosen = json.loads(lines[plan.train.columns["row"][n]])["chosen"]
        start = load_tokenizer(stories260k).decode(plan.train.completion(n, 0))
        assert start.removesuffix("</s>").strip() in chosen


def test_real_preferences_with_an_empty_answer(shared, stories260k):
    source = open_source(shared / "data" / "ultrafeedback_sample_train.jsonl.gz")
    plan = make_splits(
        source, load_tokenizer(stories260k), DataOptions(drop_empty=True)
    )
    assert plan.report["dropped: chosen and rejected are identical"] == 4
    assert plan.report["dropped: a completion is empty"] == 2


def test_ids_are_the_hash_of_the_content_and_its_occurrence():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    swapped = {"prompt": "q", "chosen": "b", "rejected": "a"}
    plan = plan_of([pair, swapped, pair, pair | {"source": 1}], heldout_fraction=0)
    names = plan.train.ids.tolist()
    stem = names[0].removesuffix("-0")
    content = json.dumps(["q", ["a", "b"], None])
    assert stem == hashlib.sha256(content.encode()).hexdigest()[:16]
    assert [names[0], names[2], names[3]] == [f"{stem}-{n}" for n in range(3)]
    assert names[1].endswith("-0") and names[1] != names[0]
    (name,) = plan_of([pair | {"annotator": 3}], heldout_fraction=0).train.ids
    content = json.dumps(["q", ["a", "b"], "3"])
    assert name == hashlib.sha256(content.encode()).hexdigest()[:16] + "-0"


def test_flips_splits_and_ids_do_not_depend_on_order_or_other_rows():
    records = synthetic_pairs(300, prompts=120)
    options = dict(inject=InjectOptions(flip_rate=0.3, seed=5), heldout_fraction=0.2)
    plan = plan_of(records, **options)
    shuffled = random.Random(1).sample(records, len(records))
    other = plan_of(shuffled, **options)
    assert texts(plan.train) == texts(other.train)
    assert texts(plan.heldout) == texts(other.heldout)
    part = plan_of(records[:100], **options)
    assert texts(part.train).items() <= texts(plan.train).items()
    assert texts(part.heldout).items() <= texts(plan.heldout).items()


def test_flips_swap_training_labels_only():
    records = synthetic_pairs(400)
    options = dict(heldout_fraction=0.25)
    clean = plan_of(records, **options)
    noisy = plan_of(records, inject=InjectOptions(flip_rate=0.4), **options)
    assert clean.train.ids.tolist() == noisy.train.ids.tolist()
    assert texts(clean.heldout) == texts(noisy.heldout)
    assert (
        not noisy.heldout.columns["is_flipped"].any()
        and not clean.train.columns["is_flipped"].any()
    )
    assert noisy.report["flipped"] == noisy.train.columns["is_flipped"].sum()
    before, after = texts(clean.train), texts(noisy.train)
    for name, (prompt, answers, flip) in after.items():
        assert before[name] == (prompt, answers[::-1] if flip else answers, False)
    # Five standard deviations of a binomial.
    n = len(noisy.train)
    assert (
        abs(noisy.train.columns["is_flipped"].sum() - 0.4 * n) < 5 * (n * 0.24) ** 0.5
    )
    assert (
        plan_of(records, inject=InjectOptions(flip_rate=1.0), **options)
        .train.columns["is_flipped"]
        .all()
    )


def test_flips_and_splits_are_pinned():
    """A change here flips and holds out other pairs in every run: no such change."""
    records = synthetic_pairs(200)
    for seed in (0, 1):
        plan = plan_of(
            records,
            inject=InjectOptions(flip_rate=0.3, seed=seed),
            heldout_fraction=0.4,
        )
        for pair_id, flip in zip(plan.train.ids, plan.train.columns["is_flipped"]):
            assert flip == (uniform(f"flip {seed}\n{pair_id}") < 0.3)
        expected = [n for n in range(200) if uniform(f"heldout\nquestion {n}") < 0.4]
        assert plan.heldout.columns["row"].tolist() == expected


def test_flip_decisions_are_uniform_nested_and_seeded():
    keys = [f"pair {n}" for n in range(20_000)]
    u = hash_uniforms(keys, salt="x")
    assert u.min() >= 0 and u.max() < 1
    histogram = np.histogram(u, bins=10, range=(0, 1))[0]
    assert np.abs(histogram - 2000).max() < 5 * (20_000 * 0.09) ** 0.5
    low = flip_symmetric(keys, rate=0.1, seed=0)
    high = flip_symmetric(keys, rate=0.3, seed=0)
    other = flip_symmetric(keys, rate=0.3, seed=1)
    assert (high | ~low).all()
    assert abs((high & other).mean() - 0.09) < 0.01
    assert not flip_symmetric(keys, rate=0.0, seed=0).any()
    assert flip_symmetric(keys, rate=1.0, seed=0).all()


def test_flips_of_the_file_are_kept_and_a_second_flip_restores():
    records = [r | {"flip": n % 3 == 0} for n, r in enumerate(synthetic_pairs(90))]
    kept = plan_of(records, heldout_fraction=0.3)
    for pairs in (kept.train, kept.heldout):
        assert (
            pairs.columns["is_flipped"].tolist()
            == (pairs.columns["row"] % 3 == 0).tolist()
        )
    every = plan_of(records, heldout_fraction=0.3, inject=InjectOptions(flip_rate=1.0))
    assert (
        every.train.columns["is_flipped"].tolist()
        == (every.train.columns["row"] % 3 != 0).tolist()
    )
    assert (
        every.heldout.columns["is_flipped"].tolist()
        == (every.heldout.columns["row"] % 3 == 0).tolist()
    )
    assert kept.report["flips in the file"] == 30


def test_no_prompt_is_in_both_splits():
    records = synthetic_pairs(1000, prompts=200)
    for record in records[::7]:
        record["prompt"] += " "
    plan = plan_of(records, heldout_fraction=0.3)
    train, heldout = (
        {prompt.strip() for prompt, _, _ in texts(pairs).values()}
        for pairs in (plan.train, plan.heldout)
    )
    assert not train & heldout
    assert train | heldout == {f"question {n}" for n in range(200)}
    assert abs(len(heldout) - 60) < 5 * (200 * 0.21) ** 0.5
    assert not len(plan_of(records, heldout_fraction=0).heldout)
    assert not len(plan_of(records, heldout_fraction=1).train)


def test_conversations_split_by_prompt():
    tokenizer = byte_tokenizer(template=CHATML)
    records = [
        {
            "prompt": [{"role": "user", "content": f"q{n % 20}" + " " * (n % 3)}],
            "chosen": f"yes {n}",
            "rejected": "no",
        }
        for n in range(100)
    ]
    plan = make_splits(
        ListSource(records), tokenizer, DataOptions(heldout_fraction=0.5)
    )
    train, heldout = (set(p.columns["row"] % 20) for p in (plan.train, plan.heldout))
    assert train and heldout and not train & heldout


def test_annotators_are_indexed_by_sorted_name():
    records = synthetic_pairs(60)
    for n, record in enumerate(records):
        record["annotator"] = ["w2", 10, None, "w1"][n % 4]
    plan = plan_of(records, heldout_fraction=0.4)
    for pairs in (plan.train, plan.heldout):
        assert pairs.annotator_names == ("10", "w1", "w2")
        assert pairs.columns["annotator"].tolist() == [
            [2, 0, -1, 1][n % 4] for n in pairs.columns["row"]
        ]


def test_max_pairs_stops_early():
    records = [*synthetic_pairs(10), "not a record"]
    records[1] = records[0] | {"rejected": records[0]["chosen"]}
    plan = plan_of(records, max_pairs=5, heldout_fraction=0)
    assert plan.train.columns["row"].tolist() == [0, 2, 3, 4, 5]
    assert (
        plan.train.ids.tolist()
        == plan_of(records[:10], heldout_fraction=0).train.ids[:5].tolist()
    )


def test_completions_for_sft():
    records = [
        {"prompt": "q", "completion": "y"},
        {"prompt": "q", "chosen": "z", "rejected": "n"},
        {"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "n"},
    ]
    plan = plan_of(records, sides=1, heldout_fraction=0)
    assert plan.train.num_completions == 1 and plan.train.completion_lengths.shape == (
        3,
        1,
    )
    assert plan.train.completion(1, 0).tolist() == ids(TOKENIZER, "z", "</s>")
    assert TOKENIZER.decode(plan.train.completion(2, 0)) == " x</s>"


def test_digest_changes_exactly_with_the_contents():
    records = synthetic_pairs(40)
    plan = plan_of(records)
    assert plan.digest == plan_of(records).digest
    assert plan.train.digest() != plan.heldout.digest()
    others = [
        plan_of(records[:-1]),
        plan_of(records, inject=InjectOptions(flip_rate=0.2)),
        plan_of(records, max_length=20, max_prompt_length=8),
        plan_of([r | {"annotator": 1} for r in records]),
        plan_of(records, heldout_fraction=0.5),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 6


def test_digest_leaves_out_names_and_places():
    records = [r | {"annotator": f"w{n % 2}"} for n, r in enumerate(synthetic_pairs(9))]
    dropped = {"prompt": "q", "chosen": "same", "rejected": "same"}
    named = [r | {"annotator": r["annotator"] + "x"} for r in records]
    plan = plan_of(records, heldout_fraction=0)
    for other in ([dropped, *records], named):
        other = plan_of(other, heldout_fraction=0)
        assert other.digest == plan.digest
    assert other.train.ids.tolist() != plan.train.ids.tolist()
    assert plan_of(records[::-1], heldout_fraction=0).digest != plan.digest


def test_pairs_without_a_difference_are_dropped_and_cuts_counted():
    records = [
        {"prompt": "q", "chosen": "same start 1", "rejected": "same start 2"},
        {"prompt": "long " * 9, "chosen": "y" * 50, "rejected": "n"},
    ]
    plan = plan_of(records, max_length=10, max_prompt_length=5, heldout_fraction=0)
    assert plan.report[f"dropped: {SAME_TOKENS}"] == 1
    assert plan.report["prompts cut"] == 1 and plan.report["completions cut"] == 1
    assert len(plan.train) == 1


def test_builder_gives_back_what_was_added():
    builder = DatasetBuilder(2)
    builder.add([1, 5], [[6, 2], [7, 8, 2]], id="a-0")
    builder.add(
        [1], [[9], [2]], id="b-0", annotator="w", columns={"is_flipped": True, "row": 7}
    )
    pairs = builder.build()
    assert pairs.tokens.tolist() == [1, 5, 6, 2, 7, 8, 2, 1, 9, 2]
    assert pairs.tokens.dtype == np.int32 and pairs.offsets.dtype == np.int64
    assert pairs.completion(0, 1).tolist() == [7, 8, 2]
    assert pairs.prompt(1).tolist() == [1] and pairs.completion(1, 0).tolist() == [9]
    assert pairs.columns["row"].tolist() == [0, 7] and pairs.columns[
        "annotator"
    ].tolist() == [-1, 0]
    layout = padded_layout(
        pairs, batch_size=1, length_multiple=4, prediction_multiple=2
    )
    assert (layout.sequence_length, layout.predictions) == (8, 4)
    with pytest.raises(ValueError, match="1 completions, not 2"):
        builder.add([1], [[2]], id="c-0")
    with pytest.raises(ValueError, match="a prompt without tokens"):
        builder.add([], [[2], [3]], id="c-0")
    assert len(builder) == 2


def test_prompts_to_sample_from():
    records = [
        {"prompt": "q"},
        {"prompt": "q"},
        {"chosen": "\n\nHuman: r\n\nAssistant: x", "rejected": "y"},
        {"prompt": "s", "chosen": "t", "rejected": "u"},
    ]
    (first, second), _ = read_prompts(ListSource(records), TOKENIZER, limit=2)
    assert (first.text, second.text) == ("q", "\n\nHuman: r\n\nAssistant:")
    assert first.tokens == ids(TOKENIZER, "<s>", "q")
    assert second.source_record == records[2] and "chosen" not in second.record
    assert len(read_prompts(ListSource(records), TOKENIZER, limit=9)[0]) == 3


def test_prompts_to_sample_from_are_told_apart_by_all_their_messages(monkeypatch):
    tokenizer = byte_tokenizer(template=CHATML)

    def user(text):
        return {"role": "user", "content": text}

    yes = {"role": "assistant", "content": "yes"}
    records = [
        {"prompt": [user("a"), yes, user("go on")]},
        {"prompt": [user("b"), yes, user("go on")]},
        {"prompt": [user("b"), yes, user("go on ")]},
        {"prompt": "c", "chosen": [yes]},
    ]
    calls = []
    encode = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer,
        "apply_chat_template",
        lambda *args, **options: calls.append(args) or encode(*args, **options),
    )
    found, _ = read_prompts(ListSource(records), tokenizer, limit=9)
    assert [prompt.text for prompt in found] == ["go on", "go on", "c"]
    # Each is rendered once as a prompt and once with an answer after it.
    assert len(calls) == 6
    assert found[0].tokens != found[1].tokens
    with pytest.raises(InputError, match="records row 2: field 'prompt' has no"):
        read_prompts(ListSource([{"prompt": "q"}, {"prompt": []}]), tokenizer, limit=9)


def test_long_prompts_to_sample_from_are_cut_as_in_training():
    records = [{"prompt": "x" * 2000 + "yz", "chosen": "a", "rejected": "b"}]
    (cut,), _ = read_prompts(
        ListSource(records), TOKENIZER, limit=1, max_prompt_length=3
    )
    assert cut.is_cut and cut.tokens == ids(TOKENIZER, "<s>", "y", "z")
    (whole,), _ = read_prompts(ListSource(records), TOKENIZER, limit=1)
    assert len(whole.tokens) == 2003 and not whole.is_cut
    (just,), _ = read_prompts(
        ListSource(records), TOKENIZER, limit=1, max_prompt_length=2003
    )
    assert just.tokens == whole.tokens and not just.is_cut

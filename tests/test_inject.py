"""Noise injected by a run: its exact rates by record and seed, and its errors."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from jaxpref.data import ANSWERS, DataOptions, InjectOptions, ListSource, make_splits
from jaxpref.data.inject import fields_read, read_noise, subject
from jaxpref.data.noise import flip_pairs
from jaxpref.data.records import parse
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, byte_tokenizer, synthetic_pairs

TOKENIZER = byte_tokenizer()
COUNT = 1200


def uniform(text):
    """The first 53 bits of SHA-256 as a number in [0, 1)."""
    return (int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) >> 11) / 2**53


def records(count=COUNT):
    """Pairs with a source, a clearness, a position, and lengths 1, 2 and 3."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": f"question {n} about {('tax', 'Taxis', 'rain')[n % 3]}",
            "chosen": "a" * rng.integers(1, 4) + "!",
            "rejected": "b" * rng.integers(1, 4) + "?",
            "source": ("web", "book", None, "forum")[n % 4],
            "first": bool(n % 2),
            "is": {"clear": [-3, 0.5, 0, 12][n // 3 % 4]},
        }
        for n in range(count)
    ]


def labeled(rows, **options):
    """The annotators and flips of all rows as training pairs."""
    inject = InjectOptions(**options)
    noise = read_noise(inject)
    found = []
    for n, row in enumerate(rows):
        example = parse(row, f"row {n}", sides=2, values=fields_read(inject))
        pair = subject(example, noise.topic)
        found.append(noise.label(pair, f"id {n}", f"row {n}"))
    noise.check_used("the rows")
    names, flips = zip(*found)
    return names, np.array(flips)


def assert_rates(flips, rates, seed=0):
    """Exactly the pairs below their rate, and as many as a binomial has."""
    u = np.array([uniform(f"flip {seed}\nid {n}") for n in range(len(flips))])
    np.testing.assert_array_equal(flips, u < rates)
    for rate in set(rates.tolist()):
        of_rate = flips[rates == rate]
        bound = 5 * (rate * (1 - rate) / len(of_rate)) ** 0.5
        assert abs(of_rate.mean() - rate) <= bound


def by_length(rows, shorter, longer, same):
    """The rate of each row by the length of its chosen answer."""
    lengths = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    return np.select(
        [np.less(lengths, 0), np.greater(lengths, 0)], [shorter, longer], same
    )


def write(tmp_path, content, name="rates.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return str(path)


def test_rates_by_a_field(tmp_path):
    """Sources, and a position: who sees the chosen answer second errs by 30%."""
    rows = records()
    path = write(tmp_path, {"web": 0.4, "book": 0.9, "elsewhere": 0.7})
    _, flips = labeled(rows, rates=path, by="source", flip_rate=0.1, seed=5)
    assert_rates(flips, np.tile([0.4, 0.9, 0.1, 0.1], COUNT // 4), seed=5)
    path = write(tmp_path, {"false": 0.3})
    _, flips = labeled(rows, rates=path, by="first")
    assert_rates(flips, np.tile([0.3, 0.0], COUNT // 2))


def test_rates_by_annotator_including_adversaries(tmp_path):
    path = write(tmp_path, {"ann": 0, "eve": 1, "7": 0.8})
    names = ["ann", "eve", 7, None]
    rows = [row | {"annotator": names[n % 4]} for n, row in enumerate(records(400))]
    found, flips = labeled(rows, rates=path, flip_rate=0.3)
    assert found[:4] == ("ann", "eve", "7", None)
    assert_rates(flips, np.tile([0.0, 1.0, 0.8, 0.3], 100))
    _, same = labeled(rows, rates=path, by="annotator", flip_rate=0.3)
    np.testing.assert_array_equal(same, flips)


def test_labels_given_by_length():
    """The longer answer is chosen in the whole share: no right label there is lost."""
    rows = records()
    _, flips = labeled(rows, prefer_longer=0.6, flip_rate=0.1)
    assert_rates(flips, by_length(rows, 0.6 + 0.4 * 0.1, 0.4 * 0.1, 0.1))
    _, flips = labeled(rows, prefer_longer=1.0)
    assert_rates(flips, by_length(rows, 1.0, 0.0, 0.0))


def test_a_topic_on_which_the_labels_are_wrong():
    rows = records()
    _, flips = labeled(rows, topic="(?i)tax", topic_rate=0.7, flip_rate=0.05)
    assert_rates(flips, np.tile([0.7, 0.7, 0.05], COUNT // 3))
    _, flips = labeled(rows, topic=r"\btax\b", topic_rate=0.7, prefer_longer=0.5)
    of_topic, others = by_length(rows, 0.85, 0.35, 0.7), by_length(rows, 0.5, 0.0, 0.0)
    on_topic = np.tile([True, False, False], COUNT // 3)
    assert_rates(flips, np.where(on_topic, of_topic, others))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": ""}]
    talks = [
        {
            "prompt": [turns[0], turns[1] | {"content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows[:30]
    ]
    for topic, matching in (("be brief\nq", 30), ("(?m)^question 3 ", 1)):
        assert labeled(talks, topic=topic, topic_rate=1.0)[1].sum() == matching


def test_unclear_pairs_are_flipped_more():
    rows = records()
    _, flips = labeled(rows, margins="is.clear", temperature=1.5)
    clear = np.array([row["is"]["clear"] for row in rows])
    assert_rates(flips, 1 / (1 + np.exp(np.abs(clear) / 1.5)))


def test_simulated_annotators(tmp_path):
    """Shares, names and rates; with another seed, other pairs."""
    rows = records()
    annotators = {
        "careful": {"share": 0.5, "flip_rate": 0.05},
        "eve": {"share": 0.3, "flip_rate": 0.8},
        "hasty": {"share": 0.2, "prefer_longer": 0.5, "flip_rate": 0.2},
    }
    path = write(tmp_path, annotators)
    names, flips = labeled(rows, annotators=path, seed=2)
    names = np.array(names)
    u = np.array([uniform(f"annotator 2\nid {n}") for n in range(COUNT)])
    expected = np.select([u < 0.5, u < 0.8], ["careful", "eve"], "hasty")
    np.testing.assert_array_equal(names, expected)
    for name, annotator in annotators.items():
        share = annotator["share"]
        assert abs(np.mean(names == name) - share) < 5 * (share / 4 / COUNT) ** 0.5
    hasty = by_length(rows, 0.5 + 0.5 * 0.2, 0.5 * 0.2, 0.2)
    assert_rates(flips, np.select([u < 0.5, u < 0.8], [0.05, 0.8], hasty), seed=2)
    others, _ = labeled(rows[:50], annotators=path, seed=3)
    assert (names[:50] != np.array(others)).any()


@pytest.mark.parametrize(
    "options",
    [
        {"prefer_longer": 0.5, "flip_rate": 0.2},
        {"topic": "1", "topic_rate": 0.9},
        {"margins": "clear", "temperature": 2.0},
        {"rates": {"web": 0.5}, "by": "source"},
        {"annotators": {"a": {"share": 0.4}, "b": {"share": 0.6, "flip_rate": 0.6}}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_run_flips_training_pairs_and_nothing_else(options, tmp_path):
    """The same for every tokenizer and in any order of the rows."""
    rows = [
        row | {"clear": n % 5, "source": ["web", "book"][n % 2]}
        for n, row in enumerate(synthetic_pairs(60))
    ]
    for name in ("rates", "annotators"):
        if name in options:
            options = options | {name: write(tmp_path, options[name])}
    given = DataOptions(inject=InjectOptions(**options, seed=1), heldout_fraction=0.25)
    plan = make_splits(ListSource(rows), TOKENIZER, given)
    clean = make_splits(ListSource(rows), TOKENIZER, DataOptions(heldout_fraction=0.25))
    flips = plan.train.columns["is_flipped"]
    assert 3 < flips.sum() == plan.report["flipped"] < len(flips) - 3
    assert plan.heldout.digest() == clean.heldout.digest()
    restored = flip_pairs(plan.train, flips)
    np.testing.assert_array_equal(restored.tokens, clean.train.tokens)
    assert bool(plan.train.annotator_names) == ("annotators" in options)
    # Another tokenizer, and the rows the other way round.
    chat = byte_tokenizer(template=CHATML)
    again = make_splits(ListSource(rows[::-1]), chat, given).train
    at = dict(zip(plan.train.ids.tolist(), flips.tolist()))
    assert at == dict(zip(again.ids.tolist(), again.columns["is_flipped"].tolist()))
    # The fields that the noise depends on count as read.
    for name in fields_read(given.inject):
        assert f", {name}" in plan.fields.describe().partition("; not read")[0]


def test_evaluation_data_keep_their_labels():
    noisy = DataOptions(
        inject=InjectOptions(flip_rate=0.3, rates="rates.json"), max_length=77
    )
    assert noisy.inject.active and InjectOptions(prefer_longer=0.1).active
    assert not InjectOptions(seed=3, flip_rate=0.0).active
    assert noisy.without_injection() == DataOptions(max_length=77)


def test_every_option_is_described():
    """So that the warning of a run leaves nothing out."""
    described = InjectOptions(
        rates="r.json", by="source", prefer_longer=0.3, flip_rate=0.1
    ).describe()
    assert described == (
        "flip rate 0.1, rates by source from r.json, 0.3 of the labels by length alone"
    )
    described = InjectOptions(topic="tax", topic_rate=0.3).describe()
    assert described == "flip rate 0.3 where the prompt matches tax"
    described = InjectOptions(margins="clear", temperature=2.0).describe()
    assert described == "rates by |clear| / 2.0"
    described = InjectOptions(annotators="a.json").describe()
    assert described == "simulated annotators from a.json"
    assert len(dataclasses.fields(InjectOptions)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefer_longer": 1.2}, "inject.prefer_longer 1.2 must be from 0 to 1"),
        ({"topic": "a", "topic_rate": -0.1}, "inject.topic_rate -0.1"),
        ({"margins": "a", "temperature": 0.0}, "inject.temperature 0.0 must be pos"),
        ({"rates": "a", "annotators": "b"}, "inject.rates and inject.annotators both"),
        ({"rates": "a", "topic": "b", "topic_rate": 0.1}, "rates and inject.topic"),
        ({"annotators": "a", "flip_rate": 0.1}, "inject.flip_rate: inject.annotators"),
        ({"annotators": "a", "prefer_longer": 0.1}, "inject.prefer_longer: inject.ann"),
        (
            {"margins": "a", "temperature": 1.0, "flip_rate": 0.1},
            "inject.flip_rate: inject.margins sets",
        ),
        ({"by": "source"}, "inject.by has no effect without inject.rates"),
        ({"topic": "a"}, "inject.topic has no effect without inject.topic_rate"),
        ({"topic_rate": 0.1}, "inject.topic_rate has no effect without inject.topic"),
        ({"margins": "a"}, "inject.margins has no effect without inject.temperature"),
        ({"temperature": 1.0}, "inject.temperature has no effect without inject.mar"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(InputError, match=message) as error:
        InjectOptions(**options)
    assert "\n" not in str(error.value)


def refused(message, rows=None, **options):
    with pytest.raises(InputError, match=message) as error:
        labeled(records(8) if rows is None else rows, **options)
    assert "\n" not in str(error.value)


def test_files_and_fields_that_do_not_fit(tmp_path):
    path = write(tmp_path, {"nobody": 0.1})
    refused("rates.json: no training pair of the rows .*'annotator'.*given", rates=path)
    refused("field 'source'; .* book, forum, web", rates=path, by="source")
    refused("row 0: field 'is' must be a string.*by.*clear", rates=path, by="is")
    refused("topic a.b: matches no training prompt", topic="a.b", topic_rate=0.1)
    refused(r"topic \(: is not a regular expression", topic="(", topic_rate=0.1)
    for field in ("source", "first", "nowhere"):
        refused(f"row 0: field '{field}' .* number", margins=field, temperature=1.0)
    rows = [records(1)[0] | {"annotator": "ann"}]
    path = write(tmp_path, {"a": {"share": 1}})
    refused("row 0: field 'annotator' is 'ann'.*--inject.rates", rows, annotators=path)
    for content, message in (
        ({"a": 0.1}, "field 'a': must be an annotator.*--inject.rates"),
        ({"a": {"flip_rate": 0.1}}, "field 'a': must be an annotator"),
        ({"a": {"share": 1, "rate": 0.1}}, "'rate'; allowed: share, flip_rate, pref"),
        ({"a": {"share": True}}, "share True must be a number from 0 to 1"),
        ({"a": {"share": 1, "flip_rate": 2}}, "flip_rate 2 must be a number"),
        ({"a": {"share": 0.5}}, "shares sum to 0.5; they must sum to 1"),
        ([], r"must be an object {\"name\""),
    ):
        refused(message, annotators=write(tmp_path, content))
    with pytest.raises(InputError, match="--inject needs pairs"):
        make_splits(
            ListSource([{"prompt": "a", "completion": "b"}]),
            TOKENIZER,
            DataOptions(inject=InjectOptions(prefer_longer=0.2)),
            kind=ANSWERS,
        )

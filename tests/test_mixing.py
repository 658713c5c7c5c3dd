"""Several data files for one run: names, weights, and the order of their pairs."""

import collections
import json
import os

import numpy as np
import pytest

from jaxpref import cli
from jaxpref.cli import train as train_command
from jaxpref.cli.words import split
from jaxpref.data import DataOptions, ListSource, make_splits
from jaxpref.data.kinds import PAIRS
from jaxpref.data.mixing import Mixture, read_mixture
from jaxpref.data.read import read_datasets
from jaxpref.data.samplers import make_order
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs, write_lines


def dataset(*counts):
    """Pairs of several sources."""
    records = synthetic_pairs(sum(counts))
    ends = np.cumsum((0, *counts))
    parts = [records[a:b] for a, b in zip(ends, ends[1:])]
    first, *more = (ListSource(part, f"{n}.jsonl") for n, part in enumerate(parts))
    options = DataOptions(heldout_fraction=0)
    return make_splits(first, byte_tokenizer(), options, more=more).train


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a.jsonl", Mixture(("a.jsonl",))),
        (("a.jsonl", "b.jsonl"), Mixture(("a.jsonl", "b.jsonl"))),
        (("a:3", "b:1"), Mixture(("a", "b"), (0.75, 0.25))),
        (("a:.5", "b:5e-1"), Mixture(("a", "b"), (0.5, 0.5))),
        ("a.jsonl:2", Mixture(("a.jsonl",), (1.0,))),
        ("http://host:8080", Mixture(("http://host:8080",))),
        ("http://host:80/a:2", Mixture(("http://host:80/a",), (1.0,))),
        ("hf:owner/name:config", Mixture(("hf:owner/name:config",))),
        ("tfds:name/config:1.0.0", Mixture(("tfds:name/config:1.0.0",))),
        (("hf:o/n:c:0.5", "b:0.5"), Mixture(("hf:o/n:c", "b"), (0.5, 0.5))),
    ],
)
def test_names_and_weights(data, expected):
    assert read_mixture(data) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("a:0.5", "b"), "--data b: has no weight, but others do; write b:WEIGHT"),
        (("a:1", "a:2"), "--data a: is given more than once"),
        (("a:0", "b:1"), "weights must be finite and above 0"),
        (("a:1e999", "b:1"), "weights must be finite and above 0"),
        ((), "--data: give a file"),
    ],
)
def test_wrong_mixtures(data, message):
    with pytest.raises(InputError, match=message):
        read_mixture(data)


def test_a_file_whose_name_ends_like_a_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs:2").write_text("")
    assert read_mixture("pairs:2") == Mixture(("pairs:2",))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.3, 0.2), (1 / 3,) * 3, (1.0,)])
def test_every_source_has_its_share_at_all_times(weights):
    counts = (7, 40, 13)[: len(weights)]
    pairs = dataset(*counts)
    order = make_order(pairs, seed=3, empty_share=None, weights=weights)
    drawn = np.concatenate([order(step, 8) for step in range(60)])
    sources = pairs.columns["source"][drawn]
    for number, weight in enumerate(weights):
        taken = np.cumsum(sources == number)
        places = np.arange(1, len(drawn) + 1)
        # Each floor is off by less than one, once for each source before it.
        assert (np.abs(taken - weight * places) <= len(weights)).all()
        own = drawn[sources == number]
        # No pair occurs again before all others of its source have.
        for start in range(0, len(own) - counts[number] + 1, counts[number]):
            part = own[start : start + counts[number]]
            assert len(set(part.tolist())) == counts[number]


def test_the_order_depends_on_the_position_alone():
    pairs = dataset(9, 5)
    make = lambda seed: make_order(
        pairs, seed=seed, empty_share=None, weights=(0.6, 0.4)
    )
    one, other = make(0), make(0)
    whole = np.concatenate([one(step, 6) for step in range(8)])
    # Resumed at another step, with other batches.
    np.testing.assert_array_equal(other(2, 12), whole[24:36])
    assert (make(1)(0, 12) != whole[:12]).any()


def test_without_weights_every_pair_occurs_once_per_epoch():
    pairs = dataset(5, 11)
    order = make_order(pairs, seed=0, empty_share=None)
    drawn = np.concatenate([order(step, 4) for step in range(4)])
    assert sorted(drawn.tolist()) == list(range(16))


def read(train, **options):
    options = DataOptions(heldout_fraction=0, **options)
    return read_datasets(
        byte_tokenizer(), options, kind=PAIRS, mix=None, train=train, heldout=None
    )


def test_files_are_read_in_order_and_named(tmp_path):
    records = synthetic_pairs(10)
    a = str(write_lines(tmp_path / "a.jsonl", records[:4]))
    b = str(write_lines(tmp_path / "b.jsonl", records[4:]))
    both = read((a, b))
    assert both.train_sources == (a, b)
    counts = collections.Counter(both.splits.train.columns["source"].tolist())
    assert counts == {0: 4, 1: 6}
    weighted = read((f"{a}:0.5", f"{b}:0.5"))
    assert weighted.splits.weights == (0.5, 0.5) and both.splits.weights is None
    # A run does not resume with other weights.
    digests = {x.splits.digest for x in (both, weighted, read((f"{a}:1", f"{b}:3")))}
    assert len(digests) == 3
    write_lines(tmp_path / "b.jsonl", records[4:5] + [{"prompt": "q"}])
    with pytest.raises(InputError, match=f"{b} row 2"):
        read((a, b))


def test_the_option_may_be_repeated(tmp_path):
    config = lambda line: train_command.config_of(
        split(f"--model m --out o {line}".split(), repeatable=("data",))
    )
    assert config("--data a").data == "a"
    assert config("--data a:0.7 --data b:0.3").data == ("a:0.7", "b:0.3")
    assert config("--data a b").data == ("a", "b")


def test_an_output_that_is_one_of_the_inputs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, synthetic_pairs(2))
    before = {name: os.stat(name).st_size for name in ("a.jsonl", "b.jsonl")}
    with pytest.raises(SystemExit):
        cli.main("train --model m --data a.jsonl:1 b.jsonl:1 --out b.jsonl".split())
    assert "b.jsonl" in capsys.readouterr().err
    assert {name: os.stat(name).st_size for name in before} == before
    assert json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])

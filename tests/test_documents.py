"""Plain texts: every token is trained exactly once, in pieces that fit."""

import json

import numpy as np
import pytest

from jaxpref import data
from jaxpref.data import ANSWERS, DataOptions, ListSource, make_splits
from jaxpref.data.record_source import RecordSource
from jaxpref.objectives import sft
from jaxpref.train import TrainConfig, read_metrics, run
from tests.answers import words, write_records
from tests.data_tokenizers import byte_tokenizer


def splits_of(texts, tokenizer, **options):
    records = ListSource([{"text": text} for text in texts])
    options = DataOptions(**{"heldout_fraction": 0.0} | options)
    source = RecordSource(records, options, sides=1)
    return make_splits(source, tokenizer, options, kind=ANSWERS)


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("length", [2, 5, 64])
def test_every_token_is_trained_once(bos, length):
    tokenizer = byte_tokenizer(bos=bos)
    texts = ["0123456789", "xyz"]
    dataset = splits_of(texts, tokenizer, max_length=length).train
    assert dataset.longest <= length and (dataset.completion_lengths > 0).all()
    found = {row: [] for row in range(len(texts))}
    for n, row in enumerate(dataset.columns["row"]):
        given, tokens = dataset.prompt(n).tolist(), dataset.completion(n, 0).tolist()
        assert len(given) == 1 and given == (found[row][-1:] or given)
        found[row] += tokens if found[row] else [*given, *tokens]
    ids = tokenizer.get_vocab()
    for row, text in enumerate(texts):
        start = [] if bos is None else [ids[bos]]
        assert found[row] == [*start, *(ids[x] for x in text), tokenizer.eos_token_id]
    if length == 64:
        assert len(dataset) == 2


def test_documents_are_dropped_and_held_out_by_their_text():
    tokenizer = byte_tokenizer()
    texts = [f"document {n} " * 4 for n in range(200)]
    plan = splits_of([*texts, "a</s>b"], tokenizer, heldout_fraction=0.3, max_length=20)
    assert plan.report["dropped: a completion holds BOS or EOS before its end"] == 1
    rows = [set(part.columns["row"]) for part in (plan.train, plan.heldout)]
    assert not rows[0] & rows[1] and len(rows[0] | rows[1]) == 200
    # Three standard deviations of a share of 0.3 of 200.
    assert abs(len(rows[1]) / 200 - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 200)
    assert len(np.unique(plan.train.ids)) == len(plan.train)
    assert len(np.unique(plan.train.columns["prompt"])) == len(rows[0])


def test_a_packed_run_trains_on_all_tokens(inputs, tmp_path):
    rng = np.random.default_rng(0)
    texts = [words(rng, 5, 40) for _ in range(40)]
    file = write_records(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "run"
    run(
        TrainConfig(
            model=str(inputs / "model"),
            data=str(file),
            out=str(out),
            objective=sft(),
            options=data.DataOptions(max_length=16, heldout_fraction=0.2),
            max_steps=4,
            batch_size=16,
            log_every=1,
        )
    )
    lines = read_metrics(out / "metrics.jsonl")
    before, after = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert after < before
    assert json.loads((out / "config.json").read_text())["row_length"] == "auto"

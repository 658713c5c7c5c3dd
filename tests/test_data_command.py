"""`jaxpref data inspect` and `jaxpref data convert`."""

import json

import numpy as np
import pytest

from jaxpref import cli
from jaxpref.data import DataOptions, ListSource, make_splits, open_source
from jaxpref.data.convert import convert
from jaxpref.data.inspection import inspect_pairs, segments
from jaxpref.data.kinds import ANSWERS, Kind
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, byte_tokenizer, synthetic_pairs, write_lines
from tests.tiny import make_model_folder, make_pairs_file

PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def pairs_of(records, tokenizer=None, **options):
    options = DataOptions(heldout_fraction=0, **options)
    tokenizer = tokenizer or byte_tokenizer()
    return make_splits(ListSource(records), tokenizer, options).train


def test_copies_contradictions_and_annotators():
    records = [
        PAIR | {"annotator": "ann"},
        PAIR | {"annotator": "ann"},  # a copy
        {"prompt": "q", "chosen": "no", "rejected": "yes", "annotator": "bob"},
        {"prompt": "r", "chosen": "no", "rejected": "yes", "flip": True},
    ]
    found = inspect_pairs(pairs_of(records))
    assert (found.pairs, found.prompts, found.copies, found.flipped) == (4, 2, 1, 1)
    # The first two say the opposite of the third; the fourth has another prompt.
    assert found.contradictions == 3
    assert found.annotators == {"ann": 2, "bob": 1}
    assert found.longer_chosen == 0.5


def test_lengths_are_those_of_the_tokens():
    records = synthetic_pairs(30)
    pairs = pairs_of(records)
    found = inspect_pairs(pairs)
    # Bytes with a few merges: BOS and the prompt, the answers and EOS.
    prompts = np.array([len(pairs.prompt(n)) for n in range(30)])
    chosen = np.array([len(pairs.completion(n, 0)) for n in range(30)])
    rejected = np.array([len(pairs.completion(n, 1)) for n in range(30)])
    assert found.lengths["prompt"]["mean"] == pytest.approx(prompts.mean())
    assert found.lengths["chosen"]["longest"] == chosen.max()
    whole = prompts + np.maximum(chosen, rejected)
    assert found.lengths["prompt and longest answer"]["median"] == np.median(whole)
    assert found.tokens == (prompts + chosen + rejected).sum()
    used = (2 * prompts + chosen + rejected).sum()
    assert found.padded == pytest.approx(1 - used / (60 * whole.max()))


def test_single_completions():
    options = DataOptions(heldout_fraction=0)
    source = ListSource([{"prompt": "q", "completion": "a"}])
    pairs = make_splits(source, byte_tokenizer(), options, kind=ANSWERS).train
    found = inspect_pairs(pairs)
    assert list(found.lengths) == ["prompt", "answer", "prompt and longest answer"]
    assert found.longer_chosen is None and found.contradictions == 0


def test_lists_of_different_lengths():
    options = DataOptions(heldout_fraction=0)
    records = [
        {"prompt": "q", "completions": ["a", "bb", "ccc"], "scores": [1, 2, 3]},
        {"prompt": "r", "completions": ["a", "bb"], "scores": [1, 2]},
    ]
    kind = Kind(None, frozenset({"qualities"}))
    tokenizer = byte_tokenizer(merges=())
    pairs = make_splits(ListSource(records), tokenizer, options, kind=kind).train
    found = inspect_pairs(pairs)
    # BOS and the prompt; the answers with EOS.
    assert found.tokens == 2 + (2 + 3 + 4) + 2 + (2 + 3)
    assert found.lengths["answer"]["mean"] == (2 + 3 + 4 + 2 + 3) / 5
    assert found.padded == pytest.approx(1 - (4 + 5 + 6 + 4 + 5) / (5 * 6))
    assert [len(segments(pairs, n, tokenizer)) for n in range(2)] == [4, 3]


@pytest.mark.parametrize("template", [None, CHATML])
def test_segments_are_all_tokens_in_order(template):
    end = "</s>" if template is None else "<|im_end|>"
    tokenizer = byte_tokenizer(template=template, eos=end)
    turn = lambda text: [{"role": "user", "content": text}]
    record = PAIR if template is None else PAIR | {"prompt": turn("où ☃?")}
    if template is not None:
        answer = lambda text: [{"role": "assistant", "content": text}]
        record |= {side: answer(record[side]) for side in ("chosen", "rejected")}
    pairs = pairs_of([record], tokenizer)
    prompt, *answers = segments(pairs, 0, tokenizer)
    text = lambda part: "".join(segment.text for segment in part)
    assert text(prompt) == tokenizer.decode(pairs.prompt(0))
    for side, answer in enumerate(answers):
        whole = np.concatenate([pairs.prompt(0), pairs.completion(0, side)])
        assert text(prompt) + text(answer) == tokenizer.decode(whole)
        assert sum(x.tokens for x in answer) == len(pairs.completion(0, side))
    assert (answers[0][-1].text, answers[0][-1].kind) == (end, "special")
    assert (answers[0][0].text, answers[0][0].kind) == ("yes", "answer")


def test_inspect_prints_and_writes_a_page(tmp_path, monkeypatch, capsys):
    make_model_folder(tmp_path / "model")
    pairs = make_pairs_file(tmp_path / "pairs.jsonl", count=1)
    record = json.loads(pairs.read_text())
    write_lines(pairs, [record, record | {"annotator": "<b>\x1b[2J"}])
    monkeypatch.chdir(tmp_path)
    words = "data inspect pairs.jsonl --model model --show 2 --out page.html"
    cli.main(words.split())
    printed = capsys.readouterr().out
    assert "pairs.jsonl: fields read: chosen, prompt, rejected" in printed
    assert "pairs.jsonl row 2\n--- prompt, " in printed
    assert "\x1b" not in printed
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "pairs.jsonl row 2" in page
    with pytest.raises(SystemExit):
        cli.main("data inspect pairs.jsonl --model model --out pairs.jsonl".split())
    assert "--out pairs.jsonl" in capsys.readouterr().err
    assert open_source("pairs.jsonl")[0] == record


def test_inspect_reads_what_the_first_record_is(tmp_path, monkeypatch, capsys):
    make_model_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": "I saw", "completion": f" a film {n}", "label": n < 2}
        for n in range(4)
    ]
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    cli.main("data inspect kto.jsonl --model model".split())
    printed = capsys.readouterr().out
    assert "completion, label, prompt" in printed
    assert "kto.jsonl row 3\n--- prompt, " in printed and "--- answer, " in printed


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.array_record"])
def test_converted_files_hold_the_same_records(tmp_path, name):
    pytest.importorskip("array_record" if "array" in name else "pyarrow")
    records = synthetic_pairs(20)
    assert convert(ListSource(records), tmp_path / name) == 20
    source = open_source(tmp_path / name)
    assert [source[n] for n in range(len(source))] == records
    shuffled = [convert(ListSource(records), tmp_path / name, seed=1)]
    source = open_source(tmp_path / name)
    shuffled = [source[n] for n in range(len(source))]
    assert shuffled != records
    key = lambda record: record["prompt"]
    assert sorted(shuffled, key=key) == sorted(records, key=key)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing else is left


def test_what_cannot_be_converted(tmp_path):
    with pytest.raises(InputError, match=r"a.csv: give a name that ends in .jsonl"):
        convert(ListSource([PAIR]), tmp_path / "a.csv")
    pytest.importorskip("pyarrow", reason="needs the hub extra")
    mixed = [{"prompt": "q"}, {"prompt": [{"role": "user", "content": "q"}]}]
    with pytest.raises(InputError, match="a column holds values of several types"):
        convert(ListSource(mixed), tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())

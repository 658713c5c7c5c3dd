"""Models that score the same ids must have tokenizers that do the same to the data."""

import json
import shutil

import pytest
from tokenizers import normalizers

from jaxpref import losses
from jaxpref.data import DataOptions, ListSource, load_tokenizer, make_splits
from jaxpref.data import tokenizers as comparison
from jaxpref.errors import InputError
from jaxpref.evaluate import evaluation as evaluate
from jaxpref.objectives import from_loss
from jaxpref.train import TrainConfig
from jaxpref.train.prepare import prepare
from tests.data_tokenizers import CHATML, byte_tokenizer
from tests.tiny import make_model_folder, make_pairs_file

MESSAGES = [
    {"prompt": [{"role": "user", "content": f"q {n}"}], "chosen": "y", "rejected": "n"}
    for n in range(3)
]
STRINGS = [
    {"prompt": f"abc {n}:", "chosen": " abd", "rejected": " cab X"} for n in range(80)
]
OPTIONS = DataOptions(heldout_fraction=0.0)


def save(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    return folder


def swapped(folder, first, second):
    """The folder after two entries of the vocabulary have exchanged their ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda x: x[1]))
    path.write_text(json.dumps(content))
    return folder


def lower(folder):
    tokenizer = byte_tokenizer(template=CHATML)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return save(folder, tokenizer)


def cut_off(folder):
    """A template that drops what the user says."""
    said = "m['content'] if m['role'] == 'assistant' else 'x'"
    template = CHATML.replace("m['content']", said)
    return save(folder, byte_tokenizer(template=template))


def rejecting(folder):
    template = "{{ raise_exception('only poems') }}"
    return save(folder, byte_tokenizer(template=template))


def with_pad(folder):
    tokenizer = byte_tokenizer(template=CHATML)
    tokenizer.pad_token = "<|im_start|>"
    return save(folder, tokenizer)


def with_more(folder):
    tokenizer = byte_tokenizer(template=CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    return save(folder, tokenizer)


def empty(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def plain(folder, **changes):
    return save(folder, byte_tokenizer(**{"template": CHATML} | changes))


def check(folder, rows, other):
    own = load_tokenizer(plain(folder / "own"))
    source = ListSource(rows, "pairs.jsonl")
    dataset = make_splits(source, own, OPTIONS).train
    comparison.check_same_tokenizer(
        own, other, [([source], dataset)], OPTIONS, name="the reference"
    )


REFUSED = {
    # name: (the other folder, records, what the line says)
    "a renumbered letter": (lambda f: swapped(plain(f), "d", "Ā"), STRINGS, "row 1: "),
    "a renumbered merge": (lambda f: swapped(plain(f), "ab", "abc"), STRINGS, "row 1"),
    "other merges": (
        lambda f: plain(f, merges=(("a", "b"), ("b", "c"))), STRINGS, "abc 0:' is ["),
    "a smaller vocabulary": (
        lambda f: plain(f, merges=()), STRINGS, "'<s>' (256), but that of"),
    "lower case": (lower, STRINGS, "row 1: "),
    "no BOS": (
        lambda f: plain(f, bos=None), STRINGS, "beginning-of-sequence token is none"),
    "another BOS": (
        lambda f: plain(f, bos="<|im_start|>"), STRINGS, "'<|im_start|>' ("),
    "another EOS": (
        lambda f: plain(f, eos="<|im_end|>"), STRINGS, "end-of-sequence token is"),
    "moved special tokens": (
        lambda f: plain(f, first=("<s>", "</s>")), STRINGS, "'<s>' (0)"),
    "moved markers of turns": (
        lambda f: swapped(plain(f), "<|im_start|>", "<|im_end|>"), MESSAGES, ""),
    "another template": (cut_off, MESSAGES, "row 1: "),
    "a template that rejects": (rejecting, MESSAGES, "only poems"),
    "no tokenizer": (empty, STRINGS, "copy tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_difference_is_refused_with_the_first_text(name, tmp_path):
    make, rows, words = REFUSED[name]
    with pytest.raises(InputError) as error:
        check(tmp_path, rows, make(tmp_path / "other"))
    line = str(error.value)
    assert words in line and "the reference" in line and "\n" not in line
    assert len(line) < 500


def test_the_line_shows_both_lists_of_ids(tmp_path):
    other = swapped(plain(tmp_path / "other"), "d", "Ā")
    own = load_tokenizer(plain(tmp_path / "own"))
    vocab, moved = own.get_vocab(), load_tokenizer(other).get_vocab()
    space, end = vocab["Ġ"], vocab["</s>"]
    with pytest.raises(InputError) as error:
        check(tmp_path, STRINGS, other)
    mine = [space, vocab["ab"], vocab["d"], end]
    its = [space, vocab["ab"], moved["d"], end]
    assert str(error.value).startswith(f"pairs.jsonl row 1: ' abd</s>' is {mine} for ")
    assert f"but {its} for the reference" in str(error.value)


ACCEPTED = {
    "a copy": (plain, MESSAGES),
    "another padding token": (with_pad, STRINGS),
    "a special token more": (with_more, STRINGS),
    "no template, for strings": (lambda f: plain(f, template=None), STRINGS),
    "no template, for messages": (lambda f: plain(f, template=None), MESSAGES),
    "another template, for strings": (cut_off, STRINGS),
    "renumbered, but not in the data": (lambda f: swapped(plain(f), "Ā", "ā"), STRINGS),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_makes_no_difference_to_the_data_is_accepted(name, tmp_path):
    make, rows = ACCEPTED[name]
    check(tmp_path, rows, make(tmp_path / "other"))


def test_tokens_outside_the_sample_are_looked_up(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "SAMPLE", 2)
    rows = [*STRINGS]
    rows[41] = rows[41] | {"chosen": " ~"}
    other = swapped(plain(tmp_path / "other"), "~", "Ā")
    with pytest.raises(
        InputError, match=r"its token \d+ is 'Ā', but that of .* is '~'"
    ):
        check(tmp_path, rows, other)


def test_few_records_are_tokenized_twice(tmp_path, monkeypatch):
    sizes = []

    def counted(source, *rest, **options):
        sizes.append(len(source))
        return make_splits(source, *rest, **options)

    monkeypatch.setattr(comparison, "make_splits", counted)
    rows = STRINGS * 5
    check(tmp_path, rows, plain(tmp_path / "other"))
    assert sizes == [64, 64]


def test_the_model_itself_is_not_read_again(tmp_path, monkeypatch):
    own = load_tokenizer(plain(tmp_path / "own"))
    monkeypatch.setattr(comparison, "load_tokenizer", lambda _: 1 / 0)
    comparison.check_same_tokenizer(own, tmp_path / "own", [], OPTIONS, name="x")


# ---- commands ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, the same function of text with other ids, and pairs."""
    folder = tmp_path_factory.mktemp("models")
    make_model_folder(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    swapped(folder / "other", "good", "bad")
    make_pairs_file(folder / "pairs.jsonl")
    return folder


@pytest.mark.parametrize("loss", [losses.dpo, losses.tdpo1])
def test_train_refuses_a_reference_with_other_ids(folder, tmp_path, loss):
    config = TrainConfig(
        model=str(folder / "model"),
        reference=str(folder / "other"),
        data=str(folder / "pairs.jsonl"),
        out=str(tmp_path / "out"),
        objective=from_loss(loss),
        batch_size=8,
        options=DataOptions(max_length=64),
    )
    with pytest.raises(InputError) as error:
        prepare(config)
    line = str(error.value)
    assert str(folder / "other") in line and str(folder / "pairs.jsonl") in line
    assert ("'good" in line or "good'" in line or " good " in line) or "bad" in line


def test_evaluate_refuses_a_reference_with_other_ids(folder, tmp_path):
    config = evaluate.EvaluateConfig(
        model=str(folder / "model"),
        reference=str(folder / "other"),
        data=str(folder / "pairs.jsonl"),
        out=str(tmp_path / "out"),
        max_length=64,
    )
    with pytest.raises(InputError, match="would score other text"):
        evaluate.run(config)
    assert not (tmp_path / "out" / "metrics.json").exists()

"""`jaxpref sample`: text in its context, and whether an answer ended."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxpref.cli import sample as sample_command
from jaxpref.data.answer_text import decode_continuation
from jaxpref.errors import InputError
from jaxpref.evaluate import draw
from jaxpref.sampling import Answer
from tests.data_tokenizers import byte_tokenizer
from tests.tiny import make_model_folder

PIECES = ["<s>", "</s>", *"▁Once ▁upon ▁a ▁time . ▁ , time".split(), "\n"]


def metaspace_tokenizer():
    """Words with their space in front, as in SentencePiece: alone, a word loses it."""
    vocabulary = {piece: n for n, piece in enumerate(PIECES)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    "prompt, new, text",
    [
        ("<s> ▁Once ▁upon ▁a", "▁time .", " time."),
        ("<s> ▁Once ▁upon ▁a", "time", "time"),
        ("<s> ▁Once", "</s>", ""),
        ("<s> ▁Once", ", ▁upon </s>", ", upon"),
        ("<s> ▁Once ▁", "time", "time"),
        ("<s>", "▁Once ▁upon", "Once upon"),
        ("<s> ▁Once", "\n", "\n"),
    ],
)
def test_a_continuation_is_decoded_in_its_context(prompt, new, text):
    tokenizer = metaspace_tokenizer()
    ids = lambda words: [PIECES.index(word) for word in words.split(" ")]
    assert decode_continuation(tokenizer, ids(prompt), ids(new)) == text


def test_letters_of_several_tokens_are_decoded_together():
    tokenizer = byte_tokenizer(merges=())
    prompt, new = (tokenizer(x)["input_ids"] for x in ("caf", "é"))
    assert len(new) == 2
    assert decode_continuation(tokenizer, prompt, new) == "é"


def test_samples_that_were_cut_say_so(tmp_path):
    """One token at most: only a stop token as the first one ends an answer."""
    make_model_folder(tmp_path / "model", 0)
    argv = f"--model {tmp_path / 'model'} --max-new-tokens 1 --out {tmp_path}/out.json"
    prompts = ["the film was", "the", "good"]
    sample_command.command([*argv.split(), "--prompts", *prompts])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == prompts
    # Special tokens are not part of the text.
    assert not any(row["ended"] for row in rows if row["output"])
    assert any(row["output"] for row in rows)
    assert {*rows[0]} == {"instruction", "output", "logp", "ended", "generator"}
    everything = ",".join(map(str, range(64)))
    generation = {"eos_token_id": json.loads(f"[{everything}]")}
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(generation))
    sample_command.command([*argv.split(), "--prompts", *prompts])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert all(row["ended"] for row in rows)


def test_lines_hold_the_records_and_all_answers(tmp_path, monkeypatch):
    """Answers arrive in any order; records keep all of their fields."""
    records = [
        {"prompt": "the film", "source": "a\u2028b", "tags": [1, None]},
        {"prompt": "good", "chosen": "the", "rejected": "film", "id": 7},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    model = make_model_folder(tmp_path / "model", 0)
    asked = []

    def answer_all(model, params, requests, rule, *, batch_size, largest):
        asked.extend(requests)
        for n in reversed(range(len(requests))):
            yield n, Answer([5 + n], -1.5 * n, ended=n == 2)

    monkeypatch.setattr(draw, "answer_all", answer_all)
    argv = f"--model {model} --data {tmp_path}/pairs.jsonl --n 2"
    argv += " --max-new-tokens 4"
    out = tmp_path / "out.jsonl"
    sample_command.command([*argv.split(), "--out", str(out)])
    assert [request.ids for request in asked] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [line["prompt"] for line in lines] == [x["prompt"] for x in records]
    answers = [answer for line in lines for answer in line["completions"]]
    assert [answer["logp"] for answer in answers] == [0, -1.5, -3, -4.5]
    assert [answer["ended"] for answer in answers] == [False, False, True, False]
    assert len({answer["text"] for answer in answers}) == 4
    assert {line["generator"] for line in lines} == {str(model)}


@pytest.mark.parametrize("words", [[], ["--raw"]])
def test_thinking_that_no_template_reads_is_refused(tmp_path, words):
    make_model_folder(tmp_path / "model", 0)
    argv = f"--model {tmp_path / 'model'} --thinking on --prompts the".split()
    with pytest.raises(InputError, match="--thinking on: only a chat template reads"):
        sample_command.command([*argv, *words])


def test_fields_of_prompts_without_records_are_refused(tmp_path):
    make_model_folder(tmp_path / "model", 0)
    argv = f"--model {tmp_path / 'model'} --ignore-fields label --prompts the"
    with pytest.raises(InputError, match="--ignore-fields label: only records of"):
        sample_command.command(argv.split())

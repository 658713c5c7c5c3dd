"""`--template.NAME`: variables of the chat template for all records of a command."""

import pytest

from jaxpref import data
from jaxpref.cli import train
from jaxpref.cli.words import split
from jaxpref.data import DataOptions, ListSource, encode_prompt, make_splits
from jaxpref.data.records import Example
from jaxpref.data.render import render, render_prompt
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
USER = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}


def example_of(**variables):
    return Example((USER,), (ANSWER,), variables=variables)


def tokenizer_with(**options):
    tokenizer = byte_tokenizer(template=TEMPLATE)
    tokenizer.template_options = options
    return tokenizer


def test_all_records_are_rendered_with_them():
    plain, off = tokenizer_with(), tokenizer_with(enable_thinking=False)
    prompt = lambda tokenizer, **own: render_prompt(example_of(**own), "f", tokenizer)
    assert prompt(plain) == "[user]2 + 2?</s>[assistant]"
    assert prompt(off) == "[user]2 + 2?</s>[assistant]<think></think>"
    # A record's own come first.
    assert prompt(off, enable_thinking=True) == prompt(plain)
    # A completion follows the prompt that the model is sampled from.
    texts = render(example_of(), "f", off)
    assert texts.prompt == prompt(off) and texts.wholes[0].startswith(f"{prompt(off)}4")
    text = Example("2 + 2?", ("4",))
    assert render_prompt(text, "f", off) == "2 + 2?"


def test_tokens_of_training_and_sampling_agree():
    off = tokenizer_with(enable_thinking=False)
    pair = {
        "prompt": [USER],
        "chosen": [ANSWER],
        "rejected": [ANSWER | {"content": "5"}],
    }
    options = DataOptions(heldout_fraction=0.0)
    train, own = (
        make_splits(ListSource([row]), tokenizer, options).train
        for row, tokenizer in (
            (pair, off),
            (
                pair | {"chat_template_kwargs": {"enable_thinking": False}},
                tokenizer_with(),
            ),
        )
    )
    assert train.prompt(0).tolist() == own.prompt(0).tolist()
    assert train.prompt(0).tolist() == encode_prompt(off, [USER])
    # The id is that of the record, whatever the run renders.
    plain = make_splits(ListSource([pair]), tokenizer_with(), options).train
    assert plain.ids.tolist() == train.ids.tolist() != own.ids.tolist()


def config_of(words):
    return train.config_of(split(f"--model m --data d --out o {words}".split()))


@pytest.mark.parametrize(
    "words, found",
    [
        ("--template.enable_thinking false", {"enable_thinking": False}),
        ("--template.enable-thinking=false", {"enable_thinking": False}),
        ("--template enable_thinking=false", {"enable_thinking": False}),
        ("--template.date today --template.depth 3", {"date": "today", "depth": 3}),
        ('--template.tags ["a"]', {"tags": ["a"]}),
        ("", {}),
    ],
)
def test_values_are_json_or_text(words, found):
    assert config_of(words).options.template_options == found


def test_a_config_file_keeps_them(tmp_path):
    given = split("--model m --data d --out o --template.enable_thinking false".split())
    (tmp_path / "a.yaml").write_text(train.config_text(given))
    read = train.config_of({"config": [str(tmp_path / "a.yaml")]})
    assert read.options.template_options == {"enable_thinking": False}
    lines = "model: m\ndata: d\nout: o\ntemplate:\n  enable_thinking: false\n"
    (tmp_path / "b.yaml").write_text(lines)
    read = train.config_of({"config": [str(tmp_path / "b.yaml")]})
    assert read.options.template_options == {"enable_thinking": False}


def test_what_no_template_reads_is_refused(tmp_path):
    tokenizer_with().save_pretrained(tmp_path)
    found = data.load_tokenizer(tmp_path, {"enable_thinking": False})
    assert found.template_options == {"enable_thinking": False}
    with pytest.raises(InputError, match="--template.thinkng: the chat template of"):
        data.load_tokenizer(tmp_path, {"thinkng": False})
    texts = [{"prompt": "2 + 2?", "chosen": " 4", "rejected": " 5"}]
    fields = make_splits(ListSource(texts), found).fields
    fields.check_rendered({}, "a.jsonl")
    with pytest.raises(InputError, match="a.jsonl: no record has messages.*--template"):
        fields.check_rendered({"enable_thinking": False}, "a.jsonl")
    with pytest.raises(InputError, match="--template.tools: only the run itself"):
        DataOptions(template=("tools=1",))
    with pytest.raises(InputError, match="--template x: expected NAME=VALUE"):
        DataOptions(template=("x",))

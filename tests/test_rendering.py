"""What is trained is what the record says, rendered as the model will be sampled."""

import json

import pytest

from jaxpref.data import (
    DataOptions,
    ListSource,
    encode_prompt,
    given_prompts,
    load_tokenizer,
    make_splits,
    read_prompts,
    stop_tokens,
)
from jaxpref.data.probe import check_exported, check_rendering
from jaxpref.data.records import parse
from jaxpref.data.tokenize import INNER_END, tokenize
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, LLAMA, byte_tokenizer
from tests.test_record_fields import CALL, CHAT, TOOL_TEMPLATE, USER

ALWAYS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
"""Writes an empty thought before answers without one, as Qwen3's does."""
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>"
    "{{ m['content'] }}{% else %}<A>{{ m['content'].split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
"""Opens a thought when asked for an answer, and leaves thoughts out of answers."""
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
STRIPS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SHOUTS = CHATML.replace(
    "m['content']",
    "m['content'] | upper if m['role'] == 'assistant' else m['content']",
)
REASONS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}",
)
TURN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


def chat(*answers, **fields):
    """A record with the answers of one or both sides."""
    sides = [
        {"role": "assistant"} | (x if isinstance(x, dict) else {"content": x})
        for x in answers
    ]
    names = ("chosen", "rejected") if len(sides) == 2 else ("completion",)
    return {"prompt": [USER]} | dict(zip(names, sides)) | fields


def chatml_tokenizer(template=CHATML, **options):
    options = dict(bos=None, eos=END, merges=(), template=template) | options
    tokenizer = byte_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</s>"]})
    return tokenizer


def tokens_of(record, tokenizer, **options):
    sides = 2 if "chosen" in record else 1
    (found,) = tokenize(
        [parse(record, "f row 1", sides=sides)],
        ["f row 1"],
        tokenizer,
        max_length=10_000,
        **options,
    )
    return found


def texts_of(record, tokenizer, **options):
    found = tokens_of(record, tokenizer, **options)
    return tokenizer.decode(found.prompt), *map(tokenizer.decode, found.completions)


# ---- everything that the record says is trained --------------------------------------

CALLS = {"content": None, "tool_calls": CALL}
ARGUED = {
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": "é"}'}}],
}


@pytest.mark.parametrize(
    "template, answer, prompt, completion",
    [
        (CHATML, "yes", TURN, "yes" + END),
        (CHATML, " yes\n", TURN, " yes\n" + END),
        (CHATML, "<think>t</think>yes", TURN, "<think>t</think>yes" + END),
        # Whatever the template writes before every answer belongs to the prompt,
        (ALWAYS, "yes", TURN + "<think>\n\n</think>\n\n", "yes" + END),
        # unless an answer has a thought of its own.
        (ALWAYS, "<think>t</think>yes", TURN, "<think>t</think>yes" + END),
        # A thought that the template leaves out is trained as it will be sampled.
        (R1, "<think>t t</think>yes", "<s><U>q<A><think>\n", "t t</think>yes</s>"),
        (R1, "<think>\nt\n</think>yes", "<s><U>q<A><think>\n", "t\n</think>yes</s>"),
        (R1, "t</think>yes", "<s><U>q<A><think>\n", "t</think>yes</s>"),
        (R1, "<think></think>yes", "<s><U>q<A><think>\n", "</think>yes</s>"),
        (STRIPS, "<think>t</think>yes", TURN, "<think>t</think>yes" + END),
        (REASONS, {"content": "yes", "reasoning_content": "t"}, TURN,
         "<think>t</think>yes" + END),
        (LLAMA, "yes", "<s>[INST] q [/INST]", " yes</s>"),
        (TOOL_TEMPLATE, CALLS, "[user]q<|im_end|>[assistant]",
         json.dumps(CALL) + END),
    ],
)  # fmt: skip
def test_the_whole_answer_is_trained_after_the_prompt_to_sample_from(
    template, answer, prompt, completion
):
    bare = template in (R1, LLAMA)
    tokenizer = chatml_tokenizer(template)
    if bare:
        tokenizer = byte_tokenizer(merges=(), template=template)
    record = chat(answer)
    assert texts_of(record, tokenizer) == (prompt, completion)
    (sampled,), _ = read_prompts(ListSource([record]), tokenizer, limit=1)
    assert tokenizer.decode(sampled.tokens) == prompt
    if "thought" not in str(answer) and "<think>" not in completion:
        (typed,) = given_prompts(["q"], tokenizer)
        assert typed.tokens == sampled.tokens == encode_prompt(tokenizer, [USER])


def test_answers_that_differ_only_in_their_thoughts_are_a_pair():
    tokenizer = byte_tokenizer(merges=(), template=R1)
    record = chat("<think>two</think>four", "<think>I guess</think>four")
    assert texts_of(record, tokenizer)[1:] == (
        "two</think>four</s>",
        "I guess</think>four</s>",
    )


@pytest.mark.parametrize(
    "template, answer, words",
    [
        (R1, "yes", "opens thinking with <think>, which the answer does not close"),
        (SHOUTS, "yes", "changes the text of the answer"),
        (CHATML, {"content": "yes", "reasoning_content": "t"},
         "leaves out or changes part of an answer with 'reasoning_content'"),
        (CHATML, {"content": "yes", "thinking": "t"},
         "part of an answer with 'thinking'"),
        (CHATML.replace("m['content']", "m['content'] or ''"), CALLS,
         "part of an answer with 'tool_calls'"),
        (TOOL_TEMPLATE.replace("m.tool_calls|tojson", "m.tool_calls[0].function.name"),
         ARGUED, "part of an answer with 'tool_calls'"),
    ],
)  # fmt: skip
def test_an_answer_that_the_template_changes_is_refused(template, answer, words):
    tokenizer = chatml_tokenizer(template)
    if template == R1:
        tokenizer = byte_tokenizer(merges=(), template=template)
    with pytest.raises(InputError, match=f"f row 1: .*{words}") as error:
        tokens_of(chat(answer), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ascii", [True, False])
def test_arguments_of_calls_are_found_however_they_are_written(ascii):
    template = TOOL_TEMPLATE
    if not ascii:
        template = template.replace("m.tool_calls|tojson", "m.tool_calls")
    _, completion = texts_of(chat(ARGUED), chatml_tokenizer(template))
    assert "add" in completion and completion.endswith(END)


# ---- the end of a turn ---------------------------------------------------------------


def folder_of(path, tokenizer, stops):
    """The tokenizer as a model folder has it, with the tokens that end an answer."""
    tokenizer.save_pretrained(path)
    vocabulary = tokenizer.get_vocab()
    eos = [vocabulary[token] for token in stops]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return load_tokenizer(path)


@pytest.mark.parametrize(
    "eos, stops, template, completion",
    [
        # The sampler stops at the end of the turn, and so does training.
        ("</s>", [END, "</s>"], CHATML, "yes" + END),
        ("</s>", [END], CHATML, "yes" + END),
        (END, [END, "</s>"], CHATML, "yes" + END),
        (END, ["</s>"], CHATML, "yes" + END),
        # A template without a stop token is given the tokenizer's EOS.
        ("</s>", ["</s>"], CHATML, "yes" + END + "\n</s>"),
        ("</s>", [END], BARE, "yes</s>"),
        ("</s>", [END, "</s>"], CHATML + "{{ eos_token }}", "yes" + END),
    ],
)  # fmt: skip
def test_an_answer_ends_where_the_sampler_stops(
    tmp_path, eos, stops, template, completion
):
    tokenizer = folder_of(tmp_path, chatml_tokenizer(template, eos=eos), stops)
    _, found = texts_of(chat("yes"), tokenizer)
    assert found == completion
    ids = tokens_of(chat("yes"), tokenizer).completions[0]
    ends = [n for n, token in enumerate(ids) if token in stop_tokens(tokenizer)]
    assert ends == [len(ids) - 1]


@pytest.mark.parametrize("word", [END, "</s>"])
def test_a_stop_token_inside_an_answer_drops_the_pair(tmp_path, word):
    tokenizer = folder_of(tmp_path, chatml_tokenizer(eos="</s>"), [END, "</s>"])
    assert tokens_of(chat(f"yes{word}no"), tokenizer) == INNER_END
    text = {"prompt": "q", "completion": f"a{word}b"}
    assert tokens_of(text, tokenizer) == INNER_END


@pytest.mark.parametrize(
    "answer, end",
    [("a", "</s>"), (f"a{END}", END), (f"a{END}\n", END), ("a</s>", "</s>")],
)
def test_a_text_ends_with_one_stop_token(tmp_path, answer, end):
    tokenizer = folder_of(tmp_path, chatml_tokenizer(eos="</s>"), [END])
    text = {"prompt": "q", "completion": answer}
    assert texts_of(text, tokenizer) == ("q", "a" + end)


# ---- what a reward model reads -------------------------------------------------------


@pytest.mark.parametrize(
    "template, options",
    [
        (CHATML, {}),
        (CHATML, {"bos": "<s>"}),
        (CHATML, {"eos": "</s>"}),
        (ALWAYS, {}),
        (LLAMA, {"bos": "<s>", "eos": "</s>"}),
        (R1, {"bos": "<s>", "eos": "</s>"}),
        (CHATML + "{{ eos_token }}", {"bos": "<s>", "eos": "</s>"}),
        (CHATML + "{{ eos_token }}", {}),  # two stop tokens
    ],
)
def test_a_reward_model_reads_what_transformers_users_give_it(
    tmp_path, template, options
):
    tokenizer = chatml_tokenizer(template, **options)
    record = chat("yes", "no")
    found = tokens_of(record, tokenizer, whole_turns=True)
    for name, completion in zip(("chosen", "rejected"), found.completions):
        conversation = [USER, record[name]]
        assert found.prompt + completion == tokenizer.apply_chat_template(
            conversation, tokenize=True, return_dict=False
        )
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    check_exported(tmp_path)


@pytest.mark.parametrize("template", [SHOUTS, STRIPS, R1])
def test_a_reward_model_is_not_trained_on_what_the_template_leaves_out(template):
    tokenizer = chatml_tokenizer(template, bos="<s>")
    with pytest.raises(InputError, match="f row 1: .*leaves out or changes part"):
        tokens_of(chat("<think>t</think>yes"), tokenizer, whole_turns=True)


@pytest.mark.parametrize("template", [SHOUTS, CHATML.rstrip() + "{{ pad_token }}"])
def test_an_exported_reward_model_that_others_would_score_differently(
    tmp_path, template
):
    tokenizer = chatml_tokenizer(template)
    tokenizer.pad_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a short chat"):
        check_exported(tmp_path)


@pytest.mark.parametrize(
    ("condition", "checked"),
    [("messages[0]['role'] != 'system'", True), ("not tools", False)],
)
def test_a_template_that_requires_more_than_a_question(
    tmp_path, capsys, condition, checked
):
    """A system turn is given to it; one that requires tools cannot be checked."""
    needs = f"{{% if {condition} %}}{{{{ raise_exception('more') }}}}{{% endif %}}"
    check = lambda template: check_rendering(
        chatml_tokenizer(needs + template), "m", padding=None
    )
    check(CHATML)
    unchecked = "m: the chat template accepts no short chat"
    assert (unchecked in capsys.readouterr().out) is not checked
    if checked:
        with pytest.raises(InputError, match="m: a short chat"):
            check(SHOUTS)


# ---- prompts to sample from ----------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "q", "weight": 2},
        {"messages": [USER], "images": ["a.png"]},
    ],
)
def test_fields_to_ignore_do_not_stop_sampling(record):
    """What the message says can be done."""
    name = [*record][-1]

    def read(record, **options):
        source = ListSource([record])
        found, _ = read_prompts(source, chatml_tokenizer(), limit=1, **options)
        return [(prompt.text, prompt.tokens) for prompt in found]

    with pytest.raises(InputError, match=f"pass --ignore-fields {name}"):
        read(record)
    others = {k: v for k, v in record.items() if k != name}
    assert read(record, ignore_fields=(name,)) == read(others) != []


@pytest.mark.parametrize(
    "prompt, text",
    [
        ("hi", "hi"),
        ('[{"role": "user", "content": "hi"}]', "hi"),
        ("[1] is a reference", "[1] is a reference"),
        ("[1]", "[1]"),
        ('{"role": "user", "content": "hi"}', "hi"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "hi"),
        ('{"a": 1}', '{"a": 1}'),
    ],
)
def test_prompts_of_a_chat_model_are_turns_of_the_user(prompt, text):
    tokenizer = chatml_tokenizer()
    (found,) = given_prompts([prompt], tokenizer)
    assert tokenizer.decode(found.tokens) == TURN.replace("q", text)
    assert found.text == text
    (raw,) = given_prompts([prompt], tokenizer, raw=True)
    assert tokenizer.decode(raw.tokens) == prompt


def test_texts_with_turns_are_not_wrapped_again():
    tokenizer = chatml_tokenizer()
    for text in (TURN, "\n\nHuman: q\n\nAssistant:"):
        (typed,) = given_prompts([text], tokenizer)
        (read,), _ = read_prompts(ListSource([{"prompt": text}]), tokenizer, limit=1)
        assert tokenizer.decode(typed.tokens) == tokenizer.decode(read.tokens) == text
    with pytest.raises(InputError, match="--prompts 1: is empty"):
        given_prompts([" "], tokenizer)


WITH_SYSTEM = "<|im_start|>system\nbe kind<|im_end|>\n" + TURN


@pytest.mark.parametrize(
    "record, text",
    [
        ({"messages": [USER]}, TURN),
        ({"messages": [{"role": "system", "content": "be kind"}, USER]}, WITH_SYSTEM),
        ({"prompt": [{"from": "human", "value": "q"}]}, TURN),
        ({"conversations": [{"from": "human", "value": "q"}]}, TURN),
        ({"conversations": [{"from": "system", "value": "be kind"},
                            {"from": "human", "value": "q"}]}, WITH_SYSTEM),
        ({"prompt": "q", "system": "be kind"}, WITH_SYSTEM),
        ({"prompt": [USER], "system": "be kind"}, WITH_SYSTEM),
    ],
)  # fmt: skip
def test_records_with_a_prompt_alone_are_sampled_from(record, text):
    tokenizer = chatml_tokenizer()
    (read,), _ = read_prompts(ListSource([record]), tokenizer, limit=1)
    assert tokenizer.decode(read.tokens) == text
    assert read.text == "q"


def test_a_bare_text_has_no_system_turn():
    source = ListSource([{"prompt": "q", "system": "be kind"}])
    with pytest.raises(InputError, match="field 'system' is for the chat template"):
        read_prompts(source, chatml_tokenizer(), limit=1, raw=True)


THINKS = ALWAYS.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)


@pytest.mark.parametrize(
    "thinking, prompt", [(None, TURN + "<think>\n\n</think>\n\n"), (True, TURN),
                         (False, TURN + "<think>\n\n</think>\n\n")]
)  # fmt: skip
def test_thinking_is_asked_for_when_sampling(thinking, prompt):
    tokenizer = chatml_tokenizer(THINKS)
    (typed,) = given_prompts(["q"], tokenizer, thinking=thinking)
    source = ListSource([{"prompt": [USER]}])
    (read,), _ = read_prompts(source, tokenizer, limit=1, thinking=thinking)
    assert tokenizer.decode(typed.tokens) == tokenizer.decode(read.tokens) == prompt
    if thinking is not None:
        options = {"chat_template_kwargs": {"enable_thinking": thinking}}
        (read,), _ = read_prompts(
            ListSource([chat("a", "b", **options)]), tokenizer, limit=1
        )
        assert tokenizer.decode(read.tokens) == prompt


@pytest.mark.parametrize(
    "sides", [("a", "<think>t</think>b"), ("<think>t</think>a", "b")]
)
def test_thinking_on_either_side_decides_about_the_prompt(sides):
    tokenizer = chatml_tokenizer(THINKS)
    record = chat(*sides)
    (sampled,), _ = read_prompts(ListSource([record]), tokenizer, limit=1)
    assert texts_of(record, tokenizer)[0] == tokenizer.decode(sampled.tokens) == TURN
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    with pytest.raises(InputError, match="enable_thinking to false, but an answer"):
        texts_of(record | options, tokenizer)


def test_thinking_that_was_cut_is_trained_as_it_was_sampled():
    record = chat("<think>\nlong", "b", ended=[False, True])
    for template, prompt, cut in (
        (THINKS, TURN, "<think>\nlong"),
        (OPENS, TURN + "<think>\n", "long"),
    ):
        tokenizer = chatml_tokenizer(template)
        if template == OPENS:
            record = record | {
                "rejected": {"role": "assistant", "content": "</think>b"}
            }
        found = texts_of(record, tokenizer)
        assert found[:2] == (prompt, cut)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tools": [{"name": "f"}]}, "does not read 'tools'"),
        (
            {"chat_template_kwargs": {"enable_thinkng": True}},
            "not read 'enable_thinkng'",
        ),
        ({"system": "be kind"}, "message 1 of the prompt .system: 'be kind'"),
        (
            {"prompt": [USER, {"role": "assistant"} | CALLS, USER]},
            "message 2 of the prompt .assistant: 'clock'",
        ),
    ],
)
def test_what_the_template_leaves_out_of_the_prompt_is_named(fields, words):
    template = CHATML.replace("m in messages", "m in messages if m['role'] != 'system'")
    template = template.replace("m['content']", "m['content'] or ''")
    with pytest.raises(InputError, match=f"f row 1: .*{words}"):
        texts_of(chat("yes") | fields, chatml_tokenizer(template))


def test_numbers_in_calls_are_found_as_they_are_written():
    call = {"function": {"name": "add", "arguments": '{"a": 1e-7, "b": 2.50}'}}
    template = TOOL_TEMPLATE.replace(
        "m.tool_calls|tojson", "m.tool_calls[0].function.name"
        " ~ m.tool_calls[0].function.arguments"
    )  # fmt: skip
    _, completion = texts_of(
        chat({"content": "", "tool_calls": [call]}), chatml_tokenizer(template)
    )
    assert completion == 'add{"a": 1e-7, "b": 2.50}' + END


def test_a_conversation_as_a_prompt_must_be_one():
    conversation = '[{"role": "bot", "content": "hi"}]'
    with pytest.raises(InputError, match="--prompts 1: .*role must be one of"):
        given_prompts([conversation], chatml_tokenizer())


def test_prompts_of_a_file_are_those_of_training():
    tokenizer = chatml_tokenizer()
    bare = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for record, text in (
        ({"prompt": "q"}, TURN),
        (bare, "q"),
        (CHAT, TURN),
        ({"prompt": [USER]}, TURN),
    ):
        (found,), _ = read_prompts(ListSource([record]), tokenizer, limit=1)
        assert tokenizer.decode(found.tokens) == text
        if "chosen" in record:
            options = DataOptions(heldout_fraction=0)
            train = make_splits(ListSource([record]), tokenizer, options).train
            assert train.prompt(0).tolist() == found.tokens
    (raw,), _ = read_prompts(
        ListSource([{"prompt": "q"}]), tokenizer, limit=1, raw=True
    )
    assert tokenizer.decode(raw.tokens) == "q"


def test_what_stands_beside_the_messages_of_a_typed_prompt_is_read():
    tokenizer = chatml_tokenizer(TOOL_TEMPLATE)
    record = {"messages": [USER], "system": "be kind", "tools": [{"name": "f"}]}
    (typed,) = given_prompts([json.dumps(record)], tokenizer)
    assert tokenizer.decode(typed.tokens) == tokenizer.apply_chat_template(
        [{"role": "system", "content": "be kind"}, USER],
        tools=record["tools"],
        add_generation_prompt=True,
        tokenize=False,
    )
    with pytest.raises(InputError, match="--prompts 1: field 'images' changes"):
        given_prompts([json.dumps(record | {"images": ["a"]})], tokenizer)

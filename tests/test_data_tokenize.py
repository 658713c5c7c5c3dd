"""Golden cases for the tokenization traps that users of other frameworks fell into."""

import gzip
import json
import logging

import pytest

from jaxpref.data import load_tokenizer
from jaxpref.data.records import Example, parse
from jaxpref.data.tokenize import (
    INNER_END,
    NO_PROMPT,
    NO_ROOM,
    NO_TOKENS,
    SAME_TOKENS,
    encode_prompt,
    tokenize,
)
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, LLAMA, byte_tokenizer, ids


def one(tokenizer, example, *, max_length=100, max_prompt_length=50):
    (result,) = tokenize(
        [example],
        ["f.jsonl row 1"],
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
    )
    return result


def messages(*texts):
    roles = ("user", "assistant")
    return tuple(
        {"role": roles[n % 2], "content": text} for n, text in enumerate(texts)
    )


def assistant(text):
    return {"role": "assistant", "content": text}


# ---- 11: merges across the boundary ------------------------------------------------


BOUNDARIES = [
    ("xa", {"bz": ("ab", "z"), "c": ("a", "c")}),
    ("xab", {"c": ("abc",), "d": ("ab", "d")}),  # the shortest shared prompt
]


@pytest.mark.parametrize("prompt, expected", BOUNDARIES)
@pytest.mark.parametrize("order", [1, -1])
def test_boundary_merge_is_split_at_the_common_token_prefix(prompt, expected, order):
    tok = byte_tokenizer()
    texts = tuple(expected)[::order]
    result = one(tok, Example(prompt, texts))
    assert result.prompt == ids(tok, "<s>", "x")
    assert result.completions == [ids(tok, *expected[x], "</s>") for x in texts]


def test_no_character_is_lost_or_invented_on_real_dialogues(shared, stories260k):
    tok = load_tokenizer(stories260k)
    path = shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line, _ in zip(file, range(100))]
    for row, record in enumerate(records):
        example = parse(record, f"row {row + 1}", sides=2)
        result = one(tok, example, max_length=10**6, max_prompt_length=10**6)
        for side, name in enumerate(("chosen", "rejected")):
            whole = tok.backend_tokenizer.encode(
                record[name], add_special_tokens=False
            ).ids
            assert result.prompt + result.completions[side] == [1, *whole, 2]


# ---- 12: BOS and EOS once ----------------------------------------------------------

VARIANTS = {
    "adds none": dict(),
    "adds both": dict(adds="<s> $A </s>"),
    "adds bos": dict(adds="<s> $A"),
    "adds eos": dict(adds="$A </s>"),
    "bos is 0": dict(first=("<s>", "</s>"), adds="<s> $A"),
    "eos is 0": dict(first=("</s>", "<s>")),
    "bos is eos": dict(bos="</s>", eos="</s>"),
    "bos is eos is 0": dict(bos="</s>", eos="</s>", first=("</s>",)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bos_and_eos_exactly_once(variant):
    tok = byte_tokenizer(**VARIANTS[variant])
    bos, eos = tok.bos_token, tok.eos_token
    result = one(tok, Example("xy", ("z", "zz")))
    assert result.prompt == ids(tok, bos, "x", "y")
    assert result.completions == [ids(tok, "z", eos), ids(tok, "z", "z", eos)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_bos_and_eos_written_in_the_text_are_not_doubled(variant):
    tok = byte_tokenizer(**VARIANTS[variant])
    bos, eos = tok.bos_token, tok.eos_token
    result = one(tok, Example(f"{bos}x", (f"y{eos}", f"z{eos}{eos}")))
    assert result.prompt == ids(tok, bos, "x")
    assert result.completions == [ids(tok, "y", eos), ids(tok, "z", eos)]


@pytest.mark.parametrize(
    "text, bos", [("y</s>z", "<s>"), ("y<s>z", "<s>"), ("y</s>z<s>", None)]
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_completion_that_goes_on_after_its_end_is_dropped(text, bos, order):
    tok = byte_tokenizer(bos=bos)
    assert one(tok, Example("x", ("n", text)[::order])) == INNER_END


@pytest.mark.parametrize("order", [1, -1])
def test_eos_inside_an_answer_of_a_conversation_drops_it(order):
    tok = byte_tokenizer(template=LLAMA)
    sides = (assistant("good</s>evil"), assistant("n"))[::order]
    assert one(tok, Example(messages("q"), sides)) == INNER_END


def test_a_chat_rendered_beforehand_keeps_its_markers():
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=())
    turn = ("<|im_start|>", "q", "<|im_end|>", "Ċ", "<|im_start|>")
    text = "<|im_start|>q<|im_end|>\n<|im_start|>"
    result = one(tok, Example(text, ("y<|im_end|>\n", "n")))
    assert result.prompt == ids(tok, *turn)
    assert result.completions == [ids(tok, x, "<|im_end|>") for x in "yn"]


def test_no_bos_where_the_tokenizer_has_none():
    tok = byte_tokenizer(bos=None)
    result = one(tok, Example("x", ("y", "z")))
    assert result.prompt == ids(tok, "x")
    # Nothing would predict the first token of a completion.
    assert one(tok, Example("", ("y", "z"))) == NO_PROMPT
    assert one(tok, Example("a", ("b", "c"))) == NO_PROMPT


def test_empty_prompt_is_bos():
    tok = byte_tokenizer()
    result = one(tok, Example("", ("y",)))
    assert result.prompt == ids(tok, "<s>")
    assert result.completions == [ids(tok, "y", "</s>")]


def test_a_completion_of_eos_alone_has_no_tokens():
    assert one(byte_tokenizer(), Example("x", ("</s>", "y"))) == NO_TOKENS


def test_tokenizer_without_eos_is_refused(tmp_path):
    byte_tokenizer(eos=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-sequence token.*eos_token"):
        load_tokenizer(tmp_path)


def test_a_model_type_that_transformers_does_not_know_is_no_warning(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new"}')
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addHandler(handler)
    try:
        load_tokenizer(tmp_path)
    finally:
        logger.removeHandler(handler)
    assert found == []


@pytest.mark.parametrize("contents", [None, "{}", "[1", '{"model": 3}'])
def test_missing_or_broken_tokenizer_is_one_line(tmp_path, contents):
    if contents:
        (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(InputError, match="no usable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ---- 13: one answer is a prefix of the other ---------------------------------------


@pytest.mark.parametrize(
    "first, second", [("The", "The sky"), ("b ", "b"), ("ab", "a")]
)
def test_answer_that_is_a_prefix_of_the_other(first, second):
    tok = byte_tokenizer(merges=())
    result = one(tok, Example("? ", (first, second)))
    assert tok.decode(result.prompt[1:]) == "? "
    texts = [tok.decode(side[:-1]) for side in result.completions]
    assert texts == [first, second]


# ---- 14: truncation ----------------------------------------------------------------


def test_long_prompt_is_cut_on_the_left_behind_bos():
    tok = byte_tokenizer(merges=())
    result = one(tok, Example("uvwxyz", ("1", "2")), max_prompt_length=4)
    assert result.prompt == ids(tok, "<s>", "x", "y", "z")
    assert result.prompt_cut and result.completions_cut == 0
    exact = one(tok, Example("xyz", ("1", "2")), max_prompt_length=4)
    assert exact.prompt == result.prompt and not exact.prompt_cut


def test_long_completions_are_cut_on_the_right_without_a_false_eos():
    tok = byte_tokenizer(merges=())
    result = one(
        tok, Example("x", ("1234", "56789")), max_length=6, max_prompt_length=6
    )
    assert result.completions == [ids(tok, *"1234"), ids(tok, *"5678")]
    assert result.completions_cut == 2
    fits = one(tok, Example("x", ("123", "56789")), max_length=6, max_prompt_length=6)
    assert fits.completions[0] == ids(tok, *"123", "</s>")
    assert fits.completions_cut == 1


def test_a_short_prompt_leaves_its_room_to_the_completion():
    tok = byte_tokenizer(merges=())
    result = one(
        tok, Example("x", ("1234567", "2")), max_length=10, max_prompt_length=8
    )
    assert result.completions_cut == 0


def test_both_sides_keep_the_limits():
    tok = byte_tokenizer()
    for sides in (("1" * 99, "2"), ("2", "1" * 99), ("1" * 99, "2" * 99)):
        result = one(tok, Example("q" * 99, sides), max_length=20, max_prompt_length=9)
        assert len(result.prompt) == 9
        assert all(0 < len(side) <= 11 for side in result.completions)


def test_a_completion_that_would_vanish_drops_the_pair():
    tok = byte_tokenizer()
    example = Example("q" * 99, ("1", "2"))
    assert one(tok, example, max_length=8, max_prompt_length=8) == NO_ROOM


def test_answers_that_are_equal_once_cut_drop_the_pair():
    tok = byte_tokenizer(merges=())
    example = Example("q", ("1234", "1235"))
    assert one(tok, example, max_length=5, max_prompt_length=5) == SAME_TOKENS


# ---- 15: conversations, the last assistant turn only -------------------------------


def test_chatml_last_turn_ends_at_the_end_of_turn_token():
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=CHATML)
    prompt = messages("q", "first", "r")
    result = one(tok, Example(prompt, (assistant("yes"), assistant("no"))))
    text = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok.decode(result.prompt) == text
    # The template writes a line break behind the end of turn; it is no target.
    assert result.completions[0] == ids(tok, *"yes", "<|im_end|>")
    assert result.completions[1] == ids(tok, *"no", "<|im_end|>")


def test_template_that_writes_bos_and_eos_and_a_tokenizer_that_adds_them():
    tok = byte_tokenizer(merges=(), adds="<s> $A </s>", template=LLAMA)
    result = one(tok, Example(messages("q"), (assistant("y"), assistant("n"))))
    assert tok.decode(result.prompt) == "<s>[INST] q [/INST]"
    assert [tok.decode(x) for x in result.completions] == [" y</s>", " n</s>"]
    assert result.prompt.count(tok.bos_token_id) == 1
    assert all(x.count(tok.eos_token_id) == 1 for x in result.completions)


def test_template_without_bos_and_eos_gets_an_eos():
    tok = byte_tokenizer(merges=(), template=CHATML)
    result = one(tok, Example(messages("q"), (assistant("y"), assistant("n"))))
    # No sampler adds BOS to what the template renders.
    assert result.prompt[:2] == ids(tok, "<|im_start|>", "u")
    assert result.completions[0] == ids(tok, "y", "<|im_end|>", "Ċ", "</s>")


def test_bos_that_is_also_the_start_of_turn_is_not_doubled():
    tok = byte_tokenizer(
        bos="<|im_start|>", eos="<|im_end|>", merges=(), template=CHATML
    )
    result = one(tok, Example(messages("q"), (assistant("y"),)))
    assert result.prompt[:2] == ids(tok, "<|im_start|>", "u")


def test_template_that_opens_the_answer_with_a_thought():
    thought = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=thought)
    result = one(tok, Example(messages("q"), (assistant("<think>t</think>y"),)))
    assert tok.decode(result.prompt).endswith("<|im_start|>assistant\n<think>")
    assert tok.decode(result.completions[0]) == "t</think>y<|im_end|>"
    with pytest.raises(InputError, match="f.jsonl row 1: .*opens thinking"):
        one(tok, Example(messages("q"), (assistant("y"),)))


def test_template_that_rewrites_the_question_is_refused():
    template = "{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}"
    tok = byte_tokenizer(template=template)
    with pytest.raises(InputError, match="f.jsonl row 1: .*prompt differently"):
        one(tok, Example(messages("q"), (assistant("y"),)))


def test_template_that_rewrites_a_question_that_stands_there_twice_is_refused():
    template = (
        "{% for m in messages %}[{{ m['role'] }}{{ ' last' if loop.last }}]"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    tok = byte_tokenizer(template=template)
    with pytest.raises(InputError, match="f.jsonl row 1: .*prompt differently"):
        one(tok, Example(messages("yes", "ok", "yes"), (assistant("y"),)))


def test_template_that_strips_earlier_thoughts():
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tok = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=template)
    prompt = messages("q", "<think>t</think>a", "r")
    sides = (assistant("<think>v</think>y"), assistant("<think>u</think>n"))
    result = one(tok, Example(prompt, sides))
    text = (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    assert tok.decode(result.prompt) == text
    assert tok.decode(result.completions[0]) == "v</think>y<|im_end|>"


def test_template_that_closes_a_conversation_with_eos():
    template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant:"
        "{% else %}{{ eos_token }}{% endif %}"
    )
    tok = byte_tokenizer(bos=None, merges=(), template=template)
    result = one(tok, Example(messages("q"), (assistant("y"),)))
    assert tok.decode(result.prompt) == "user:q<|im_end|>\nassistant:"
    assert result.completions == [ids(tok, "y", "<|im_end|>", "Ċ", "</s>")]
    # With the end of turn as EOS, what the template writes behind it is no target.
    template = template.replace("{{ eos_token }}", "</s>")
    tok = byte_tokenizer(bos="</s>", eos="<|im_end|>", merges=(), template=template)
    result = one(tok, Example(messages("q"), (assistant("y"),)))
    assert result.completions == [ids(tok, "y", "<|im_end|>")]


def test_template_that_refuses_a_role_is_one_line():
    tok = byte_tokenizer(template=LLAMA)
    prompt = ({"role": "system", "content": "s"}, *messages("q"))
    with pytest.raises(InputError, match="f.jsonl row 1: .*only user and assistant"):
        one(tok, Example(prompt, (assistant("y"),)))


def test_messages_without_a_template_say_what_to_do():
    with pytest.raises(InputError, match="f.jsonl row 1: .*no chat template; use"):
        one(byte_tokenizer(), Example(messages("q"), (assistant("y"),)))


# ---- prompts to sample from --------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_encode_prompt_equals_the_training_prompt(variant):
    tok = byte_tokenizer(**VARIANTS[variant])
    trained = one(tok, Example("xyz ", ("1", "2"))).prompt
    assert encode_prompt(tok, "xyz ") == trained
    assert encode_prompt(tok, "vwxyz ", max_prompt_length=len(trained)) == trained


def test_encode_prompt_of_messages():
    tok = byte_tokenizer(template=LLAMA)
    trained = one(tok, Example(messages("q"), (assistant("y"),))).prompt
    assert encode_prompt(tok, messages("q")) == trained
    with pytest.raises(InputError, match="no tokens"):
        encode_prompt(byte_tokenizer(bos=None), "")

"""Examples that do not fit: nothing is cut that fits, and never inside a header."""

import pytest

from jaxpref.data import DataOptions, ListSource, make_splits
from jaxpref.data.cut import NO_ROOM
from jaxpref.data.template import render_template
from tests.data_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=CHATML)
TEXTS = byte_tokenizer(merges=())
SYSTEM = {"role": "system", "content": "be kind"}


def turns(*texts, system=False):
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": x} for n, x in enumerate(texts)]
    return [SYSTEM] * system + messages


def rendered(messages):
    return TOKENIZER.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def splits_of(prompt, chosen="yes", rejected="no", *, tokenizer=TOKENIZER, **options):
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    options = DataOptions(heldout_fraction=0, **options)
    return make_splits(ListSource([record]), tokenizer, options)


def prompt_of(splits, tokenizer=TOKENIZER):
    return tokenizer.decode(splits.train.prompt(0))


@pytest.mark.parametrize("length", [40, 50, 59])
def test_nothing_is_cut_where_the_whole_fits(length):
    # BOS, the prompt, three letters and EOS.
    splits = splits_of("q" * (length - 5), "yes", tokenizer=TEXTS, max_length=length)
    assert len(splits.train.prompt(0)) == length - 4
    assert not splits.report["prompts cut"] + splits.report["completions cut"]
    splits = splits_of("q" * (length - 4), "yes", tokenizer=TEXTS, max_length=length)
    assert splits.report["prompts cut"] == 1
    assert len(splits.train.prompt(0)) == length - 4


def test_a_chat_that_fits_is_whole():
    prompt = turns("x" * 30, system=True)
    size = len(TOKENIZER(rendered(prompt))["input_ids"]) + 4
    assert prompt_of(splits_of(prompt, max_length=size)) == rendered(prompt)


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_the_earliest_turns_are_dropped_and_the_system_turn_is_kept(system, kept):
    texts = [letter * 9 for letter in "abcde"]
    short = turns(*texts[-kept:], system=system)
    size = len(TOKENIZER(rendered(short))["input_ids"]) + 4
    splits = splits_of(turns(*texts, system=system), max_length=size)
    assert prompt_of(splits) == rendered(short)
    assert splits.report["prompts without earlier turns"] == (kept < 5)
    assert not splits.report["prompts cut"]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("missing", [1, 5, 29])
def test_the_last_turn_loses_its_beginning_and_keeps_its_header(system, missing):
    text = "".join(chr(ord("a") + n % 26) for n in range(60))
    whole = turns(text, system=system)
    size = len(TOKENIZER(rendered(whole))["input_ids"]) + 4 - missing
    splits = splits_of(whole, max_length=size)
    assert prompt_of(splits) == rendered(turns(text[missing:], system=system))
    assert splits.report["prompts cut"] == 1


def test_letters_of_several_tokens_are_not_cut_in_half():
    whole = turns("é" * 40)
    size = len(TOKENIZER(rendered(whole))["input_ids"]) + 4 - 3
    assert prompt_of(splits_of(whole, max_length=size)) == rendered(turns("é" * 38))


def test_a_header_that_does_not_fit_drops_the_row():
    records = [
        {"prompt": prompt, "chosen": "yes", "rejected": "no"}
        for prompt in (turns("ok"), turns("x" * 80, system=True))
    ]
    size = len(TOKENIZER(rendered(turns("ok")))["input_ids"]) + 4
    options = DataOptions(heldout_fraction=0, max_length=size)
    splits = make_splits(ListSource(records), TOKENIZER, options)
    assert splits.report[f"dropped: {NO_ROOM}"] == 1 and len(splits.train) == 1


def test_a_long_answer_leaves_the_prompt_half_of_the_length():
    splits = splits_of("q" * 90, "y" * 90, tokenizer=TEXTS, max_length=40)
    assert len(splits.train.prompt(0)) == 20
    assert splits.report["prompts cut"] == splits.report["completions cut"] == 1
    splits = splits_of("q" * 15, "y" * 90, tokenizer=TEXTS, max_length=40)
    assert len(splits.train.prompt(0)) == 16 and not splits.report["prompts cut"]


@pytest.mark.parametrize(
    "missing, expected",
    [
        (0, "\n\nHuman: aaaa\n\nAssistant: b\n\nHuman: cccc\n\nAssistant:"),
        (1, "\n\nHuman: cccc\n\nAssistant:"),
        (28, "\n\nHuman: ccc\n\nAssistant:"),
        (30, "\n\nHuman: c\n\nAssistant:"),
    ],
)
def test_dialogues_in_one_text_are_cut_by_turns(missing, expected):
    whole = "\n\nHuman: aaaa\n\nAssistant: b\n\nHuman: cccc\n\nAssistant:"
    record = {"chosen": whole + " yes", "rejected": whole + " no"}
    size = 1 + len(whole) + len(" yes") + 1 - missing
    options = DataOptions(heldout_fraction=0, max_length=size)
    splits = make_splits(ListSource([record]), TEXTS, options)
    assert prompt_of(splits, TEXTS) == "<s>" + expected
    assert splits.report["prompts without earlier turns"] == (missing > 0)
    assert splits.report["prompts cut"] == (missing > 27)


@pytest.mark.parametrize("cut, long", [(2, "result"), (1, "question")])
def test_a_long_result_of_a_tool_is_cut_before_the_question(cut, long):
    text = "".join(chr(ord("a") + n % 26) for n in range(60))
    texts = {"question": "why?", "result": "42"} | {long: text}
    prompt = turns("earlier", "turn", texts["question"])
    prompt += [{"role": "tool", "content": texts["result"]}]
    short = prompt[2:]
    short[cut - 1] = short[cut - 1] | {"content": text[7:]}
    size = len(TOKENIZER(rendered(short))["input_ids"]) + 4
    splits = splits_of(prompt, max_length=size)
    assert prompt_of(splits) == rendered(short)
    assert splits.report["prompts cut"] == 1


def test_several_long_results_of_tools_are_cut_to_one_length():
    """Also where no single one is long enough to make room."""
    text = "".join(chr(ord("a") + n % 26) for n in range(60))
    prompt = turns("why?") + [
        {"role": "tool", "content": text[:size]} for size in (40, 60, 5)
    ]
    short = prompt[:1] + [
        {"role": "tool", "content": x} for x in (text[32:40], text[52:60], text[:5])
    ]
    size = len(TOKENIZER(rendered(short))["input_ids"]) + 4
    splits = splits_of(prompt, max_length=size)
    assert prompt_of(splits) == rendered(short)
    assert splits.report["prompts cut"] == 1


def test_thousands_of_turns_are_not_rendered_thousands_of_times(monkeypatch):
    rendered_turns = []
    monkeypatch.setattr(
        "jaxpref.data.render._template",
        lambda messages, *args, **kwargs: (
            rendered_turns.append(len(messages))
            or render_template(messages, *args, **kwargs)
        ),
    )
    prompt = turns(*["turn"] * 2001)
    splits = splits_of(prompt, max_length=100)
    assert 50 < len(splits.train.prompt(0)) <= 97
    assert len(rendered_turns) < 100 and sum(rendered_turns) < 50 * 2001


def test_later_system_turns_are_kept():
    rules = {"role": "system", "content": "new rules"}
    prompt = [SYSTEM, *turns("x" * 40, "y"), rules, *turns("q")]
    size = len(TOKENIZER(rendered([SYSTEM, rules, *turns("q")]))["input_ids"]) + 4
    splits = splits_of(prompt, max_length=size)
    assert prompt_of(splits) == rendered([SYSTEM, rules, *turns("q")])

"""Every field of a record is read, or named as not read, or refused."""

import dataclasses

import pytest

from jaxpref.data import DataOptions, ListSource, make_splits
from jaxpref.data.records import Example, FieldUse, parse, parse_prompt
from jaxpref.data.tokenize import tokenize
from jaxpref.errors import InputError
from tests.data_tokenizers import CHATML, byte_tokenizer

USER = {"role": "user", "content": "q"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
SYSTEM = {"role": "system", "content": "s"}
CHAT = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
TEXT = {"prompt": "q", "chosen": "a", "rejected": "b"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools|tojson }}{% endif %}{% for m in messages %}[{{ m['role'] }}"
    "]{% if m['content'] %}{{ m['content'] }}{% endif %}{% if m.tool_calls %}"
    "{{ m.tool_calls|tojson }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)


def tool_tokenizer():
    return byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=TOOL_TEMPLATE)


def pair_of(record, tokenizer, **options):
    """Prompt and completions of a record, as text."""
    example = parse(record, "f row 1", sides=2)
    (found,) = tokenize([example], ["f row 1"], tokenizer, max_length=1000)
    return tokenizer.decode(found.prompt), *map(tokenizer.decode, found.completions)


# ---- what the chat template reads ----------------------------------------------------


@pytest.mark.parametrize(
    "fields, messages, variables",
    [
        ({"tools": TOOLS}, [USER], {"tools": TOOLS}),
        ({"tools": '[{"type": "function", "function": {"name": "clock"}}]'}, [USER],
         {"tools": [{"type": "function", "function": {"name": "clock"}}]}),
        ({"tools": []}, [USER], {}),
        ({"tools": None, "system": None}, [USER], {}),
        ({"system": "s"}, [SYSTEM, USER], {}),
        ({"system": "s", "prompt": [SYSTEM, USER]}, [SYSTEM, USER], {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, [USER],
         {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": None}}, [USER],
         {"enable_thinking": False}),
        ({"tools": TOOLS, "system": "s",
          "chat_template_kwargs": {"enable_thinking": False}},
         [SYSTEM, USER], {"tools": TOOLS, "enable_thinking": False}),
    ],
)  # fmt: skip
def test_the_prompt_is_what_transformers_renders(fields, messages, variables):
    tokenizer = tool_tokenizer()
    prompt, *_ = pair_of(CHAT | fields, tokenizer)
    assert prompt == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **variables
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"tools": 3}, "field 'tools' must be a list of JSON schemas"),
        ({"tools": ["clock"]}, "field 'tools' must be a list of JSON schemas"),
        ({"tools": "[1"}, "field 'tools' is not JSON"),
        ({"system": ["s"]}, "field 'system' must be a string"),
        ({"system": "t", "prompt": [SYSTEM, USER]}, "'system' differs from the system"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "may not set 'chat_template'",
        ),
        ({"chat_template_kwargs": {"tokenize": True}}, "may not set 'tokenize'"),
        (TEXT | {"tools": TOOLS}, "field 'tools' is for the chat template"),
        (TEXT | {"system": "s"}, "field 'system' is for the chat template"),
        (
            TEXT | {"chat_template_kwargs": {"a": 1}},
            "field 'chat_template_kwargs' is for the chat template",
        ),
    ],
)
def test_malformed_fields_for_the_template_are_named(fields, words):
    with pytest.raises(InputError, match=f"f row 1: .*{words}") as error:
        parse(CHAT | fields, "f row 1", sides=2)
    assert "\n" not in str(error.value)


def test_records_that_differ_in_their_tools_have_different_ids():
    plain, tooled = (
        parse(CHAT | fields, "row 1", sides=2) for fields in ({}, {"tools": TOOLS})
    )
    assert plain.content_id() != tooled.content_id()
    bare = dataclasses.replace(tooled, variables={})
    assert bare.content_id() == plain.content_id()


# ---- fields that nobody reads --------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    "sample_weights loss_weight mask desirable preference winner better flipped history"
    " input system_message Label image_path".split(),
)
def test_other_fields_that_change_the_meaning(name):
    with pytest.raises(InputError, match=f"f row 1: field '{name}' changes what"):
        parse(TEXT | {name: "x"}, "f row 1", sides=2)
    with pytest.raises(InputError, match=f"f row 1: field '{name}' changes what"):
        parse_prompt({"prompt": "q", name: "x"}, "f row 1")


@pytest.mark.parametrize("field", [{"weight": 0}, {"loss": False}, {"images": ["x"]}])
def test_fields_of_a_message_that_change_the_meaning(field):
    chosen = {"role": "assistant", "content": "yes"} | field
    (name,) = field
    with pytest.raises(InputError, match=f"message 1: field '{name}' changes what"):
        parse(CHAT | {"chosen": [chosen]}, "f row 1", sides=2)
    turn = {"from": "gpt", "value": "yes"} | field
    record = {"conversations": [{"from": "human", "value": "q"}], "chosen": turn}
    with pytest.raises(InputError, match=f"turn 1: field '{name}' changes what"):
        parse(record | {"rejected": "no"}, "f row 1", sides=2)
    parse(CHAT | {"chosen": [YES | {"weight": 1}]}, "f row 1", sides=2)


UNREAD = {
    "label": ({"prompt": "q", "completion": "a", "label": False}, 1, "label"),
    "true label": ({"prompt": "q", "completion": "a", "label": True}, 1, "label"),
    "weight": (TEXT | {"weight": 0.5}, 2, "weight"),
    "zero weight": (TEXT | {"weight": 0}, 2, "weight"),
    "sample weight": (CHAT | {"sample_weight": 2.0}, 2, "sample_weight"),
    "images": (CHAT | {"images": ["a.png"]}, 2, "images"),
    "system prompt": (CHAT | {"system_prompt": "s"}, 2, "system_prompt"),
    "functions": (CHAT | {"functions": TOOLS}, 2, "functions"),
    "template": (CHAT | {"chat_template": "{{ 1 }}"}, 2, "chat_template"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_field_that_changes_the_meaning_is_read_or_refused(name):
    record, sides, field = UNREAD[name]
    with pytest.raises(
        InputError, match=f"f row 1: field '{field}'.*--ignore-fields {field}$"
    ):
        parse(record, "f row 1", sides=sides)
    ignored = parse(record, "f row 1", sides=sides, ignore_fields=[field])
    without = {k: v for k, v in record.items() if k != field}
    assert ignored == parse(without, "f row 1", sides=sides)
    # An empty field means nothing.
    assert parse(record | {field: None}, "f row 1", sides=sides) == ignored


def test_a_label_that_a_loss_reads_is_no_error():
    options = DataOptions(heldout_fraction=0, columns=("strength=weight",))
    source = ListSource([TEXT | {"weight": 0.5}])
    splits = make_splits(source, byte_tokenizer(), options)
    assert splits.train.columns["strength"].tolist() == [0.5]


@pytest.mark.parametrize(
    "records, sides, line",
    [
        ([TEXT], 2, "fields read: chosen, prompt, rejected; format: pairs 1"),
        (
            [TEXT | {"source": "x", "score": 3}],
            2,
            "fields read: chosen, prompt, rejected; not read: source, score; "
            "format: pairs 1",
        ),
        ([TEXT], 1, "fields read: chosen, prompt; not read: rejected; format: pairs 1"),
        (
            [{"prompt": "", "chosen": "\n\nHuman: q\n\nAssistant: a"}],
            1,
            "fields read: chosen, prompt; format: dialogues 1",
        ),
        (
            [{"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a"}],
            1,
            "fields read: chosen, prompt; format: dialogues 1",
        ),
        ([CHAT | {"annotator": 1, "empty": []}], 2,
         "fields read: annotator, chosen, prompt, rejected; format: messages 1"),
        ([TEXT | {"label": 1}], 2,
         "fields read: chosen, prompt, rejected; ignored on request: label; "
         "format: pairs 1"),
    ],
)  # fmt: skip
def test_the_fields_are_listed_once(records, sides, line):
    fields = FieldUse()
    for record in records:
        parse(record, "f", sides=sides, ignore_fields=["label"], fields=fields)
    assert fields.describe() == line


def test_ignoring_a_field_that_no_record_has_is_an_error():
    options = DataOptions(heldout_fraction=0, ignore_fields=("lable", "score"))
    splits = make_splits(ListSource([TEXT | {"score": 1}]), byte_tokenizer(), options)
    splits.fields.check_ignored(["score"])
    with pytest.raises(InputError, match="--ignore-fields lable: no record has"):
        splits.fields.check_ignored(options.ignore_fields)


# ---- other ways to write a record ----------------------------------------------------

CALL = [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]
CALLS = {"role": "assistant", "content": None, "tool_calls": CALL}
GPT = lambda text: {"from": "gpt", "value": text}
HUMAN = {"from": "human", "value": "q"}
MESSAGES = Example((USER,), (YES, NO))


@pytest.mark.parametrize(
    "record, expected",
    [
        (CHAT | {"chosen": YES, "rejected": NO}, MESSAGES),
        (CHAT | {"prompt": USER}, MESSAGES),
        (TEXT | {"chosen": YES, "rejected": NO}, MESSAGES),
        (
            CHAT | {"prompt": [USER | {"content": [{"type": "text", "text": "q"}]}]},
            MESSAGES,
        ),
        (CHAT | {"chosen": [YES | {"content": ["yes"]}]}, MESSAGES),
        (
            CHAT | {"prompt": [USER | {"content": ["a", {"text": "b"}]}]},
            Example((USER | {"content": "a\nb"},), (YES, NO)),
        ),
        (
            {"conversations": [HUMAN], "chosen": GPT("yes"), "rejected": GPT("no")},
            MESSAGES,
        ),
        (
            {"prompt": [HUMAN], "chosen": [GPT("yes")], "rejected": [GPT("no")]},
            MESSAGES,
        ),
        (
            {
                "conversations": [{"from": "system", "value": "s"}, HUMAN],
                "chosen": "yes",
                "rejected": GPT("no"),
            },
            Example((SYSTEM, USER), (YES, NO)),
        ),
        ({"prompt": "q", "completions": ["b", "a"], "ranking": [2, 1]},
         Example("q", ("a", "b"))),
        ({"prompt": [USER], "completions": ["yes", NO], "ranking": [0, 4]}, MESSAGES),
        (CHAT | {"chosen": [CALLS]}, Example((USER,), (CALLS, NO))),
        (CHAT | {"chosen": CALLS | {"content": ""}},
         Example((USER,), (CALLS | {"content": ""}, NO))),
    ],
)  # fmt: skip
def test_ways_to_write_a_pair(record, expected):
    assert parse(record, "f row 1", sides=2) == expected


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"conversations": [HUMAN, GPT("yes")]}, Example((USER,), (YES,))),
        ({"conversations": [USER, YES]}, Example((USER,), (YES,))),
        ({"prompt": "q", "completions": ["b", "a", "c"], "ranking": [2, 1, 3]},
         Example("q", ("a",))),
        (
            {"conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "clock"}'},
                {"from": "observation", "value": "10"},
                GPT("yes"),
            ]},
            Example(
                (
                    USER,
                    CALLS | {"tool_calls": [
                        {"type": "function", "function": {"name": "clock"}}
                    ]},
                    {"role": "tool", "content": "10"},
                ),
                (YES,),
            ),
        ),
    ],
)  # fmt: skip
def test_ways_to_write_a_completion(record, expected):
    assert parse(record, "f row 1", sides=1) == expected
    assert parse_prompt(record, "f row 1").prompt == expected.prompt


@pytest.mark.parametrize(
    "record, words",
    [
        (
            CHAT | {"chosen": [YES | {"content": [{"type": "image", "url": "a"}]}]},
            "'chosen' message 1 part 1 is of type 'image'",
        ),
        (CHAT | {"chosen": [YES | {"content": [3]}]}, "part 1: text must be a string"),
        (CHAT | {"chosen": [YES | {"content": None}]}, "content must be a string"),
        (CHAT | {"chosen": [YES | {"tool_calls": "f"}]}, "tool_calls must be a list"),
        (CHAT | {"chosen": [YES | {"tool_calls": ["f"]}]}, "tool_calls must be a list"),
        (
            {"conversations": [HUMAN], "chosen": GPT("a")},
            "no field 'rejected'",
        ),
        (
            {"conversations": [HUMAN], "chosen": 3, "rejected": 4},
            "'chosen' turn 1 must",
        ),
        (
            {"conversations": [{"from": "me", "value": "q"}]},
            "turn 1: 'from' must be one of system, human",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "now"}]},
            "'value' of a function_call must be a JSON object",
        ),
        ({"prompt": "q", "completions": "a", "ranking": [1]}, "'completions' must be"),
        ({"prompt": "q", "completions": ["a"], "ranking": [1, 2]}, "1 'completions'"),
        ({"prompt": "q", "completions": ["a", "b"], "ranking": ["1", 2]}, "whole numb"),
        (
            {"prompt": "q", "completions": ["a", "b", "c"], "ranking": [1, 2, 3]},
            "3 ranked 'completions' instead of 2",
        ),
        (TEXT | {"ended": 1}, "field 'ended' must be true or false"),
        (TEXT | {"ended": [True]}, "field 'ended' must be true or false, or a list"),
    ],
)
def test_malformed_records_are_named(record, words):
    sides = 1 if "from" in str(record) and "chosen" not in record else 2
    with pytest.raises(InputError, match=f"f row 1: .*{words}") as error:
        parse(record, "f row 1", sides=sides)
    assert "\n" not in str(error.value)


def test_prompts_of_conversations_without_an_answer():
    found = parse_prompt({"conversations": [HUMAN], "system": "s"}, "f row 1")
    assert found == Example((SYSTEM, USER), ())
    found = parse_prompt({"prompt": [USER], "tools": TOOLS}, "f row 1")
    assert found == Example((USER,), (), variables={"tools": TOOLS})


# ---- answers that were cut when they were sampled ------------------------------------


@pytest.mark.parametrize("template", [None, CHATML])
def test_an_answer_that_did_not_end_has_no_end(template):
    tokenizer = byte_tokenizer(bos=None, eos="<|im_end|>", merges=(), template=template)
    record = (CHAT if template else TEXT | {"chosen": "yes", "rejected": "no"}) | {}
    end = "<|im_end|>"
    for ended, ends in (
        (True, (end, end)),
        ([True, False], (end, "")),
        ([False, True], ("", end)),
        (False, ("", "")),
    ):
        _, *answers = pair_of(record | {"ended": ended}, tokenizer)
        assert answers == ["yes" + ends[0], "no" + ends[1]]


def test_ended_is_in_the_order_of_the_answers_as_they_are_written():
    record = {"prompt": "q", "completions": ["b", "a"], "ranking": [2, 1]}
    found = parse(record | {"ended": [False, True]}, "f row 1", sides=2)
    assert found == Example("q", ("a", "b"), ended=(True, False))


@pytest.mark.parametrize(
    "ended, read", [([True, False], ()), ([False, True], (False,))]
)
def test_a_single_completion_of_a_pair_is_as_complete_as_the_chosen_one(ended, read):
    """`data pairs` writes both, and supervised training reads the chosen one."""
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "ended": ended}
    assert parse(record, "f row 1", sides=1) == Example("q", ("a",), ended=read)


def test_the_name_of_the_file_does_not_change_the_speakers():
    record = {"conversations": [HUMAN], "chosen": "yes", "rejected": "no"}
    assert parse(record, "conversations.jsonl row 1", sides=2) == MESSAGES


@pytest.mark.parametrize("merges", [(), (("a", "b"), ("ab", "\u010a"))])
def test_an_open_answer_keeps_nothing_that_the_template_writes(merges):
    template = "{% for m in messages %}{{ m['content'] }}\n{{ eos_token }}{% endfor %}"
    tokenizer = byte_tokenizer(merges=merges, template=template)
    record = CHAT | {"chosen": "xab", "rejected": "no", "ended": False}
    assert pair_of(record, tokenizer)[1:] == ("xab", "no")


def test_a_field_that_may_reverse_a_pair_is_refused():
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "preferred": "rejected"}
    with pytest.raises(InputError, match="f row 1: field 'preferred' changes what"):
        parse(record, "f row 1", sides=2)

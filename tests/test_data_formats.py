"""Every format the field uses, and every way a record or a file can be wrong."""

import dataclasses
import gzip
import json
import sys
import time
import types

import pytest

from jaxpref.data import (
    ANSWERS,
    DataOptions,
    InjectOptions,
    ListSource,
    make_splits,
    open_source,
    records,
)
from jaxpref.data.records import (
    EMPTY,
    HUMAN_LAST,
    IDENTICAL,
    PROMPTS_DIFFER,
    Example,
    parse,
    parse_prompt,
    prompt_key,
)
from jaxpref.errors import InputError
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs, write_lines

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER, LATER = {"role": "assistant", "content": "b"}, {"role": "user", "content": "r"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
AS_STRINGS = Example("q", ("a", "b"))
AS_MESSAGES = Example((USER,), (ANSWER, OTHER))


@pytest.mark.parametrize(
    "record, expected",
    [
        (PAIR, AS_STRINGS),
        (PAIR | {"flip": None, "annotator": None, "source": 3}, AS_STRINGS),
        (PAIR | {"flip": True}, Example("q", ("a", "b"), flip=True)),
        (PAIR | {"annotator": "w1"}, Example("q", ("a", "b"), annotator="w1")),
        (PAIR | {"annotator": 7}, Example("q", ("a", "b"), annotator="7")),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
            AS_MESSAGES,
        ),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, AS_MESSAGES),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]}, AS_MESSAGES),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, AS_MESSAGES),
        # The prompt is often repeated in front of both answers.
        (
            {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            AS_MESSAGES,
        ),
        (
            {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            AS_MESSAGES,
        ),
        # A prompt string is dropped only where the conversation holds it.
        (
            {"prompt": " q\n", "chosen": [SYSTEM, USER, ANSWER], "rejected": "b"},
            PROMPTS_DIFFER,
        ),
        (
            {
                "prompt": "q ",
                "chosen": [SYSTEM, USER, ANSWER],
                "rejected": [SYSTEM, USER, OTHER],
            },
            Example((SYSTEM, USER), (ANSWER, OTHER)),
        ),
        (
            {
                "prompt": "q",
                "chosen": [ANSWER, LATER, ANSWER],
                "rejected": [ANSWER, LATER, OTHER],
            },
            Example((USER, ANSWER, LATER), (ANSWER, OTHER)),
        ),
        # A list is joined with the turns where they overlap.
        (
            {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": "b"},
            Example((SYSTEM, USER), (ANSWER, OTHER)),
        ),
        (
            {
                "prompt": [USER],
                "chosen": [SYSTEM, USER, ANSWER],
                "rejected": [SYSTEM, USER, OTHER],
            },
            Example((SYSTEM, USER), (ANSWER, OTHER)),
        ),
        (
            {"prompt": [SYSTEM], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            Example((SYSTEM, USER), (ANSWER, OTHER)),
        ),
        (
            {"prompt": [USER, ANSWER, USER], "chosen": "a", "rejected": [OTHER]},
            Example((USER, ANSWER, USER), (ANSWER, OTHER)),
        ),
        # A sequence of structs comes out of columnar stores transposed and with nulls.
        (
            {
                "chosen": {"role": ["user", "assistant"], "content": ["q", "a"]},
                "rejected": [USER, OTHER | {"tool_calls": None}],
            },
            AS_MESSAGES,
        ),
        (
            {
                "chosen": [USER, ANSWER, LATER, ANSWER],
                "rejected": [USER, ANSWER, LATER, OTHER],
            },
            Example((USER, ANSWER, LATER), (ANSWER, OTHER)),
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
                "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: d",
            },
            Example(
                "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", (" c", " d")
            ),
        ),
        # A prompt beside whole dialogues is part of them, with or without its mark.
        *(
            (
                {
                    "prompt": prompt,
                    "chosen": "\n\nHuman: q\n\nAssistant: a",
                    "rejected": "\n\nHuman: q\n\nAssistant: b",
                },
                Example("\n\nHuman: q\n\nAssistant:", (" a", " b")),
            )
            for prompt in ("\n\nHuman: q\n\nAssistant:", "Human: q", "q", "")
        ),
        (
            {
                "prompt": "\n\nHuman: q\n\nAssistant:",
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: r\n\nAssistant: b",
            },
            PROMPTS_DIFFER,
        ),
        # But a text that only begins like its prompt, or is a dialogue that was asked
        # for, stays.
        (
            {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"},
            Example("Hi", ("Hi there", "Hi!")),
        ),
        (
            {
                "prompt": "Write a dialogue.",
                "chosen": "Human: q\n\nAssistant: a",
                "rejected": "Human: q\n\nAssistant: b",
            },
            Example(
                "Write a dialogue.",
                ("Human: q\n\nAssistant: a", "Human: q\n\nAssistant: b"),
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: b\n\nHuman: thanks",
            },
            HUMAN_LAST,
        ),
        (PAIR | {"rejected": "a"}, IDENTICAL),
        ({"chosen": [USER, ANSWER], "rejected": [LATER, OTHER]}, PROMPTS_DIFFER),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, IDENTICAL),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: r\n\nAssistant: b",
            },
            PROMPTS_DIFFER,
        ),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: ",
            },
            EMPTY,
        ),
    ],
)
def test_pairs(record, expected):
    assert parse(record, "f row 1", sides=2) == expected


@pytest.mark.parametrize(
    "record, expected",
    [
        ({"prompt": "q", "completion": "a"}, Example("q", ("a",))),
        ({"prompt": "", "completion": "a"}, Example("", ("a",))),
        (PAIR, Example("q", ("a",))),
        ({"prompt": "q", "chosen": "a"}, Example("q", ("a",))),
        ({"messages": [USER, ANSWER]}, Example((USER,), (ANSWER,))),
        (
            {"messages": [USER, ANSWER, LATER, OTHER]},
            Example((USER, ANSWER, LATER), (OTHER,)),
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a"},
         Example("\n\nHuman: q\n\nAssistant:", (" a",))),
    ],
)  # fmt: skip
def test_completions(record, expected):
    assert parse(record, "f row 1", sides=1) == expected


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": [OTHER]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": "b"},
        {"prompt": "q", "messages": [USER, ANSWER, LATER, OTHER]},
        {"prompt": "q", "completion": [ANSWER]},
        {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
        PAIR,
    ],
)
def test_the_prompt_to_sample_from_is_that_of_training(record):
    try:
        expected = parse(record, "row 1", sides=2)
    except InputError:  # a single answer
        expected = parse(record, "row 1", sides=1)
    if isinstance(expected, str):
        expected = parse(record, "row 1", sides=1)
    assert parse_prompt(record, "row 1") == expected


def test_a_new_format_is_one_entry_of_the_tuple(monkeypatch):
    """Here: two answers in one field, and which of them is better in another."""

    def parse_best(record, where, *, sides, drop_empty):
        best = record["best"]
        answers = record["answers"][best], record["answers"][1 - best]
        return Example(record["prompt"], answers)

    ranked = types.SimpleNamespace(
        matches=lambda record, sides: "answers" in record, parse=parse_best
    )
    monkeypatch.setattr(records, "FORMATS", {"best": ranked, **records.FORMATS})
    record = {"prompt": "q", "answers": ["b", "a"], "best": 1, "annotator": "w1"}
    expected = Example("q", ("a", "b"), annotator="w1")
    assert parse(record, "f row 1", sides=2) == expected
    assert parse(PAIR, "f row 1", sides=2) == AS_STRINGS
    # It ignores `sides`, which is an error of the format, but must name the row.
    with pytest.raises(InputError, match="f row 1: .* 2 completions instead of 1"):
        parse(record, "f row 1", sides=1)


def test_a_prompt_without_a_completion():
    found = parse_prompt({"prompt": "q", "chosen": None}, "row 1")
    assert found == Example("q", ())
    found = parse_prompt({"prompt": [SYSTEM, USER]}, "row 1")
    assert found == Example((SYSTEM, USER), ())
    with pytest.raises(InputError, match="row 1: field 'prompt' has no messages"):
        parse_prompt({"prompt": []}, "row 1")


def test_prompts_count_as_one_whatever_their_outer_white_space():
    padded = USER | {"content": " q\n"}
    assert prompt_key((SYSTEM, padded)) == prompt_key((SYSTEM, USER))
    assert prompt_key((SYSTEM, USER)) != prompt_key((USER,)) != prompt_key("q")
    assert prompt_key((USER,)) != prompt_key((LATER,))
    assert prompt_key(" q") == prompt_key("q\n")


def without(name):
    return {key: value for key, value in PAIR.items() if key != name}


BAD_RECORDS = {
    "missing prompt": (without("prompt"), "no field 'prompt'"),
    "missing chosen": (without("chosen"), "no field 'chosen'"),
    "missing rejected": (without("rejected"), "no field 'rejected'"),
    "misspelt": (without("chosen") | {"chozen": "a"}, "has prompt, rejected, chozen"),
    "null prompt": (PAIR | {"prompt": None}, "field 'prompt' must be.*null"),
    "null chosen": (PAIR | {"chosen": None}, "field 'chosen' must be.*null"),
    "number": (PAIR | {"rejected": 3}, "field 'rejected' must be.*int"),
    "object": (PAIR | {"rejected": {"text": "b"}}, "field 'rejected'.*an object"),
    "empty": (PAIR | {"rejected": ""}, "field 'rejected' is an empty completion"),
    "white space": (PAIR | {"chosen": " \n"}, "field 'chosen' is an empty completion"),
    "a list": (["q", "a", "b"], "must be a JSON object, but this is a list"),
    "a string": ("q", "must be a JSON object, but this is a string"),
    "null record": (None, "must be a JSON object, but this is null"),
    "bad flip": (PAIR | {"flip": 1}, "field 'flip' must be true or false"),
    "flip text": (PAIR | {"flip": "maybe"}, "field 'flip' must be true or false"),
    "bad annotator": (PAIR | {"annotator": 1.5}, "field 'annotator' must be"),
    "annotator bool": (PAIR | {"annotator": True}, "field 'annotator' must be"),
    "surrogate": (PAIR | {"chosen": "a\ud800"}, "field 'chosen'.*surrogate"),
    "10 MB": (PAIR | {"chosen": "a" * 10**7}, "field 'chosen'.*10,000,000 characters"),
    "bad role": (
        PAIR | {"chosen": [{"role": "bot", "content": "a"}]},
        "field 'chosen' message 1: role must be one of",
    ),
    "message of parts": (
        PAIR | {"chosen": [ANSWER | {"content": [{"type": "image", "url": "a"}]}]},
        "field 'chosen' message 1 part 1 is of type 'image'",
    ),
    "not a message": (PAIR | {"prompt": ["q"]}, "field 'prompt' message 1 must be"),
    "ends with user": (
        {"chosen": [USER, ANSWER], "rejected": [USER]},
        "field 'rejected' must end with an assistant message",
    ),
    "no messages": (PAIR | {"chosen": []}, "field 'chosen' must end with an assistant"),
    "answer alone": (
        {"chosen": [ANSWER], "rejected": [OTHER]},
        "field 'chosen' has no message before the answer",
    ),
    "another question": (
        {"prompt": "Q1", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        "field 'chosen' does not continue 'prompt'",
    ),
    "another question in a list": (
        {"prompt": [LATER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        "field 'chosen' does not continue",
    ),
    "another question on one side": (
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [LATER, OTHER]},
        "field 'rejected' does not continue",
    ),
    "another system message": (
        {"prompt": [SYSTEM, USER], "chosen": [LATER, ANSWER], "rejected": "b"},
        "field 'chosen' does not continue",
    ),
    "empty message": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER | {"content": ""}]},
        "field 'rejected' is an empty completion",
    ),
    "a dialogue beside another prompt": (
        {
            "prompt": "other",
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        },
        "field 'prompt' is not part of the dialogues in 'chosen' and 'rejected'",
    ),
    "a dialogue beside an answer": (
        {"prompt": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
        "field 'rejected' is not a dialogue",
    ),
    "no dialogue": (
        {"chosen": "Human: q Assistant: a", "rejected": "b"},
        "no field 'prompt', and field 'chosen' is not a dialogue",
    ),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records_name_file_row_and_field(kind, tmp_path):
    record, expected = BAD_RECORDS[kind]
    path = write_lines(tmp_path / "pairs.jsonl", [PAIR, PAIR, record])
    started = time.monotonic()
    with pytest.raises(InputError, match=expected) as error:
        make_splits(open_source(path), byte_tokenizer())
    assert f"{path} row 3" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.monotonic() - started < 20


BAD_BYTES = {
    "not JSON": (b'{"prompt": \n', "row 2: not JSON"),
    "field twice": (
        b'{"prompt": "q", "chosen": "a", "chosen": "c", "rejected": "b"}\n',
        "row 2: .*field 'chosen' occurs twice; keep one",
    ),
    "not UTF-8": (b'{"prompt": "caf\xe9"}\n', "row 2: byte 0xe9 .*not UTF-8"),
    "UTF-16": ('{"prompt": "q"}\n'.encode("utf-16"), "row 2: .*not UTF-8"),
    "truncated": (b'{"prompt": "q", "chosen": "a", "rej', "row 2: not JSON"),
    "too deep": (b"[" * 200_000 + b"\n", "row 2: not usable JSON"),
    "huge number": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "row 2: not usable JSON"),
    "10 MB of garbage": (b"x" * 10**7 + b"\n", "row 2: not JSON"),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_bad_bytes_name_file_and_row(kind, suffix, tmp_path):
    raw, expected = BAD_BYTES[kind]
    path = tmp_path / f"pairs{suffix}"
    contents = json.dumps(PAIR).encode() + b"\n" + raw
    path.write_bytes(gzip.compress(contents, 1) if suffix[-1] == "z" else contents)
    with pytest.raises(InputError, match=expected) as error:
        make_splits(open_source(path), byte_tokenizer())
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def _gzip_bomb(path):
    path.write_bytes(gzip.compress(bytes(1 << 27), 1))


def _gzip_cut(path):
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode() * 99)[:-20])


BAD_FILES = {
    "missing file": ("pairs.jsonl", lambda path: None, "no such file"),
    "empty": ("pairs.jsonl", lambda path: path.write_text(""), "holds no records"),
    "blank": ("pairs.jsonl", lambda path: path.write_text("\n \n"), "no records"),
    "empty list": ("pairs.json", lambda path: path.write_text("[]"), "no records"),
    "cut list": ("pairs.json", lambda path: path.write_text('[{"p'), "not JSON"),
    "gzip bomb": ("pairs.jsonl.gz", _gzip_bomb, "unpacks to more than 200 times"),
    "cut gzip": ("pairs.jsonl.gz", _gzip_cut, "compressed file ends too early"),
    "no gzip": ("p.jsonl.gz", lambda path: path.write_text("{}"), "not a valid gzip"),
    "unknown": ("pairs.xlsx", lambda path: path.write_text("a,b"), "unknown kind"),
    "folder": ("pairs", lambda path: path.mkdir(), "folder holds no dataset"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_one_line(kind, tmp_path):
    name, write, expected = BAD_FILES[kind]
    write(tmp_path / name)
    with pytest.raises(InputError, match=expected) as error:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_left_is_an_error_with_counts():
    source = ListSource([PAIR | {"rejected": "a"}] * 3, "pairs.jsonl")
    with pytest.raises(InputError, match="pairs.jsonl row 1 .*no record is left") as e:
        make_splits(source, byte_tokenizer())
    assert "identical 3" in str(e.value)


def test_empty_completions_can_be_dropped():
    records = [PAIR, PAIR | {"chosen": ""}]
    options = DataOptions(drop_empty=True, heldout_fraction=0)
    plan = make_splits(ListSource(records), byte_tokenizer(), options)
    assert len(plan.train) == 1 and plan.report[f"dropped: {EMPTY}"] == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(max_prompt_length=9, max_length=8), "max_prompt_length 9"),
        (dict(max_prompt_length=1), "max_prompt_length 1"),
        (dict(max_length=1), "max_length 1 must be at least 2"),
        (dict(heldout_fraction=1.5), "heldout_fraction 1.5"),
        (dict(max_pairs=0), "max_pairs 0"),
    ],
)
def test_bad_options(options, expected):
    with pytest.raises(InputError, match=expected):
        DataOptions(**options)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_bad_flip_rates(rate):
    with pytest.raises(InputError, match=f"inject.flip_rate {rate}"):
        InjectOptions(flip_rate=rate)


def test_a_prompt_takes_what_the_answers_leave_unless_said_otherwise():
    records = [
        {"prompt": "q" * 99, "chosen": chosen, "rejected": "b"}
        for chosen in ("a", "a" * 50)
    ]
    options = DataOptions(max_length=20, heldout_fraction=0)
    plan = make_splits(ListSource(records), byte_tokenizer(), options)
    assert plan.train.prompt_lengths.tolist() == [18, 10]
    options = dataclasses.replace(options, max_prompt_length=7)
    plan = make_splits(ListSource(records), byte_tokenizer(), options)
    assert plan.train.prompt_lengths.tolist() == [7, 7]


def test_flips_need_pairs():
    with pytest.raises(InputError, match="--inject needs pairs"):
        make_splits(
            ListSource(synthetic_pairs(2)),
            byte_tokenizer(),
            DataOptions(inject=InjectOptions(flip_rate=0.1)),
            kind=ANSWERS,
        )


@pytest.mark.parametrize("name", ["hf:owner/name", "owner-of/some-name"])
def test_missing_datasets_package_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "jaxpref\[hub\]"'):
        open_source(name)


def test_missing_tfds_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r'pip install "jaxpref\[tfds\]"'):
        open_source("tfds:name")

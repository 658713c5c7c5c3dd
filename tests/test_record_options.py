"""Field names and formats of the user's choice, errors that name them, bad rows."""

import json
import random

import numpy as np
import pytest

from jaxpref.data import (
    DataOptions,
    ListSource,
    RecordOptions,
    examples_of,
    make_splits,
)
from jaxpref.data.bad_rows import FILE, describe, write_skipped
from jaxpref.data.record_source import RecordSource
from jaxpref.data.records import Example, FieldUse, parse, parse_prompt
from jaxpref.data.sources import Divisible
from jaxpref.errors import InputError
from tests.data_tokenizers import LLAMA, byte_tokenizer
from tests.format_cases import CASES, RATED, TEXTS, USER, record_of, ukp, views

ARGILLA = {"prompt": "2 + 2?", "response-1": "5", "response-2": "4"}
STUDIO = record_of("label_studio")

# ---- --fields and --format -----------------------------------------------------------


@pytest.mark.parametrize(
    "fields, record",
    [
        ("prompt=q,chosen=a,rejected=b", {"q": "2 + 2?", "a": "4", "b": "5"}),
        ("prompt=x.0.q, chosen=x.1.a.-1, rejected=x.1.a.0",
         {"x": [{"q": "2 + 2?"}, {"a": ["5", "4"]}]}),
        ("prompt=x.y,chosen=b,rejected=chosen",  # exchanged, and a dot in a name
         {"x.y": "2 + 2?", "chosen": "5", "b": "4"}),
        ("better_response_id=safer_response_id",
         record_of("safe_rlhf") | {"better_response_id": 0, "safer_response_id": 1}),
        ("prompt=q,chosen=a,rejected=b",  # not votes, since the answers are named
         {"q": "2 + 2?", "a": "4", "b": "5", "conversation_a": 1, "conversation_b": 2,
          "judge": "x"}),
    ],
)  # fmt: skip
def test_fields_by_other_names(fields, record):
    assert examples_of([record], RecordOptions(fields=tuple(fields.split()))) == [TEXTS]


def test_the_fields_of_a_run_are_named_as_in_the_file():
    use, record = FieldUse(), {"q": "2 + 2?", "x": {"a": "4", "z": 1}, "b": "5", "n": 1}
    given = "prompt=q,chosen=x.a,rejected=b"
    (view,) = views([record], fields=(given,))
    parse(view, "f", sides=2, fields=use)
    assert use.describe() == (
        "fields read: b as rejected, q as prompt, x.a as chosen; not read: n;"
        " format: pairs 1"
    )
    use.check_mapped(RecordOptions(fields=(given,)).mapped)
    (view,) = views([record], fields=(f"{given},promt=n",))
    parse(view, "f", sides=2, fields=(use := FieldUse()))
    with pytest.raises(InputError, match="promt=n: nothing reads .* mean prompt"):
        use.check_mapped(RecordOptions(fields=("promt=n",)).mapped)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fields": ("prompt",)}, "--fields prompt: expected NAME=FIELD"),
        ({"fields": ("prompt=",)}, "--fields prompt=: expected NAME=FIELD"),
        ({"fields": ("a=b,a=c",)}, "'a' is given twice"),
        ({"fields": ("prompt=q",), "ignore_fields": ("q",)}, "--fields prompt=q reads"),
        ({"format": "orka"}, "--format orka: no such format; did you mean orca"),
    ],
)
def test_options_that_cannot_be_used(options, words):
    with pytest.raises(InputError, match=words):
        RecordOptions(**options)


def test_options_of_the_records_need_records():
    given = RecordOptions(format="orca", fields=("a=b",))
    assert given.changed() == {"format": "orca", "fields": ("a=b",)}
    assert RecordOptions(**given.for_other()) == given


def test_names_of_ignored_fields_may_be_separated_by_commas():
    assert RecordOptions(ignore_fields=("a, b", "c")).ignore_fields == ("a", "b", "c")
    assert DataOptions(ignore_fields=("a,b",), max_length=9).ignore_fields == ("a", "b")


# ---- errors --------------------------------------------------------------------------

STUDIO_RESULT = {
    "type": "pairwise",
    "to_name": "text1,text2",
    "value": {"selected": "top"},
}
BAD = {
    "a missing field": (
        {"questoin": "q", "a": "4", "b": "5"}, "prompt=question,chosen=a,rejected=b",
        "no field 'question' for --fields prompt=question; the record has questoin, a,"
        " b; did you mean questoin"),
    "a missing part": (
        {"q": {"txt": 1}}, "prompt=q.text", "'q' has txt; did you mean txt"),
    "too short a list": ({"q": ["a"]}, "prompt=q.1", "'q' is a list of 1, counted"),
    "a part of a text": ({"q": "a"}, "prompt=q.0", "'q' is a str and has no fields"),
    "null under another name": (
        {"q": "q", "a": None, "b": "5"}, "prompt=q,chosen=a,rejected=b",
        "'chosen' must be a string .* null; 'chosen' is read from 'a'"),
    "null in a format": (
        {"question": "q", "chosen": None, "rejected": "5"}, "",
        "'chosen' must be a string .*; read as --format orca"),
    "null of a scored answer": (
        {"instruction": "q", "completions": [RATED[0], RATED[1] | {"response": None}]},
        "", "'rejected' must be .* null; 'rejected' is read from 'completions 2'"),
    "a misspelled field": (
        {"prompt": "q", "chosn": "a", "rejected": "b"}, "",
        "no field 'chosen'; .*; did you mean chosn.; .*--fields chosen=NAME"),
    "text beside a shared beginning": (
        {"promt": "2 + 2?", "chosen": "It is 4", "rejected": "It is 5"}, "",
        "no field 'prompt'.*--fields prompt=NAME"),
    "rows of HelpSteer2": (
        {"prompt": "q", "response": "a", "helpfulness": 3, "verbosity": 1}, "",
        "two rows make a pair; use HelpSteer2-Preference"),
    "an unknown winner": (
        record_of("arena") | {"winner": "model_c"}, "",
        "field 'winner' must be one of 'model_a', 'model_b', 'tie'"),
    "a conversation as text": (
        record_of("arena") | {"conversation_a": "hi"}, "",
        "field 'conversation_a' must be messages"),
    "two winners": (
        record_of("lmarena") | {"winner_model_b": 1}, "", "but 2 of them are"),
    "an answer too few": (
        record_of("lmarena") | {"prompt": '["a", "b"]'}, "",
        "'response_a' has 1 answers to 2 questions"),
    "a score too few": (
        {"instruction": "q", "generations": ["4", "5"], "ratings": [1]}, "",
        "'generations' has 2 answers, but 'ratings' has 1 numbers"),
    "not a score": (
        {"instruction": "q", "completions": [RATED[0] | {"overall_score": "high"}]}, "",
        "'completions' 1 'overall_score' must be a number, but it is a string"),
    "no score": (
        {"instruction": "q", "completions": [{"response": "4"}]}, "",
        "'completions' 1 has no 'overall_score'"),
    "NaN": (
        {"instruction": "q", "completions": [RATED[0] | {"overall_score": np.nan}]}, "",
        "must be a finite number"),
    "one answer": (
        {"instruction": "q", "completions": RATED[:1]}, "", "a pair needs two"),
    "one ranked answer": (
        {"prompt": "q", "answers": [{"answer": "4", "rank": 1}]}, "", "has 1 answers"),
    "no rank": ({"prompt": "q", "answers": [{"answer": "4"}]}, "", "and 'rank'"),
    "a strength of 4": (
        record_of("helpsteer2_preference") | {"preference_strength": 4}, "",
        "must be from -3 to 3"),
    "an unknown answer": (
        record_of("safe_rlhf") | {"better_response_id": 2}, "", "must be one of 0, 1"),
    "three outputs": (
        {"instruction": "q", "output": ["a", "b", "c"]}, "", "'output' must have two"),
    "half a round": (
        {"instruction": "q", "output": "a", "history": [["x"]]}, "", "round 1 must be"),
    "another field of the input": (
        record_of("openai") | {"input": {"messages": [USER], "temperature": 1}}, "",
        "'input.temperature' changes what"),
    "six comparisons": (
        record_of("finegrained") | {"preference": [1]}, "", "must have 6 numbers"),
    "a comparison of 3": (
        record_of("finegrained") | {"preference": [3] * 6}, "", "'preference' 1 must"),
    "an unknown label of a vote": (ukp("a3"), "", "'votes' 1 'label' must be one of"),
    "a vote that is a text": (ukp() | {"votes": ["a1"]}, "", "'votes' 1 must be"),
    "labels of other fields": (
        {"fields": ARGILLA, "responses": {"best": [{"value": "good"}]}}, "",
        "no question names 'response-1' or 'response-2'"),
    "a rating of 2 in Argilla": (
        {"fields": ARGILLA, "responses": {"quality": [{"value": 2}]}}, "",
        "no question names 'response-1' or 'response-2'"),
    "two comparisons in Argilla": (
        {"fields": ARGILLA, "responses": {
            "safer": [{"value": "response-1"}], "best": [{"value": "response-2"}]}}, "",
        "2 questions compare the answers: safer, best"),
    "one text in Argilla": (
        {"fields": {"text": "a"}, "responses": {}}, "", "a field 'prompt' and two"),
    "an unknown side": (
        STUDIO | {"annotations": [{"result": [STUDIO_RESULT]}]}, "",
        "'annotations' 1 'selected' must be one of 'left', 'right'"),
    "one text in Label Studio": (
        STUDIO | {"data": {"prompt": "a"}}, "", "'data' must have a prompt and two"),
    "a list of endings": (
        record_of("safe_rlhf") | {"ended": [True, False]}, "", "'ended' is a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_row_and_the_field_in_the_file(name):
    record, fields, words = BAD[name]
    options = RecordOptions(fields=(fields,) if fields else ())
    with pytest.raises(InputError, match=f"f row 1.*{words}") as error:
        (view,) = views([record], **vars(options))
        parse(view, "f row 1", sides=2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_single_answers_with_a_label_are_not_demonstrations():
    record = {"user_query": "q", "chatgpt_response": "a", "hallucination": "yes"}
    with pytest.raises(InputError, match="'label' changes .*from 'hallucination'"):
        examples_of([record], sides=1)
    ignored = RecordOptions(ignore_fields=("label",))
    assert examples_of([record], ignored, sides=1) == [Example("q", ("a",))]


# ---- bad rows ------------------------------------------------------------------------

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
ROWS = [
    GOOD,
    GOOD | {"chosen": 3},
    GOOD | {"chosen": None},
    "text",
    GOOD | {"rejected": "c"},
]


class Broken(ListSource):
    """A source whose last record cannot be decoded."""

    part, content = Divisible.part, Divisible.content

    def __getitem__(self, index):
        if index == len(self) - 1:
            raise InputError(f"{self.location(index)}: not JSON (x at character 1)")
        return super().__getitem__(index)


def test_bad_rows_are_skipped_counted_and_listed(tmp_path):
    source = Broken([*ROWS, None], "f")
    options = DataOptions(heldout_fraction=0, on_bad_row="skip")
    splits = make_splits(source, byte_tokenizer(), options)
    assert splits.train.columns["row"].tolist() == [0, 4]
    assert splits.report["skipped"] == 4 and splits.report["rows"] == 6
    assert [x.row for x in splits.skipped] == [f"f row {n}" for n in (2, 3, 4, 6)]
    lines = describe(splits.skipped)
    assert lines[0] == "4 malformed rows skipped:" and len(lines) == 4
    assert lines[1].startswith("  2 times: field 'chosen' must be a string")
    write_skipped(tmp_path, splits.skipped, "skip")
    written = [json.loads(x) for x in (tmp_path / FILE).read_text("utf-8").splitlines()]
    assert written[2] == {
        "row": "f row 4",
        "reason": "a record must be a JSON object, but this is a string",
    }
    without = make_splits(ListSource([ROWS[0], ROWS[4]]), byte_tokenizer(), options)
    assert (without.train.tokens == splits.train.tokens).all()
    write_skipped(tmp_path / "missing", (), "raise")  # writes nothing


def test_rows_that_the_template_rejects_are_skipped():
    turns = lambda role: [{"role": role, "content": "q"}]
    records = [GOOD | {"prompt": turns(x)} for x in ("user", "tool", "user")]
    tokenizer = byte_tokenizer(template=LLAMA)
    options = DataOptions(heldout_fraction=0, on_bad_row="skip")
    splits = make_splits(ListSource(records, "f"), tokenizer, options)
    assert splits.train.columns["row"].tolist() == [0, 2]
    ((row, reason),) = splits.skipped
    assert row == "f row 2" and "only user and assistant roles" in reason


def test_a_file_of_bad_rows_is_an_error():
    options = DataOptions(on_bad_row="skip")
    with pytest.raises(
        InputError, match="no record is left .*skipped 2.*must be a str"
    ):
        make_splits(ListSource(ROWS[1:3], "f"), byte_tokenizer(), options)


def test_bad_rows_among_several_of_a_record():
    records = [ukp("a1", "a2"), {"a1": "x", "a2": "y", "votes": 3}, ukp("a2")]
    source = RecordSource(ListSource(records, "f"), RecordOptions(), sides=2)
    options = DataOptions(heldout_fraction=0, on_bad_row="skip")
    splits = make_splits(source, byte_tokenizer(), options)
    assert splits.train.annotator_names == ("w0", "w1") and len(splits.train) == 3
    assert [x.row for x in splits.skipped] == ["f row 2"]


# ---- hostile records -----------------------------------------------------------------

JUNK = (
    *(
        None,
        True,
        0,
        -1,
        1.5,
        float("nan"),
        10**400,
        "",
        "x",
        "tie",
        "1",
        "[",
        "\ud800",
    ),
    *([], [None], [[]], ["a", 1], {}, {"value": None}, {"rank": "x", "value": []}),
    *([{"rank": None, "value": "response_1"}, {"value": "response_2"}], {"a": [1]}),
)


def spoiled(value, rng, depth=0):
    """The value with one part of it replaced, removed or added."""
    if not isinstance(value, dict | list) or not value:
        return rng.choice(JUNK)
    if depth and rng.random() < 0.2:
        return rng.choice(JUNK)
    keys = [*value] if isinstance(value, dict) else range(len(value))
    key, copy = rng.choice(keys), value.copy()
    kind = rng.random()
    if kind < 0.15:
        del copy[key]
    elif kind < 0.25 and isinstance(copy, list):
        copy.append(rng.choice(JUNK))
    else:
        copy[key] = spoiled(copy[key], rng, depth + 1)
    return copy


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)
def test_any_record_is_read_or_refused_in_one_line(case):
    rng = random.Random(case.about)
    for _ in range(60):
        record = spoiled(case.record, rng)
        record = spoiled(record, rng) if rng.random() < 0.3 else record
        options = {"pairs": rng.choice(["all", "best-random"])}
        options |= {"votes": rng.choice(["each", "majority"])}
        options |= {"format": case.format} if rng.random() < 0.5 else {}
        sides = rng.choice([1, 2])
        try:
            for view in views([record], sides, **options):
                parse(view, "f row 1", sides=sides)
                parse_prompt(view, "f row 1")
        except InputError as error:
            assert "f row 1" in str(error) and "\n" not in str(error)
            assert len(str(error)) < 1000

"""Foreign record formats: detection, pairs, ties, errors, and the page about them."""

import collections
import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from jaxpref.data import (
    ListSource,
    RecordOptions,
    examples_of,
    open_records,
)
from jaxpref.data.answers import read_answers
from jaxpref.data.record_options import NAMES
from jaxpref.data.record_source import RecordSource
from jaxpref.data.records import (
    EMPTY,
    IDENTICAL,
    PROMPTS_DIFFER,
    Example,
    FieldUse,
    parse,
    parse_prompt,
)
from jaxpref.data.records.adapters import ADAPTERS
from jaxpref.data.records.adapters.adapter import NO_VOTE, SAME_SCORE, SPLIT, TIE
from jaxpref.data.records.reanswered import without_answers
from jaxpref.errors import InputError
from jaxpref.evaluate.audit_records import cleaned, named_annotators
from tests.data_tokenizers import write_lines
from tests.format_cases import (
    CASES,
    CHAT,
    FIVE,
    FOUR,
    RATED,
    TEXTS,
    USER,
    by,
    record_of,
    ukp,
    views,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
NATIVE = {"pairs", "messages", "dialogues", "traces", "ranked", "sharegpt"}
NATIVE |= {"own_prompts"}
PAIRS = [case for case in CASES if case.sides == 2]
by_name = lambda case: case.format


# ---- detection -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_record_is_read_as_its_format_and_no_other(case):
    options = RecordOptions(**case.options)
    found = examples_of([case.record], options, sides=case.sides)
    assert tuple(found) == case.expected
    named = dataclasses.replace(options, format=case.format)
    assert examples_of([case.record], named, sides=case.sides) == found
    matching = [x.name for x in ADAPTERS if x.matches(case.record)]
    assert matching == ([] if case.format in NATIVE else [case.format])


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_other_fields_do_not_change_the_format_of_a_pair(case):
    record = case.record | {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert views([record])[0] is record


def test_every_format_has_an_example():
    # Others are refused with the reason, or have a table of tests of their own.
    others = {"helpsteer2", "halueval", "lists"}
    assert {case.format for case in CASES} | others == {*NAMES}


@pytest.mark.parametrize("case", PAIRS, ids=by_name)
def test_single_completions_are_the_better_answers(case):
    best = case.expected[0]
    options = RecordOptions(**case.options)
    found = examples_of([case.record], options, sides=1)
    if case.format == "multipref":  # one vote for each answer
        assert found == [SPLIT]
    else:
        assert [x.completions for x in found] == [best.completions[:1]]
        assert found[0].prompt == best.prompt
    view = views([case.record], **case.options)[0]
    assert parse_prompt(view, "f row 1").prompt == best.prompt


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_new_answers_follow_the_same_prompt(case):
    """What `sample` writes of a record, and `data pairs` of that, is read as meant."""
    record = {**case.record, "margin": 2.0, "flip": True, "note": 3}
    if case.format != "implicit":  # where any other text could be the prompt
        record |= {"answer": "4"}
    view = views([record], **case.options)[0]
    example = parse_prompt(view, "f row 1")
    whole = without_answers(view, example) | {"completions": [{"text": "6"}]}
    assert whole["note"] == 3 and whole.get("answer") == record.get("answer")
    assert not {"flip", "margin", "chosen", "annotator", "messages"} & whole.keys()
    answers = read_answers(json.loads(json.dumps(whole)), "f row 1")
    assert parse_prompt(answers.record, "f row 1").prompt == example.prompt
    (pair,) = examples_of([answers.record | {"chosen": "6", "rejected": "7"}])
    assert pair.prompt == example.prompt and pair.variables == example.variables
    assert pair.texts == ["6", "7"]


def test_new_answers_have_the_tools_of_the_prompt_alone():
    record = {"prompt": "4?", "tools": [{"name": "add"}], "Label": 1, "note": 3}
    ignored = parse_prompt(record, "f row 1", ignore_fields=("tools", "Label"))
    assert without_answers(record, ignored) == {"prompt": "4?", "note": 3}
    whole = parse_prompt(record, "f row 1", ignore_fields=("Label",))
    assert without_answers(record, whole)["tools"] == record["tools"]


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_a_field_that_nobody_reads_is_still_an_error(case):
    record = case.record | {"weight": 0.5, "note": 3}
    with pytest.raises(InputError, match="f row 1.*: field 'weight' changes what"):
        for view in views([record], case.sides, **case.options):
            parse(view, "f row 1", sides=case.sides)
    fields, names = FieldUse(), ["weight"]
    options = case.options | {"ignore_fields": ("weight",)}
    for view in views([record], case.sides, **options):
        parse(view, "f", sides=case.sides, ignore_fields=names, fields=fields)
    fields.check_ignored(names)
    assert "note" in fields.describe() and f"format: {case.format}" in fields.describe()
    view = views([record], case.sides, **case.options)[0]
    example = parse(view, "f", sides=case.sides, columns={"weight": "weight"})
    assert example.numbers == {"weight": 0.5}


def test_numbers_of_the_record_in_the_file_can_be_labels():
    record = record_of("helpsteer2_preference") | {"preference_strength": -3}
    fields = {"margin": "preference_strength", "weight": "strength"}
    (view,) = views([record])
    found = parse(view, "f", sides=2, columns=fields)
    assert found.numbers == {"margin": -3.0, "weight": 3.0}
    assert found.completions == ("5", "4")


def test_messages_of_columnar_stores_and_lists_by_column():
    columns = {"response": ["4", "5"], "overall_score": [9, 2]}
    assert examples_of([{"instruction": "2 + 2?", "completions": columns}]) == [TEXTS]
    turns = {"role": ["user", "assistant"], "content": ["2 + 2?", "4"]}
    record = record_of("arena") | {"winner": "model_a", "conversation_a": turns}
    record["conversation_b"] = [USER, FIVE]
    assert examples_of([record]) == [by("ann", CHAT)]


# ---- variants of a format ------------------------------------------------------------

ARGILLA = {"prompt": "2 + 2?", "response-1": "5", "response-2": "4"}
VOTE = {"user_id": "ann", "status": "submitted"}
STUDIO = record_of("label_studio")
VARIANTS = {
    "alpaca with two outputs": (
        {"instruction": "2 + 2?", "input": "", "output": ["4", "5"]}, TEXTS),
    "alpaca with a system message and history": (
        {"instruction": "2 + 2?", "chosen": "4", "rejected": "5", "system": "s",
         "history": [["1 + 1?", "2"]]},
        Example(({"role": "system", "content": "s"},
                 {"role": "user", "content": "1 + 1?"},
                 {"role": "assistant", "content": "2"}, USER), (FOUR, FIVE))),
    "orca without a system field": (
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"}, TEXTS),
    "orca with an empty system message": (
        {"system": "", "question": "2 + 2?", "chosen": "4", "rejected": "5"}, CHAT),
    "distilabel's orca": (
        {"system": "", "input": "2 + 2?", "chosen": "4", "rejected": "5",
         "status": "swapped", "generations": ["5", "4"], "rating": [1.0, 9.0],
         "chosen_score": 9.0}, CHAT),
    "a judge's tie": (
        {"input": "2 + 2?", "chosen": "4", "rejected": "5", "status": "tie"}, TIE),
    "fine-grained scores": (
        {"instruction": "2 + 2?", "completions": [
            {"response": "5", "fine-grained_score": 1.5},
            {"response": "4", "fine-grained_score": 4.5}]}, TEXTS),
    "ratings as text": (
        {"instruction": "2 + 2?", "completions": [
            {"response": "5", "annotations": {"truth": {"Rating": "1"},
                                              "honesty": {"Rating": "N/A"}}},
            {"response": "4", "annotations": {"truth": {"Rating": "5"}}},
            {"response": "6", "annotations": {"truth": {"Rating": "N/A"}}}]}, TEXTS),
    "equal scores": (
        {"instruction": "q", "completions": [RATED[0], RATED[0]]}, SAME_SCORE),
    "the first response is better": (
        record_of("helpsteer2_preference") | {"preference_strength": -1},
        Example("2 + 2?", ("5", "4"))),
    "no preference": (
        record_of("helpsteer2_preference") | {"preference_strength": 0}, TIE),
    "an arena's tie": (record_of("arena") | {"winner": "tie (bothbad)"}, TIE),
    "LMArena's tie": (
        record_of("lmarena") | {"winner_model_a": 0, "winner_tie": 1}, TIE),
    "the first round of two": (
        record_of("arena") | {
            "conversation_a": [USER, FIVE, USER, FOUR],
            "conversation_b": [USER, FOUR, USER, FIVE]}, by("ann", CHAT)),
    "rounds with different answers": (
        record_of("arena") | {"turn": 2,
            "conversation_a": [USER, FIVE, USER, FOUR],
            "conversation_b": [USER, FOUR, USER, FIVE]}, PROMPTS_DIFFER),
    "the safer answer": (
        {"prompt": "2 + 2?", "response_0": "4", "response_1": "5",
         "better_response_id": 0}, TEXTS),
    "equal scores of WebGPT": (
        record_of("webgpt") | {"score_0": 0.0, "score_1": 0.0}, SAME_SCORE),
    "the second comment": (
        {"history": "2 + 2?", "human_ref_A": "5", "human_ref_B": "4", "labels": 0},
        TEXTS),
    "a draft that was right": (
        {"prompt": "q", "draft": "4", "edited": "4"}, IDENTICAL),
    "an empty answer": ({"prompt": "q", "draft": "4", "edited": ""}, EMPTY),
    "identical texts": ({"chosen": "a b", "rejected": "a b"}, IDENTICAL),
    "a shared part of a word": (
        {"chosen": "The sky is blue", "rejected": "The sky is black"},
        Example("The sky is", (" blue", " black"))),
    "nobody has voted": (record_of("ukp") | {"votes": []}, NO_VOTE),
    "no choice": (
        record_of("community_alignment") | {"first_turn_preferred_response": None},
        NO_VOTE),
    "Argilla's ranking": (
        {"fields": ARGILLA, "responses": {"rank": [
            {"value": ["response-2", "response-1"], "user_id": "ann"}]}}, by("ann")),
    "Argilla's tie in a ranking": (
        {"fields": ARGILLA, "responses": {"rank": [{"value": [
            {"value": "response-1", "rank": 1}, {"value": "response-2", "rank": 1}]}]}},
        TIE),
    "Argilla 1 on disk": (
        {"fields": ARGILLA, "responses": [
            {"user_id": "ann", "status": "submitted",
             "values": {"best": {"value": 2}, "why": {"value": "it is right"}}},
            {"user_id": "bob", "status": "discarded", "values": {}}]}, by("ann")),
    "Argilla 1 on the hub": (
        ARGILLA | {"best": [VOTE | {"value": 2}], "external_id": "7",
                   "metadata": "{}"}, by("ann")),
    "Argilla 2 on the hub": (
        ARGILLA | {"best.responses": ["2"], "best.responses.users": ["ann"],
                   "status": "completed"}, by("ann")),
    "Argilla with a rating of 1 and a comment first": (
        {"fields": ARGILLA, "responses": {
            "quality": [{"value": 1, "user_id": "ann"}],
            "comment": [{"value": "I was unsure about 1", "user_id": "ann"}],
            "rank": [{"value": "Response 2", "user_id": "ann"}]}}, by("ann")),
    "Argilla with full names after an end": (
        {"fields": ARGILLA, "responses": {
            "level": [{"value": "1", "user_id": "ann"}],
            "rank": [{"value": "response-2", "user_id": "ann"}]}}, by("ann")),
    "Argilla 2 with a discarded answer on the hub": (
        ARGILLA | {"best.responses": ["response-1", "response-2"],
                   "best.responses.users": ["bob", "ann"],
                   "best.responses.status": ["discarded", "submitted"]}, by("ann")),
    "Argilla without answers": (
        {"fields": ARGILLA, "responses": {"best": []}}, NO_VOTE),
    "Label Studio's right answer": (
        {"data": {"prompt": "2 + 2?", "answer1": "5", "answer2": "4", "id": 7},
         "annotations": [
             {"was_cancelled": True, "result": []},
             {"completed_by": {"id": 1, "email": "ann"}, "result": [
                 {"type": "choices", "value": {}},
                 {"type": "pairwise", "to_name": "answer1, answer2",
                  "value": {"selected": "right"}}]}]}, by("ann")),
    "Label Studio without annotations": (STUDIO | {"annotations": []}, NO_VOTE),
    "OpenAI with tools": (
        {"input": {"messages": [USER], "tools": [{"type": "function"}]},
         "preferred_output": [FOUR], "non_preferred_output": [FIVE]},
        dataclasses.replace(CHAT, variables={"tools": [{"type": "function"}]})),
}  # fmt: skip


def test_opinions_of_helpsteer():
    record = next(x.record for x in CASES if "all_preferences_unprocessed" in x.record)
    strengths = [view["strength"] for view in views([record])]
    assert strengths == [2, 3, 1]
    (view,) = views([record], votes="majority")
    assert (view["chosen"], view["strength"], view["num_votes"]) == ("4", 2, 3)
    assert view["agreement"] == pytest.approx(2 / 3)
    record = record | {"all_preferences_unprocessed": [{"strength": "much"}]}
    with pytest.raises(InputError, match="'all_preferences_unprocessed' 1 'strength'"):
        views([record])


def test_which_text_was_on_the_left_is_never_guessed():
    record = json.loads(json.dumps(STUDIO))
    result = record["annotations"][0]["result"][0]
    for named in ({"to_name": "tag1,tag2"}, {"to_name": "text1"}, {"to_name": None}):
        result.update(named)
        with pytest.raises(
            InputError, match="f row 1: the export does not say.*left=data.NAME"
        ):
            views([record])
    result["value"]["selected"] = "up"
    named = dict(fields=("left=data.text2", "right=data.text1"))
    with pytest.raises(InputError, match="'annotations' 1 'selected' must be one of"):
        views([record], **named)
    result["value"]["selected"] = "left"
    (view,) = views([record], **named)
    assert (view["chosen"], view["rejected"]) == ("5", "4")
    with pytest.raises(InputError, match="f row 1: a JSON_MIN export.*left=NAME"):
        views([record_of("label_studio_min")])


def test_scores_that_contradict_the_label_are_counted():
    record = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    scored = lambda a, b: record | {"score_chosen": a, "score_rejected": b}
    records = [scored(1, 2), scored("1", "3"), scored(2, 2), scored(3, 1), record]
    records.append(record | {"metadata": {"chosen_rating": 1, "rejected_rating": 2}})
    records.append(scored(None, 2))
    records.append({"prompt": "2 + 2?", "completions": [{"response": "4"}]} | record)
    fields = FieldUse()
    for one in records:
        assert parse(one, "f", sides=2, fields=fields).completions == ("4", "5")
    counted = FieldUse()  # as of chunks of rows
    counted.include(fields.counts())
    first, second = counted.warnings()
    assert "'score_chosen' is below 'score_rejected' in 2 records" in first
    assert "'chosen_rating' is below 'rejected_rating' in 1 records" in second


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_format(name):
    record, expected = VARIANTS[name]
    (view,) = views([record])
    assert parse(view, "f row 1", sides=2, drop_empty=True) == expected
    if isinstance(expected, str) and expected not in (PROMPTS_DIFFER, IDENTICAL, EMPTY):
        assert parse_prompt(view, "f row 1").prompt  # a tie can be sampled from


def test_rounds_of_community_alignment_follow_the_choices():
    record = record_of("community_alignment") | {"second_turn_prompt": "3 + 3?"}
    record |= {f"second_turn_response_{x}": x for x in "abcd"}
    record |= {"second_turn_preferred_response": "response_d"}
    found = examples_of([record], RecordOptions(pairs="all"))
    asked = {"role": "user", "content": "3 + 3?"}
    assert [x.prompt for x in found] == [(USER,)] * 3 + [(USER, FOUR, asked)] * 3
    assert {x.completions[0]["content"] for x in found[3:]} == {"d"}
    assert [x.completions[1]["content"] for x in found[3:]] == ["a", "b", "c"]
    assert {x.annotator for x in found} == {"ann"}


# ---- pairs and votes -----------------------------------------------------------------


def scored(*scores, prompt="q"):
    completions = [{"response": f"a{x}", "overall_score": x} for x in scores]
    return {"instruction": prompt, "completions": completions}


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("best-worst", [("a9", "a1", 8)]),
        ("all", [("a9", "a4", 5), ("a9", "a1", 8), ("a4", "a1", 3)]),
    ],
)
def test_pairs_of_scored_answers(rule, expected):
    found = views([scored(4, 9, 1)], pairs=rule)
    assert [(x["chosen"], x["rejected"], x["margin"]) for x in found] == expected
    assert all(x["score_chosen"] - x["score_rejected"] == x["margin"] for x in found)


def test_the_best_against_a_random_worse_answer_depends_on_the_content_alone():
    records = [scored(4, 9, 1, 9, prompt=str(n)) for n in range(400)]
    found = views(records)
    assert {x["chosen"] for x in found} == {"a9"}
    counts = collections.Counter(x["rejected"] for x in found)
    # Of 400 fair draws, 200 with a standard deviation of 10.
    assert counts.keys() == {"a4", "a1"} and abs(counts["a4"] - 200) < 50
    assert views(records[::-1]) == found[::-1]


def test_equal_scores_among_all_pairs_are_counted():
    reasons = [x.origin.reason for x in views([scored(1, 2, 2)], pairs="all")]
    assert sorted(reasons) == ["", "", SAME_SCORE]


def test_lists_hold_every_answer():
    (view,) = views([scored(4, 9, 1)], sides=None)
    assert view == {
        "prompt": "q", "completions": ["a4", "a9", "a1"], "scores": [4, 9, 1]
    }  # fmt: skip
    (view,) = views([record_of("nectar")], sides=None)
    assert view["scores"] == [-1, -2]


def test_each_vote_is_a_pair_with_its_annotator():
    found = examples_of([ukp("a1", "a2", "equal")])
    assert [x if isinstance(x, str) else x.annotator for x in found] == [
        "w0",
        "w1",
        TIE,
    ]
    assert [x.completions for x in found[:2]] == [("5", "4"), ("4", "5")]


@pytest.mark.parametrize(
    "labels, expected",
    [
        (("a2", "a2", "a1", "equal"), (("4", "5"), 2 / 3, 3)),
        (("a1", "a2"), SPLIT),
        (("equal", "equal"), TIE),
    ],
)
def test_the_majority_of_the_votes(labels, expected):
    (view,) = views([ukp(*labels)], votes="majority")
    found = parse(view, "f", sides=2)
    if not isinstance(found, str):
        found = found.completions, view["agreement"], view["num_votes"]
    assert found == expected


def test_records_that_stand_for_several():
    records = [ukp("a1"), ukp("a1", "a2"), {"prompt": "p"}, ukp()]
    source = RecordSource(ListSource(records, "f"), RecordOptions(), sides=2)
    places = ["f row 1", "f row 2 vote 1", "f row 2 vote 2", "f row 3", "f row 4"]
    assert [source.location(n) for n in range(len(source))] == places
    order = [4, 1, 3, 0, 2]  # access in any order gives the same
    assert [source[n] for n in order] == [views(records)[n] for n in order]
    # If the first record is of another format, records are not counted beforehand.
    mixed = RecordSource(ListSource(records[2:0:-1], "f"), RecordOptions(), sides=2)
    with pytest.raises(InputError, match="f row 2: .* 2 pairs.*--format ukp"):
        mixed[1]
    assert len(views(records[:2], format="ukp", votes="majority")) == 2


# ---- writers that go back to the records ---------------------------------------------


@pytest.mark.parametrize("case", PAIRS, ids=by_name)
def test_an_audit_reverses_the_labels_of_every_format(case):
    options = RecordOptions(**case.options)
    source = RecordSource(ListSource([case.record]), options, sides=2)
    renamed = named_annotators(source, None)
    for name, reverse in (("relabel", True), ("keep", False)):
        actions = [{"row": n + 1, "action": name} for n in range(len(source))]
        written = json.loads(json.dumps([*cleaned(renamed, actions)]))
        order = slice(None, None, -1) if reverse else slice(None)
        assert [
            (x.prompts, x.completions, x.annotator) for x in examples_of(written)
        ] == [
            (x.prompts[order], x.completions[order], x.annotator) for x in case.expected
        ]


def test_an_audit_leaves_out_ties_and_malformed_rows():
    records = [ukp("a1", "equal"), {"a1": "5"}, ukp("a2")]
    source = RecordSource(ListSource(records), RecordOptions(), sides=2)
    kept = (
        [*cleaned(named_annotators(source, "worker"), [])]
        if False
        else [*cleaned(named_annotators(source, None), [])]
    )
    assert [x["annotator"] for x in kept] == ["w0", "w0"]


# ---- the shared files and the page ---------------------------------------------------

FILES = {
    # file: (options, completions, records, share of them that can be used)
    "finegrained_qa_feedback_dev.json": ({"pairs": "all"}, 2, 3000, 0.8),
    "gsm8k_solution_pairs.jsonl.gz": ({}, 2, 1571, 1),
    "gsm8k_train.jsonl.gz": ({}, 1, 7473, 1),
    "hh_rlhf_helpful_base_test.jsonl.gz": ({}, 2, 2354, 0.98),
    "llamafactory_dpo_en_demo.json": ({}, 2, 299, 1),
    "llamafactory_kto_en_demo.json": ({"ignore_fields": ("label",)}, 1, 300, 1),
    "halueval_general_binary.jsonl.gz": (
        {"fields": ("prompt=user_query,completion=chatgpt_response",)}, 1, 4507, 1),
    "mtbench_human_pairs.jsonl.gz": ({}, 2, 1130, 0.3),
    "ukpconvarg1_votes.jsonl.gz": ({"votes": "majority"}, 2, 12_935, 0.8),
    "ultrafeedback_sample_train.jsonl.gz": ({}, 2, 1000, 0.98),
}  # fmt: skip


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
def test_every_shared_file_is_listed():
    assert {x.name for x in DATA.glob("*.json*")} == {*FILES}


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", FILES)
def test_every_shared_file_loads(name):
    options, sides, records, share = FILES[name]
    options = RecordOptions(**options)
    source = open_records(str(DATA / name), options, sides=sides)
    assert len(source) == records
    rows = range(0, records, max(1, records // 400))
    given = {"drop_empty": True, "ignore_fields": options.ignore_fields}
    found = [parse(source[n], "f", sides=sides, **given) for n in rows]
    assert sum(isinstance(x, Example) for x in found) >= share * len(found)


@pytest.fixture(scope="module")
def maker():
    script = ROOT / "docs" / "make_format_table.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date_and_its_examples_run(maker, capsys):
    page = maker.PAGE.read_text("utf-8")
    assert page == maker.page(), "run `python docs/make_format_table.py`"
    start, *blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(start, names)
    assert len(blocks) == len(CASES)
    for block in blocks:
        exec(block, names)
        printed = capsys.readouterr().out
        assert printed and all(line in block for line in printed.splitlines())


def test_the_table_of_formats_is_complete():
    page = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert {x for x in NAMES if f"`{x}`" not in page} == set()


def test_files_are_read_by_the_commands(tmp_path):
    path = write_lines(tmp_path / "f.jsonl", [record_of("orca"), ukp("a1", "a2")])
    source = open_records(str(path), RecordOptions(votes="majority"), sides=2)
    assert source[0].origin.format == "orca" and source[1].origin.reason == SPLIT
    assert source.location(1) == f"{path} row 2"

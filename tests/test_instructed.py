"""`jaxpref data instruct`: prompts with instructions that an answer follows, or not."""

import json
import re

import numpy as np
import pytest

from jaxpref.cli.data import command
from jaxpref.data import examples_of
from jaxpref.errors import InputError
from tests.answers import write_records

TEXTS = [
    "Cats, dogs and birds.\n\nThey are animals.",
    "- one thing\n- another thing\n\nWhich of them?",
    "yes",
    "No, never!\n\n\n* a\n* b\n\nThree paragraphs, with a list",
    "an answer without any punctuation that has somewhat more words than the others",
    "Why not? Because of commas, questions and lists",
]


def written(tmp_path, records, *options):
    out = tmp_path / "out.jsonl"
    file = write_records(tmp_path / "pairs.jsonl", records)
    command(["instruct", str(file), "--out", str(out), *options])
    return [json.loads(line) for line in out.open()]


def follows(text: str, instruction: str) -> bool:
    """Read as a person would: each kind has its own words."""
    words, lines = text.split(), text.split("\n")
    if found := re.fullmatch(r"Use at (least|most) (\d+) words?", instruction):
        limit = int(found[2])
        return len(words) >= limit if found[1] == "least" else len(words) <= limit
    if found := re.fullmatch(r"Write exactly (\d+) paragraphs?", instruction):
        blocks, inside = 0, False
        for line in lines:
            blocks += bool(line.strip()) and not inside
            inside = bool(line.strip())
        return blocks == int(found[1])
    if found := re.fullmatch(r'(Use|Do not use) the word "(\w+)"', instruction):
        there = found[2].lower() in re.sub(r"[^a-z]", " ", text.lower()).split()
        return there == (found[1] == "Use")
    if found := re.fullmatch(r"(Use|Do not use) a bulleted list", instruction):
        return any(line[:2] in ("- ", "* ") for line in lines) == (found[1] == "Use")
    if found := re.fullmatch(r"Use (some|no) commas", instruction):
        return ("," in text) == (found[1] == "some")
    found = re.fullmatch(r"(End|Do not end) with a question mark", instruction)
    assert found, instruction
    return (text[-1] == "?") == (found[1] == "End")


def followed(record, side: str, question: str) -> list[bool]:
    words = record[f"{side}_prompt"]
    assert words.endswith(f"\n\n{question}")
    instructions = words.removesuffix(f".\n\n{question}").split(". ")
    return [follows(record[side], x) for x in instructions]


def test_an_answer_follows_more_of_the_preferred_prompt(tmp_path):
    pairs = [
        {"prompt": f"question {n}", "chosen": a, "rejected": b}
        for n in range(8)
        for a, b in zip(TEXTS, TEXTS[1:] + TEXTS[:1])
    ]
    records = written(tmp_path, pairs, "--seed", "1")
    assert len(records) == 2 * len(pairs)
    kinds, lengths = set(), set()
    for n, record in enumerate(records):
        pair = pairs[n // 2]
        assert record["chosen"] == record["rejected"]
        assert record["chosen"] == pair[("chosen", "rejected")[n % 2]]
        better, worse = (
            followed(record, side, pair["prompt"]) for side in ("chosen", "rejected")
        )
        lengths |= {len(better), len(worse)}
        all_of = all(better) and not all(worse)
        some_of = any(better) and not any(worse)
        assert all_of or some_of
        kinds.add((sum(better), sum(worse)))
    assert lengths == {3}
    assert kinds == {(3, 0), (3, 1), (3, 2), (1, 0), (2, 0)}
    assert written(tmp_path, pairs, "--seed", "1") == records
    assert written(tmp_path, pairs, "--seed", "2") != records
    # They are read as pairs of the same answer to two prompts.
    for example, record in zip(examples_of(records, sides=2), records, strict=True):
        assert example.own_prompts == (
            record["chosen_prompt"],
            record["rejected_prompt"],
        )


def test_all_kinds_of_instructions_are_used(tmp_path):
    pairs = [{"prompt": "q", "chosen": TEXTS[0], "rejected": TEXTS[3]}] * 40
    records = written(tmp_path, pairs, "--instructions", "6")
    for record in records:
        assert len(followed(record, "chosen", "q")) == 6
    texts = " ".join(record["chosen_prompt"] for record in records)
    for words in ("least", "most", "exactly", "not use the word", "Use the word"):
        assert words in texts
    assert np.mean(["least" in x["chosen_prompt"] for x in records]) < 0.9


def test_in_a_conversation_the_user_gives_the_instructions(tmp_path):
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    said = [[{"role": "assistant", "content": x}] for x in ("an answer", "other words")]
    pair = {"prompt": asked, "chosen": said[0], "rejected": said[1]}
    pair["chat_template_kwargs"] = {"style": "plain"}
    first, second = written(tmp_path, [pair], "--instructions", "1")
    assert first["chosen"] == first["rejected"] == said[0]
    assert second["chosen"] == said[1]
    for side in ("chosen_prompt", "rejected_prompt"):
        system, user = first[side]
        assert system == asked[0] and user["content"].startswith("q\n\n")
    words = [first[f"{x}_prompt"][1]["content"][3:-1] for x in ("chosen", "rejected")]
    assert [follows("an answer", x) for x in words] == [True, False]
    assert first["chat_template_kwargs"] == {"style": "plain"}


def test_what_has_no_prompt_to_edit_is_refused(tmp_path):
    pair = {"chosen_prompt": "q", "chosen": "a", "rejected_prompt": "r"}
    with pytest.raises(InputError, match="row 1: answers with prompts of their own"):
        written(tmp_path, [pair | {"rejected": "b"}])
    with pytest.raises(InputError, match="instructions 0: must be at least 1"):
        written(tmp_path, [], "--instructions", "0")
    with pytest.raises(InputError, match="instructions 7: there are 6 kinds"):
        written(tmp_path, [], "--instructions", "7")
    thought = {"prompt": "q", "chosen": "a", "rejected": "<think>b</think>c"}
    with pytest.raises(InputError, match="row 1: the rejected answer contains reas"):
        written(tmp_path, [thought])
    system = [{"role": "system", "content": "s"}]
    answers = {x: [{"role": "assistant", "content": x}] for x in ("chosen", "rejected")}
    with pytest.raises(InputError, match="row 2: the prompt has no message of the u"):
        written(tmp_path, [pair_of("a b", "c"), {"prompt": system, **answers}])


def pair_of(chosen, rejected, **more):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected, **more}


def test_instructions_come_before_the_results_of_tools(tmp_path):
    """And an answer that only calls a tool follows none."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    turns = [
        *({"role": "user", "content": "q"}, calls),
        {"role": "tool", "content": "42", "name": "f"},
    ]
    said = {"role": "assistant", "content": "It is forty-two."}
    pair = {"prompt": turns, "chosen": [said], "rejected": [calls]}
    (record,) = written(tmp_path, [pair], "--instructions", "2")
    assert record["chosen"] == [said]
    for side in ("chosen_prompt", "rejected_prompt"):
        assert record[side][0]["content"].startswith("q\n\n")
        assert record[side][1:] == turns[1:]


def test_an_unfinished_answer_remains_unfinished(tmp_path):
    pair = pair_of("an answer that", "a whole one.", ended=[False, True])
    first, second = written(tmp_path, [pair])
    assert first["ended"] is False and "ended" not in second


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("猫、狗和鸟？", "some commas", "no commas"),
        ("هل هذا صحيح، حقا؟", "End with", "Do not end with"),
        ("彼は「なぜ？」", "End with", "Do not end with"),
        ("Sie sagte: „Straße?“ Ja.", "Do not end with", " End with"),
    ],
)
def test_other_languages_have_other_punctuation(tmp_path, text, right, wrong):
    pairs = [pair_of(text, "wouldn't Straßen gehen 日本語の文章です")] * 20
    records = written(tmp_path, pairs, "--instructions", "6")[::2]
    better, worse = (
        " " + " ".join(x[f"{side}_prompt"] for x in records)
        for side in ("chosen", "rejected")
    )
    assert right in better and wrong in worse
    words = {*re.findall('the word "(.*?)"', better + worse)}
    if "Straße" in text:  # in its own spelling, and no part of a contraction
        assert words <= {"Straße", "sagte", "Straßen", "gehen"} and "sagte" in words
    elif text[0] in "猫彼":  # no words without spaces
        assert not words and not re.search(r"\d+ word", better + worse)

"""`jaxpref sample --diverse`: one reply with several answers."""

import json

import pytest

from jaxpref.cli import sample as sample_command
from jaxpref.data import Prompt, with_system
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate import draw
from jaxpref.evaluate.diverse import split
from jaxpref.evaluate.sampled import Sampled
from jaxpref.sampling import Answer
from tests.tiny import WORDS, make_model_folder

REPLY = "Sure:\n### Answer 1\n{}\n**Answer 2:**\n{}\n\n### answer 3\n{}"


@pytest.mark.parametrize(
    "text, ended, expected",
    [
        (
            REPLY.format("yes", "no\n\nno", "Answer 4 me"),
            True,
            "yes|no\n\nno|Answer 4 me",
        ),
        (REPLY.format("yes", "", "maybe"), False, "yes|maybe (cut)"),
        ("yes", True, ""),
        ("### Answer 1", True, ""),
        ("### Answer 1\r\nyes\r\n### Answer 2\r\nno", True, "yes|no"),
        ("### Answer 1: yes\n**Answer 2:** no", True, "yes|no"),
        ("### Answer 1\nsee\nAnswer 3.\n### Answer 2\nno", True, "see\nAnswer 3.|no"),
    ],
)
def test_a_reply_is_split_at_its_headings(text, ended, expected):
    found = split(Sampled(text, -3.0, ended), 3)
    shown = [x.text + " (cut)" * (not x.ended) for x in found]
    assert "|".join(shown) == expected
    assert all(x.logp is None for x in found)
    assert len(split(Sampled(text, -3.0, ended), 1)) <= 1


def test_the_answers_of_a_reply_are_those_of_the_prompt(tmp_path, monkeypatch):
    model = make_model_folder(tmp_path / "model", 0, max_position_embeddings=512)
    asked = []
    # The tokenizer knows words alone, so headings are written by hand.
    texts = iter([REPLY.format(*WORDS[:3]), "no headings", REPLY.format(*WORDS[3:6])])

    def answer_all(model, params, requests, rule, *, batch_size, largest):
        asked.extend(requests)
        yield from ((n, Answer([4], -1.0, True)) for n in range(len(requests)))

    monkeypatch.setattr(draw, "answer_all", answer_all)
    monkeypatch.setattr(
        "jaxpref.evaluate.generations.decode_continuation", lambda *_: next(texts)
    )
    out = tmp_path / "out.jsonl"
    words = f"--model {model} --n 3 --diverse --max-new-tokens 20 --out {out}"
    sample_command.command([*words.split(), "--prompts", "the film", "good", "meal"])
    assert [x.max_new_tokens for x in asked] == [60] * 3
    assert len(asked[0].tokens) > 50  # with the instruction
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the film", "meal"]
    found = [x["text"] for row in rows for x in row["completions"]]
    assert found == list(WORDS[:6])


@pytest.mark.parametrize(
    "words, message",
    [
        ("--diverse", "--diverse: needs several completions; pass --n"),
        (
            "--diverse --n 2 --decode qalign --reward rule:words",
            "--decode qalign: does",
        ),
        ("--diverse --n 2 --guide base:1 --guide-system a", "--guide-system: does not"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, words, message):
    model = make_model_folder(tmp_path / "model", 0)
    with pytest.raises(InputError, match=message):
        sample_command.command(
            f"--model {model} --prompts the {words}".split(),
        )


def prompt_of(prompt):
    example = Example(prompt, ())
    return Prompt("why?", [], {}, {}, example, "file row 1")


def test_a_system_message_replaces_that_of_the_prompt():
    user = {"role": "user", "content": "why?"}
    for turns in ([user], [{"role": "system", "content": "be kind"}, user]):
        found = with_system(prompt_of(tuple(turns)), "be rude", "--x")
        assert found.prompt == ({"role": "system", "content": "be rude"}, user)
    with pytest.raises(InputError, match="--x: prompts need a chat template"):
        with_system(prompt_of("why?"), "be rude", "--x")

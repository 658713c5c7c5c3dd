"""`jaxpref sample --pick mbr`, `--direction-prompt`, and the candidates of a choice."""

import json
from fractions import Fraction

import numpy as np
import pytest

from jaxpref import rewards
from jaxpref.cli import sample as command
from jaxpref.data import Prompt
from jaxpref.data import prompts as prompts_of_data
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate import draw, neighbors
from jaxpref.evaluate.chosen import Choice, chosen
from jaxpref.evaluate.generations import AlignmentOptions, DirectionOptions
from jaxpref.evaluate.sampled import Sampled
from jaxpref.rewards.follow_up import FollowUp
from jaxpref.sampling import Answer
from jaxpref.sampling.similarity import unigram_f1
from tests.tiny import WORDS, make_model_folder

PROMPTS = ["the film was", "we liked the warm"]
DIRECTED = "not {1} but {2} {prompt}"
RPS = [
    *("--pick", "best", "--reward", "rule:words", "--reward", "rule:distinct:1"),
    *("--weights", "0.2", "3", "--direction-prompt", DIRECTED, "--keep-candidates"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("picked") / "model", 0)


@pytest.fixture
def asked(monkeypatch):
    """The requests; each is answered by words that depend on its prompt and numbers."""
    found = []

    def answer_all(model, params, requests, rule, *, batch_size, largest):
        for n, request in enumerate(requests):
            found.append(request)
            rng = np.random.default_rng([*request.ids, *request.tokens])
            words = rng.integers(4, 9, rng.integers(1, 7)).tolist()
            yield n, Answer(words, -1.0, True)

    monkeypatch.setattr(draw, "answer_all", answer_all)
    return found


def sample(model, out, *words):
    line = ["--model", str(model), "--prompts", *PROMPTS, "--out", str(out)]
    line += ["--max-new-tokens", "20"]
    command.command([*line, *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


def texts_of(answers):
    return [one["text"] for one in answers]


def test_the_words_in_common_of_two_texts():
    texts = ["The cat sat.", "the cat, the dog", "a dog", "!"]
    expected = [
        [1, Fraction(4, 7), 0, 0],
        [Fraction(4, 7), 1, Fraction(1, 3), 0],
        [0, Fraction(1, 3), 1, 0],
        [0, 0, 0, 0],
    ]
    np.testing.assert_allclose(unigram_f1(texts), np.array(expected, float))
    assert unigram_f1([]).shape == (0, 0)


def overlap(a, b):
    """The F1 of the words in common, which are struck out one by one."""
    rest = b.split()
    for word in a.split():
        if word in rest:
            rest.remove(word)
    common = len(b.split()) - len(rest)
    return 2 * common / (len(a.split()) + len(b.split()))


def test_the_sample_that_agrees_best_is_kept(model, asked, tmp_path):
    every = sample(model, tmp_path / "all.jsonl", "--n", "6")
    words = ("--n", "6", "--pick", "mbr", "--keep-candidates")
    rows = sample(model, tmp_path / "one.jsonl", *words)
    for row, whole in zip(rows, every, strict=True):
        texts = texts_of(whole["completions"])
        risks = [np.mean([overlap(a, b) for b in texts]) for a in texts]
        assert texts_of(row["completions"]) == [texts[int(np.argmax(risks))]]
        assert texts_of(row["candidates"]) == texts
        found = [one["score"] for one in row["candidates"]]
        np.testing.assert_allclose(found, risks, rtol=1e-12)
        assert not {"score", "direction"} & row["completions"][0].keys()


@pytest.mark.parametrize("pick", ["mbr", "majority"])
def test_a_reward_of_the_decoding_does_not_choose(pick):
    def rewards_of(texts):
        raise AssertionError("no way of choosing reads rewards")

    texts = ["a b", "a b", "a b c", "x y z"]
    options = AlignmentOptions(decode="qalign", pick=pick, keep_candidates=True)
    (choice,) = chosen([texts], options, rewards_of)
    assert texts[choice.place] == "a b"
    found = [one.score for one in choice.scored([Sampled(x, 0.0, True) for x in texts])]
    if pick == "majority":
        assert found == [None] * 4
    else:
        risks = [np.mean([overlap(a, b) for b in texts]) for a in texts]
        np.testing.assert_allclose(found, risks)


def test_a_score_that_is_not_finite_is_no_number_of_json():
    choice = Choice(0, np.array([1.0, -np.inf, np.nan]))
    scored = choice.scored([Sampled("a", 0.0, True)] * 3)
    assert [one.score for one in scored] == [1, None, None]


def test_the_most_likely_answers_to_different_directions_differ(model, asked, tmp_path):
    rows = sample(model, tmp_path / "out.jsonl", "--n", "5", "--temperature", "0", *RPS)
    assert len(rows[0]["candidates"]) == 5


def test_answers_for_neighboring_preferences(model, asked, tmp_path):
    """Each is requested with its direction, and the best for --weights is kept."""
    rows = sample(model, tmp_path / "out.jsonl", "--n", "5", *RPS)
    assert [row["prompt"] for row in rows] == PROMPTS
    assert len({tuple(request.ids) for request in asked}) == 10
    place = lambda word: 4 + WORDS.index(word)
    for request in asked:  # <s> not UNK but UNK ..., since digits are no words here
        assert request.tokens[1] == place("not") and request.tokens[3] == place("but")
    target = np.array([0.2, 3]) / np.hypot(0.2, 3)
    every = [one for row in rows for one in row["candidates"]]
    directions = np.array([one["direction"] for one in every])
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    angles = np.degrees(np.arccos(directions @ target))
    assert len({*angles.round(6)}) == 10 and 15 < angles.max() <= 30
    for row in rows:
        utilities = []
        for one in row["candidates"]:
            words = one["text"].split()
            utilities.append(0.2 * len(words) + 3 * len({*words}) / len(words))
            assert one["score"] == pytest.approx(utilities[-1])
        kept = row["candidates"][int(np.argmax(utilities))]
        kept.pop("score")
        assert row["completions"] == [kept]


def test_interrupted_directions_are_resumed(model, asked, tmp_path, monkeypatch):
    rows = sample(model, tmp_path / "whole.jsonl", "--n", "5", *RPS)
    count = len(asked)
    whole, answer_all = tmp_path / "out.jsonl", draw.answer_all

    def interrupted(*args, **kwargs):
        for n, found in enumerate(answer_all(*args, **kwargs)):
            if n == 7:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(draw, "answer_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(model, whole, "--n", "5", *RPS)
    before = len(asked)
    assert sample(model, whole, "--n", "5", *RPS) == rows
    assert len(asked) - before == count - 7


def test_the_text_of_a_direction(monkeypatch):
    """It replaces a text, or the last message of a conversation."""
    monkeypatch.setattr(
        prompts_of_data, "encode_prompt", lambda tokenizer, example, **_: example.prompt
    )
    system = {"role": "system", "content": "be kind"}
    turns = (system, {"role": "user", "content": "why {2}?"})
    prompts = [
        Prompt("why?", [], {}, {}, Example(prompt, ()), "file row 1")
        for prompt in ("why?", turns)
    ]
    options = DirectionOptions(direction_prompt="help*{1} + brief*{2}. {prompt}")
    directions = np.array([[[0.6, -0.8]], [[0.996, 0.004]]])
    first, second = neighbors.asked(prompts, directions, options, None, 99)
    assert first.tokens == "help*60 + brief*-80. why?"
    content = "help*100 + brief*0. why {2}?"
    assert second.tokens == (system, {"role": "user", "content": content})
    with pytest.raises(InputError, match="row 1: with the text of --direction-prompt"):
        neighbors.asked(prompts, directions, options, None, 9)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--n 4 --direction-prompt {1}{2}{prompt}", "requires --pick best"),
        ("--n 4 --pick best --reward rule:words --direction-prompt {1}{2}", "at least"),
        (
            "--n 4 --pick best --reward rule:words --reward rule:characters "
            "--direction-prompt {1}{2}",
            r"\{prompt\} is missing",
        ),
        (
            "--n 4 --pick best --reward rule:words --reward rule:characters "
            "--direction-prompt {1}{2}{3}{prompt}",
            r"\{3\} is not one of these",
        ),
        (
            "--n 4 --pick best --reward rule:words --reward rule:characters "
            "--weights 0 0 --direction-prompt {1}{2}{prompt}",
            "--weights are all 0",
        ),
        (
            "--n 4 --pick best --reward rule:words --reward rule:characters "
            "--guide base:1 --guide-system a --direction-prompt {1}{2}{prompt}",
            "--guide-system: does not go with --direction-prompt",
        ),
        ("--n 4 --max-angle 20", "--max-angle: only --direction-prompt reads it"),
        ("--n 4 --keep-candidates", "--keep-candidates: only --pick best and"),
        ("--n 4 --pick mbr --keep-candidates", "--keep-candidates: is written to a"),
        ("--pick mbr", "--pick mbr: needs several completions"),
        ("--n 4 --pick mbr --reward rule:words", "--reward: only --pick best"),
    ],
)
def test_what_does_not_go_together_is_refused(model, words, message):
    with pytest.raises(InputError, match=message):
        command.command(["--model", str(model), "--prompts", "the", *words.split()])


def test_a_combined_reward_keeps_its_models(monkeypatch):
    """Models are loaded once; a rule is left as it is."""
    loaded = []
    options = rewards.ModelOptions()
    names = {"a": "first", "b": "second", "c": "third", "d": "fourth"}
    load = lambda weights, options: (loaded.append(weights) or weights.upper(), options)
    for module in ("models", "follow_up"):
        monkeypatch.setattr(f"jaxpref.rewards.{module}.in_memory", load)
    rule = rewards.reward_of("rule:words", options)
    parts = {
        "model": rewards.ModelReward("model", names["a"], options),
        "ratio": rewards.LogRatio("ratio", names["b"], names["c"], options),
        "follow-up": FollowUp("follow-up", names["d"], "Thanks!", options),
        "rule": rule,
    }
    found = rewards.Combined(parts, rewards.RewardOptions()).in_memory().parts
    assert loaded == [*names.values()]
    assert found["follow-up"].params == "FOURTH"
    assert found["model"].params == "FIRST" and found["rule"] is rule
    assert found["ratio"].params == ("SECOND", "THIRD")

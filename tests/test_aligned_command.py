"""`jaxpref sample --pick` and `--decode`: completions by their rewards."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.data import Prompt, RecordOptions, load_tokenizer
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate import draw as drawing
from jaxpref.evaluate.chosen import reward_of_texts
from jaxpref.evaluate.generations import AlignmentOptions, GuideOptions, SampleConfig
from jaxpref.evaluate.generations import run as sample
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from jaxpref.rewards import RewardOptions
from tests.tiny import make_model_folder

REWARD = RewardOptions(reward=("rule:distinct:1",))
DEFAULT = GuideOptions()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aligned")
    model = make_model_folder(folder / "model", 0)
    return SampleConfig(
        model=str(model),
        prompts=("the film was", "we liked the warm"),
        n=8,
        max_new_tokens=7,
        out=str(folder / "out.json"),
    )


def reward(text: str) -> float:
    """The share of distinct words; 1 of an empty text."""
    words = text.split()
    return len(set(words)) / len(words) if words else 1.0


def by_prompt(rows) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["instruction"], []).append(row["output"])
    return list(found.values())


def check_logps(config, rows):
    """Against the logits of whole texts: every word is a token, and of a completion of
    the full length, all tokens are words."""
    folder = config.model
    tokenizer, model = load_tokenizer(folder), build(read_architecture(folder))
    params = load_params(folder, model)
    logits = jax.jit(model.logits)
    whole = [x for x in rows if len(x["output"].split()) == config.max_new_tokens]
    assert whole
    for row in whole:
        prompt = [1, *tokenizer(row["instruction"], add_special_tokens=False).input_ids]
        answer = tokenizer(row["output"], add_special_tokens=False).input_ids
        tokens = jnp.array([[*prompt, *answer, *[0] * (16 - len(prompt + answer))]])
        logps = jax.nn.log_softmax(logits(params, tokens))[0]
        places = np.arange(len(answer)) + len(prompt) - 1
        expected = float(jnp.sum(logps[places, np.array(answer)]))
        assert row["logp"] == pytest.approx(expected, abs=1e-4)


def test_one_of_the_samples_is_kept(config):
    every = by_prompt(sample(config))
    best = AlignmentOptions(pick="best")
    rows = sample(config, DEFAULT, best, REWARD)
    assert [x["output"] for x in rows] == [max(own, key=reward) for own in every]
    assert not any("sample" in x for x in rows)
    # Equal answers, up to case and spaces, are rare here: the first one is kept.
    rows = sample(config, DEFAULT, AlignmentOptions(pick="majority"))
    counts = [[own.count(x) for x in own] for own in every]
    expected = [own[int(np.argmax(n))] for own, n in zip(every, counts)]
    assert [x["output"] for x in rows] == expected


def test_a_chain_with_a_small_beta_only_climbs(config, monkeypatch):
    alignment = AlignmentOptions(decode="qalign", steps=5, beta=1e-6)
    start, rows = by_prompt(sample(config)), sample(config, DEFAULT, alignment, REWARD)
    check_logps(config, rows)
    ends = by_prompt(rows)
    gains = [
        reward(new) - reward(old)
        for own, others in zip(start, ends)
        for old, new in zip(own, others)
    ]
    assert min(gains) >= 0 < max(gains)
    again = sample(
        dataclasses.replace(config, batch_size=8), DEFAULT, alignment, REWARD
    )
    assert by_prompt(again) == ends
    # Interrupted in its third step, it finishes with the same answers.
    count, answer_all = 0, drawing.answer_all

    def interrupted(*args, **kwargs):
        nonlocal count
        for found in answer_all(*args, **kwargs):
            if (count := count + 1) == 35:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "answer_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sample(config, DEFAULT, alignment, REWARD)
        assert by_prompt(sample(config, DEFAULT, alignment, REWARD)) == ends
    assert count == 35 + 96 - 34
    with open(config.out) as file:
        assert [row["output"] for row in json.load(file)] == sum(ends, [])


def test_transfer_q_with_a_small_beta_takes_the_candidate_of_largest_value(config):
    """With one token left, its value is the reward, and no rollout is drawn."""
    config = dataclasses.replace(config, n=1, max_new_tokens=1, temperature=0.0)
    alignment = AlignmentOptions(
        decode="transfer-q", beta=1e-6, candidates=40, rollouts=1
    )
    longest = RewardOptions(reward=("rule:characters",))
    rows = sample(config, DEFAULT, alignment, longest)
    tokenizer = load_tokenizer(config.model)
    words = [tokenizer.decode([n], skip_special_tokens=True) for n in range(40)]
    assert {len(x["output"].strip()) for x in rows} == {max(map(len, words))}


@pytest.mark.slow
def test_transfer_q_draws_rollouts_of_a_baseline(config, tmp_path):
    baseline = make_model_folder(tmp_path / "baseline", 1)
    config = dataclasses.replace(config, n=2, max_new_tokens=4)
    alignment = AlignmentOptions(decode="transfer-q", candidates=3, rollouts=2)
    rows = sample(config, DEFAULT, alignment, REWARD)
    check_logps(config, rows)
    other = dataclasses.replace(alignment, baseline=str(baseline), beta=0.01)
    rows = sample(config, DEFAULT, other, REWARD)
    check_logps(config, rows)
    assert by_prompt(sample(config, DEFAULT, other, REWARD)) == by_prompt(rows)


@pytest.mark.parametrize(
    "options, rewards, message",
    [
        (dict(pick="best"), (), "--pick best: needs a --reward"),
        (dict(decode="qalign"), (), "--decode qalign: needs a --reward"),
        (dict(), ("rule:words",), "--reward: only --pick best"),
        (dict(decode="qalign"), ("judge:DIR",), "--reward judge:DIR: compares"),
        (dict(pick="majority", steps=3), (), "--steps: only --decode qalign reads it"),
        (dict(vote_on="number"), (), "--vote-on: only --pick majority and"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, options, rewards, message):
    with pytest.raises(InputError, match=message):
        sample(
            config, DEFAULT, AlignmentOptions(**options), RewardOptions(reward=rewards)
        )


def test_one_completion_leaves_nothing_to_pick(config):
    with pytest.raises(InputError, match="--pick majority: needs several"):
        sample(
            dataclasses.replace(config, n=1), DEFAULT, AlignmentOptions(pick="majority")
        )


@pytest.mark.parametrize("decode", ["qalign", "transfer-q"])
@pytest.mark.parametrize("combine", ["log_sigmoid", "constrained"])
def test_rewards_that_depend_on_the_batch_are_refused_in_decoding(
    config, decode, combine
):
    rewards = RewardOptions(
        reward=("rule:words", "rule:characters"), combine=combine, at_least=(1.0,)
    )
    with pytest.raises(InputError, match=f"--combine {combine}: depends on the"):
        AlignmentOptions(decode=decode).check(config, rewards)
    AlignmentOptions(pick="best").check(config, rewards)


@pytest.mark.parametrize("options", [dict(pick="majority"), dict(decode="qalign")])
def test_greedy_samples_leave_no_choice(config, options):
    greedy = dataclasses.replace(config, temperature=0.0)
    rewards = REWARD if "decode" in options else RewardOptions()
    with pytest.raises(InputError, match="--temperature 0: .*a higher temperature"):
        AlignmentOptions(**options).check(greedy, rewards)


def test_reward_options_without_a_reader_are_refused(config):
    with pytest.raises(InputError, match="--weights: only --pick best"):
        AlignmentOptions().check(config, RewardOptions(weights=(1.0,)))


def test_a_baseline_needs_the_positions_too(config, tmp_path):
    baseline = make_model_folder(tmp_path / "baseline", 1, max_position_embeddings=8)
    alignment = AlignmentOptions(decode="transfer-q", baseline=str(baseline))
    with pytest.raises(InputError, match="exceed the 8 positions of --baseline"):
        sample(config, DEFAULT, alignment, REWARD)


def test_nothing_to_draw_loads_no_model():
    assert drawing.draw(None, None, None, {}, batch_size=1, kept=None) == {}


def test_ignored_fields_are_ignored_by_rewards():
    record = {"prompt": "the film", "system": "be brief"}
    prompt = Prompt("the film", [], record, record, Example("the film", ()), "row 1")
    options = RecordOptions(ignore_fields=("system", "completions"))
    read = []

    def rewards(answered):
        read.extend(answered)
        return [np.zeros(1)]

    reward_of_texts(rewards, [prompt], options)([["good"]])
    assert [(x.example.prompt, x.texts) for x in read] == [("the film", ["good"])]


def test_options_of_records_are_checked(config):
    split = dataclasses.replace(config, ignore_fields=("a,b",))
    assert split.ignore_fields == ("a", "b")
    with pytest.raises(InputError, match="--template.messages: only the run"):
        dataclasses.replace(config, template=("messages=[]",))
    with pytest.raises(InputError, match="seed -1: must be at least 0"):
        dataclasses.replace(config, seed=-1)

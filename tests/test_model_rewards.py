"""Rewards of models, compared with one sequence at a time."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxpref import data, rewards
from jaxpref.errors import InputError
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.rewards import follow_up, judge, models
from tests.compiled import compiled
from tests.test_rewards import answered, score
from tests.tiny import make_model_folder, make_tokenizer, tiny_config, tiny_params

RECORDS = [
    {"prompt": "the film", "completions": [" is good", " was a dull book", " is good"]},
    {"prompt": "a meal", "completions": [" never again"]},
    {"prompt": "the book", "completions": [" is fine", "", " is great and warm"]},
    {"chosen": "we saw it", "rejected": "we liked it always", "prompt": ""},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model_folder(folder / "strong", seed=1)
    make_model_folder(folder / "weak", seed=2)
    network = RewardModel(tiny_config())
    (folder / "reward").mkdir()
    make_tokenizer(folder / "reward")
    save(folder / "reward", network, tiny_params(network))
    return folder


def make_chat_model(folder, seed):
    make_model_folder(folder, seed=seed)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + ' ' }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}we {% endif %}"
        "{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def alone(of_tokens, tokenizer, record):
    """`of_tokens(tokens, size of the prompt)` of each answer; tokens by hand."""
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = [tokenizer.bos_token_id, *ids(record["prompt"])]
    texts = record.get("completions") or [record["chosen"], record["rejected"]]
    whole = [[*prompt, *ids(text), tokenizer.eos_token_id] for text in texts]
    return [of_tokens(jnp.array([x]), len(prompt)) for x in whole]


def test_a_reward_model(folders, tmp_path):
    folder = folders / "reward"
    model = RewardModel(read_architecture(folder))
    params = load_params(folder, model)
    rewards_of = jax.jit(model.rewards)
    of_tokens = lambda x, _: float(rewards_of(params, x, jnp.array([x.shape[1]]))[0])
    tokenizer = data.load_tokenizer(folder)
    found = score(tmp_path, RECORDS, "--model", str(folder))
    assert found[2]["scores"].pop(1) is None  # an empty answer
    for record, scored in zip(RECORDS[:3], found):
        texts = [text for text in record["completions"] if text]
        expected = alone(of_tokens, tokenizer, record | {"completions": texts})
        np.testing.assert_allclose(scored["scores"], expected, atol=1e-5)
    pair = [found[3]["chosen_score"], found[3]["rejected_score"]]
    expected = alone(of_tokens, tokenizer, RECORDS[3])
    np.testing.assert_allclose(pair, expected, atol=1e-5)


def test_a_log_ratio(folders):
    def logp(folder, tokens, start):
        model = build(read_architecture(folder))
        params = load_params(folder, model)
        logits = jax.jit(model.logits)(params, tokens)[0]
        each = jax.nn.log_softmax(logits[:-1].astype(float))
        picked = each[np.arange(tokens.shape[1] - 1), np.asarray(tokens)[0, 1:]]
        return float(picked[start - 1 :].sum())

    strong, weak = folders / "strong", folders / "weak"
    word = f"log-ratio:{strong}:{weak}"
    reward = rewards.reward_of(word, rewards.ModelOptions())
    tokenizer = data.load_tokenizer(strong)
    (found,) = reward(answered(RECORDS[0]))
    ratio = lambda x, start: logp(strong, x, start) - logp(weak, x, start)
    np.testing.assert_allclose(found, alone(ratio, tokenizer, RECORDS[0]), atol=1e-4)


def test_many_answers_are_split_over_rows(folders, monkeypatch):
    word = str(folders / "reward")
    reward = rewards.reward_of(word, rewards.ModelOptions())
    whole = reward(answered(*RECORDS))
    monkeypatch.setattr(models, "TOKENS", 9)
    for one, other in zip(whole, reward(answered(*RECORDS)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_answer_that_cannot_be_read_has_no_score(folders, tmp_path, capsys):
    long = {"prompt": "a", "completions": [" good", " </s> good", " the"]}
    (found,) = score(tmp_path, [long], "--model", str(folders / "reward"))
    assert [x is None for x in found["scores"]] == [False, True, False]
    assert "1 without a score" in capsys.readouterr().out


def test_turns_are_rendered_and_texts_are_not(tmp_path):
    """`jaxpref sample` writes turns if it has used the chat template."""
    for seed, name in enumerate(("strong", "weak")):
        make_chat_model(tmp_path / name, seed)
    word = f"log-ratio:{tmp_path / 'strong'}:{tmp_path / 'weak'}"
    options = rewards.ModelOptions()
    reward = rewards.reward_of(word, options)
    turns = [{"role": "user", "content": "the film"}]
    sampled = {"prompt": turns, "completions": [{"text": "is good", "logp": -1.0}]}
    chat = {"prompt": turns, "completions": ["is good"]}
    plain = {"prompt": "the film", "completions": ["is good"]}
    found = [float(x[0]) for x in reward(answered(sampled, chat, plain))]
    assert found[0] == found[1] != found[2]


def test_a_judge_compares_in_both_orders(folders, monkeypatch):
    """A judge that says A with a probability that depends on both answers' lengths."""
    asked, pattern = [], r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n"

    def fake(weights, name, questions, options, title, *, allow_cut):
        assert name == "policy_logps" and not allow_cut
        assert options.max_length == 128  # the model's context
        found = []
        for question in questions:
            asked.append(question.example.prompt)
            ((a, b),) = re.findall(pattern, question.example.prompt)
            found.append(np.array([0.3 + len(a) - len(b), 0.0]))  # 0.3 for the first
        return found

    monkeypatch.setattr(judge, "score", fake)
    options = rewards.RewardOptions(principle="be {prompt}")
    word = f"judge:{folders / 'weak'}"
    reward = rewards.reward_of(word, rewards.ModelOptions(), options)
    record = {"prompt": "say {a}", "completions": ["a", "{b}", "ab"]}
    (found,) = reward(answered(record))
    wins = lambda d: (expit(0.3 + d) + expit(d - 0.3)) / 2
    lengths = [1, 3, 2]
    expected = [
        np.mean([wins(x - y) for m, y in enumerate(lengths) if m != n])
        for n, x in enumerate(lengths)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(asked) == 6 and "principle: be {prompt}?" in asked[0]
    assert "[Question]\nsay {a}\n" in asked[0]
    with pytest.raises(InputError, match="row 1: has one answer"):
        reward(answered({"prompt": "p", "completion": "a"}))


def test_a_judge_reads_letters(folders):
    """Of a real model: the wins of all answers add up to half of the pairs'."""
    reward = rewards.reward_of(f"judge:{folders / 'weak'}", rewards.ModelOptions())
    (found,) = reward(answered({"prompt": "the", "completions": ["a", "is"]}))
    assert found.sum() == pytest.approx(1) and 0 < found[0] < 1


def test_a_follow_up(folders):
    folder = folders / "strong"
    options = rewards.RewardOptions(follow_up_model=str(folder))
    models_of = rewards.ModelOptions()
    reward = rewards.reward_of("follow-up:great and fine", models_of, options)
    record = {"prompt": "the film", "completions": [" is good", " is dull"]}
    (found,) = reward(answered(record))
    tokenizer = data.load_tokenizer(folder)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    model = build(read_architecture(folder))
    logits_of = jax.jit(model.logits)
    params = load_params(folder, model)
    for text, value in zip(record["completions"], found, strict=True):
        before = [tokenizer.bos_token_id, *ids(record["prompt"] + text)]
        after = [*ids("great and fine"), tokenizer.eos_token_id]
        logits = logits_of(params, jnp.array([before + after]))[0]
        each = jax.nn.log_softmax(logits[len(before) - 1 : -1].astype(float))
        expected = each[np.arange(len(after)), np.array(after)].sum()
        assert value == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(InputError, match="--follow-up-model"):
        rewards.reward_of("follow-up:thanks", models_of)


def test_a_follow_up_is_the_users_next_turn(tmp_path, monkeypatch):
    make_chat_model(tmp_path, 0)
    asked = []
    score = lambda _, __, x, *___, params: asked.extend(x) or [np.zeros(1)] * 2
    monkeypatch.setattr(follow_up, "score", score)
    options = rewards.RewardOptions(follow_up_model=str(tmp_path))
    reward = rewards.reward_of("follow-up:great", rewards.ModelOptions(), options)
    turns = [{"role": "user", "content": "the film"}]
    answers = [{"text": "is good"}, {"text": "is great"}]
    reward(answered({"prompt": turns, "completions": answers}))
    assert [x.example.prompt for x in asked] == [
        "<s>the film we is good </s>",
        "<s>the film we is great </s>",
    ]
    assert {x.example.completions for x in asked} == {("great",)}


def test_the_wrong_kind_of_model_is_refused(folders):
    with pytest.raises(InputError, match="holds a language model"):
        rewards.reward_of(str(folders / "weak"), rewards.ModelOptions())
    word = f"log-ratio:{folders / 'reward'}:{folders / 'weak'}"
    with pytest.raises(InputError, match="is a reward model"):
        rewards.reward_of(word, rewards.ModelOptions())


def test_a_loaded_model_gives_the_same_rewards(folders):
    """In memory, with lengths that are rounded up; other lengths compile nothing."""
    options = models.ModelOptions(batch_size=8)
    plain = models.model_reward(str(folders / "reward"), options)
    loaded = plain.loaded()
    asked = answered(*RECORDS[:3])
    for one, other in zip(plain(asked), loaded(asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    shorter = [{"prompt": "a", "completions": [" good", " fine", " warm"]}] * 3
    with compiled("score_step") as programs:
        loaded(answered(*shorter))
    assert not programs


def test_a_loaded_log_ratio_is_the_same(folders):
    strong, weak = str(folders / "strong"), str(folders / "weak")
    plain = models.log_ratio(strong, weak, models.ModelOptions(batch_size=8))
    asked = answered(*RECORDS[:3])
    for one, other in zip(plain(asked), plain.loaded()(asked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)

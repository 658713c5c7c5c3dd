"""KL and reward of what a policy writes, against enumeration and plain numpy."""

import json

import jax
import numpy as np
import pytest
import scipy.special

from jaxpref import data
from jaxpref.data.read import read_datasets
from jaxpref.data.records import Example
from jaxpref.errors import InputError
from jaxpref.evaluate.on_policy import (
    Compute,
    Prompts,
    heldout_prompts,
    measure,
    reward_folder,
)
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.train import MeshConfig, make_mesh
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params

PROMPT = "the film was"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, its reference, a reward model, and pairs with few prompts."""
    folder = tmp_path_factory.mktemp("folders")
    make_model_folder(folder / "policy", 0)
    make_model_folder(folder / "reference", 1)
    model = RewardModel(tiny_config())
    save(folder / "reward", model, tiny_params(model, 2), folder / "policy")
    return folder


def compute():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    return Compute(mesh=mesh, batch_size=256, numerics=Numerics())


def same_prompt(folders, count, max_new_tokens):
    """One prompt, answered many times: rows of a batch have their own randomness."""
    tokenizer = data.load_tokenizer(folders / "policy")
    tokens = tuple(data.encode_prompt(tokenizer, PROMPT))
    return Prompts(
        tokens=(tokens,) * count,
        examples=(Example(PROMPT, ()),) * count,
        max_new_tokens=max_new_tokens,
    )


def log_probs(folder, sequences):
    """Float64 [N, T, V] of the next tokens."""
    model = build(read_architecture(folder))
    logits = jax.jit(model.logits)(load_params(folder, model), np.array(sequences))
    return scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)


def test_the_kl_is_that_of_all_answers(folders):
    """Of two tokens: every first one, and what follows it unless it ends the answer."""
    prompts = same_prompt(folders, 512, max_new_tokens=2)
    found = measure(
        folders / "policy", folders / "reference", prompts, None, compute=compute()
    )
    stops = data.stop_tokens(data.load_tokenizer(folders / "policy"))
    prompt, vocabulary = list(prompts.tokens[0]), tiny_config().vocab_size
    sequences = [[*prompt, token] for token in range(vocabulary)]
    policy, reference = (
        log_probs(folders / name, sequences)[:, len(prompt) - 1 :]
        for name in ("policy", "reference")
    )
    kl = np.sum(np.exp(policy) * (policy - reference), axis=-1)  # [V, 2]
    goes_on = ~np.isin(np.arange(vocabulary), stops)
    first = np.exp(policy[0, 0])
    exact = kl[0, 0] + np.sum(first * goes_on * kl[:, 1])
    assert exact > 0.3 and goes_on.sum() == vocabulary - 1
    for name in ("kl", "log_ratio"):
        assert abs(found[name] - exact) < 4 * found[f"{name}_error"]
    assert found["kl_error"] < 0.5 * found["log_ratio_error"]
    assert found["samples"] == 512
    two_tokens = np.sum(first * goes_on)
    assert found["tokens"] == pytest.approx(1 + two_tokens, abs=0.05)
    second = np.sum(first * goes_on * np.exp(policy[:, 1, stops]).sum(-1))
    assert found["ended"] == pytest.approx(1 - two_tokens + second, abs=0.05)
    assert "reward" not in found


@pytest.mark.slow
def test_the_reference_itself_has_no_kl_and_its_mean_reward(folders, monkeypatch):
    prompts = same_prompt(folders, 16, max_new_tokens=8)
    judge, drawn = reward_folder(str(folders / "reward")), []
    reward = lambda name: measure(
        folders / name, folders / "policy", prompts, judge, compute=compute()
    )
    import jaxpref.evaluate.on_policy as module

    answered = module._answered
    monkeypatch.setattr(
        module,
        "_answered",
        lambda *given: drawn.append(given) or answered(*given),
    )
    found = reward("policy")
    assert found["kl"] == found["kl_error"] == found["log_ratio"] == 0
    model = RewardModel(read_architecture(folders / "reward"))
    params = load_params(folders / "reward", model)
    tokenizer = data.load_tokenizer(folders / "policy")
    scores = []
    for _, text, ended in drawn:
        tokens = [*prompts.tokens[0], *tokenizer(text)["input_ids"]]
        tokens = [t for n, t in enumerate(tokens) if t > 2 or n == 0]
        tokens += [tokenizer.eos_token_id] * ended
        if text.strip():
            padded = np.pad(tokens, (0, 24 - len(tokens)))[None]
            length = np.array([len(tokens)])
            scores.append(float(model.rewards(params, padded, length)[0]))
    assert found["rewarded"] == len(scores) > 10
    assert found["reward"] == pytest.approx(np.mean(scores), abs=1e-4)
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    assert found["reward_error"] == pytest.approx(error, abs=1e-4)


def test_prompts_are_held_out_distinct_and_leave_room(folders, tmp_path):
    path = make_pairs_file(tmp_path / "pairs.jsonl", 40)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    again = [row | {"chosen": " good", "rejected": " bad"} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    options = data.DataOptions(max_length=64, heldout_fraction=0.4)
    datasets = read_datasets(
        data.load_tokenizer(folders / "policy"),
        options,
        kind=data.PAIRS,
        mix=None,
        train=str(path),
        heldout=None,
    )
    ask = lambda **sizes: heldout_prompts(
        datasets,
        options,
        **{"count": 99, "max_new_tokens": 8, "positions": 128} | sizes,
    )
    heldout = datasets.splits.heldout
    expected = {rows[row]["prompt"] for row in heldout.columns["row"] if row < 40}
    found = ask()
    assert [x.prompt for x in found.examples] == [
        *dict.fromkeys(x.prompt for x in found.examples)
    ]
    assert {x.prompt for x in found.examples} == expected
    tokenizer = data.load_tokenizer(folders / "policy")
    for tokens, example in zip(found.tokens, found.examples):
        assert list(tokens) == data.encode_prompt(tokenizer, example.prompt)
    assert ask(count=3).tokens == found.tokens[:3]
    lengths = sorted(map(len, found.tokens))
    short = ask(positions=8 + lengths[0])
    assert 0 < len(short.tokens) < len(found.tokens)
    assert {len(x) for x in short.tokens} == {lengths[0]}
    with pytest.raises(InputError, match="--kl-tokens 200: no held-out prompt leaves"):
        ask(max_new_tokens=200)


def test_a_language_model_is_no_reward_model(folders):
    with pytest.raises(InputError, match="--reward-model .*policy: is not a reward"):
        reward_folder(str(folders / "policy"))

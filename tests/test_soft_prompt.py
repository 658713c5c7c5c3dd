"""Soft prompts: what they compute, train, store and refuse."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.evaluation import run as evaluate
from jaxpref.evaluate.generations import SampleConfig
from jaxpref.evaluate.generations import run as sample
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.lora import LoraOptions
from jaxpref.models.soft_prompt import PROMPT, SoftPrompt, SoftPromptOptions
from jaxpref.objectives import from_loss
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import OptimizerConfig, TrainConfig, read_metrics, run
from jaxpref.train.gradient import gradient
from tests.family_cases import architecture_of, random_params
from tests.test_packing import make_pairs, packed, padded
from tests.test_training import mesh_of
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params

TOKENS = 7, 9, 30
SLOW = pytest.mark.slow
LOGPS = frozenset({"policy_logps"})


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(24)


def really_prefixed(pairs):
    """The pairs, with the tokens in the places of placeholders."""
    found = pairs.prefixed(len(TOKENS))
    tokens = found.tokens.copy()
    for start in found.offsets[:-1]:
        assert not tokens[start : start + len(TOKENS)].any()
        tokens[start : start + len(TOKENS)] = TOKENS
    assert found.prompt(3)[len(TOKENS) :].tolist() == pairs.prompt(3).tolist()
    assert found.completion(3, 1).tolist() == pairs.completion(3, 1).tolist()
    return dataclasses.replace(found, tokens=tokens)


def first(batch):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


def test_embeddings_of_tokens_are_read_as_these_tokens(pairs):
    """In packed rows and, in the same program's numbers, in padded ones."""
    model = build(tiny_config())
    params = tiny_params(model)
    part = SoftPrompt(len(TOKENS), TOKENS)
    joined = part.join(part.trained(params, model, jax.random.key(0)), params)
    scorer = jax.jit(make_scorer(model, LOGPS, chunk_size=4))
    batch, held = packed(pairs.prefixed(len(TOKENS)), row_length=64)
    found = scorer(joined, {}, first(batch)).scores["policy_logps"]
    real, _ = packed(really_prefixed(pairs), row_length=64)
    expected = scorer(params, {}, first(real)).scores["policy_logps"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    other = scorer(params, {}, first(batch)).scores["policy_logps"]
    assert np.abs(np.asarray(other - expected)).max() > 0.1
    whole = first(padded(pairs.prefixed(len(TOKENS)), held))
    of_pair = np.asarray(scorer(joined, {}, whole).scores["policy_logps"])[:, 0]
    at = np.asarray(batch.pair_index[0])
    ours = np.stack([found[tuple(np.argwhere(at == n)[0])] for n in held])
    np.testing.assert_allclose(ours, of_pair, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["gemma2", pytest.param("gemma3", marks=SLOW)])
def test_gemma_scales_the_embeddings_of_tokens_alone(case):
    """A soft prompt that starts from tokens is read as these tokens, scaled once."""
    model = build(architecture_of(case))
    params, part = random_params(model), SoftPrompt(len(TOKENS), TOKENS)
    joined = part.join(part.trained(params, model, jax.random.key(0)), params)
    text = np.array([[5, 9, 4, 12, 8]])
    real, placed = ([[*start, *text[0]]] for start in (TOKENS, (0, 0, 0)))
    logits = jax.jit(model.logits)
    expected = logits(params, np.array(real))
    found = logits(joined, np.array(placed))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_gradient_is_that_of_whole_sequences(pairs, sizes):
    """Of packed rows, in two micro-batches or on a mesh; to rounding in float32."""
    prefixed = pairs.prefixed(len(TOKENS))
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    objective = from_loss(losses.dpo)
    part = SoftPrompt(len(TOKENS), TOKENS)

    def of(batch, *sizes):
        with jax.set_mesh(mesh_of(*sizes)):
            model = build(tiny_config(), Numerics(remat="full"))
            params = tiny_params(model)
            scorer = make_scorer(model, objective.scores, chunk_size=4)
            score = lambda p, micro: scorer(part.join(p, params), {}, micro)
            placed = to_global(jax.device_get(batch), jax.sharding.get_mesh())
            step = jax.jit(lambda p, b: gradient(objective, score, p, b, {})[0])
            prompt = part.trained(params, model, jax.random.key(0))
            return np.asarray(jax.device_get(step(prompt, placed))[PROMPT])

    count = 1 if sizes == (1, 1, 1) else 2
    batch, held = packed(
        prefixed, rows=8, row_length=64, accumulation=3 - count, reference=zeros
    )
    expected = of(padded(prefixed, held, zeros), 1, 1, 1)
    found = of(batch, *sizes)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        model=str(make_model_folder(tmp_path / "model")),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl", 24)),
        out=str(tmp_path / "run"),
        objective=from_loss(losses.dpo, beta=0.5),
        soft_prompt=SoftPromptOptions(text="the film was good", length=5),
        options=DataOptions(max_length=32, heldout_fraction=0.2),
        max_steps=3,
        batch_size=4,
        log_every=1,
        optimizer=OptimizerConfig(learning_rate=0.3),
    )


def test_a_run_trains_the_prompt_alone_and_starts_at_log_2(config, tmp_path):
    run(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [x["loss"] for x in lines if "loss" in x]
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(found[-1] - found[0]) > 1e-4
    folder = tmp_path / "run" / "adapter"
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["peft_type"] == "PROMPT_TUNING"
    assert fields["num_virtual_tokens"] == 5
    assert not (tmp_path / "run" / "export").exists()
    asked = SampleConfig(
        model=config.model,
        prompts=("the film was", "we liked the"),
        max_new_tokens=4,
        temperature=0.0,
        out=str(tmp_path / "answers.json"),
    )
    plain = sample(asked)
    prompted = sample(dataclasses.replace(asked, adapter=str(folder)))
    assert [x["logp"] for x in plain] != [x["logp"] for x in prompted]
    again = dataclasses.replace(
        config,
        soft_prompt=SoftPromptOptions(),
        adapter=str(folder),
        out=str(tmp_path / "again"),
        max_steps=1,
    )
    run(again)
    lines = read_metrics(tmp_path / "again" / "metrics.jsonl")
    start = next(x["loss"] for x in lines if "loss" in x)
    assert start == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_reward_model_trains_its_head_beside_the_prompt(config, tmp_path):
    changes = dict(objective=from_loss(losses.bradley_terry), max_steps=2)
    run(dataclasses.replace(config, **changes))
    folder = tmp_path / "run" / "adapter"
    fields = json.loads((folder / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS" and fields["modules_to_save"] == ["score"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = [x for x in lines if "eval_rewards/margins" in x][-1]
    found = evaluate(
        EvaluateConfig(
            model=config.model,
            adapter=str(folder),
            data=config.data,
            out=str(tmp_path / "evaluated"),
            max_length=32,
        )
    )
    assert found["rewards/chosen"] != 0 and math.isfinite(last["eval_rewards/margins"])
    more = dict(soft_prompt=SoftPromptOptions(), adapter=str(folder), max_steps=1)
    run(dataclasses.replace(config, **changes | more, out=str(tmp_path / "more")))
    trained = {path.name for path in (tmp_path / "more" / "adapter").iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "reward_head.json"}
    assert trained == files
    assert not (tmp_path / "more" / "export").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(lora=LoraOptions(rank=2)), "--lora.rank 2: only the soft prompt is"),
        (dict(train="head"), "--train head: only the soft prompt is trained"),
    ],
)
def test_what_a_soft_prompt_excludes(config, changes, words):
    with pytest.raises(InputError, match=words):
        run(dataclasses.replace(config, **changes))


def test_wrong_options_and_folders_are_refused(tmp_path):
    from jaxpref.models.soft_prompt_files import load_soft_prompt, save_soft_prompt

    with pytest.raises(InputError, match="--soft-prompt.length 5000: must be at most"):
        SoftPromptOptions(length=5000)
    model, wider = build(tiny_config()), build(tiny_config(hidden_size=32))
    prompt = {PROMPT: jnp.ones((3, 16))}
    save_soft_prompt(tmp_path, model, prompt, base="base", dtype="float32")
    np.testing.assert_array_equal(load_soft_prompt(tmp_path, model)[PROMPT], 1)
    with pytest.raises(InputError, match=r"tensors prompt_embeddings \[3, 32\] and"):
        load_soft_prompt(tmp_path, wider)
    with pytest.raises(InputError, match=r"\[3, 16\] and base_model.score.weight \[1"):
        load_soft_prompt(tmp_path, RewardModel(tiny_config()))

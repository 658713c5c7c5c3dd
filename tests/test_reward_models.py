"""Reward models: where a score is read, folders, dropout, and training by the loop."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxpref import losses
from jaxpref.errors import InputError
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import is_reward_model, read_architecture
from jaxpref.models.reward import Padding, padding_of
from jaxpref.objectives import Objective, em, from_loss
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.scoring.scores import last_tokens, reads_reference
from jaxpref.train import Decay, OptimizerConfig, read_metrics
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from tests.compiled import compiled
from tests.test_training import pairs  # noqa: F401
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    make_tokenizer,
    padded_batches,
    tiny_config,
    tiny_params,
)

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(4, 36, (8, 12)).astype(np.int32)
LENGTHS = np.array([12, 3, 1, 7, 12, 5, 9, 2], np.int32)


def mesh_of(*sizes):
    names, types = ("data", "fsdp", "tensor"), (AxisType.Explicit,) * 3
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=types, devices=devices)


@pytest.fixture(scope="module")
def model():
    return RewardModel(tiny_config())


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model)


def test_a_score_is_the_head_on_the_last_real_state(model, params):
    """Of the language model's own states, one sequence at a time, without padding."""
    lm = build(tiny_config(tie_word_embeddings=True))
    backbone = {name: x for name, x in params.items() if name != "score"}
    score = np.asarray(params["score"], np.float64)[:, 0]
    expected = []
    for row, length in zip(TOKENS[:3], LENGTHS):
        states = lm.hidden(backbone, row[None, :length])
        expected.append(np.asarray(states, np.float64)[0, -1] @ score)
    rewards = jax.jit(model.rewards)
    found = rewards(params, TOKENS, LENGTHS)
    assert found.dtype == jnp.float32 and np.std(expected) > 0.1
    np.testing.assert_allclose(found[:3], expected, rtol=0, atol=1e-5)
    # Tokens after the end do not matter: to the bit, as the program is the same.
    changed = np.where(np.arange(12) < LENGTHS[:, None], TOKENS, 5)
    np.testing.assert_array_equal(rewards(params, changed, LENGTHS), found)


def test_scores_are_read_where_asked(model, params):
    at = np.array([[0, 6], [2, 1]])
    states, _ = model.states_and_router(params, TOKENS[:2], at)
    found = model.head(params, states)
    for row in range(2):
        for place in range(2):
            alone = model.rewards(params, TOKENS[[row]], at[[row], place] + 1)
            np.testing.assert_allclose(found[row, place], alone[0], atol=1e-6)


def test_scores_of_bfloat16_states_are_summed_in_float32(params):
    narrow = RewardModel(tiny_config(), Numerics(compute_dtype="bfloat16"))
    found = narrow.rewards(params, TOKENS, LENGTHS)
    exact = RewardModel(tiny_config()).rewards(params, TOKENS, LENGTHS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, atol=0.1)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        (2, 2, 2),
        pytest.param((1, 4, 2), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same_scores_and_slopes(model, params, sizes):
    def total(params):
        rewards = model.rewards(params, TOKENS, LENGTHS)
        return jnp.sum(jnp.sin(rewards)), rewards

    both = jax.jit(jax.grad(total, has_aux=True))
    expected = both(params)
    with jax.set_mesh(mesh_of(*sizes)):
        found = both(tiny_params(model))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- the head to begin with

KEY = jax.random.key(3)


def test_a_new_head_is_small_and_belongs_to_its_key():
    wide = RewardModel(tiny_config(hidden_size=4096))
    heads = [wide.new_head(jax.random.key(seed))["score"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert abs(np.corrcoef(heads[0][:, 0], heads[2][:, 0])[0, 1]) < 0.1
    # The standard error of a standard deviation of n normals is sigma / sqrt(2 n).
    np.testing.assert_allclose(np.std(heads[0]), 4097**-0.5, rtol=4 / (2 * 4096) ** 0.5)


def test_init_is_a_backbone_and_a_head(model):
    params = model.init(KEY)
    assert set(params) == {"embed", "layers", "norm", "score"}
    assert params["score"].shape == (16, 1)
    half = RewardModel(tiny_config(), Numerics(param_dtype="bfloat16")).init(KEY)
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}


# --- folders


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_round_trips_bit_for_bit(tmp_path, tied):
    model = RewardModel(tiny_config(tie_word_embeddings=tied))
    params = tiny_params(model)
    save(tmp_path / "one", model, params)
    save(tmp_path / "many", model, params, max_file_bytes=2000)
    for name in ("one", "many"):
        assert is_reward_model(tmp_path / name)
        assert read_architecture(tmp_path / name) == model.architecture
        assert_same(load_params(tmp_path / name, model), params)
    fields = json.loads((tmp_path / "one" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0"} and fields["pad_token_id"] is None


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 2)])
def test_a_mesh_reads_and_writes_the_same_bits(model, params, tmp_path, sizes):
    save(tmp_path / "alone", model, params)
    with jax.set_mesh(mesh_of(*sizes)):
        loaded = load_params(tmp_path / "alone", model)
        shapes = jax.eval_shape(model.init, KEY)
        assert jax.tree.map(jax.typeof, loaded) == jax.tree.map(jax.typeof, shapes)
        save(tmp_path / "mesh", model, loaded)
    stored = [tmp_path / name / "model.safetensors" for name in ("alone", "mesh")]
    assert stored[0].read_bytes() == stored[1].read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_gives_its_backbone_and_a_new_head(tmp_path, tied):
    config = tiny_config(tie_word_embeddings=tied)
    lm, model = build(config), RewardModel(config)
    of_lm = tiny_params(lm)
    save(tmp_path / "lm", lm, of_lm)
    assert not is_reward_model(tmp_path / "lm")
    params = load_params(tmp_path / "lm", model, KEY)
    np.testing.assert_array_equal(
        params["score"], jax.jit(model.new_head)(KEY)["score"]
    )
    for name in ("embed", "layers", "norm"):
        assert_same(params[name], of_lm[name])
    # A reward model's own head stays.
    save(tmp_path / "reward", model, params)
    again = load_params(tmp_path / "reward", model, jax.random.key(9))
    assert_same(again, params)


def test_the_wrong_kind_of_folder_is_refused_in_one_line(model, params, tmp_path):
    lm = build(tiny_config())
    save(tmp_path / "reward", model, params)
    save(tmp_path / "lm", lm, tiny_params(lm))
    with pytest.raises(InputError, match=r"/reward: holds a reward model .*no LM head"):
        load_params(tmp_path / "reward", lm)
    with pytest.raises(InputError, match=r"/lm: holds no reward model .*score.weight"):
        load_params(tmp_path / "lm", model)
    three = RewardModel(tiny_config())
    wide = params | {"score": jnp.ones((16, 3))}
    save(tmp_path / "three", three, wide)
    with pytest.raises(InputError, match=r"score.weight has shape \[3, 16\]"):
        load_params(tmp_path / "three", three)


class Tokenizer:
    """As much of a tokenizer as the choice of a padding token reads."""

    def __init__(self, pad=None, bos=None, unk=None, eos="</s>", others=()):
        self.pad_token, self.bos_token, self.unk_token = pad, bos, unk
        self.eos_token, self.all_special_tokens = eos, [eos, *others]

    def convert_tokens_to_ids(self, token):
        return ["<pad>", "<s>", "</s>", "<unk>", "<|x|>"].index(token)


def test_the_padding_token_is_never_the_end():
    assert padding_of(Tokenizer("<pad>", "<s>", "<unk>")) == Padding("<pad>", 0)
    assert padding_of(Tokenizer("</s>", "<s>", "<unk>")) == Padding("<s>", 1)
    assert padding_of(Tokenizer(None, "</s>", "<unk>")) == Padding("<unk>", 3)
    alone = Tokenizer("</s>", "</s>", "</s>", others=["<|x|>"])
    assert padding_of(alone) == Padding("<|x|>", 4)
    assert padding_of(Tokenizer("</s>")) is None


def test_a_tokenizer_that_pads_with_eos_is_told_otherwise(model, params, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = make_model_folder(tmp_path / "source")
    path = source / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"pad_token": {"content": "</s>"}}))
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>"}))
    padding = Padding("<s>", 1)
    save(tmp_path / "out", model, params, source, padding=padding)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<s>", 1)
    assert (tokenizer.eos_token, len(tokenizer)) == (
        "</s>",
        model.architecture.vocab_size,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] == 1

    # One that pads otherwise is copied to the byte.
    (source / "special_tokens_map.json").unlink()
    make_tokenizer(source)
    own = padding_of(transformers.AutoTokenizer.from_pretrained(source))
    assert own == Padding("<pad>", 0)
    save(tmp_path / "own", model, params, source, padding=own)
    assert (tmp_path / "own" / path.name).read_bytes() == path.read_bytes()


# --- training: the same loop, the same step


def centered(chosen_rewards, rejected_rewards, *, weight=0.01):
    """Bradley-Terry with its constant held: two losses of rewards, added."""
    arrays = chosen_rewards, rejected_rewards
    return losses.bradley_terry(*arrays) + weight * losses.center_rewards(*arrays)


def micro_batch(pairs):  # noqa: F811
    batch = next(padded_batches(pairs, batch_size=8))
    return batch, jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


def test_scores_are_those_of_each_whole_answer(pairs, model, params):  # noqa: F811
    batch, micro = micro_batch(pairs)
    scorer = make_scorer(model, frozenset({"rewards"}))
    found = jax.jit(scorer)(params, None, micro).scores
    assert set(found) == {"rewards"} and found["rewards"].shape == (8, 1, 2)
    alone = jax.jit(model.rewards)
    for row, n in enumerate(batch.pair_index[0, :, 0]):
        for side in (0, 1):
            tokens = [*pairs.prompt(n), *pairs.completion(n, side)]
            padded = np.pad(tokens, (0, 32 - len(tokens)))[None]
            expected = alone(params, padded, np.array([len(tokens)]))
            ours = found["rewards"][row, 0, side]
            np.testing.assert_allclose(ours, expected[0], rtol=0, atol=1e-5)


def test_the_last_token_of_each_completion_of_a_packed_row():
    owners = np.array([[0, 0, 1, 1, 1, -1], [2, 3, 3, -1, -1, -1], [4, 4, 4, 5, 5, 5]])
    expected = np.full_like(owners, -1)
    for c in range(6):
        row, place = np.argwhere(owners == c)[-1]
        expected[row, place] = c
    np.testing.assert_array_equal(last_tokens(jnp.asarray(owners)), expected)


def reward_steps(pairs, loss, *, sizes=(1, 1, 1), accumulation=1):  # noqa: F811
    """Metrics and parameters after each of three steps of eight pairs."""
    objective = loss if isinstance(loss, Objective) else from_loss(loss)
    optimizer = OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        model = RewardModel(tiny_config())
        schedule = make_schedule(optimizer, 100)
        tx = make_optimizer(optimizer, schedule)
        scorer = make_scorer(model, objective.scores)
        new = lambda p: init_state(p, tx, objective, num_annotators=0)
        state = jax.jit(new)(tiny_params(model))
        step = make_train_step(scorer, objective, tx, schedule)
        batches = padded_batches(
            pairs,
            batch_size=8,
            accumulation=accumulation,
            seed=3,
        )
        history = []
        with compiled("train_step") as programs:
            for _ in range(3):
                state, metrics = step(state, {}, to_global(next(batches), mesh))
                history.append(jax.device_get(metrics))
        assert len(programs) == 1
        return history, jax.device_get(state.params)


@pytest.mark.parametrize(
    ("sizes", "accumulation"), [((1, 1, 1), 4), ((2, 2, 2), 1), ((4, 1, 2), 2)]
)
def test_layout_does_not_change_the_numbers(pairs, sizes, accumulation):  # noqa: F811
    history, params = reward_steps(pairs, losses.bradley_terry)
    split, others = reward_steps(
        pairs, losses.bradley_terry, sizes=sizes, accumulation=accumulation
    )
    for ours, theirs in zip(split, history):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies"):
            # As for policies: rounding, which Adam's first steps amplify.
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), others, params
    )


def test_the_first_step_is_the_mean_over_the_pairs(pairs, model, params):  # noqa: F811
    (first, *_), _ = reward_steps(pairs, losses.bradley_terry)
    batch = next(padded_batches(pairs, batch_size=8, seed=3))
    tokens, lengths = batch.tokens[0].reshape(16, -1), batch.lengths[0].reshape(16)
    rewards = np.asarray(model.rewards(params, tokens, lengths), float).reshape(8, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "loss": np.log1p(np.exp(-margins)).mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
    }
    assert not any(name.startswith("logps") for name in first)
    for name, value in expected.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "loss",
    [
        centered,
        losses.unbiased(losses.bradley_terry, 0.2),
        losses.forward_corrected(losses.bradley_terry, 0.2),
        em(losses.bradley_terry),
    ],
    ids=["centered", "unbiased", "forward", "em"],
)
def test_any_loss_of_rewards_is_trained(pairs, loss):  # noqa: F811
    history, _ = reward_steps(pairs, loss)
    for metrics in history:
        assert metrics["finite"] and metrics["grad_norm"] > 0
    assert history[-1]["rewards/margins"] != history[0]["rewards/margins"]


def test_rewards_and_log_probs_are_not_read_at_once():
    def both(chosen_rewards, rejected_rewards, policy_chosen_logps):
        return losses.bradley_terry(chosen_rewards, rejected_rewards)

    with pytest.raises(
        InputError, match="both: reads policy_logps, rewards; a model gives eit"
    ):
        from_loss(both)
    read = from_loss(losses.bradley_terry).scores
    assert "rewards" in read and not reads_reference(read)
    assert "rewards" not in from_loss(losses.dpo).scores


def train(folder, pairs_file, out, *flags, loss="bradley_terry"):
    options = {
        "loss": loss,
        "model": folder,
        "data": pairs_file,
        "out": out,
        "max-steps": 6,
        "batch-size": 8,
        "heldout-fraction": 0.2,
        "learning-rate": 1e-2,
        "save-every": 3,
        "log-every": 1,
        "seed": 5,
    }
    options = {k: v for k, v in options.items() if f"--{k}" not in flags}
    argv = [text for k, v in options.items() for text in (f"--{k}", str(v))]
    # On one device, as on a user's own computer.
    done = subprocess.run(
        [sys.executable, "-m", "jaxpref", "train", *argv, *flags],
        env=os.environ | {"XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(done.stderr)
    return out / "export"


def test_a_run_from_the_command_line_exports_a_reward_model(tmp_path):
    source = make_model_folder(tmp_path / "source")
    pairs_file = make_pairs_file(tmp_path / "pairs.jsonl")
    export = train(source, pairs_file, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    held = [line for line in lines if "eval_loss" in line]
    assert "eval_rewards/accuracies" in held[-1] and "eval_logps/chosen" not in held[-1]

    model = RewardModel(read_architecture(export))
    params = load_params(export, model)
    fresh = load_params(source, model, jax.random.key(5))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), params, fresh)
    # Six steps of Adam at 0.01: from the seed's head, and not further.
    assert all(0 < x < 0.07 for x in jax.tree.leaves(moved))
    fields = json.loads((export / "config.json").read_text())
    assert fields["pad_token_id"] == 0  # of the tokenizer

    with pytest.raises(InputError, match="holds a reward model .*no LM head"):
        train(export, pairs_file, tmp_path / "dpo", loss="dpo")


@pytest.mark.slow
def test_a_run_is_resumed_to_the_same_bits_and_trained_on(tmp_path):
    source = make_model_folder(tmp_path / "source")
    pairs_file = make_pairs_file(tmp_path / "pairs.jsonl")
    run = tmp_path / "run"
    export = train(source, pairs_file, run)
    stored = (export / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "6")
    shutil.rmtree(export)
    train(source, pairs_file, run)
    assert (export / "model.safetensors").read_bytes() == stored

    # A second run starts from the head that the first has learned.
    again = train(export, pairs_file, tmp_path / "again", "--learning-rate", "1e-9")
    model = RewardModel(read_architecture(export))
    kept, params = load_params(again, model), load_params(export, model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, params)

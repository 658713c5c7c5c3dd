"""Heads of reward models: two layers, and embeddings that score pairs."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.data import DataOptions
from jaxpref.data.kinds import LABELED, LISTS, PAIRS
from jaxpref.errors import InputError
from jaxpref.evaluate.evaluation import run as evaluate
from jaxpref.evaluate.heads import answers_of, rated_kind
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import check_folder, load_params, save
from jaxpref.models.folder_config import is_reward_model, read_head
from jaxpref.models.lora import LoraOptions
from jaxpref.models.reward import check_one_reward, reward_model
from jaxpref.models.reward_head import Head, HeadOptions
from jaxpref.models.weights import Weights
from jaxpref.objectives import attribute_regression, from_loss
from jaxpref.scoring import make_scorer
from jaxpref.scoring.reward_head import head_of
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from tests.test_reward_models import assert_same, micro_batch
from tests.test_training import pairs  # noqa: F401
from tests.tiny import make_model_folder, tiny_config, tiny_params

RNG = np.random.default_rng(0)
GPM = from_loss(losses.general_preference)
HEADS = {
    "embedding": Head("linear", embedding=4, temperature=0.1),
    "mlp": Head("mlp"),
    "mlp of ratings": Head("mlp", ("helpful", "short")),
}


def numbers(head, params, states):
    """The head in float64, written out."""
    x = np.asarray(states, np.float64)
    if head.layers == "mlp":
        x = x @ np.asarray(params["score_hidden"], np.float64)
        x = x / (1 + np.exp(-x))
    x = x @ np.asarray(params["score"], np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True) if head.embedding else x


@pytest.mark.parametrize("name", HEADS)
def test_the_numbers_of_a_head(name):
    head = HEADS[name]
    params = head.init(jax.random.key(0), 8, jnp.float32)
    states = RNG.normal(size=(3, 2, 8)).astype(np.float32)
    found = head(params, jnp.asarray(states))
    assert found.dtype == jnp.float32 and found.shape == (3, 2, head.size)
    np.testing.assert_allclose(found, numbers(head, params, states), atol=1e-6)
    # Where there is no answer, there is no direction, and no gradient either.
    blank = jax.grad(lambda p: head(p, jnp.zeros((1, 1, 8))).sum())(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(blank))


# --- folders


@pytest.mark.parametrize("name", HEADS)
def test_a_folder_says_which_head_it_holds(name, tmp_path):
    model = RewardModel(tiny_config(), head=HEADS[name])
    params = tiny_params(model)
    save(tmp_path / "m", model, params)
    assert is_reward_model(tmp_path / "m")
    assert reward_model(tmp_path / "m") == model
    assert check_folder(tmp_path / "m") == model.architecture
    assert_same(load_params(tmp_path / "m", model), params)
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    mlp = model.head.layers == "mlp"
    kind = "LlamaModel" if mlp else "LlamaForSequenceClassification"
    assert fields["architectures"] == [kind]
    assert len(fields["id2label"]) == model.head.size
    with pytest.raises(InputError, match="holds a reward model .*no LM head"):
        load_params(tmp_path / "m", build(tiny_config()))
    if model.head.score != "rewards":
        with pytest.raises(InputError, match="--reward m: gives (a vec|ratings of h)"):
            check_one_reward(model.head, "--reward m")


def test_labels_of_others_are_attributes(tmp_path):
    model = RewardModel(tiny_config(), head=Head(attributes=("a", "b", "c")))
    save(tmp_path / "m", model, tiny_params(model))
    path = tmp_path / "m" / "config.json"
    fields = json.loads(path.read_text())

    def head(**changes):
        path.write_text(json.dumps(fields | changes))
        return read_head(tmp_path / "m")

    assert head(id2label={"0": "LABEL_0"}) == head(id2label=None) == Head()
    assert head(id2label={"0": "Reward"}) == Head()
    rating = {"id2label": {"0": "toxic"}, "reward_head": {"rating": True}}
    assert head(**rating) == Head(attributes=("toxic",))
    two = {"0": "LABEL_0", "1": "LABEL_1"}
    assert head(id2label=two).attributes == ("LABEL_0", "LABEL_1")
    with pytest.raises(InputError, match="id2label has no label '1'; number them"):
        head(id2label={"0": "a", "2": "b"})
    with pytest.raises(InputError, match="layers is 'conv'; use linear or mlp"):
        head(reward_head={"layers": "conv"})


def test_the_head_that_a_run_trains(tmp_path):
    ratings = attribute_regression(attributes=("helpful,short",))
    of = lambda objective, folder=None, **options: head_of(
        objective.reads,
        objective.options,
        HeadOptions(**options),
        folder and Weights(folder),
    )
    assert of(from_loss(losses.dpo)) is None
    assert of(from_loss(losses.bradley_terry)) == Head()
    assert of(ratings, kind="mlp") == HEADS["mlp of ratings"]
    assert of(from_loss(losses.general_preference, tau=2.0), size=4) == Head(
        embedding=4, temperature=2.0
    )
    unbiased = from_loss(losses.unbiased(losses.general_preference, 0.2))
    assert of(unbiased) == Head(embedding=6, temperature=0.1)

    folders = {}
    for name, head in [*HEADS.items(), ("one", Head(attributes=("helpful",)))]:
        model = RewardModel(tiny_config(), head=head)
        save(folders.setdefault(name, tmp_path / name), model, tiny_params(model))
    one = attribute_regression(attributes=("helpful",))
    # A model that predicts one rating is one that gives a reward.
    assert of(from_loss(losses.bradley_terry), folders["one"]) == Head()
    assert of(one, folders["mlp"]) == Head("mlp", ("helpful",))
    assert of(GPM, folders["embedding"]) == HEADS["embedding"]
    for message, objective, folder, options in (
        ("--head.kind mlp: trains no", from_loss(losses.dpo), None, {"kind": "mlp"}),
        ("--head.size 2: only the emb", ratings, None, {"size": 2}),
        ("head of .*mlp is mlp, and is tr", ratings, "mlp", {"kind": "linear"}),
        ("with ratings of helpful, short, but .* trains one reward",
         from_loss(losses.bradley_terry), "mlp of ratings", {}),
        ("with an embedding of 4 numbers, but .* of 6", GPM, "embedding", {"size": 6}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            of(objective, folder and folders[folder], **options)
    for size in (0, 3):
        with pytest.raises(InputError, match=f"--head.size {size}: must be an even"):
            HeadOptions(size=size)


# --- scores of batches


def test_vectors_are_those_of_each_whole_answer(pairs):  # noqa: F811
    """In padded and in packed rows, of the same states as a language model's."""
    head = Head("mlp", ("a", "b", "c"))
    model = RewardModel(tiny_config(), head=head)
    params = tiny_params(model)
    scorer = jax.jit(make_scorer(model, frozenset({"attributes"})))
    batch, micro = micro_batch(pairs)
    padded = scorer(params, None, micro).scores["attributes"]
    assert padded.shape == (8, 1, 2, 3)
    lm = build(tiny_config(tie_word_embeddings=True))
    backbone = {k: x for k, x in params.items() if not k.startswith("score")}
    states = jax.jit(lm.hidden)
    for row, side in itertools.product((0, 5), (0, 1)):
        n = int(batch.pair_index[0, row, 0])
        tokens = [*pairs.prompt(n), *pairs.completion(n, side)]
        whole = np.pad(tokens, (0, 32 - len(tokens)))[None]
        state = states(backbone, whole)[0, len(tokens) - 1]
        np.testing.assert_allclose(
            padded[row, 0, side], numbers(head, params, state), atol=1e-5
        )
    layout = data.packed_layout(
        pairs,
        order=data.in_order(pairs),
        batch_size=8,
        shards=1,
        tokens_per_device=64,
    )
    table = np.full((len(pairs), 2, 3), np.nan)
    for packed in layout.eval_batches(pairs):
        for a in range(len(packed.pair_index)):
            part = jax.tree.map(lambda x, a=a: jnp.asarray(x[a]), packed)
            found = np.asarray(scorer(params, None, part).scores["attributes"])
            index = packed.pair_index[a]
            table[index[index >= 0]] = found[index >= 0]
    np.testing.assert_allclose(
        table[batch.pair_index[0, :, 0]], padded[:, 0], rtol=1e-4, atol=1e-5
    )


# --- general preferences


def cycles_file(path, prompts=8):
    """Three answers to each prompt, each of which is preferred to the next one."""
    answers = " good film", " bad meal", " dull book"
    with path.open("w") as file:
        for n, first in itertools.product(range(prompts), range(3)):
            words = ("the a film book meal was is good".split())[n]
            row = {
                "prompt": f"I saw {words}",
                "chosen": answers[first],
                "rejected": answers[(first + 1) % 3],
            }
            file.write(json.dumps(row) + "\n")
    return path


def config(folder, pairs_file, out, objective, **changes):
    plain = dict(
        model=str(folder),
        data=str(pairs_file),
        out=str(out),
        objective=objective,
        max_steps=24,
        batch_size=24,
        row_length=64,
        save_every=12,
        eval_every=1000,
        options=DataOptions(max_length=32, heldout_fraction=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
    )
    return TrainConfig(**plain | changes)


def accuracy(model, records, out, **options):
    asked = dict(model=str(model), data=str(records), out=str(out), max_length=32)
    return evaluate(EvaluateConfig(**asked | options))["rewards/accuracies"]


def test_a_cycle_of_preferences_is_fitted_by_pair_scores(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    records = cycles_file(tmp_path / "pairs.jsonl")
    export = run(
        config(folder, records, tmp_path / "gpm", GPM, head=HeadOptions(size=4))
    )
    assert read_head(export) == HEADS["embedding"]
    assert accuracy(export, records, tmp_path / "eval") == 1.0
    lines = (tmp_path / "eval" / "eval_pairs.jsonl").read_text().splitlines()
    # s(y1 > y2) / 0.1, of vectors of unit length.
    assert all(0 < json.loads(line)["margin"] <= 10 for line in lines)


@pytest.mark.slow
def test_rewards_fit_two_of_the_three_pairs_of_a_cycle_at_most(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    records = cycles_file(tmp_path / "pairs.jsonl")
    bradley_terry = from_loss(losses.bradley_terry)
    export = run(config(folder, records, tmp_path / "bt", bradley_terry))
    assert accuracy(export, records, tmp_path / "eval") <= 2 / 3 + 1e-9


@pytest.mark.slow
def test_layout_and_interruption_do_not_change_the_numbers(tmp_path):
    """On other meshes, with accumulation, and to the bit after a restart."""
    folder = make_model_folder(tmp_path / "model")
    records = cycles_file(tmp_path / "pairs.jsonl")
    small = dict(max_steps=4, save_every=2, log_every=1, batch_size=8)
    small["head"] = HeadOptions(kind="mlp", size=4)
    layouts = {
        "plain": {},
        "split": {"mesh": MeshConfig(data=2, fsdp=2, tensor=2), "accumulation": 2},
        "padded": {"row_length": "none"},
    }
    found = {}
    for name, changes in layouts.items():
        out = tmp_path / name
        run(config(folder, records, out, GPM, **small, **changes))
        lines = read_metrics(out / "metrics.jsonl")
        found[name] = [
            [line[x] for x in ("loss", "grad_norm", "rewards/margins")]
            for line in lines
            if "loss" in line
        ]
    assert np.shape(found["plain"]) == (4, 3)
    for name in ("split", "padded"):
        # Rounding, which Adam's first steps amplify.
        np.testing.assert_allclose(found[name], found["plain"], rtol=2e-4, atol=2e-5)

    out = tmp_path / "split"
    stored = (out / "export" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "4")
    shutil.rmtree(out / "export")
    run(config(folder, records, out, GPM, **small, **layouts["split"]))
    assert (out / "export" / "model.safetensors").read_bytes() == stored
    shutil.rmtree(out / "export")
    with pytest.raises(InputError, match="with another head; let the run finish"):
        accuracy(out, records, tmp_path / "eval")


@pytest.mark.slow
def test_adapters_train_a_head_of_their_own(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    records = cycles_file(tmp_path / "pairs.jsonl")
    lora = LoraOptions(rank=4, targets="all")
    options = dict(head=HeadOptions(size=4), lora=lora)
    export = run(config(folder, records, tmp_path / "lora", GPM, **options))
    assert accuracy(export, records, tmp_path / "eval") == 1.0
    adapter = str(tmp_path / "lora" / "adapter")
    again = accuracy(folder, records, tmp_path / "again", adapter=adapter)
    assert again == 1.0
    # Its head is trained on, and need not be described again.
    more = config(folder, records, tmp_path / "more", GPM, adapter=adapter, max_steps=1)
    assert read_head(run(more)) == Head(embedding=4, temperature=0.1)


def test_what_a_head_cannot_judge_is_refused():
    pair_scores = answers_of(HEADS["embedding"], (), PAIRS)
    vectors = RNG.normal(size=(3, 2, 4)).astype(np.float32)
    found, scores = pair_scores(vectors)
    planes = [(0, 1), (2, 3)]
    expected = sum(
        vectors[:, 0, a] * vectors[:, 1, b] - vectors[:, 0, b] * vectors[:, 1, a]
        for a, b in planes
    )
    np.testing.assert_allclose(found[:, 0] - found[:, 1], expected / 0.1, rtol=1e-4)
    np.testing.assert_array_equal(found[:, 0], -found[:, 1])
    assert scores == {}
    for kind in (LISTS, LABELED):
        with pytest.raises(InputError, match="scores pairs of answers, and no single"):
            answers_of(HEADS["embedding"], (), kind)
    with pytest.raises(InputError, match="a=1: the model predicts no ratings"):
        answers_of(Head(), ("a=1",), PAIRS)
    with pytest.raises(InputError, match="--kind rated: the model predicts no ratings"):
        rated_kind(Head())

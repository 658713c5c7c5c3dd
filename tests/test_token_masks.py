"""Masks of tokens (SparsePO): from the reference's layers, and trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.objectives import sparse_po
from jaxpref.objectives.inputs import Inputs
from jaxpref.scoring.token_masks import LearnedMasks
from jaxpref.scoring.twin import make_scorer
from jaxpref.train import read_metrics, run
from tests.test_packing import make_pairs
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    padded_batches,
    tiny_config,
    tiny_params,
)

FEW = "--max-steps 4 --batch-size 8 --max-length 64 --log-every 1 --decay constant"


@functools.cache
def _read(model):
    def read(params, tokens):
        hidden, _, states = model.hidden_head_and_readouts(
            params, tokens, readout=lambda x, own: x, heads={}
        )
        return states, hidden, jax.nn.log_softmax(model.logits(params, tokens))

    return jax.jit(read)


def read_of(model, params, tokens):
    """States after each layer [L, T, D], hidden states and log-probs of one text.

    Of a row with padding on the right, which changes nothing before it.
    """
    row = jnp.zeros((1, 32), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    states, hidden, table = _read(model)(params, row)
    whole = lambda x: np.asarray(x, float)[..., : len(tokens), :]
    return whole(states[:, 0]), whole(hidden[0]), whole(table[0])


def layer_norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


def test_what_is_read_is_the_residual_stream():
    """After all layers, the final norm of it; before, that of a model with fewer."""
    model = build(tiny_config())
    params = tiny_params(model)
    tokens = np.random.default_rng(0).integers(4, 30, 7)
    states, hidden, _ = read_of(model, params, tokens)
    shorter = build(tiny_config(num_layers=1))
    first = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    others = np.asarray(jax.jit(shorter.hidden)(first, tokens[None]))[0], hidden
    for state, normed in zip(states, others):
        rms = np.sqrt((state**2).mean(-1, keepdims=True) + tiny_config().rms_norm_eps)
        expected = state / rms * np.asarray(params["norm"])
        np.testing.assert_allclose(normed, expected, rtol=2e-4, atol=2e-4)


def relu(x):
    return np.maximum(x, 0)


def learned(states, heads):
    """Both masks of one completion, from states [L, n, D]."""
    of_layers = [
        relu(layer_norm(h) @ heads["weight"][n] + heads["bias"][n])
        for n, h in enumerate(states)
    ]
    mixed = relu(sum(a * m for a, m in zip(heads["mixer"], of_layers)))
    return mixed[:, 0], mixed[:, -1]


def rescaled(states):
    a = states.mean(-1)
    low, high = a.min(1, keepdims=True), a.max(1, keepdims=True)
    # 1 for an answer of one token.
    mask = ((a - low + (high == low)) / (high - low + (high == low))).mean(0)
    return mask, mask


@pytest.mark.parametrize(
    "kind",
    ["independent", pytest.param("common", marks=pytest.mark.slow), "activations"],
)
def test_scores_and_loss_are_the_papers(kind):
    model, pairs = build(tiny_config()), make_pairs(8)
    policy, reference = tiny_params(model), tiny_params(model, seed=1)
    rng = np.random.default_rng(2)
    heads = {}
    if kind != "activations":
        made = LearnedMasks(shared=kind == "common")
        drawn = made.init(jax.random.key(0), model.architecture)
        heads = {
            name: np.asarray(x + rng.normal(0, 0.5, x.shape), np.float32)
            for name, x in drawn.items()
        }
    batch = next(padded_batches(pairs, batch_size=4))
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    objective = sparse_po(
        masks=kind,
        beta=0.4,
        **({"reward_l1": 0.01, "kl_l1": 0.02} if heads else {}),
    )
    scorer = make_scorer(model, objective.scores, heads=objective.heads, chunk_size=4)
    params = {"policy": policy, "heads": heads} if heads else policy
    scores = jax.jit(lambda *args: scorer(*args).scores)(
        params, {"reference": reference}, micro
    )
    inputs = Inputs(scores, micro)
    found = np.asarray(objective.losses(inputs, {}))[:, 0]
    for row, n in enumerate(batch.pair_index[0, :, 0]):
        sums = []
        for side in (0, 1):
            prompt, answer = pairs.prompt(n), pairs.completion(n, side)
            tokens, at = [*prompt, *answer], slice(len(prompt) - 1, -1)
            table = read_of(model, policy, tokens)[2][at]
            states, _, other = read_of(model, reference, tokens)
            states, other = states[:, at], other[at]
            m_u, m_d = learned(states, heads) if heads else rescaled(states)
            chosen = np.arange(len(answer)), answer
            kls = (np.exp(other) * (other - table)).sum(-1)
            sums.append(
                {
                    "masked_log_ratios": (m_u * (table - other)[chosen]).sum(),
                    "masked_kls": (m_d * kls).sum(),
                    "reward_mask_sums": m_u.sum(),
                    "kl_mask_sums": m_d.sum(),
                    "unmasked": (m_u > 0).sum(),
                }
            )
            for name, value in sums[-1].items():
                ours = float(scores[name][row, 0, side])
                assert ours == pytest.approx(value, rel=2e-3, abs=2e-4), name
        w, l = sums
        u = w["masked_log_ratios"] - l["masked_log_ratios"]
        d = l["masked_kls"] - w["masked_kls"]
        expected = np.log1p(np.exp(-0.4 * (u - d)))
        if heads:
            expected += 0.01 * (w["reward_mask_sums"] + l["reward_mask_sums"])
            expected += 0.02 * (w["kl_mask_sums"] + l["kl_mask_sums"])
        assert found[row] == pytest.approx(expected, rel=2e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_masks")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl", 24)
    return folder


def lines_of(folders, out, flags):
    words = f"--model {folders / 'model'} --data {folders / 'pairs.jsonl'} --out {out}"
    words += f" --loss sparse_po --learning-rate 1e-2 {FEW} {flags}"
    run(config_of(split(words.split())))
    return [x for x in read_metrics(out / "metrics.jsonl") if "loss" in x]


def test_a_run_trains_its_masks(folders, tmp_path):
    lines = lines_of(folders, tmp_path / "run", "")
    # The policy is the reference, whatever the masks are.
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert 0.5 < lines[0]["sparse_po/reward_mask"] < 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("reward_mask", "kl_mask"):
        change = lines[-1][f"sparse_po/{name}"] - lines[0][f"sparse_po/{name}"]
        assert abs(change) > 1e-4
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--loss.masks activations", "--loss.masks common", "--lora.rank 2"],
)
def test_results_do_not_depend_on_packing_or_accumulation(folders, tmp_path, flags):
    packed = lines_of(folders, tmp_path / "a", flags)
    padded = lines_of(folders, tmp_path / "b", f"{flags} --row-length none")
    split_up = lines_of(folders, tmp_path / "c", f"{flags} --accumulation 2")
    for other in (padded, split_up):
        found = [line["loss"] for line in other]
        assert found == pytest.approx([line["loss"] for line in packed], rel=1e-3)
        name = "sparse_po/reward_mask"
        assert other[0][name] == pytest.approx(packed[0][name], rel=1e-4)


def test_penalties_that_have_no_effect_are_refused():
    with pytest.raises(InputError, match="reward_l1 0.1: masks of activations"):
        sparse_po(masks="activations", reward_l1=0.1)
    with pytest.raises(InputError, match="kl_l1 -1"):
        sparse_po(kl_l1=-1)
    with pytest.raises(InputError, match="beta"):
        sparse_po(beta=0)

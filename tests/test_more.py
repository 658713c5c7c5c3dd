"""`--objective more`: files weighted by the gradients of the reward head."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.models import RewardModel
from jaxpref.models.reward_head import Head
from jaxpref.objectives import from_loss, more
from jaxpref.scoring import make_scorer
from jaxpref.scoring.partition import in_training
from jaxpref.train import read_metrics, run
from jaxpref.train.gradient import gradient
from tests.test_packing import make_pairs
from tests.tiny import (
    MULTIPLES,
    make_model_folder,
    make_pairs_file,
    tiny_config,
    tiny_params,
)

MORE = more(losses.bradley_terry, normalize=False, sources=("a", "b", "c"))


def batch_of(sources, accumulation=1, contradicting=False):
    """A padded batch of pairs of the given files.

    Args:
      sources: the file of each pair.
      accumulation: micro-batches.
      contradicting: whether every second pair is the one before, exchanged.
    """
    pairs, builder = make_pairs(len(sources)), data.DatasetBuilder(2)
    for n, source in enumerate(sources):
        own = n - n % 2 if contradicting else n
        answers = [pairs.completion(own, side) for side in (0, 1)]
        answers = answers[::-1] if own != n else answers
        columns = {"source": source}
        builder.add(pairs.prompt(own), answers, id=str(n), columns=columns)
    layout = data.padded_layout(
        built := builder.build(), batch_size=len(sources), **MULTIPLES
    )
    (batch,) = layout.eval_batches(built)
    shape = (accumulation, len(sources) // accumulation)
    return jax.tree.map(
        lambda x: jnp.asarray(x[0].reshape(*shape, *x.shape[2:])), batch
    )


def step_of(objective, model):
    """The compiled gradient and metrics of a train step."""
    scorer = make_scorer(model, objective.scores, heads=objective.heads)
    read = in_training({}, jnp.int32(0))
    score = lambda params, micro: scorer(params, read, micro)

    def step(params, batch):
        grads, _, metrics = gradient(objective, score, params, batch, {})
        return grads, metrics

    return jax.jit(step)


def stepped(objective, model, params, batch):
    """The gradient and the metrics of a train step."""
    return step_of(objective, model)(params, batch)


@pytest.mark.parametrize("layers", ["linear", "mlp"])
def test_a_step_takes_the_smallest_combination_of_the_files_gradients(layers):
    model = RewardModel(tiny_config(), head=Head(layers))
    params = tiny_params(model)
    sources = np.array([0, 2, 0, 0, 2, 2, 0, 2, 2, 0, 0, 0])
    batch = batch_of(sources)
    grads, metrics = stepped(MORE, model, params, batch)

    # The gradient of each file's mean loss, by a backward pass of its own.
    def alone(file):
        weights = batch.weights * (batch.source == file)
        plain = dataclasses.replace(batch, weights=weights)
        found, _ = stepped(from_loss(losses.bradley_terry), model, params, plain)
        share = np.mean(np.asarray(batch.source) == file)
        return jax.tree.map(lambda x: np.asarray(x, float) / share, found)

    first, third = alone(0), alone(2)
    g, h = first["score"].ravel(), third["score"].ravel()
    expected = np.clip(h @ (h - g) / ((g - h) @ (g - h)), 0, 1)
    assert metrics["more/a"] == pytest.approx(expected, abs=1e-4)
    assert 0.02 < expected < 0.98 and metrics["more/b"] == 0
    assert metrics["more/a"] + metrics["more/c"] == pytest.approx(1, abs=1e-6)
    jax.tree.map(
        lambda ours, x, y: np.testing.assert_allclose(
            ours, expected * x + (1 - expected) * y, rtol=2e-3, atol=2e-5
        ),
        grads,
        first,
        third,
    )
    if layers == "linear":
        parts = batch_of(sources, accumulation=3)
        again, more_metrics = stepped(MORE, model, params, parts)
        assert more_metrics["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
        np.testing.assert_allclose(again["score"], grads["score"], atol=1e-5)


def test_files_that_contradict_each_other_cancel_in_the_head():
    """The same pairs in two files, once with the answers exchanged."""
    model = RewardModel(tiny_config())
    params = tiny_params(model)
    params["score"] *= 0  # both losses are log 2, with opposite gradients
    batch = batch_of(np.arange(8) % 2, contradicting=True)
    grads, metrics = stepped(MORE, model, params, batch)
    assert metrics["more/a"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(grads["score"], 0, atol=1e-6)


def test_gradients_of_any_length_count_alike_by_default():
    """The pairs of one file have a smaller weight, and so a shorter gradient."""
    model = RewardModel(tiny_config())
    params = tiny_params(model)
    step = step_of(more(losses.bradley_terry, sources=("a", "b")), model)
    plain = step_of(from_loss(losses.bradley_terry), model)
    batch = batch_of(np.arange(8) % 2)

    def score_gradients(batch):
        alone = lambda file: batch.weights * (batch.source == file)
        files = [dataclasses.replace(batch, weights=alone(n)) for n in (0, 1)]
        # Half of the pairs are a file's.
        return [2 * np.asarray(plain(params, x)[0]["score"], float) for x in files]

    def weighted(batch, scale):
        weights = batch.weights * jnp.where(batch.source == 0, scale, 1)
        return dataclasses.replace(batch, weights=weights)

    for scale in (1, 0.05):
        own = weighted(batch, scale)
        g, h = score_gradients(own)
        grads, metrics = step(params, own)
        # Of two vectors of length 1, the shortest combination is in the middle.
        lengths = np.linalg.norm(g), np.linalg.norm(h)
        expected = lengths[1] / sum(lengths)
        assert metrics["more/a"] == pytest.approx(expected, rel=1e-4)
        assert metrics["more/a"] + metrics["more/b"] == pytest.approx(1, abs=1e-6)
        found = np.asarray(grads["score"])
        combined = expected * g + (1 - expected) * h
        np.testing.assert_allclose(found, combined, rtol=2e-3, atol=2e-5)
        assert (found * g).sum() > 0 and (found * h).sum() > 0

    # A file whose gradient is 0 does not silence the other.
    own = weighted(batch, 0)
    grads, metrics = step(params, own)
    assert metrics["more/a"] == 0 and metrics["more/b"] == pytest.approx(1)
    expected = score_gradients(own)[1]
    np.testing.assert_allclose(grads["score"], expected, rtol=2e-3, atol=2e-5)

    # Opposite gradients cancel, also if one is longer.
    params["score"] *= 0
    grads, metrics = step(params, weighted(batch_of(np.arange(8) % 2, 1, True), 0.05))
    assert metrics["more/a"] == pytest.approx(1 / 1.05, abs=1e-3)
    np.testing.assert_allclose(grads["score"], 0, atol=1e-6)


def test_a_run_weights_its_files(tmp_path):
    model = make_model_folder(tmp_path / "model")
    files = [
        make_pairs_file(tmp_path / f"{name}.jsonl", 40, seed)
        for seed, name in enumerate(("short", "long"))
    ]
    argv = f"--model {model} --data {files[0]}:0.7 {files[1]}:0.3 --objective more"
    argv += " --loss bradley_terry --max-steps 4 --batch-size 8 --accumulation 2"
    argv += (
        f" --max-length 64 --log-every 1 --heldout-fraction 0.3 --out {tmp_path / 'o'}"
    )
    run(config_of(split(argv.split())))
    lines = read_metrics(tmp_path / "o" / "metrics.jsonl")
    shares = [(x["more/short"], x["more/long"]) for x in lines if "more/short" in x]
    assert len(shares) == 4
    np.testing.assert_allclose(np.sum(shares, 1), 1, atol=1e-5)
    # Held-out losses are those of the plain loss.
    held = [x for x in lines if "eval_loss" in x][-1]
    assert {"eval_loss/short", "eval_loss/long"} <= held.keys()
    assert not any(name.startswith("eval_more") for name in held)
    stored = json.loads((tmp_path / "o" / "config.json").read_text())["loss"]
    assert stored["sources"] == ["short", "long"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["more", "goal_contrast"])
def test_layouts_do_not_change_the_numbers(name, tmp_path):
    """On another mesh with accumulation, and in padded rows."""
    model = make_model_folder(tmp_path / "model")
    files = [make_pairs_file(tmp_path / f"{n}.jsonl", 40, n) for n in range(2)]
    plain = f"--model {model} --data {files[0]} {files[1]} --loss bradley_terry"
    plain += f" --objective {name} --max-steps 3 --batch-size 8 --max-length 64"
    plain += " --log-every 1 --heldout-fraction 0.2 --learning-rate 1e-3"
    layouts = {
        "one": "--row-length 64",
        "split": "--row-length 64 --accumulation 2 --mesh.data 2 --mesh.fsdp 2 "
        "--mesh.tensor 2",
        "padded": "--row-length none",
    }
    found = {}
    for layout, more_options in layouts.items():
        out = tmp_path / layout
        run(config_of(split(f"{plain} --out {out} {more_options}".split())))
        lines = [x for x in read_metrics(out / "metrics.jsonl") if "loss" in x]
        names = [x for x in lines[0] if x.startswith(f"{name}/")]
        found[layout] = [[line[x] for x in ("loss", *names)] for line in lines]
    assert np.shape(found["one"]) == (3, 3 if name == "more" else 2)
    for layout in ("split", "padded"):
        np.testing.assert_allclose(found[layout], found["one"], rtol=1e-3, atol=1e-4)


def test_what_has_no_shares_is_refused():
    with pytest.raises(InputError, match="two files are named one; name each file"):
        more(losses.bradley_terry, sources=("one", "two", "one"))
    with pytest.raises(InputError, match="--data names 1; give two or more"):
        more(losses.bradley_terry, sources=("one",))
    with pytest.raises(InputError, match="dpo reads no rewards; use a pairwise"):
        more(losses.dpo, sources=("one", "two"))
    with pytest.raises(InputError, match="general_preference reads no rewards"):
        more(losses.general_preference, sources=("one", "two"))

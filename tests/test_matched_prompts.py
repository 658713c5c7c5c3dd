"""BCO's weights that match prompts: the classifier, the features, and runs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from jaxpref import data
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.objectives import bco
from jaxpref.scoring.density_ratio import FOLDS, PENALTIES, fit_density_ratio
from jaxpref.scoring.prompt_features import make_prompt_step, prompt_features
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from tests.answers import words, write_records
from tests.test_training import mesh_of
from tests.tiny import make_model_folder, tiny_config, tiny_params

WEIGHTS = "reference/prompt_weights.npz"


def gaussians(count=2000, size=3, seed=0):
    """Prompts of two classes, more of class 0, and their true log density ratio."""
    rng = np.random.default_rng(seed)
    classes = rng.random(count) < 0.3
    mean = np.array([1.0, -0.5, 0.0])[:size]
    x = rng.normal(size=(count, size)) + classes[:, None] * mean
    counts = np.stack([~classes, classes], 1) * rng.integers(1, 4, count)[:, None]
    return x, counts, x @ mean - mean @ mean / 2


def logistic(x, labels, weights, penalty):
    """Coefficients and intercept of weighted logistic regression, by a solver."""

    def loss(b):
        s, signs = x @ b[:-1] + b[-1], np.where(labels, 1, -1)
        d = -signs * weights * expit(-signs * s)
        value = np.sum(weights * np.logaddexp(0, -signs * s))
        value += penalty / 2 * b[:-1] @ b[:-1]
        return value, np.append(x.T @ d + penalty * b[:-1], d.sum())

    start = np.zeros(x.shape[1] + 1)
    return minimize(loss, start, jac=True, tol=1e-10, method="BFGS").x


def test_the_classifier_is_that_of_a_general_solver():
    x, counts, _ = gaussians(400)
    found = fit_density_ratio(x, counts)
    z = (x - x.mean(0)) / x.std(0)
    folds = np.empty(len(x), int)
    for label in (0, 1):
        own = np.flatnonzero(counts[:, label] > 0)
        folds[own] = np.arange(len(own)) % FOLDS
    labels, sizes = counts[:, 1] > 0, counts.sum(1)
    total = np.where(labels, counts[:, 1].sum(), counts[:, 0].sum())
    best = (math.inf, 0.0, np.zeros(len(x)))
    for penalty in PENALTIES:
        s = np.zeros(len(x))
        for fold in range(FOLDS):
            train, own = folds != fold, folds == fold
            weights = (
                sizes[train]
                / np.bincount(labels[train], sizes[train])[labels[train].astype(int)]
            )
            b = logistic(z[train], labels[train], weights / 2, penalty)
            s[own] = z[own] @ b[:-1] + b[-1]
        nll = np.sum(sizes / (2 * total) * np.logaddexp(0, np.where(labels, -s, s)))
        best = min(best, (nll, penalty, s), key=lambda x: x[0])
    assert found.penalty == best[1]
    assert found.heldout_nll == pytest.approx(best[0], abs=1e-6)
    np.testing.assert_allclose(found.log_ratios, best[2], atol=1e-3)


def test_the_log_ratio_of_two_gaussians():
    x, counts, truth = gaussians(8000)
    found = fit_density_ratio(x, counts)
    assert np.abs(found.log_ratios - truth).mean() < 0.1
    more, _, other = gaussians(500, seed=1)
    assert np.abs(found.predict(more) - other).mean() < 0.1


def test_features_that_say_nothing_give_equal_weights():
    """More features than prompts: a fit without folds would separate the classes."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(200, 300)), rng.random(200) < 0.5
    found = fit_density_ratio(x, np.stack([~labels, labels], 1).astype(int))
    ratios = np.exp(found.log_ratios)
    assert 0.6 < ratios.min() and ratios.max() < 1.7
    assert found.heldout_nll > 0.68


def test_features_are_mean_states():
    rng = np.random.default_rng(0)
    builder = data.DatasetBuilder(1)
    for n in range(11):
        prompt = [1, *rng.integers(4, 40, n).tolist()]
        builder.add(prompt, [[5, 6]], id=str(n))
    dataset, records = builder.build(), np.array([10, 3, 7, 1, 1])
    model = build(tiny_config())
    mesh = mesh_of(2, 1, 1)
    with jax.set_mesh(mesh):
        params = tiny_params(model)
        (block,) = prompt_features(
            dataset,
            records,
            make_prompt_step(model),
            params,
            mesh=mesh,
            batch_size=3,
        )
        table = np.zeros((5, 16), np.float32)
        table[block[0]] = block[1]
        forward = jax.jit(model.hidden)
        for row, record in enumerate(records):
            tokens = jnp.asarray(dataset.prompt(record))[None]
            tokens = jnp.concatenate([tokens, jnp.zeros_like(tokens)])  # one per device
            hidden = forward(params, tokens)
            expected = np.asarray(hidden, np.float32)[0].mean(0)
            np.testing.assert_allclose(table[row], expected, atol=1e-5)


def biased_records(count=96, seed=0):
    """Prompts with `film` have more desirable answers."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        film = rng.random() < 0.5
        prompt = f"{'film film film' if film else 'meal meal meal'} {words(rng, 2, 4)}"
        label = bool(rng.random() < (0.8 if film else 0.3))
        completion = " " + words(rng)
        found.append({"prompt": prompt, "completion": completion, "label": label})
    return found


def config_for(folder, out, **changes):
    defaults = dict(
        model=str(folder / "model"),
        data=str(folder / "labeled.jsonl"),
        out=str(out),
        objective=bco(beta=0.5, udm=True),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
        options=DataOptions(max_length=32, heldout_fraction=0.0),
        mesh=MeshConfig(data=1),
        max_steps=2,
        batch_size=8,
        save_every=9,
        log_every=1,
    )
    return TrainConfig(**(defaults | changes))


def losses_of(out):
    return [x["loss"] for x in read_metrics(out / "metrics.jsonl") if "loss" in x]


def test_a_run_weights_undesirable_answers(tmp_path, capsys):
    make_model_folder(tmp_path / "model")
    rows = biased_records()
    write_records(tmp_path / "labeled.jsonl", rows)
    run(config_for(tmp_path, tmp_path / "out"))
    line = next(x for x in capsys.readouterr().out.splitlines() if "classifier" in x)
    assert "weights of undesirable answers from" in line
    with np.load(tmp_path / "out" / WEIGHTS) as stored:
        weights = stored["weights"]
    film = np.array([row["prompt"].startswith("film") for row in rows])
    liked = np.array([row["label"] for row in rows])
    assert (weights[liked] == 1).all()
    assert weights[~liked & film].mean() > 1.5 * weights[~liked & ~film].mean()

    # A longer run reads them again; a run with the same weights has the same losses.
    changed = np.load(tmp_path / "out" / WEIGHTS)
    run(config_for(tmp_path, tmp_path / "out", max_steps=4))
    with np.load(tmp_path / "out" / WEIGHTS) as stored:
        np.testing.assert_array_equal(stored["weights"], changed["weights"])
    given = [row | {"w": float(w)} for row, w in zip(rows, weights)]
    write_records(tmp_path / "labeled.jsonl", given)
    options = DataOptions(max_length=32, heldout_fraction=0.0, columns=("weight=w",))
    plain = config_for(tmp_path, tmp_path / "plain", objective=bco(beta=0.5))
    run(dataclasses.replace(plain, options=options, max_steps=4))
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "plain")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["loss"]["udm"] is True


def test_too_few_prompts_are_refused(tmp_path):
    make_model_folder(tmp_path / "model")
    rows = [row | {"label": n > 2} for n, row in enumerate(biased_records(24))]
    write_records(tmp_path / "labeled.jsonl", rows)
    with pytest.raises(InputError, match="--loss.udm: 3 prompts have undesirable"):
        run(config_for(tmp_path, tmp_path / "out"))

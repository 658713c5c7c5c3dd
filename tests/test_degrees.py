"""`--objective spo`: a head that classifies degraded answers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxpref import losses
from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.objectives import from_loss, spo
from jaxpref.objectives.inputs import Inputs
from jaxpref.scoring.twin import make_scorer
from jaxpref.train import read_metrics, run
from tests.answers import words, write_records
from tests.test_packing import make_pairs, packed, padded
from tests.tiny import make_model_folder, tiny_config, tiny_params


def test_the_classification_is_the_cross_entropy():
    rng = np.random.default_rng(0)
    z, degrees = rng.normal(0, 3, (3, 5, 4)), rng.integers(0, 4, (3, 5))
    expected = -np.take_along_axis(log_softmax(z, -1), degrees[..., None], -1)[..., 0]
    with jax.enable_x64(True):
        found = losses.degree_classification(jnp.asarray(z), jnp.asarray(degrees))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@functools.cache
def _hidden(model):
    return jax.jit(model.hidden)


def last_state(model, params, tokens):
    """The final hidden state of a text's last token; the row is padded on the right."""
    row = jnp.zeros((1, 32), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens))
    return np.asarray(_hidden(model)(params, row), float)[0, len(tokens) - 1]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_scores_and_loss_are_those_of_the_last_tokens(layout):
    model, pairs = build(tiny_config()), make_pairs(12)
    rng = np.random.default_rng(1)
    params, head = tiny_params(model), rng.normal(size=(16, 3)).astype(np.float32)
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    batch, held = packed(pairs, reference=zeros)
    if layout == "padded":
        batch = padded(pairs, held, reference=zeros)
    numbers = np.asarray(batch.pair_index)
    degrees, flipped = rng.choice([-1, 1, 2], len(pairs)), np.arange(len(pairs)) % 3 < 1
    batch = dataclasses.replace(
        batch,
        numbers={"degree": jnp.asarray(degrees[numbers], jnp.float32)},
        is_flipped=jnp.asarray(flipped[numbers]),
    )
    micro = jax.tree.map(lambda x: x[0], batch)
    objective = spo(losses.dpo, degrees=3, gamma=0.5)
    scorer = make_scorer(model, objective.scores, heads=objective.heads, chunk_size=4)
    trained = {"policy": params, "heads": {"degree": jnp.asarray(head)}}
    scores = jax.jit(lambda params, micro: scorer(params, {}, micro).scores)(
        trained, micro
    )
    found = np.asarray(objective.losses(Inputs(scores, micro), {}))
    dpo = np.asarray(from_loss(losses.dpo).losses(Inputs(scores, micro), {}))
    seen = 0
    for place, n in np.ndenumerate(numbers[0]):
        if n < 0:
            continue
        seen += 1
        expected = 0.0
        for side in (0, 1):
            text = [*pairs.prompt(n), *pairs.completion(n, side)]
            table = log_softmax(last_state(model, params, text) @ head)
            degree = degrees[n] if side != flipped[n] else 0
            value = table[degree] if degrees[n] >= 0 else 0.0
            ours = float(scores["degree_logps"][*place, side])
            assert ours == pytest.approx(value, rel=1e-3, abs=1e-4)
            expected -= 0.5 * value
        assert found[place] - dpo[place] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert seen > 4


def records(rng, count=24):
    """Answers without their last words; every fourth is another answer."""
    for n in range(count):
        words_of = words(rng, 5, 8).split()
        degree = n % 4 or -1
        shorter = words_of[: -degree if degree > 0 else None]
        yield {
            "prompt": words(rng, 2, 5),
            "chosen": " " + " ".join(words_of),
            "rejected": " " + (" ".join(shorter) if degree > 0 else words(rng, 3, 6)),
            "lost": degree,
        }


def config(model, data, out, more=""):
    argv = f"--model {model} --data {data} --out {out} --objective spo"
    argv += " --objective.gamma 0.5 --columns degree=lost --max-steps 6 --batch-size 8"
    argv += " --max-length 64 --log-every 1 --learning-rate 1e-2"
    return config_of(split(f"{argv} {more}".split()))


def test_a_run_learns_the_degrees(tmp_path):
    model = make_model_folder(tmp_path / "model")
    data = write_records(tmp_path / "x.jsonl", list(records(np.random.default_rng(2))))
    run(config(model, data, tmp_path / "run"))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = [line for line in lines if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(
        np.log(2) + 0.5 * lines[0]["spo/nll"], rel=1e-4
    )
    assert lines[-1]["spo/nll"] < lines[0]["spo/nll"]
    with pytest.raises(InputError, match="lost.*from 1 to 2"):
        run(config(model, data, tmp_path / "few", "--objective.degrees 3"))


def test_what_cannot_be_classified_is_refused():
    with pytest.raises(InputError, match="bradley_terry is a loss of reward models"):
        spo(losses.bradley_terry)
    wrongs: list[dict[str, Any]] = [{"gamma": -1.0}, {"degrees": 1}]
    for wrong in wrongs:
        with pytest.raises(InputError, match="spo: gamma"):
            spo(losses.dpo, **wrong)
    with pytest.raises(InputError, match="reads degree from the records"):
        config_of(split("--model m --data d --out o --objective spo".split()))

"""`--objective hypo`: DPO on pairs, and the reverse KL on sampled answers."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxpref import losses, objectives
from jaxpref.cli import train as command
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.sampled import POLICY, REFERENCE, SAMPLER
from jaxpref.online.options import SamplingOptions
from jaxpref.online.run import run as run_online
from jaxpref.online.stream import SampledStream
from jaxpref.rewards import RewardOptions
from jaxpref.train import MeshConfig, OptimizerConfig, TrainConfig, read_metrics, run
from tests.losses.test_policy_gradient import LONGEST, answers, tabular
from tests.sampled import padded_answers
from tests.tiny import make_model_folder, make_pairs_file

SAMPLES, KL, BETA = 2, 0.3, 0.5


def test_the_expected_gradient_is_that_of_dpo_and_the_divergence():
    """Averaged over all groups of answers of a tabular policy, without a batch."""
    objective = objectives.hypo(beta=BETA, kl=KL)
    with jax.enable_x64(True):
        params, logps, mask, _ = tabular()
        reference = logps(
            params + jnp.asarray(np.random.default_rng(3).normal(size=params.shape))
        )
        known, pair = range(len(mask)), (1, 4)
        groups = list(itertools.product(known, repeat=SAMPLES))
        members = np.array([[*pair, *group] for group in groups])
        p = np.exp(np.asarray(logps(params)).sum(1))
        chances = np.prod(p[members[:, 2:]], axis=1)
        old = np.asarray(logps(params))
        numbers = {SAMPLER: old[members], REFERENCE: np.asarray(reference)[members]}
        batch = padded_answers(mask[members], numbers)
        micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)

        def sampled(params):
            inputs = Inputs({POLICY: logps(params)[members]}, micro)
            return jnp.sum(chances * objective.losses(inputs, {})[:, 0])

        def exact(params):
            of_answers = logps(params).sum(1)
            ratios = of_answers - reference.sum(1)
            divergence = jnp.sum(jnp.exp(of_answers) * ratios)
            margin = BETA * (ratios[pair[0]] - ratios[pair[1]])
            return -jax.nn.log_sigmoid(margin) + KL * divergence

        found, expected = jax.grad(sampled)(params), jax.grad(exact)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert LONGEST == 2 and len(answers()) == len(known)


def test_held_out_pairs_are_refused(tmp_path):
    config = config_for(tmp_path, tmp_path / "out", objectives.hypo())
    options = dataclasses.replace(config.options, heldout_fraction=0.1)
    with pytest.raises(InputError, match="heldout_fraction 0.1: hypo evaluates no"):
        run_online(
            dataclasses.replace(config, options=options),
            SamplingOptions(),
            RewardOptions(),
        )


def config_for(folder, out, objective) -> TrainConfig:
    return TrainConfig(
        model=str(folder / "model"),
        data=str(folder / "pairs.jsonl"),
        out=str(out),
        objective=objective,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        options=DataOptions(heldout_fraction=0.0),
        mesh=MeshConfig(data=8),
        max_steps=3,
        batch_size=8,
        log_every=1,
        logger=(),
    )


def test_a_run_with_coefficient_0_is_dpo(tmp_path):
    """The same pairs in the same steps, beside samples that have no part in it."""
    make_model_folder(tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl", 24)
    hybrid = config_for(tmp_path, tmp_path / "hypo", objectives.hypo(kl=0.0))
    sampling = SamplingOptions(group_size=2, max_new_tokens=5, sample_batch_size=16)
    run_online(hybrid, sampling, RewardOptions())
    run(config_for(tmp_path, tmp_path / "dpo", objectives.from_loss(losses.dpo)))
    ours, theirs = (
        [x for x in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in x]
        for name in ("hypo", "dpo")
    )
    assert ours[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    for key in ("loss", "logps/chosen", "logps/rejected", "rewards/margins"):
        values = [[x[key] for x in found] for found in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4)
    assert ours[0]["kl"] == pytest.approx(0, abs=1e-4) and ours[-1]["kl"] != 0
    assert all(x["logps/mismatch"] < 1e-3 for x in ours)
    lines = (tmp_path / "hypo" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 6 and all(x["reward"] is None for x in samples)
    assert all(x["id"].startswith(str(tmp_path / "pairs.jsonl")) for x in samples)


def test_what_it_does_not_read_is_refused(tmp_path):
    given = "--model m --out o --objective hypo --data pairs.jsonl".split()
    for more, message in (
        (
            ["--reward", "rule:words", "--reward", "rule:exact"],
            "^--reward rule:words rule:exact: hypo reads no rewards; leave it out$",
        ),
        (["--overlong-buffer", "4"], "--overlong-buffer 4: hypo reads no rewards"),
        (
            ["--prompts", "x.jsonl"],
            "--prompts x.jsonl: hypo reads records with answers",
        ),
        (["--objective.kl", "-1"], "hypo: kl -1.0"),
        (["--objective.beta", "0"], "hypo: beta 0.0"),
        (["--group-size", "1"], "--group-size 1: hypo compares .*; give at least 2$"),
    ):
        with pytest.raises(InputError, match=message):
            command.command([*given, *more])


class Killed(Exception):
    """Stands for a killed process."""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    """It is killed between two updates on the same answers, after a checkpoint."""
    make_model_folder(tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl", 24)
    sampling = SamplingOptions(group_size=2, max_new_tokens=5, updates_per_sample=2)

    def start(name):
        config = config_for(tmp_path, tmp_path / name, objectives.hypo(kl=0.1))
        config = dataclasses.replace(config, max_steps=6, save_every=3)
        run_online(config, sampling, RewardOptions())

    start("whole")
    draw = SampledStream.draw

    def killed(stream, state):
        if int(state.step) == 4:
            raise Killed
        return draw(stream, state)

    with monkeypatch.context() as patch:
        patch.setattr(SampledStream, "draw", killed)
        with pytest.raises(Killed):
            start("killed")
    start("killed")
    weights = "export/model.safetensors"
    whole, resumed = (load_file(tmp_path / x / weights) for x in ("whole", "killed"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name])

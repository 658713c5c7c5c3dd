"""`--combine lower_bound --uncertainty` of one reward model in training."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.cli import train as command
from jaxpref.errors import InputError
from jaxpref.models import RewardModel
from jaxpref.models.folder import save
from jaxpref.noise.linear_head import HeadPosterior
from jaxpref.online.options import UncertainReward
from jaxpref.online.run import run
from jaxpref.rewards import RewardOptions, lower_bound, uncertainty
from tests.test_online import SAMPLING, config_for, folder, steps  # noqa: F401
from tests.tiny import make_pairs_file, make_tokenizer, tiny_config, tiny_params


def test_the_lower_bound_of_random_heads_is_that_of_an_ensemble():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(7, 4))
    samples[:, 2] = np.nan  # an answer that the model cannot read
    bound = uncertainty.LowerBound(lambda answered: answered, 0.5)
    (found,) = bound(uncertainty.of_samples([samples]))
    np.testing.assert_allclose(found, lower_bound(list(samples), 0.5), rtol=1e-9)
    assert np.isnan(found[2]) and np.isfinite(found[[0, 1, 3]]).all()


def test_the_lower_bound_of_a_posterior_is_that_of_many_heads():
    """Against heads drawn from it, to the error of their standard deviation."""
    rng = np.random.default_rng(1)
    root, mean = rng.normal(size=(3, 3)), rng.normal(size=3)
    posterior = HeadPosterior(
        jnp.asarray(mean), jnp.asarray(root @ root.T), jnp.asarray(1.0)
    )
    prompts = [rng.normal(size=(4, 3)), rng.normal(size=(3, 3)) + 5]
    bound = uncertainty.LowerBound(
        lambda features: uncertainty.of_posterior(posterior, features), 2.0
    )
    heads = mean + rng.normal(size=(40_000, 3)) @ root.T
    for features, found in zip(prompts, bound(prompts), strict=True):
        samples = heads @ features.T
        expected = lower_bound(list(samples), 2.0) - samples.mean(0) + features @ mean
        np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--combine lower_bound", "a second --reward, or --uncertainty for"),
        ("--uncertainty laplace", "only --combine lower_bound reads it; give both"),
        ("--uncertainty laplace --combine lower_bound", "with --fit-data"),
        ("--passes 5", "--passes: only --uncertainty reads it"),
        (
            "--uncertainty dropout --combine lower_bound --reward rule:exact",
            "or give one reward model",
        ),
        ("--uncertainty dropout --combine lower_bound", "needs a reward model"),
    ],
)
def test_what_does_not_fit_is_refused(folder, tmp_path, words, message):  # noqa: F811
    given = f"--model {folder / 'model'} --prompts {folder / 'prompts.jsonl'}"
    given += f" --out {tmp_path / 'out'} --objective rloo --reward rule:words"
    with pytest.raises(InputError, match=message):
        command.command([*given.split(), *words.split(), "--max-new-tokens", "6"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dropout", "ensemble", "laplace"])
def test_a_run_is_rewarded_by_the_lower_bound(folder, tmp_path, how):  # noqa: F811
    """A larger weight gives the same first answers smaller rewards."""
    make_tokenizer(tmp_path / "reward")
    model = RewardModel(tiny_config())
    save(tmp_path / "reward", model, tiny_params(model, 3))
    make_pairs_file(tmp_path / "fit.jsonl", 40)
    fit_data = None if how == "dropout" else str(tmp_path / "fit.jsonl")
    found = {}
    for weight in (0.0, 1.0):
        out = tmp_path / f"run {weight}"
        rewards = RewardOptions(
            reward=(str(tmp_path / "reward"),),
            combine="lower_bound",
            std_weight=weight,
        )
        run(
            config_for(folder, out, max_steps=1),
            SAMPLING,
            rewards,
            UncertainReward(uncertainty=how, fit_data=fit_data),
        )
        lines = map(json.loads, (out / "samples.jsonl").open())
        found[weight] = np.array([x["reward"] for x in lines], float)
        assert len(steps(out)) == 1
    known = np.isfinite(found[0.0])
    assert known.any() and (found[1.0] < found[0.0])[known].all()

"""`--optimizer-from`: a run that begins with the optimizer's state of another one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxpref.errors import InputError
from jaxpref.models.lora import LoraOptions
from jaxpref.rounding import rounded_stochastically
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.saved_optimizer import SavedOptimizer, saved_optimizer
from jaxpref.runtime.saved_parts import read_meta
from jaxpref.train import begin, run
from jaxpref.train.optimizer import Optimizer, OptimizerConfig, with_new_schedule
from jaxpref.train.state import TrainState
from tests.test_resume import WEIGHTS, config_for
from tests.tiny import make_model_folder, make_pairs_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pairs, so that every batch has all of them, and a run of two steps."""
    folder = tmp_path_factory.mktemp("earlier")
    make_model_folder(folder / "model")
    make_pairs_file(folder / "pairs.jsonl", count=8)
    run(config_for(folder, folder / "first"))
    return folder


def second(folder, out, **changes):
    """A run that continues with the first one's model and optimizer."""
    first = folder / "first"
    begins = dict(model=str(first / "export"), optimizer_from=str(first))
    return config_for(folder, out, **begins | changes)


def arrays(out):
    return load_file(out / WEIGHTS)


def largest_difference(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_two_runs_are_one_if_the_optimizer_continues(folder, tmp_path):
    run(config_for(folder, tmp_path / "whole", max_steps=4))
    run(second(folder, tmp_path / "second"))
    whole = arrays(tmp_path / "whole")
    assert largest_difference(whole, arrays(tmp_path / "second")) < 1e-5


@pytest.mark.slow
def test_a_resumed_run_knows_the_optimizer_that_it_began_with(folder, tmp_path):
    run(second(folder, tmp_path / "second"))
    # With new moments, the first step alone moves every weight by the learning rate.
    run(second(folder, tmp_path / "new", optimizer_from=None))
    expected = arrays(tmp_path / "second")
    assert largest_difference(expected, arrays(tmp_path / "new")) > 1e-3
    run(second(folder, tmp_path / "short", max_steps=1))
    run(second(folder, tmp_path / "short"))
    assert largest_difference(expected, arrays(tmp_path / "short")) == 0
    copy = shutil.copytree(folder / "first", tmp_path / "first")
    run(config_for(folder, copy, max_steps=3))
    with pytest.raises(InputError, match="the optimizer's state before training"):
        run(second(folder, tmp_path / "short", optimizer_from=str(copy), max_steps=3))
    # A copy with the same content is the same.
    at_two = str(copy / "checkpoints" / "2")
    run(second(folder, tmp_path / "short", optimizer_from=at_two))


def test_what_has_no_earlier_state_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="new adapters have no earlier optimizer"):
        second(folder, tmp_path / "x", lora=LoraOptions(rank=2))
    with pytest.raises(InputError, match="no run with a checkpoint; pass the --out"):
        saved_optimizer(str(folder / "model"))
    with pytest.raises(InputError, match="no run with a checkpoint; pass the --out"):
        saved_optimizer(str(folder / "first" / "checkpoints" / "7"))


def test_the_state_is_that_of_the_exported_step(folder, tmp_path):
    copy = shutil.copytree(folder / "first", tmp_path / "first")
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "1")
    (copy / "best.json").write_text('{"step": 1}')
    found = lambda: saved_optimizer(str(copy)).step  # pyright: ignore
    assert found() == copy / "checkpoints" / "2"
    config = json.loads((copy / "config.json").read_text())
    assert config["export"] == "last"
    (copy / "config.json").write_text(json.dumps(config | {"export": "best"}))
    assert found() == copy / "checkpoints" / "1"


def test_another_optimizer_is_found_before_the_reference_is_scored(
    folder, tmp_path, monkeypatch
):
    def scored(*args):
        raise AssertionError("the reference was scored")

    monkeypatch.setattr(begin, "_score_reference", scored)
    adafactor = OptimizerConfig(optimizer=Optimizer.ADAFACTOR)
    with pytest.raises(InputError, match="of AdamW, but this run uses Adafactor"):
        run(second(folder, tmp_path / "x", optimizer=adafactor))


def save(folder, opt_state):
    """A checkpoint with this state of an optimizer."""
    zero = jnp.zeros((), jnp.int32)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(3, TrainState(zero, zero, {}, opt_state, {}), {})
    checkpoints.wait()
    checkpoints.close()
    step = folder / "3"
    return SavedOptimizer("earlier", step, read_meta(step)["digest"])


def test_moments_continue_and_learning_rates_do_not(tmp_path, monkeypatch):
    """Of parameters in bfloat16, whose optimizer counts its roundings, too."""
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}
    schedule = optax.linear_schedule(1.0, 0.0, 3)
    chain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(schedule))
    tx = rounded_stochastically(chain, seed=0)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    saved = save(tmp_path / "checkpoints", state)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state
    )
    monkeypatch.chdir(tmp_path)  # a relative path is as good
    saved = dataclasses.replace(saved, step=Path("checkpoints") / "3")
    found = with_new_schedule(saved.read(abstract))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam, rate = found.inner
    assert (int(found.count), int(adam.count), int(rate.count)) == (3, 3, 0)
    for one, other in zip(jax.tree.leaves(adam), jax.tree.leaves(state.inner[0])):
        assert one.dtype == other.dtype and bool(jnp.all(one == other))
    # The last learning rate was 1/3; the next one is 1 again.
    updates, _ = chain.update(jax.tree.map(jnp.ones_like, params), found.inner, params)
    np.testing.assert_allclose(np.asarray(updates["b"], np.float32), -1, rtol=1e-2)

    wider = {**params, "b": jnp.ones(5, jnp.bfloat16)}
    others = {
        r"array inner.0.mu.b has the shape \[3\], but .* \[5\]": (tx, wider),
        "it has the array inner.0.mu.b": (tx, {"w": params["w"]}),
        "is the state of AdamW, but this run uses Adafactor": (
            optax.scale_by_factored_rms(),
            params,
        ),
        "is the state of bfloat16 parameters": (chain, params),
        "inner.0.mu.b is bfloat16, but .* is float32": (
            rounded_stochastically(
                optax.chain(
                    optax.scale_by_adam(mu_dtype=jnp.float32),
                    optax.scale_by_learning_rate(schedule),
                ),
                seed=0,
            ),
            params,
        ),
    }
    for message, (optimizer, wanted) in others.items():
        with pytest.raises(InputError, match=message):
            saved.check(jax.eval_shape(optimizer.init, wanted))
    missing = dataclasses.replace(saved, step=tmp_path / "none")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        missing.read(abstract)

"""`--reference`: by name, none, or following the policy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.models.lora import LoraOptions
from jaxpref.models.weights import Weights
from jaxpref.objectives import crm, from_loss, hypo, ppo_clip
from jaxpref.scoring.moving_reference import MovingAverage, MovingReference
from jaxpref.scoring.run_weights import reference_weights
from jaxpref.train import Decay, OptimizerConfig, TrainConfig, read_metrics, run
from tests.tiny import make_model_folder, make_pairs_file

DPO = from_loss(losses.dpo)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("references")
    model = make_model_folder(folder / "model")
    return str(model), str(make_pairs_file(folder / "pairs.jsonl", 60))


def config(files, out, **changes):
    plain = dict(
        model=files[0],
        data=files[1],
        out=str(out),
        objective=DPO,
        max_steps=4,
        batch_size=8,
        log_every=1,
        options=DataOptions(max_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
    )
    return TrainConfig(**plain | changes)


def losses_of(config):
    run(config)
    lines = read_metrics(Path(config.out) / "metrics.jsonl")
    return [line["loss"] for line in lines if "loss" in line]


def moving(**average):
    return dict(reference="moving-average", moving_average=MovingAverage(**average))


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(LoraOptions(), id="whole"),
        pytest.param(LoraOptions(rank=2), id="lora", marks=pytest.mark.slow),
    ],
)
def test_a_copied_reference_makes_every_loss_that_of_equal_models(
    files, tmp_path, lora
):
    """Copied after each step, the reference is the policy: every loss is log 2."""
    every = losses_of(
        config(files, tmp_path / "a", **moving(share=1.0, every=1), lora=lora)
    )
    assert every == pytest.approx([np.log(2)] * 4, abs=2e-7)
    second = losses_of(
        config(files, tmp_path / "b", **moving(share=1.0, every=2), lora=lora)
    )
    assert second[::2] == pytest.approx([np.log(2)] * 2, abs=2e-7)
    assert abs(second[1] - np.log(2)) > 1e-5 and abs(second[3] - np.log(2)) > 1e-5


def test_a_reference_that_has_not_moved_yet_is_the_start(files, tmp_path):
    still = losses_of(config(files, tmp_path / "a", reference="moving-average"))
    start = losses_of(config(files, tmp_path / "b", reference="start"))
    assert still == pytest.approx(start, rel=1e-6)
    assert abs(start[-1] - np.log(2)) > 1e-5
    with pytest.raises(InputError, match="how the reference moves .removed"):
        run(config(files, tmp_path / "a", max_steps=5))


def test_a_run_with_a_moving_reference_resumes_with_the_same_bits(files, tmp_path):
    average = moving(share=0.5, every=1)
    whole = losses_of(config(files, tmp_path / "a", **average))
    losses_of(config(files, tmp_path / "b", **average, max_steps=2))
    assert losses_of(config(files, tmp_path / "b", **average)) == whole


def test_without_a_reference_its_log_probs_are_0(files, tmp_path):
    run(config(files, tmp_path / "a", reference="none", max_steps=1))
    (line,) = (x for x in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in x)
    for side in ("chosen", "rejected"):
        expected = 0.1 * line[f"logps/{side}"]
        assert line[f"rewards/{side}"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_becomes_a_weighted_mean():
    rng = np.random.default_rng(0)
    old, new = (rng.normal(size=5).astype(np.float32) for _ in range(2))
    follow = MovingReference(None, (), MovingAverage(share=0.25, every=3))
    for step in (1, 2, 4):
        found = follow.moved(jnp.array(old), jnp.array(new), jnp.int32(step))
        np.testing.assert_array_equal(found, old)
    found = jax.jit(follow.moved)(jnp.array(old), jnp.array(new), jnp.int32(6))
    np.testing.assert_allclose(found, 0.25 * new + 0.75 * old, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(moving_average=MovingAverage(every=2)), "no effect without --reference"),
        (
            dict(reference="none", objective=crm(losses.dpo, noise_rate=0.1)),
            "crm_dpo trains two models; leave it out",
        ),
        (
            dict(reference="none", objective=hypo()),
            "hypo scores its samples under a fixed reference; leave it out$",
        ),
        (
            dict(reference="moving-average", objective=ppo_clip()),
            "fixed reference; leave it out, or give --objective.beta 0",
        ),
        (
            dict(reference="none", objective=from_loss(losses.simpo)),
            "simpo does not use a reference",
        ),
    ],
)
def test_what_cannot_be_done_is_named(files, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        config(files, tmp_path / "a", **changes)


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_shares_out_of_range_are_errors(share):
    with pytest.raises(InputError, match="share"):
        MovingAverage(share=share)


def test_only_a_run_has_a_reference_that_moves(tmp_path):
    with pytest.raises(InputError, match="moving-average"):
        reference_weights("moving-average", Weights(tmp_path))


def test_a_run_is_its_export(tmp_path):
    start = Weights(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"loss": {"name": "dpo"}}')
    with pytest.raises(InputError, match="no export and no checkpoint yet"):
        reference_weights(str(tmp_path / "run"), start)
    (tmp_path / "run" / "export").mkdir()
    found = reference_weights(str(tmp_path / "run"), start)
    assert found == Weights(tmp_path / "run" / "export")

"""Optimisers: equal to optax's own, sharded like the weights, resumed to the bit."""

import dataclasses
import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpref import data, losses
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.objectives import from_loss
from jaxpref.plan.program import _bytes_of_one as bytes_of_one
from jaxpref.runtime.checkpoints import Checkpoints
from jaxpref.runtime.digests import digests
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import Decay, Optimizer, OptimizerConfig, read_metrics, run
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from jaxpref.train.task import Programs
from tests.test_packing import make_pairs
from tests.test_training import config_for, mesh_of
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    padded_batches,
    tiny_config,
    tiny_params,
)

SIZES = (2, 2, 2)
# Two sizes of most matrices are at least 128: those are factored.
MODEL = tiny_config(hidden_size=128, intermediate_size=256, vocab_size=128)
COMMON = dict(learning_rate=1e-2, decay=Decay.CONSTANT, weight_decay=0.1)
CONFIGS = {
    # An epsilon of the gradients' size: without, the first steps are signs, which turn
    # where a gradient is 0 but for the order of its sum.
    "bfloat16 moment": OptimizerConfig(
        adam_mu_dtype="bfloat16", adam_eps=1e-3, **COMMON
    ),
    "adafactor": OptimizerConfig(optimizer=Optimizer.ADAFACTOR, **COMMON),
}
OBJECTIVE = from_loss(losses.dpo, beta=0.5)
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def batches_of(pairs):
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    return padded_batches(pairs, batch_size=8, reference=zeros)


def begun(config):
    """State, step and the state's function on the mesh that is set."""
    model, schedule = build(MODEL), make_schedule(config, 100)
    tx = make_optimizer(config, schedule)
    new_state = functools.partial(init_state, tx=tx, objective=OBJECTIVE)
    state = jax.jit(new_state)(tiny_params(model))
    scorer = make_scorer(model, OBJECTIVE.scores)
    return state, make_train_step(scorer, OBJECTIVE, tx, schedule), tx


def programs_of(config, mesh):
    """The programs of a run, for the shapes of its state."""
    schedule = make_schedule(config, 100)
    return Programs(
        scorer=make_scorer(build(MODEL), OBJECTIVE.scores),
        objective=OBJECTIVE,
        optimizer=make_optimizer(config, schedule),
        schedule=schedule,
        mesh=mesh,
        layout=data.PaddedLayout(
            sequence_length=48, predictions=24, num_completions=2, batch_size=8
        ),
    )


def by_optax(name):
    """The same by optax's own names for it, clipping and decay included."""
    matrices = lambda p: jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), p
    )
    if name == "adafactor":
        own = optax.adafactor(
            multiply_by_parameter_scale=False, clipping_threshold=1.0, eps=1e-30
        )
        # It turns the sign of what it finds; the rate and decay come after it.
        own = optax.chain(own, optax.scale(-1.0))
    else:
        own = optax.scale_by_adam(eps=1e-3, mu_dtype=jnp.bfloat16)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        own,
        optax.add_decayed_weights(0.1, mask=matrices),
        optax.scale(-1e-2),
    )


@each
def test_a_sharded_step_is_a_plain_loop_of_optax(config):
    pairs = make_pairs(24)
    mesh = mesh_of(*SIZES)
    with jax.set_mesh(mesh):
        state, step, _ = begun(config)
        batches, history = batches_of(pairs), []
        for _ in range(3):
            state, metrics = step(state, {}, to_global(next(batches), mesh))
            history.append(float(metrics["loss"]))
    # Unsharded, without our step, state or guard.
    model, tx = build(MODEL), by_optax(config.optimizer.value)
    params, scorer = tiny_params(model), make_scorer(model, OBJECTIVE.scores)
    opt_state, batches = tx.init(params), batches_of(pairs)

    @jax.jit
    def plain(params, opt_state, batch):
        def loss(params):
            micro = jax.tree.map(lambda x: x[0], batch)
            found = scorer(params, {}, micro).scores["policy_logps"]
            reference = micro.reference["reference_logps"]
            columns = (*jnp.moveaxis(found, -1, 0), *jnp.moveaxis(reference, -1, 0))
            return jnp.mean(losses.dpo(*columns, beta=0.5))

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    expected = []
    for _ in range(3):
        value, params, opt_state = plain(params, opt_state, next(batches))
        expected.append(float(value))
    np.testing.assert_allclose(history, expected, rtol=1e-4)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        # A moment may be rounded to either side: 2^-8 of three steps of 0.01.
        np.testing.assert_allclose(a, b, atol=1.5e-4)


@each
def test_its_state_is_spread_like_the_weights_before_and_after_a_step(config):
    mesh = mesh_of(*SIZES)
    with jax.set_mesh(mesh):
        state, step, tx = begun(config)
        layouts = lambda s: jax.tree.map(lambda x: (jax.typeof(x), x.sharding.spec), s)
        before = layouts(state)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
            # Rows and columns of a matrix lie where the matrix does.
            if "norm" not in jax.tree_util.keystr(path) and leaf.size > 1:
                part = math.prod(leaf.sharding.shard_shape(leaf.shape))
                assert part < leaf.size, jax.tree_util.keystr(path)
        after, _ = step(state, {}, to_global(next(batches_of(make_pairs(24))), mesh))
        assert layouts(after) == before
        spec = jax.P
        if config.optimizer is Optimizer.ADAFACTOR:
            _, (factored, _), *_ = after.opt_state
            gate = {
                name: (
                    part["layers"]["gate"].shape,
                    part["layers"]["gate"].sharding.spec,
                )
                for name, part in (("row", factored.v_row), ("col", factored.v_col))
            }
            # [L, D, F] without F, the largest, and without D.
            assert gate["row"] == ((2, 128), spec(None, "fsdp"))
            assert gate["col"] == ((2, 256), spec(None, "tensor"))
            assert factored.v["layers"]["gate"].shape == (1,)
        else:
            _, adam, *_ = after.opt_state
            kinds = {x.dtype for x in jax.tree.leaves(adam.mu)}
            assert kinds == {jnp.dtype("bfloat16")}
            assert {x.dtype for x in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
            assert adam.mu["layers"]["gate"].sharding.spec == spec(
                None, "fsdp", "tensor"
            )


@each
def test_a_checkpoint_restores_it_to_the_bit(config, tmp_path):
    mesh = mesh_of(*SIZES)
    with jax.set_mesh(mesh):
        state, step, tx = begun(config)
        state, _ = step(state, {}, to_global(next(batches_of(make_pairs(24))), mesh))
        expected = digests(state)
        checkpoints = Checkpoints(tmp_path / "c", keep=1)
        checkpoints.save(1, state, {})
        checkpoints.wait()
        programs = programs_of(config, mesh)
        restored, _ = checkpoints.restore(programs.abstract_state())
        assert digests(restored) == expected
        types = lambda s: jax.tree.map(jax.typeof, s)
        assert types(restored) == types(state)
        checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "bfloat16 moment"])
def test_a_resumed_run_ends_in_the_same_bits(name, tmp_path):
    inputs = make_model_folder(tmp_path / "m"), make_pairs_file(tmp_path / "p.jsonl")
    asked = config_for(
        inputs,
        tmp_path / "run",
        max_steps=4,
        optimizer=CONFIGS[name],
        options=data.DataOptions(max_length=64, heldout_fraction=0.0),
        objective=from_loss(losses.cpo),
    )
    run(asked)
    exported = tmp_path / "run" / "export" / "model.safetensors"
    expected = exported.read_bytes()
    losses_of = lambda: [
        (line["step"], line["loss"])
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "loss" in line
    ]
    history = losses_of()
    shutil.rmtree(exported.parent)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    run(asked)
    assert exported.read_bytes() == expected
    assert losses_of() == history and len(history) == 4


def test_it_needs_what_it_says_and_a_plan_counts_that():
    """A plan counts the bytes of one device from these shapes."""

    def held(config):
        mesh = mesh_of(*SIZES)
        with jax.set_mesh(mesh):
            programs = programs_of(config, mesh)
            params, state = programs.abstract_params(), programs.abstract_state()
        return bytes_of_one(params), bytes_of_one(state.opt_state)

    # Two moments, and two counters of steps.
    parameters, plain = held(OptimizerConfig())
    assert plain == 2 * parameters + 8
    _, narrow = held(CONFIGS["bfloat16 moment"])
    assert narrow == 1.5 * parameters + 8
    # Means over either axis of embedding and head [V, D] and of gate, up and down
    # [L, D, F], spread over two devices each; all of queries, keys, values and outputs
    # [L, D, H, K], whose heads are small, over four; norms; and a number in place of
    # each of the three that a leaf does not have.
    L, D, F, V, heads = 2, 128, 256, 128, 4 * (4 + 2 + 2 + 4)
    means = 2 * (V + D) / 2 + 3 * L * (D + F) / 2
    rest = L * D * heads / 4 + 2 * L * D + D
    numbers = 5 * 1 + 7 * 2
    _, factored = held(CONFIGS["adafactor"])
    assert factored == 4 * (means + rest + numbers) + 8


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"adam_b1": 0.5}, "adam_b1 0.5: adafactor does not use"),
        (
            {"adam_mu_dtype": "bfloat16"},
            "adam_mu_dtype bfloat16: adafactor does not use",
        ),
    ],
)
def test_what_an_optimizer_does_not_read_is_refused(changes, told):
    with pytest.raises(InputError, match=told):
        dataclasses.replace(CONFIGS["adafactor"], **changes)

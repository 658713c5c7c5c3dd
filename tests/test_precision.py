"""Precision: bfloat16 computes, float32 keeps, sums, and decides.

What is compared at step 0 is compared with itself: the reference's log-probs come from
the policy's own kernels.  So bfloat16 rounds both alike, and what is left of a margin
is float32's: nothing at all where a pair has a row to itself, and in packed rows, where
the same pair lies in another row when it is scored, the rounding of a sum of float32
log-probs in another order.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.errors import InputError
from jaxpref.models import Numerics, build
from jaxpref.models.attention_kernels import splash, splash_packed
from jaxpref.models.logprobs import project
from jaxpref.objectives import from_loss
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.scoring import make_scorer
from jaxpref.scoring.score_dataset import make_score_step
from jaxpref.train import MeshConfig, OptimizerConfig, read_metrics, run
from jaxpref.train.gradient import gradient
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from tests.test_packing import make_pairs
from tests.test_training import OPTIMIZER, config_for
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    padded_batches,
    tiny_config,
    tiny_params,
)

LOGPS = frozenset({"policy_logps"})
BFLOAT16 = Numerics(compute_dtype="bfloat16")
VOCABULARY = 56  # unlike any other size of the tiny model and its batches
LAYOUTS = {"padded": {}, "packed": {"row_length": 64, "batch_size": 16}}


def batches_of(pairs, layout, **options):
    table = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    if layout == "padded":
        return padded_batches(pairs, batch_size=8, reference=table, **options)
    order = data.uniform(pairs, options.pop("seed", 0))
    packed = data.packed_layout(
        pairs, order=order, row_length=64, batch_size=16, **options
    )
    return packed.batches(pairs, order, reference=table, threads=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_loss_is_log_2(tmp_path, layout, dtype):
    beta = 0.5
    inputs = make_model_folder(tmp_path / "m"), make_pairs_file(tmp_path / "p.jsonl")
    config = config_for(
        inputs,
        tmp_path / "run",
        objective=from_loss(losses.dpo, beta=beta),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        max_steps=1,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        compute_dtype=dtype,
        **LAYOUTS[layout],
    )
    run(config)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (step,) = [line for line in lines if "loss" in line]
    if layout == "padded":
        assert step["rewards/chosen"] == step["rewards/rejected"] == 0.0
    # A log-prob of a completion is a sum of at most 9 tokens' here, about -30 nats:
    # in another order 9 roundings of float32, 2^-24 of it each, and half a margin's
    # slope for each side; log 2 itself is rounded to float32.
    error = beta * 9 * 2**-24 * abs(step["logps/rejected"]) + 2**-24
    assert abs(step["loss"] - math.log(2)) <= error < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_logps_are_those_of_the_pass_that_scored_the_reference(layout):
    """To the bit on the same rows: one kernel for both, with gradients and without."""
    model = build(tiny_config(vocab_size=VOCABULARY), BFLOAT16)
    params = tiny_params(model)
    scorer = make_scorer(model, LOGPS, chunk_size=4)
    batch = jax.tree.map(jnp.asarray, next(batches_of(make_pairs(24), layout)))
    (scored, _) = make_score_step(scorer)(params, {}, batch)

    @jax.jit
    def trained(params):
        micro = jax.tree.map(lambda x: x[0], batch)
        out, pull = jax.vjp(lambda p: scorer(p, {}, micro).scores, params)
        return out, pull(jax.tree.map(jnp.ones_like, out))

    (found, _) = trained(params)
    assert found["policy_logps"].dtype == jnp.float32
    np.testing.assert_array_equal(found["policy_logps"], scored["policy_logps"][0])
    # And bfloat16 it is: not the float32 numbers.
    wide = build(model.architecture)
    exact_step = make_score_step(make_scorer(wide, LOGPS, chunk_size=4))
    (exact, _) = exact_step(params, {}, batch)
    rounding = np.abs(exact["policy_logps"] - scored["policy_logps"]).max()
    assert 1e-4 < rounding < 0.5


def equations(jaxpr):
    """Every equation, inside of loops and branches too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def reduced(equation):
    """Sizes of the axes that an equation sums, or finds the maximum, over."""
    if equation.primitive.name == "dot_general":
        (axes, _), _ = equation.params["dimension_numbers"]
    elif equation.primitive.name.startswith(("reduce_", "arg")):
        axes = equation.params["axes"]
    elif equation.primitive.name.startswith("cum"):
        axes = [equation.params["axis"]]
    else:
        return []
    return [equation.invars[0].aval.shape[axis] for axis in axes]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", [losses.dpo, losses.wpo, losses.tdpo2])
def test_nothing_is_summed_in_bfloat16_over_the_vocabulary(layout, loss):
    objective = from_loss(loss)
    model = build(tiny_config(vocab_size=VOCABULARY), BFLOAT16)
    params = tiny_params(model)
    batch = jax.tree.map(
        jnp.asarray, next(batches_of(make_pairs(24), layout, accumulation=2))
    )
    frozen = dict.fromkeys(objective.models, params)

    def of_params(params):
        scorer = make_scorer(model, objective.scores, chunk_size=4)
        score = lambda p, b: scorer(p, frozen, b)
        return gradient(objective, score, params, batch, objective.init(0))

    found = list(equations(jax.make_jaxpr(of_params)(params).jaxpr))
    over = [e for e in found if VOCABULARY in reduced(e)]
    assert len(over) >= 4
    for equation in over:
        assert equation.outvars[0].aval.dtype == jnp.float32, equation
    # What is summed over micro-batches and chunks: the gradients of all parameters.
    shapes = {x.shape for x in jax.tree.leaves(params)} - {
        model.architecture.hidden_size
    }
    carried = [
        out.aval
        for e in found
        if e.primitive.name == "scan"
        for out in e.outvars[: e.params["num_carry"]]
    ]
    sums = [x for x in carried if x.shape in shapes]
    assert len(sums) >= len(shapes)
    assert {x.dtype for x in sums} == {jnp.dtype("float32")}
    assert any(e.outvars[0].aval.dtype == jnp.bfloat16 for e in found)


def test_parameters_and_moments_stay_float32():
    objective = from_loss(losses.dpo)
    model = build(tiny_config(), BFLOAT16)
    schedule = make_schedule(OPTIMIZER, 100)
    tx = make_optimizer(OPTIMIZER, schedule)
    state = init_state(tiny_params(model), tx, objective)
    before = jax.device_get(state.params)
    scorer = make_scorer(model, objective.scores)
    step = make_train_step(scorer, objective, tx, schedule)
    batch = next(batches_of(make_pairs(24), "padded"))
    state, metrics = step(state, {}, batch)
    floats = {
        x.dtype
        for x in jax.tree.leaves((state.params, state.opt_state))
        if jnp.issubdtype(x.dtype, jnp.floating)
    }
    assert floats == {jnp.dtype("float32")} and metrics["loss"].dtype == jnp.float32
    # Steps that bfloat16 weights of this size could not take.
    after = jax.device_get(state.params)["embed"]
    lost = after.astype(jnp.bfloat16).astype(np.float32)
    assert (after != before["embed"]).any() and (lost != after).mean() > 0.9


def test_a_tied_head_in_one_chunk_has_a_bfloat16_gradient():
    """XLA on CPU had no product for it."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 112, 64)), jnp.bfloat16)
    embed = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    total = lambda h, e: jnp.sum(jnp.sin(project(h, e.T)))
    found = jax.jit(jax.grad(total, (0, 1)))(hidden, embed)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    wide = hidden.astype(jnp.float32)
    rounded = embed.astype(jnp.bfloat16).astype(jnp.float32)
    expected = jax.grad(total, (0, 1))(wide, rounded)
    for ours, exact in zip(found, expected, strict=True):
        scale = np.abs(exact).max()
        # Slopes are rounded to 8 bits before the products.
        np.testing.assert_allclose(
            np.asarray(ours, float) / scale, exact / scale, atol=0.01
        )


# ---- what is computed in where nobody said -------------------------------------------


@pytest.mark.parametrize(
    "platform, dtype", [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_accelerators_compute_in_bfloat16(monkeypatch, capsys, platform, dtype):
    config = config_for(("model", "pairs"), "out")
    assert config.compute_dtype is None and config.param_dtype == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert default_compute_dtype() == dtype
    told = capsys.readouterr().out
    assert told == f"compute dtype {dtype}, by default on a {platform}\n"


def test_a_run_goes_on_in_the_dtype_it_began_with(tmp_path, monkeypatch, capsys):
    inputs = make_model_folder(tmp_path / "m"), make_pairs_file(tmp_path / "p.jsonl")
    config = config_for(
        inputs,
        tmp_path / "run",
        max_steps=1,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        objective=from_loss(losses.cpo),
        options=data.DataOptions(max_length=64, heldout_fraction=0.0),
    )
    with monkeypatch.context() as patched:
        patched.setattr(jax, "default_backend", lambda: "tpu")
        run(config)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (written["compute_dtype"], written["param_dtype"]) == ("bfloat16", "float32")
    # On a CPU the same command asks for something else, and says so.
    with pytest.raises(InputError, match="compute_dtype .'bfloat16' -> 'float32'."):
        run(config)
    assert "compute dtype float32, by default on a cpu" in capsys.readouterr().out
    run(dataclasses.replace(config, compute_dtype="bfloat16"))
    assert "compute dtype" not in capsys.readouterr().out  # which was given


# ---- full precision, where it is asked for -------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_product_can_be_asked_for_in_full_precision(layout):
    """`JAX_DEFAULT_MATMUL_PRECISION=highest` reaches the products and their slopes.

    Those of float32 factors: bfloat16's are exact anyway.
    """
    objective = from_loss(losses.tdpo2)  # keeps the reference, so it has them all
    model = build(tiny_config(), Numerics(remat="full"))
    params = tiny_params(model)
    batch = jax.tree.map(jnp.asarray, next(batches_of(make_pairs(24), layout)))

    def of_params(params):
        scorer = make_scorer(model, objective.scores, chunk_size=4)
        score = lambda p, b: scorer(p, {"reference": params}, b)
        return gradient(objective, score, params, batch, objective.init(0))

    def products():
        text = jax.jit(of_params).lower(params).as_text()
        return [line for line in text.splitlines() if "dot_general" in line]

    assert not any("HIGHEST" in line for line in products())
    with jax.default_matmul_precision("highest"):
        found = products()
    assert len(found) > 30
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in found)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_on_a_tpu_follows_too(packed):
    q, k = jnp.ones((2, 256, 4, 16)), jnp.ones((2, 256, 2, 16))
    places = (jnp.zeros((2, 256), int),) * 2

    def total(q, k, v):
        if packed:
            return jnp.sum(splash_packed(q, k, v, *places, interpret=True))
        return jnp.sum(splash(q, k, v, interpret=True))

    with jax.default_matmul_precision("highest"):
        traced = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, k, k)
    found = [
        e.params["precision"]
        for e in equations(traced.jaxpr)
        if e.primitive.name == "dot_general"
    ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) >= 7 and set(found) == {highest}

"""Packed rows: the same numbers as one pair a row, and hardly any padding."""

import collections
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.data.layouts.bins import RowSize, best_fit, first_fit_decreasing
from jaxpref.errors import InputError
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.objectives import from_loss
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from jaxpref.train.gradient import gradient
from tests.test_training import mesh_of
from tests.tiny import (
    MULTIPLES,
    make_model_folder,
    make_pairs_file,
    tiny_config,
    tiny_params,
)


def make_pairs(count, *, seed=0, longest=(8, 9)):
    rng = np.random.default_rng(seed)
    words = lambda most: rng.integers(4, 40, rng.integers(1, most)).tolist()
    builder = data.DatasetBuilder(2)
    for n in range(count):
        prompt, answer = longest
        builder.add([1, *words(prompt)], [words(answer), words(answer)], id=f"{n}")
    return builder.build()


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(24)


def packed(pairs, *, rows=4, row_length=48, accumulation=1, reference=None):
    """One batch of the first pairs, and which these are."""
    layout = layout_of(pairs, row_length=row_length)
    layout = dataclasses.replace(
        layout, rows=rows // accumulation, accumulation=accumulation
    )
    (batch, *_) = layout.eval_batches(pairs, reference=reference)
    held = batch.pair_index[batch.pair_index >= 0]
    assert len(set(held.tolist())) == len(held) > 4
    return jax.tree.map(jnp.asarray, batch), held


def padded(pairs, held, reference=None):
    layout = data.padded_layout(pairs, batch_size=len(held), **MULTIPLES)
    batch = layout.collate(pairs, held[None], reference=reference)
    return jax.tree.map(jnp.asarray, batch)


NEEDS = [
    {"policy_logps"},
    {"policy_logps", "policy_prefix_logps"},
    {"policy_logps", "log_weights"},
    {"policy_logps", "kls"},
    {"rewards"},
]


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "-".join(sorted(needs)))
def test_scores_equal_those_of_whole_sequences(pairs, needs):
    """In float64, so that nothing but rounding could hide."""
    with jax.enable_x64(True):
        wide = Numerics(param_dtype="float64", compute_dtype="float64")
        make_model = RewardModel if "rewards" in needs else build
        model = make_model(tiny_config(), wide)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_params(model))
        reference = {"reference": jax.tree.map(lambda x: 0.9 * x, params)}
        scorer = jax.jit(make_scorer(model, frozenset(needs), chunk_size=4))
        batch, held = packed(pairs)
        micro = lambda b: jax.tree.map(lambda x: x[0], b)
        found = scorer(params, reference, micro(batch)).scores
        expected = scorer(params, reference, micro(padded(pairs, held))).scores
    at = np.asarray(batch.pair_index[0])
    order = [np.argwhere(at == n)[0] for n in held]
    for name, values in expected.items():
        ours = np.stack([found[name][row, slot] for row, slot in order])
        np.testing.assert_allclose(ours, values[:, 0], rtol=1e-9, err_msg=name)
        # Empty slots hold nothing.
        assert not np.asarray(found[name])[at < 0].any()


@pytest.mark.parametrize(
    ("sizes", "accumulation"), [((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 2, 2), 1)]
)
def test_the_gradient_is_that_of_whole_sequences(pairs, sizes, accumulation):
    rng = np.random.default_rng(1)
    table = {"reference_logps": rng.normal(-20, 2, (len(pairs), 2)).astype(np.float32)}
    objective = from_loss(losses.dpo, beta=0.1)

    def on_mesh(batch, *sizes):
        mesh = mesh_of(*sizes)
        with jax.set_mesh(mesh):
            model = build(tiny_config())
            scorer = make_scorer(model, objective.scores, chunk_size=4)
            score = lambda p, micro: scorer(p, {}, micro)
            step = jax.jit(lambda p, b: gradient(objective, score, p, b, {}))
            grads, _, metrics = step(tiny_params(model), to_global(batch, mesh))
        return jax.device_get(grads), float(metrics["loss"])

    batch, held = packed(pairs, accumulation=accumulation, reference=table)
    found, loss = on_mesh(jax.device_get(batch), *sizes)
    whole = jax.device_get(padded(pairs, held, reference=table))
    expected, whole_loss = on_mesh(whole, 1, 1, 1)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    ("accumulation", "tied"),
    [
        (1, False),
        (2, True),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_exact(pairs, accumulation, tied):
    """In float64, of every parameter, to the rounding of its largest slope."""
    rng = np.random.default_rng(1)
    table = {"reference_logps": rng.normal(-20, 2, (len(pairs), 2)).astype(np.float32)}
    objective = from_loss(losses.dpo, beta=0.1)
    wide = Numerics(param_dtype="float64", compute_dtype="float64")
    with jax.enable_x64(True):
        model = build(tiny_config(tie_word_embeddings=tied), wide)
        scorer = make_scorer(model, objective.scores, chunk_size=4)
        score = lambda p, micro: scorer(p, {}, micro)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny_params(model))
        of_batch = jax.jit(lambda b: gradient(objective, score, params, b, {}))
        batch, held = packed(pairs, accumulation=accumulation, reference=table)
        found, _, metrics = of_batch(batch)
        expected, _, whole = of_batch(padded(pairs, held, reference=table))
        assert metrics["loss"] == pytest.approx(float(whole["loss"]), rel=1e-13)
        for ours, exact in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            atol = 1e-12 * float(jnp.abs(exact).max())
            np.testing.assert_allclose(ours, exact, rtol=0, atol=atol)


def test_a_row_by_hand():
    builder = data.DatasetBuilder(2)
    builder.add([1, 5], [[6, 7], [8]], id="a")
    builder.add([1], [[9], [4, 4]], id="b")
    pairs = builder.build()
    layout = data.PackedLayout(
        row_length=10, predictions=7, slots=3, num_completions=2, rows=1, batch_size=2
    )
    batch = layout.collate(pairs, np.array([[[0, 1, -1]]]))
    row = lambda x: x[0, 0, 0].tolist()
    assert row(batch.tokens) == [1, 5, 6, 7, 8, 1, 9, 4, 4, 0]
    assert row(batch.positions) == [0, 1, 2, 3, 2, 0, 1, 1, 2, 0]
    assert row(batch.segments) == [0, 0, 1, 1, 2, 3, 4, 5, 5, -1]
    assert row(batch.targets) == [6, 7, 8, 9, 4, 4, 0]
    assert row(batch.predictors) == [1, 2, 1, 5, 5, 7, 0]
    assert row(batch.completions) == [0, 0, 1, 2, 3, 3, -1]
    assert batch.completion_lengths[0, 0].tolist() == [[2, 1], [1, 2], [0, 0]]
    assert batch.pair_index[0, 0].tolist() == [0, 1, -1] and batch.lengths.tolist() == [
        [[9]]
    ]


def numbers(batch):
    return batch.pair_index[batch.pair_index >= 0].tolist()


def layout_of(dataset, *, seed=3, **sizes):
    sizes = dict(batch_size=12, row_length=64) | sizes
    return data.packed_layout(dataset, order=data.uniform(dataset, seed), **sizes)


def stream(dataset, *, seed=3, threads=0, reference=None, **sizes):
    order = data.uniform(dataset, seed)
    layout = layout_of(dataset, seed=seed, **sizes)
    return layout.batches(dataset, order, threads=threads, reference=reference)


@pytest.mark.parametrize("row_length", [40, 64, "auto"])
@pytest.mark.parametrize("shards", [1, 3])
def test_each_step_has_the_pairs_of_the_padded_step(row_length, shards):
    dataset = make_pairs(50)
    order = data.uniform(dataset, 3)
    padded = data.padded_layout(dataset, batch_size=12)
    padded = padded.batches(dataset, order, threads=0)
    packed = stream(dataset, row_length=row_length, shards=shards)
    for _ in range(15):  # more than three epochs
        batch = next(packed)
        assert sorted(numbers(batch)) == sorted(numbers(next(padded)))
        assert batch.tokens.shape[1] % shards == 0
        # Filled micro-batches come first.
        filled = (batch.pair_index >= 0).any((1, 2))
        assert (np.diff(filled.astype(int)) <= 0).all()


def test_rows_hold_what_they_have_room_for():
    dataset = make_pairs(200, longest=(20, 10))
    tokens, answers = dataset.packed_lengths, dataset.completion_lengths.sum(1)
    size = RowSize(tokens=40, predictions=22, slots=3)
    drawn = np.random.default_rng(0).permutation(200).reshape(10, 20)
    every = first_fit_decreasing(tokens[drawn], answers[drawn], size)
    for pairs, rows in zip(drawn, every):
        # A plain Python packer, one pair after the other, as the oracle.
        held = []
        for place in sorted(range(20), key=lambda n: (-tokens[pairs[n]], n)):
            fits = lambda row, n=pairs[place]: (
                tokens[[*row, n]].sum() <= 40
                and answers[[*row, n]].sum() <= 22
                and len(row) < 3
            )
            row = next((k for k, row in enumerate(held) if fits(row)), len(held))
            held += [[]] * (row == len(held))
            held[row] = [*held[row], pairs[place]]
            assert rows[place] == row
    assert every.max() > 5


def test_a_batch_has_room_for_the_step_that_needs_most():
    dataset = make_pairs(50)
    batches = stream(dataset, num_steps=30)
    used = [int((next(batches).pair_index >= 0).any((1, 2)).sum()) for _ in range(4)]
    few = stream(dataset, num_steps=4)
    assert next(few).pair_index.shape[0] == max(used)
    with pytest.raises(InputError, match="need . packed rows, but .* --accumulation"):
        small = dataclasses.replace(layout_of(dataset), accumulation=1)
        next(small.batches(dataset, data.uniform(dataset, 3), threads=0))
    # Micro-batches that are asked for are there, though no step needs them.
    assert layout_of(dataset, accumulation=20).accumulation == 20


def test_more_micro_batches_are_smaller():
    """Accumulation saves memory; every step still has room for its pairs."""
    dataset = make_pairs(50)
    sizes = dict(num_steps=4, batch_size=16, shards=2, tokens_per_device=4096)
    order = data.uniform(dataset, 3)
    packed = lambda a: data.packed_layout(
        dataset, order=order, row_length=64, accumulation=a, **sizes
    )
    whole, parts = packed(1), packed(4)
    assert parts.rows < whole.rows and parts.rows % 2 == 0
    assert parts.accumulation >= 4
    batches = parts.batches(dataset, order, threads=0)
    for step in range(4):
        found = next(batches).pair_index
        assert sorted(found[found >= 0]) == sorted(order(step, 16))


def test_a_mixture_of_traces_is_packed_too():
    dataset = make_pairs(40)
    empty = np.arange(40) % 3 == 0
    dataset = dataclasses.replace(
        dataset, columns=dataset.columns | {"empty_trace": empty}
    )
    order = data.mixture(dataset, 3, 0.25)
    layout = data.packed_layout(dataset, order=order, batch_size=8, row_length=64)
    batches = layout.batches(dataset, order, threads=0)
    for step in range(12):
        batch = next(batches)
        assert sorted(numbers(batch)) == sorted(order(step, 8).tolist())
        assert (
            batch.empty_trace.sum() == 2
            and not batch.empty_trace[batch.pair_index < 0].any()
        )


def test_another_seed_is_another_order():
    pairs = make_pairs(60)
    one, two = (numbers(next(stream(pairs, seed=seed))) for seed in (0, 1))
    assert one != two


def test_rows_can_be_chosen_for_the_order_of_another_seed():
    """Runs with other seeds then have the same rows, and room for all their steps."""
    pairs = make_pairs(120, longest=(30, 20))
    sizes = dict(batch_size=16, num_steps=4, row_length="auto", tokens_per_device=2048)
    orders = [data.uniform(pairs, seed) for seed in range(6)]
    own = [data.packed_layout(pairs, order=order, **sizes) for order in orders]
    assert len({layout.rounding() for layout in own}) > 1
    layouts = [
        data.packed_layout(pairs, order=order, sizes_for=orders[0], **sizes)
        for order in orders
    ]
    assert {layout.rounding() for layout in layouts} == {own[0].rounding()}
    assert layouts[0] == own[0]
    for layout, order in zip(layouts, orders):
        batches = layout.batches(pairs, order, threads=0)
        for step in range(4):
            assert sorted(numbers(next(batches))) == sorted(order(step, 16).tolist())


@pytest.fixture(scope="module")
def dialogues(shared):
    tokenizer = data.load_tokenizer(shared / "models" / "stories260k-hf")
    source = data.open_source(shared / "data" / "hh_rlhf_helpful_base_test.jsonl.gz")
    options = data.DataOptions(max_length=512, max_pairs=600)
    return data.make_splits(source, tokenizer, options).train


@pytest.mark.parametrize(("batch_size", "share"), [(8, 0.8), (32, 0.9), (128, 0.95)])
def test_rows_are_full(dialogues, batch_size, share):
    """Real lengths: of the filled rows' places, so many hold a token."""
    layout = layout_of(dialogues, batch_size=batch_size, row_length="auto", num_steps=4)
    batches = stream(dialogues, batch_size=batch_size, row_length="auto", num_steps=4)
    drawn = [next(batches) for _ in range(4)]
    real = sum(batch.lengths.sum() for batch in drawn)
    filled = sum((batch.pair_index >= 0).any((1, 2)).sum() for batch in drawn)
    computed = filled * layout.rows * layout.row_length
    assert real / computed == pytest.approx(layout.utilization)
    assert layout.utilization > share


def test_micro_batches_keep_a_device_busy_where_that_wastes_little(dialogues):
    sizes = dict(row_length="auto", tokens_per_device=8192)
    small = layout_of(dialogues, batch_size=8, **sizes)
    large = layout_of(dialogues, batch_size=128, **sizes)
    assert 4 <= large.rows <= 8192 // large.row_length
    assert large.utilization > 0.85
    # Here a second row per device would often be empty.
    assert small.rows == 1 and small.utilization > 0.8


def test_an_evaluation_sees_every_pair_once():
    dataset = make_pairs(70)
    layout = layout_of(dataset, num_steps=2)
    some = np.random.default_rng(0).permutation(70)[:40]
    for indices, expected in ((None, range(70)), (some, some)):
        seen = [
            n
            for batch in layout.eval_batches(dataset, indices=indices)
            for n in numbers(batch)
        ]
        assert sorted(seen) == sorted(expected)


def test_no_pair_waits_forever_and_nothing_overflows():
    dataset = make_pairs(300, longest=(20, 10))
    tokens, answers = dataset.packed_lengths, dataset.completion_lengths.sum(1)
    size = RowSize(tokens=40, predictions=24, slots=4)
    waiting = collections.deque(range(300))
    while waiting:
        first = waiting[0]
        rows = best_fit(waiting, tokens, answers, size, 3)
        assert len(rows) == 3 and any(first in row for row in rows)
        for row in rows:
            assert tokens[row].sum() <= 40 and answers[row].sum() <= 24
            assert len(row) <= 4
        assert list(waiting) == sorted(waiting)


def test_no_pairs_are_no_batches(pairs):
    layout = layout_of(pairs)
    assert [*layout.eval_batches(pairs.take(np.arange(0)))] == []


def test_a_pair_longer_than_a_row_is_refused(pairs):
    with pytest.raises(InputError, match="row_length 8: a prompt with all its .* has"):
        layout_of(pairs, row_length=8)


def test_a_packed_run_starts_at_log_2_and_resumes(tmp_path):
    """Through the loop: reference, evaluation and training on the same packed rows."""
    options = dict(
        model=str(make_model_folder(tmp_path / "model")),
        data=str(make_pairs_file(tmp_path / "pairs.jsonl")),
        objective=from_loss(losses.dpo, beta=0.5),
        batch_size=16,
        row_length=64,
        log_every=1,
        eval_every=4,
        save_every=2,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        options=data.DataOptions(heldout_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
    )
    run(TrainConfig(**options, out=str(tmp_path / "whole"), max_steps=4))
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert all(0 < line["grad_norm"] < np.inf for line in steps)
    held = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert held[0] == pytest.approx(np.log(2), abs=1e-6)
    # The same run in two processes' lives: a checkpoint at 2, then the rest.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    shutil.rmtree(killed / "export")
    shutil.rmtree(killed / "checkpoints" / "4")
    run(TrainConfig(**options, out=str(killed), max_steps=4))
    weights = "export/model.safetensors"
    whole = tmp_path / "whole" / weights
    assert (killed / weights).read_bytes() == whole.read_bytes()

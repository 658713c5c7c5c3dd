"""Several votes on a pair: one forward pass, the gradient of separate rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit, logsumexp

from jaxpref import data, losses
from jaxpref.data.batch import one_batch
from jaxpref.data.votes import share_votes
from jaxpref.models import build
from jaxpref.objectives import (
    PER_RECORD,
    auto,
    beta_dpo,
    em,
    em_weighted,
    from_loss,
    instance_noise,
    learned_rate,
    re_po,
)
from jaxpref.scoring import make_scorer
from jaxpref.scoring.scores import Scored
from jaxpref.train import (
    Decay,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    read_metrics,
    run,
)
from jaxpref.train.gradient import gradient
from tests.answers import voted_records, write_records
from tests.data_tokenizers import byte_tokenizer
from tests.test_training import few_steps
from tests.tiny import MULTIPLES, make_model_folder, tiny_config, tiny_params

DPO = functools.partial(losses.dpo, beta=0.5)
NAMES = ("ann", "bob", "cy", None)


def vote_rows(count=8, seed=0, most=5):
    """A row for each vote, and each vote's pair, sign and annotator."""
    rng = np.random.default_rng(seed)
    words = lambda low, high: rng.integers(4, 40, rng.integers(low, high)).tolist()
    builder, about = data.DatasetBuilder(2), []
    for pair in range(count):
        prompt, answers = [1, *words(2, 6)], [words(3, 9), words(3, 9)]
        for place in range(rng.integers(1, most + 1)):
            who, sign = int(rng.integers(len(NAMES))), int(rng.choice([-1, 1]))
            builder.add(
                prompt,
                answers[::sign],
                id=f"{pair}-{place}",
                annotator=NAMES[who],
                columns={
                    "row": pair,
                    "prompt": pair % 3,
                    "weight": float(rng.uniform(0.5, 2)),
                    "beta": float(rng.uniform(0.1, 1)),
                    "is_flipped": bool(rng.integers(2)),
                },
            )
            about.append((pair, sign, -1 if NAMES[who] is None else who))
    return builder.build(), np.array(about)


def test_all_votes_on_a_pair_are_one_row():
    rows, about = vote_rows()
    (shared,) = share_votes(rows)
    sizes = np.bincount(about[:, 0])
    assert (len(shared), shared.num_votes) == (8, sizes.max())
    for pair, size in enumerate(sizes):
        own = np.flatnonzero(about[:, 0] == pair)
        signs = about[own, 1] * about[own[0], 1]
        assert shared.columns["votes"][pair].tolist() == [
            *signs,
            *[0] * (sizes.max() - size),
        ]
        assert shared.columns["annotator"][pair, :size].tolist() == [*about[own, 2]]
        np.testing.assert_array_equal(
            shared.weights[pair, :size], rows.columns["weight"][own]
        )
        for side in (0, 1):
            np.testing.assert_array_equal(
                shared.completion(pair, side), rows.completion(own[0], side)
            )
    assert shared.ids.tolist() == [f"{pair}-0" for pair in range(8)]


def test_only_votes_share_a_row():
    """Copies of a record are votes only if their annotators are named."""
    builder = data.DatasetBuilder(2)
    texts = [5, 6], [7, 8]
    for row, (annotator, prompt, sides) in enumerate(
        [
            ("ann", [1, 2], texts),
            ("bob", [1, 2], texts[::-1]),
            (None, [1, 2], texts),
            (None, [1, 2], texts),
            ("cy", [1, 3], texts),
            ("cy", [1, 2], ([5, 6], [7, 9])),
        ]
    ):
        at = {"row": row, "prompt": prompt[1]}
        builder.add(prompt, sides, id=str(row), annotator=annotator, columns=at)
    rows = builder.build()
    (shared,) = share_votes(rows)
    assert shared.columns["row"].tolist() == [0, 2, 3, 4, 5]
    assert shared.columns["votes"].tolist() == [[1, -1], *[[1, 0]] * 4]
    alone = rows.take(np.array([0, 2, 4]))
    assert share_votes(alone) == (alone,)
    # Of one run, all data have as many columns.
    one, empty = share_votes(alone.take(np.arange(0)), rows)
    assert (one.num_votes, empty.num_votes, len(one)) == (2, 2, 0)


def test_the_votes_of_a_record_need_no_names(tmp_path):
    rows = voted_records(6, most=3)
    names = [[x.pop("worker") for x in row["votes"]] for row in rows]
    assert any(len(x) > 1 for x in names)
    path = write_records(tmp_path / "votes.jsonl", [*rows, rows[0]])
    source = data.open_records(str(path), data.RecordOptions(), sides=2)
    options = data.DataOptions(heldout_fraction=0.0)
    (shared,) = share_votes(data.make_splits(source, byte_tokenizer(), options).train)
    labels = [[x["label"] for x in row["votes"]] for row in [*rows, rows[0]]]
    decisive = [[x for x in own if x != "equal"] for own in labels]
    counts = [len(own) for own in decisive if own]
    # The copy of a record with several votes adds to them.
    assert np.count_nonzero(shared.columns["votes"]) == sum(counts)
    assert (shared.columns["annotator"] == -1).all()


OBJECTIVES = {
    "dpo": from_loss(losses.dpo, beta=0.5),
    "beta of each record": from_loss(losses.dpo, beta=PER_RECORD),
    "likelihood term": from_loss(losses.cpo, beta=0.5),
    "coupled": from_loss(losses.dr_dpo, beta=0.5),
    "beta_dpo": beta_dpo(),
    "learned_rate": learned_rate(DPO),
    "instance_noise": instance_noise(DPO, warmup=0),
    "auto": auto(DPO, warmup=0),
}


def on_scores(objective, dataset, scores, state=None):
    """Gradient of the scores of each pair [N, 2], the next state, and metrics."""
    zeros = np.zeros((len(dataset), 2), np.float32)
    batch = one_batch(dataset, {"reference_logps": zeros})
    batch = dataclasses.replace(batch, weights=dataset.weights.reshape(len(zeros), -1))
    if batch.votes is not None:
        batch = dataclasses.replace(batch, weights=batch.weights[:, None])
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
    if state is None:
        state = objective.init(len(dataset.annotator_names))
    score = lambda p, micro: Scored({"policy_logps": p[:, None]}, {})
    run = jax.jit(lambda p, s: gradient(objective, score, p, batch, s))
    return run(jnp.asarray(scores, jnp.float32), state)


SLOW = ("auto", "beta of each record", "instance_noise", "likelihood term")


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in OBJECTIVES],
)
def test_the_gradient_is_that_of_separate_rows(name):
    objective = OBJECTIVES[name]
    rows, about = vote_rows(seed=3)
    (shared,) = share_votes(rows)
    rng = np.random.default_rng(0)
    of_pair = rng.normal(-9, 1, (8, 2))
    ordered = np.stack([of_pair[p, ::s] for p, s, _ in about])
    first = np.array([np.flatnonzero(about[:, 0] == p)[0] for p in range(8)])
    stored = np.stack([of_pair[p, :: about[first[p], 1]] for p in range(8)])
    expected, state, metrics = on_scores(objective, rows, ordered)
    found, shared_state, shared_metrics = on_scores(objective, shared, stored)
    summed = np.zeros((8, 2))
    for (pair, sign, _), g in zip(about, np.asarray(expected)):
        summed[pair] += g[::sign]
    got = np.stack([g[:: about[first[p], 1]] for p, g in enumerate(np.asarray(found))])
    np.testing.assert_allclose(got, summed, rtol=1e-4, atol=1e-6)
    for key in metrics.keys() - {"nonfinite_pairs"}:
        np.testing.assert_allclose(shared_metrics[key], metrics[key], rtol=1e-4)
    sizes = [np.sort(np.ravel(x)) for x in jax.tree.leaves(state) if x.size < 20]
    others = [np.sort(np.ravel(x)) for x in jax.tree.leaves(shared_state)]
    for size, other in zip(sizes, [x for x in others if x.size < 20]):
        np.testing.assert_allclose(other, size, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [em, em_weighted, re_po])
def test_em_has_one_latent_truth_per_pair(make):
    """Against an enumeration of both truths, in float64."""
    rows, about = vote_rows(seed=1)
    rows = dataclasses.replace(
        rows, columns=rows.columns | {"weight": np.ones(len(rows), np.float32)}
    )
    (shared,) = share_votes(rows)
    objective, beta = make(DPO), 0.5
    rng = np.random.default_rng(2)
    stored = rng.normal(-9, 1, (8, 2))
    state = objective.init(3)
    eta = np.array([0.9, 0.7, 0.55, 0.8])
    state |= {"reliability": jnp.asarray(eta, jnp.float32)}
    found, following, metrics = on_scores(objective, shared, stored, state)
    z = beta * (stored[:, 0] - stored[:, 1])
    right, expected, total = np.zeros((2, 4)), np.zeros(8), 0.0
    for pair in range(8):
        own = about[about[:, 0] == pair]
        signs = own[:, 1] * own[0, 1]
        agree = np.where(signs == 1, eta[own[:, 2]], 1 - eta[own[:, 2]])
        oppose = np.where(signs == -1, eta[own[:, 2]], 1 - eta[own[:, 2]])
        truth = log_expit(z[pair]) + np.log(agree).sum()
        other = log_expit(-z[pair]) + np.log(oppose).sum()
        w = np.exp(truth - logsumexp([truth, other]))
        # The gradient of -log P(votes) in z, and the expected complete likelihood.
        expected[pair] = beta * (expit(z[pair]) - w) / 8
        total -= (w * log_expit(z[pair]) + (1 - w) * log_expit(-z[pair])) / 8
        for sign, who in zip(signs, own[:, 2]):
            chance = w if sign == 1 else 1 - w
            right[:, who] += chance, 1 - chance
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[:, 1], -expected, rtol=1e-4, atol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
    if make is re_po:
        mean = 0.9 * eta + 0.1 * right[0] / right.sum(0)
        np.testing.assert_allclose(following["reliability"], mean, rtol=1e-5)
    else:
        np.testing.assert_allclose(following["right"], right[0], rtol=1e-5)
        np.testing.assert_allclose(following["wrong"], right[1], rtol=1e-5)


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_scores_a_pair_once(packed):
    """The model's gradient is that of separate rows, in either layout."""
    rows, _ = vote_rows(count=6, seed=4, most=4)
    (shared,) = share_votes(rows)
    model = build(tiny_config())
    scorer = make_scorer(model, OBJECTIVES["dpo"].scores)
    params = tiny_params(model)

    def of(dataset):
        size = len(dataset)
        order = data.uniform(dataset, 0)
        if packed:
            layout = data.packed_layout(
                dataset, order=order, batch_size=size, row_length=64
            )
        else:
            layout = data.padded_layout(dataset, **MULTIPLES, batch_size=size)
        zeros = {"reference_logps": np.zeros((size, 2), np.float32)}
        batch = next(layout.batches(dataset, order, reference=zeros, threads=0))
        abstract = layout.abstract_batch(numbers=dataset.numbers, reference=zeros)
        same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
        assert all(jax.tree.leaves(jax.tree.map(same, batch, abstract)))
        batch = jax.tree.map(jnp.asarray, batch)
        score = lambda p, micro: scorer(p, None, micro, totals=frozenset())
        step = jax.jit(lambda p: gradient(OBJECTIVES["dpo"], score, p, batch, {}))
        grads, _, metrics = step(params)
        return int(batch.lengths.sum()), grads, metrics

    tokens, grads, metrics = of(shared)
    of_rows, expected, once = of(rows)
    assert tokens < of_rows
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        np.testing.assert_allclose(metrics[name], once[name], rtol=1e-4)


@pytest.mark.slow
def test_shards_and_micro_batches_do_not_matter():
    (shared,) = share_votes(vote_rows(count=24, seed=5)[0])
    expected, params = few_steps(shared, objective=em(DPO))
    split, sharded = few_steps(
        shared, objective=em(DPO), sizes=(2, 2, 2), accumulation=2
    )
    np.testing.assert_allclose(split, expected, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(sharded)):
        np.testing.assert_allclose(a, b, atol=2e-4)


def config_for(folder, out, **changes):
    defaults = dict(
        model=str(folder / "model"),
        data=str(folder / "votes.jsonl"),
        out=str(out),
        objective=em(DPO),
        optimizer=OptimizerConfig(learning_rate=1e-2, decay=Decay.CONSTANT),
        options=data.DataOptions(max_length=48, heldout_fraction=0.2),
        mesh=MeshConfig(data=1),
        max_steps=4,
        batch_size=8,
        row_length="none",  # the rows of packed steps depend on their number
        save_every=9,
        eval_every=4,
        log_every=1,
    )
    return TrainConfig(**(defaults | changes))


def losses_of(out):
    return [x["loss"] for x in read_metrics(out / "metrics.jsonl") if "loss" in x]


def test_a_run_on_votes_goes_on_where_it_ended(tmp_path, capsys):
    make_model_folder(tmp_path / "model")
    rows = voted_records()
    write_records(tmp_path / "votes.jsonl", rows)
    run(config_for(tmp_path, tmp_path / "whole"))
    assert "a pair is scored once for all its votes" in capsys.readouterr().out
    run(config_for(tmp_path, tmp_path / "cut", max_steps=2))
    run(config_for(tmp_path, tmp_path / "cut"))
    found = losses_of(tmp_path / "whole")
    assert len(found) == 4 and found[0] == pytest.approx(np.log(2), abs=1e-5)
    assert losses_of(tmp_path / "cut") == found

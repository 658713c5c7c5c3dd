"""BVPO in the engine: exact mixtures, what probes find, layouts, whole runs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import data, losses
from jaxpref.cli import train as train_command
from jaxpref.data import read_datasets
from jaxpref.errors import InputError
from jaxpref.gradients.bvpo import direction, mix, optimal_alpha
from jaxpref.models import Numerics, build
from jaxpref.objectives import bvpo, crm, em, from_loss, learned_rate, sft
from jaxpref.runtime.mesh import to_global
from jaxpref.scoring import make_scorer
from jaxpref.scoring.checks import check_finite, check_fits
from jaxpref.scoring.scores import Scored
from jaxpref.train import TrainConfig, read_metrics
from jaxpref.train import gradient as engine
from jaxpref.train.optimizer import make_optimizer, make_schedule
from jaxpref.train.state import init_state
from jaxpref.train.step import make_train_step
from tests.compiled import compiled
from tests.data_tokenizers import byte_tokenizer
from tests.test_traces import plan_of, traced
from tests.test_training import OPTIMIZER, mesh_of
from tests.tiny import MULTIPLES, WORDS, make_model_folder, tiny_config, tiny_params

LOSS = functools.partial(losses.dpo, beta=0.5)
DPO = from_loss(LOSS)
KEPT = ("trace_variance", "empty_variance", "bias_sq")


@pytest.fixture(scope="module")
def pairs():
    """15 pairs with traces, and 9 with an empty one and shorter answers."""
    rng = np.random.default_rng(1)
    words = lambda low, high: rng.integers(4, 40, rng.integers(low, high)).tolist()
    builder = data.DatasetBuilder(2)
    for n in range(24):
        empty = n % 8 in (1, 4, 6)
        longest = 5 if empty else 9
        answers = [words(3, longest), words(3, longest)]
        builder.add(
            [1, *words(2, 6)], answers, id=f"pair-{n}", columns={"empty_trace": empty}
        )
    return builder.build()


def streams(pairs, accumulation=1):
    layout = data.padded_layout(
        pairs, batch_size=8, accumulation=accumulation, **MULTIPLES
    )
    zeros = {"reference_logps": np.zeros((len(pairs), 2), np.float32)}
    order = data.mixture(pairs, 3, 0.375)
    return layout.batches(pairs, order, threads=0, reference=zeros)


def first_batch(pairs, accumulation=1):
    """Its third pair is blanked: a slot that holds none."""
    batch = jax.tree.map(np.array, next(streams(pairs, accumulation)))
    place = np.unravel_index(2, batch.pair_index.shape)
    for array, blank in ((batch.pair_index, -1), (batch.weights, 0)):
        array[place] = blank
    return jax.tree.map(jnp.asarray, batch)


def rows(batch, where):
    """The pairs where `where` [A, R] is true, as one micro-batch."""
    return jax.tree.map(lambda x: x[np.asarray(where)][None], batch)


def kinds(batch):
    """Where pairs with traces and with an empty one are, bool [A, R]."""
    real = np.asarray(batch.pair_index >= 0)[..., 0]
    empty = np.asarray(batch.empty_trace)[..., 0]
    return real & ~empty, real & empty


def curved(params, batch):
    """A "model" of seven weights: log-probs from each completion's tokens."""
    rng = np.random.default_rng(2)
    table = jnp.asarray(rng.normal(size=(64, 7)), jnp.float32)
    seen = jnp.sum(table[batch.tokens[:, None]], axis=-2)  # [R, 1, K, 7]
    logps = -jax.nn.softplus(seen @ params["w"] + params["b"])
    return Scored({"policy_logps": logps}, {})


CURVED = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=7) / 4, jnp.float32),
    "b": jnp.float32(0.5),
}


def gradient(objective, batch, state=None):
    state = objective.init(0) if state is None else state
    run = jax.jit(functools.partial(engine.gradient, objective, curved))
    return run(CURVED, batch, state)


@pytest.mark.parametrize(
    ("base", "alphas", "accumulation"),
    [
        (DPO, (0.0, 0.3, 1.0), 1),
        (from_loss(losses.simpo, beta=2.0, gamma=0.5), (0.3,), 1),
        (em(LOSS), (0.3,), 4),
        (learned_rate(LOSS), (0.3,), 1),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_fixed_alpha_is_the_mixture_of_two_gradients(
    pairs, base, alphas, accumulation
):
    """One pass over weighted pairs, against two plain gradients mixed afterward."""
    batch = first_batch(pairs, accumulation)
    (trace, _, of_trace), (empty, _, of_empty) = (
        gradient(base, rows(batch, where)) for where in kinds(batch)
    )
    for alpha in alphas:
        found, _, metrics = gradient(bvpo(base, alpha=alpha), batch)
        by_hand = jax.tree.map(lambda t, e, a=alpha: a * t + (1 - a) * e, trace, empty)
        for other in (mix(trace, empty, alpha), by_hand):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6),
                *(found, other),
            )
        loss = alpha * of_trace["loss"] + (1 - alpha) * of_empty["loss"]
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert float(metrics["bvpo/alpha"]) == pytest.approx(alpha)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_batch_of_one_kind_has_its_plain_mean(pairs, kind):
    batch = first_batch(pairs)
    batch = rows(batch, kinds(batch)[kind])
    expected, _, _ = gradient(DPO, batch)
    for alpha in (0.3, "auto"):
        found, state, metrics = gradient(bvpo(DPO, alpha=alpha), batch)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected
        )
        assert float(metrics["bvpo/alpha"]) == 1 - kind
    # Nothing is known of the other kind, so nothing was learned.
    assert float(state["running"].weight) == 0
    assert max(map(float, state["products"].values())) == 0


def test_what_all_learn_of_the_labels_is_learnt_of_both_kinds(pairs):
    batch = first_batch(pairs)
    base = em(LOSS)
    _, expected, _ = gradient(base, batch)
    _, state, metrics = gradient(bvpo(base, alpha="auto"), batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, state["base"], expected)
    assert float(state["base"]["right"][0] + state["base"]["wrong"][0]) == (
        pytest.approx(7)
    )
    assert {"noise/flip_rate", "bvpo/mse"} <= metrics.keys()


def test_a_probe_finds_what_each_pairs_own_gradient_says(pairs):
    """`jax.grad` of one pair at a time, projected, and the formulas in numpy."""
    batch = first_batch(pairs, accumulation=2)
    model = build(tiny_config(), Numerics(remat="full", twice_differentiable=True))
    params = tiny_params(model)
    objective = bvpo(DPO, alpha="auto")
    scorer = make_scorer(model, objective.scores, chunk_size=4)
    score = lambda params, micro: scorer(params, {}, micro)
    _, _, metrics = jax.jit(functools.partial(engine.gradient, objective, score))(
        params, batch, objective.init(0)
    )

    @jax.jit
    def own(params, micro):
        def loss(params):
            logps = score(params, micro).scores["policy_logps"][0, 0]
            return jnp.logaddexp(0, -0.5 * (logps[0] - logps[1]))

        return jax.grad(loss)(params)

    along = direction(jax.random.fold_in(jax.random.key(0), 0), params)
    along = [np.asarray(leaf, float) for leaf in jax.tree.leaves(along)]
    assert {abs(leaf).min() for leaf in along} == {1.0}

    def slope(micro):
        leaves = jax.tree.leaves(own(params, micro))
        return sum(
            float(np.sum(np.asarray(g, float) * v)) for g, v in zip(leaves, along)
        )

    trace, empty = (
        np.array(
            [
                slope(jax.tree.map(lambda x, n=n: x[0, n : n + 1], rows(batch, where)))
                for n in range(where.sum())
            ]
        )
        for where in kinds(batch)
    )
    assert len(trace) + len(empty) == 7 and min(len(trace), len(empty)) > 1
    s_t, s_e = trace.var(ddof=1) / len(trace), empty.var(ddof=1) / len(empty)
    gap = (trace.mean() - empty.mean()) ** 2
    expected = [s_t, s_e, gap - s_t - s_e]
    shown = [float(metrics[f"bvpo/{name}"]) for name in KEPT]
    np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-5 * gap)
    norms = [float(metrics[f"bvpo/{kind}_grad_norm"]) for kind in ("trace", "empty")]
    np.testing.assert_allclose(norms, np.abs([trace.mean(), empty.mean()]), rtol=1e-4)
    # Of one direction all that can be seen of an angle is its sign.
    sign = np.sign(trace.mean() * empty.mean())
    assert float(metrics["bvpo/cosine"]) == pytest.approx(sign, rel=1e-5)
    a = 0.5
    assert float(metrics["bvpo/alpha"]) == a
    mse = a**2 * s_t + (1 - a) ** 2 * (s_e + expected[2])
    np.testing.assert_allclose(metrics["bvpo/mse"], mse, rtol=1e-4, atol=1e-5 * gap)
    np.testing.assert_allclose(metrics["bvpo/mse_trace"], s_t, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["bvpo/mse_empty"], s_e + expected[2], rtol=1e-4, atol=1e-5 * gap
    )


def test_alpha_is_that_of_the_probes_before(pairs):
    batches = streams(pairs)
    objective = bvpo(DPO, alpha="auto", probe_every=3, decay=0.8)
    run = jax.jit(functools.partial(engine.gradient, objective, curved, CURVED))
    plain = jax.jit(functools.partial(engine.gradient, DPO, curved, CURVED))
    state, probes = objective.init(0), 0
    for step in range(8):
        expected = 0.5
        if probes:
            expected = optimal_alpha(**vars(state["running"].means))
        batch = jax.tree.map(jnp.asarray, next(batches))
        before = jax.tree.leaves(state["running"])
        grads, state, metrics = run(batch, state)
        assert float(metrics["bvpo/alpha"]) == pytest.approx(float(expected))
        trace, empty = (plain(rows(batch, where), {})[0] for where in kinds(batch))
        wanted = mix(trace, empty, float(expected))
        np.testing.assert_allclose(grads["w"], wanted["w"], rtol=1e-4, atol=1e-6)
        probed = step in (0, 1, 2, 3, 6)
        probes += probed
        assert (jax.tree.leaves(state["running"]) != before) == probed
        weight = 1 - 0.8**probes
        assert float(state["running"].weight) == pytest.approx(weight)
        assert int(state["steps"]) == step + 1
        # Squares of means are averaged as their variances are.
        gap = (
            state["products"]["trace"]
            + state["products"]["empty"]
            - 2 * state["products"]["both"]
        ) / weight
        of_means = state["running"].means
        unbiased = gap - of_means.trace_variance - of_means.empty_variance
        np.testing.assert_allclose(of_means.empty_bias_sq, unbiased, rtol=1e-3)


def test_a_probe_of_what_is_not_finite_is_passed_over(pairs):
    batch = first_batch(pairs)
    objective = bvpo(DPO, alpha="auto")
    _, state, _ = gradient(objective, batch)
    reference = batch.reference["reference_logps"].at[0, 0].set(jnp.nan)
    bad = dataclasses.replace(batch, reference={"reference_logps": reference})
    _, after, _ = gradient(objective, bad, state)
    for name in ("running", "products"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])


def steps_of(pairs, *, sizes=(1, 1, 1), accumulation=1, count=4):
    """All metrics of `bvpo` in a few steps, [steps, metrics], and their names."""
    objective = bvpo(em(LOSS), alpha="auto", probe_every=2)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        model = build(tiny_config())
        schedule = make_schedule(OPTIMIZER, 100)
        tx = make_optimizer(OPTIMIZER, schedule)
        new = lambda p: init_state(p, tx, objective)
        state = jax.jit(new)(tiny_params(model))
        scorer = make_scorer(model, objective.scores, chunk_size=4)
        step = make_train_step(scorer, objective, tx, schedule)
        batches, history = streams(pairs, accumulation), []
        with compiled("train_step") as programs:
            for _ in range(count):
                state, metrics = step(state, {}, to_global(next(batches), mesh))
                wanted = {
                    name: float(value)
                    for name, value in metrics.items()
                    if name.startswith("bvpo/") or name in ("loss", "grad_norm")
                }
                history.append(list(wanted.values()))
        assert len(programs) == 1
        return np.array(history), list(wanted)


@pytest.fixture(scope="module")
def whole(pairs):
    return steps_of(pairs)


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((4, 1, 2), 1, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), 1, marks=pytest.mark.slow),
        ((1, 1, 1), 4),
    ],
)
def test_layout_does_not_change_the_mixture(pairs, whole, sizes, accumulation):
    whole, names = whole
    split, _ = steps_of(pairs, sizes=sizes, accumulation=accumulation)
    # Bias and errors are differences of numbers as large as the variances.
    variances = whole[:, [names.index(f"bvpo/{name}") for name in KEPT[:2]]]
    atol = 1e-4 * variances.max()
    differences = [n in ("bvpo/bias_sq", "bvpo/mse", "bvpo/mse_empty") for n in names]
    where = np.array(differences)
    np.testing.assert_allclose(split[:, ~where], whole[:, ~where], rtol=1e-4)
    np.testing.assert_allclose(split[:, where], whole[:, where], rtol=1e-4, atol=atol)


def test_evaluation_is_the_wrapped_objectives(pairs):
    from jaxpref.train.evaluation import evaluation_metrics, make_evaluation

    base = em(LOSS)
    rng = np.random.default_rng(0)
    logps = rng.normal(size=(len(pairs), 2)).astype(np.float32)
    scores, zeros = {"policy_logps": logps}, {"reference_logps": 0 * logps}
    found, expected = (
        evaluation_metrics(make_evaluation(o), scores, zeros, pairs, o.init(0))
        for o in (bvpo(base, alpha="auto"), base)
    )
    assert found == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bvpo(DPO, alpha=1.5), "alpha 1.5: must be in"),
        (lambda: bvpo(DPO, alpha=float("nan")), "alpha nan"),
        (lambda: bvpo(DPO, alpha="often"), "alpha often: must be in .0, 1., or auto"),
        (lambda: bvpo(DPO, probe_every=0), "probe_every 0"),
        (lambda: bvpo(DPO, decay=1.0), "decay 1.0"),
        (lambda: bvpo(from_loss(losses.dr_dpo)), "dr_dpo couples the pairs"),
        (lambda: bvpo(crm(losses.dpo, noise_rate=0.1)), "crm_dpo couples the pairs"),
        (lambda: bvpo(sft()), "sft reads no pairs"),
    ],
)
def test_what_cannot_be_mixed_is_named(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_objective_that_mixes_has_its_data_and_no_other_has():
    plain = dict(model="m", data="d", out="o")
    with pytest.raises(InputError, match="bvpo_dpo: mixes pairs .* mix=MixOptions"):
        TrainConfig(**plain, objective=bvpo(DPO))
    with pytest.raises(InputError, match="dpo does not mix pairs"):
        TrainConfig(**plain, objective=DPO, mix=data.MixOptions())
    mix = data.MixOptions(empty_data="e")
    assert TrainConfig(**plain, objective=bvpo(DPO), mix=mix).mix == mix


def test_records_come_from_both_files(tmp_path):
    traces, empty, heldout = (
        str(write_records(tmp_path / f"{name}.jsonl", 6, traces=name != "e", seed=n))
        for n, name in enumerate("deh")
    )
    read = functools.partial(
        read_datasets,
        byte_tokenizer(),
        kind=data.PAIRS,
        mix=data.MixOptions(empty_data=empty),
        train=traces,
    )
    found = read(data.DataOptions(max_length=128, heldout_fraction=0.3), heldout=None)
    assert found.train_sources == found.heldout_sources == (traces, empty)
    shared = data.DataOptions(max_length=128, allow_shared_prompts=True)
    found = read(shared, heldout=heldout)
    assert (found.train_sources, found.heldout_sources) == ((traces, empty), (heldout,))
    # With data of its own for evaluation, nothing is held out of the rest.
    assert len(found.splits.train) == 6 + 6 and len(found.splits.heldout) == 6 + 6
    assert set(found.splits.train.columns["source"]) == {0, 1}


def test_messages_name_the_file_that_a_pair_is_in():
    """A record of the first source may have an empty trace, too."""
    plain = {"prompt": "p", "chosen": " c", "rejected": " d"}
    records = [*traced(3), plain | {"prompt": "x"}]
    train = plan_of(records, empty=[plain, plain | {"prompt": "long" * 30}]).train
    assert train.columns["empty_trace"].tolist() == [False] * 3 + [True] * 3
    assert train.columns["source"].tolist() == [0, 0, 0, 0, 1, 1]
    assert not plan_of(records).train.columns["source"].any()
    names = ("with.jsonl", "without.jsonl")
    few = tiny_config(max_position_embeddings=64, vocab_size=512)
    with pytest.raises(InputError, match="^without.jsonl row 2: a sequence of"):
        check_fits(names, train, "m", few)
    scores = np.zeros((6, 2))
    scores[4:] = np.nan
    with pytest.raises(InputError, match="^without.jsonl row 1: its scores"):
        check_finite(names, train, "m", scores)
    scores[3] = np.nan
    with pytest.raises(InputError, match="^with.jsonl row 4: its scores"):
        check_finite(names, train, "m", scores)


# ---- the command line -------------------------------------------------------------


def write_records(path, count, *, traces, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda low, high: " ".join(rng.choice(WORDS, rng.integers(low, high)))
    side = lambda: (
        {"trace": text(4, 9), "answer": " " + text(2, 4)}
        if traces
        else " " + text(2, 4)
    )
    lines = (
        json.dumps({"prompt": text(2, 6), "chosen": side(), "rejected": side()})
        for _ in range(count)
    )
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    settings = {
        "model": make_model_folder(folder / "model"),
        "data": write_records(folder / "traces.jsonl", 24, traces=True),
        "empty-data": write_records(folder / "plain.jsonl", 16, traces=False, seed=1),
        "empty-share": 0.25,
        "objective": "bvpo",
        "objective.alpha": "auto",
        "objective.probe-every": 2,
        "objective.noise": "em",
        "objective.noise.memory": 500,
        "loss.beta": 0.5,
        "max-length": 64,
        "heldout-fraction": 0.2,
        "learning-rate": 1e-2,
        "max-steps": 5,
        "batch-size": 8,
        "eval-every": 3,
        "save-every": 2,
        "log-every": 1,
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    return lambda out, **changes: [
        part
        for k, v in (settings | {"out": out} | changes).items()
        for part in (f"--{k}", str(v))
    ]


class Killed(BaseException):
    pass


def test_a_run_by_command_resumes_bit_for_bit(command, tmp_path, monkeypatch):
    train_command.command(command(tmp_path / "whole"))
    make_batches = data.PackedLayout.batches

    class Mortal:
        def __init__(self, batches):
            self.batches, self.fetched = batches, 0
            self.set_state, self.get_state = batches.set_state, batches.get_state

        def __next__(self):
            self.fetched += 1
            if self.fetched > 3:
                raise Killed
            return next(self.batches)

    def mortal(*args, **options):
        return Mortal(make_batches(*args, **options))

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(data.PackedLayout, "batches", mortal)
        train_command.command(command(tmp_path / "cut"))
    train_command.command(command(tmp_path / "cut"))
    weights, lines, configs = (
        [read(tmp_path / name) for name in ("whole", "cut")]
        for read in (
            lambda out: (out / "export" / "model.safetensors").read_bytes(),
            lambda out: [
                {
                    k: v
                    for k, v in line.items()
                    if not k.endswith("_per_second") and k != "data_wait_fraction"
                }
                for line in read_metrics(out / "metrics.jsonl")
            ],
            lambda out: json.loads((out / "config.json").read_text()),
        )
    )
    assert weights[0] == weights[1]
    assert lines[0] == lines[1]
    steps = [line for line in lines[0] if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["bvpo/alpha"] == 0.5 and steps[1]["bvpo/alpha"] != 0.5
    assert {"bvpo/cosine", "bvpo/mse_empty", "noise/flip_rate"} <= steps[0].keys()
    loss = configs[0]["loss"]
    mixed = loss.pop("objective")
    assert (mixed["name"], mixed["memory"]) == ("em_dpo", 500)
    assert mixed["loss"]["beta"] == 0.5
    own = {"alpha": "auto", "probe_every": 2, "decay": 0.9}
    assert loss == {"name": "bvpo_em_dpo"} | own
    assert configs[0]["mix"]["empty_share"] == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.noise": "crm"}, "--objective.noise crm: no such objective"),
        ({"objective.alpha": 2}, "alpha 2.0: must be in"),
        ({"empty-share": 1}, "empty_share 1.0 must be"),
        ({"batch-size": 1}, "batch_size 1 "),
    ],
)
def test_wrong_flags_are_named(command, tmp_path, changes, message):
    devices = {f"mesh.{axis}": 1 for axis in ("fsdp", "tensor")} | {"mesh.data": 8}
    with pytest.raises(InputError, match=message):
        train_command.command(command(tmp_path / "run", **devices, **changes))


def test_the_flags_of_a_mixture_are_unknown_to_other_objectives():
    plain = "--model m --data d --out o --objective em --empty-data e"
    with pytest.raises(InputError, match="--empty-data: jaxpref train .* no such"):
        train_command.command(plain.split())

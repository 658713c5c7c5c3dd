"""Hyperparameters and flip rates of each record, and corrections of any loss."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref import cli, data, losses, objectives
from jaxpref.cli import train as train_command
from jaxpref.cli.words import split
from jaxpref.data import DataOptions, Kind, ListSource
from jaxpref.errors import InputError
from jaxpref.objectives import PER_RECORD, em, from_loss
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import weighted_losses
from jaxpref.train import TrainConfig, read_metrics
from tests.data_tokenizers import byte_tokenizer, synthetic_pairs
from tests.tiny import make_model_folder

COUNT = 6


def records(count=COUNT):
    return [
        row | {"info": {"e": 0.05 + 0.1 * (n % 4), "b": 0.1 * (1 + n % 3)}, "w": n % 3}
        for n, row in enumerate(synthetic_pairs(count))
    ]


def inputs_of(objective, *columns, rows=None):
    """A batch with two empty slots, and random scores [N, K] of its pairs."""
    rows = records() if rows is None else rows
    options = DataOptions(columns=columns, heldout_fraction=0.0)
    source, tokenizer = ListSource(rows), byte_tokenizer()
    pairs = data.make_splits(source, tokenizer, options, kind=objective.kind).train
    (batch,) = data.padded_layout(pairs, batch_size=COUNT + 2).eval_batches(pairs)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    rng = np.random.default_rng(0)
    names = ("policy_logps", "reference_logps")
    scores = {name: rng.normal(-9, 3, (COUNT + 2, 2)) for name in names}
    scores = {name: np.float32(x) for name, x in scores.items()}
    order = np.asarray(batch.pair_index)[:, 0]
    given = {name: jnp.asarray(x)[:, None] for name, x in scores.items()}
    arrays = [jnp.asarray(side) for name in names for side in scores[name].T]
    return Inputs(given, batch), order, arrays


def of(name, order):
    """The numbers of the records, in the order of the batch."""
    return jnp.float32([records()[n]["info"][name] for n in order[:COUNT]])


def check(found, wanted):
    # float32, at margins of up to 20 nats.
    np.testing.assert_allclose(found[:COUNT, 0], wanted, rtol=3e-6, atol=3e-6)


FLIPS, BETAS = "flip_rate=info.e", "beta=info.b"


@pytest.mark.parametrize("loss", [losses.rdpo, losses.cdpo, losses.forward_dpo])
def test_each_pair_has_the_loss_of_its_own_rate_and_beta(loss):
    objective = from_loss(loss, beta=PER_RECORD, flip_rate=PER_RECORD)
    assert objective.numbers == {"beta", "flip_rate"}
    inputs, order, arrays = inputs_of(objective, FLIPS, BETAS)
    alone = [
        loss(*(a[n : n + 1] for a in arrays), beta=float(b), flip_rate=float(e))[0]
        for n, (e, b) in enumerate(zip(of("e", order), of("b", order)))
    ]
    check(objective.losses(inputs, {}), alone)
    rewards = of("b", order) * (arrays[0] - arrays[2])[:COUNT]
    metrics = objective.metrics(inputs)
    np.testing.assert_allclose(metrics["rewards/chosen"], rewards.mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.ipo, losses.flex_dpo, losses.chi_po])
def test_gradients_are_finite_beside_empty_slots(loss):
    """A beta of 0, as in an empty slot, would be infinite in IPO."""
    fixed = {"max_reward": 4.0} if loss is losses.chi_po else {}
    names = ["chosen_beta", "rejected_beta"] if loss is losses.flex_dpo else ["beta"]
    objective = from_loss(loss, **dict.fromkeys(names, PER_RECORD), **fixed)
    columns = [f"{name}=info.b" for name in names]
    inputs, order, arrays = inputs_of(objective, *columns, "weight=w")

    def total(policy):
        scores = dict(inputs.scores) | {"policy_logps": policy}
        return weighted_losses(objective, Inputs(scores, inputs.batch), {}).sum()

    value, gradient = jax.value_and_grad(total)(inputs.scores["policy_logps"])
    own = [dict.fromkeys(names, float(b)) for b in of("b", order)]
    alone = [
        loss(*(a[n : n + 1] for a in arrays), **fixed, **b)[0]
        for n, b in enumerate(own)
    ]
    weights = order[:COUNT] % 3
    np.testing.assert_allclose(value, np.dot(weights, alone), rtol=1e-5)
    assert np.isfinite(gradient).all() and not gradient[COUNT:].any()


CORRECTIONS = {
    "unbiased": (objectives.unbiased, losses.unbiased),
    "forward": (objectives.forward, losses.forward_corrected),
}


@pytest.mark.parametrize("how", CORRECTIONS)
@pytest.mark.parametrize("loss", [losses.dpo, losses.ipo, losses.hinge])
def test_a_correction_is_the_function_of_the_library(how, loss):
    correct, direct = CORRECTIONS[how]
    base = functools.partial(loss, beta=0.5)
    objective = from_loss(correct(base, flip_rate=PER_RECORD))
    inputs, order, arrays = inputs_of(objective, FLIPS)
    arrays = [a[:COUNT] for a in arrays]
    check(objective.losses(inputs, {}), direct(base, of("e", order))(*arrays))
    fixed = from_loss(correct(base, flip_rate=0.2))
    assert fixed.options == {"beta": 0.5, "flip_rate": 0.2} and not fixed.numbers
    assert fixed.name.endswith(f"_{loss.__name__}")
    check(fixed.losses(inputs, {}), direct(base, 0.2)(*arrays))
    if loss is losses.dpo:  # as published
        own = {"unbiased": losses.rdpo, "forward": losses.forward_dpo}[how]
        published = own(*arrays, beta=0.5, flip_rate=of("e", order))
        check(objective.losses(inputs, {}), published)


def test_noise_is_learned_with_a_beta_of_each_pair():
    """em compares with the pair exchanged, which has the same beta."""
    objective = em(functools.partial(losses.dpo, beta=PER_RECORD))
    inputs, order, arrays = inputs_of(objective, BETAS)
    a, b, c, d = (x[:COUNT] for x in arrays)
    z = of("b", order) * (a - b - c + d)
    right = 1 / (1 + np.exp(-z - np.log(9)))  # 0.9 is the prior's reliability
    wanted = right * np.logaddexp(0, -z) + (1 - right) * np.logaddexp(0, z)
    check(objective.losses(inputs, objective.init(0)), wanted)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: from_loss(losses.aot, beta=PER_RECORD), "aot: couples the pairs"),
        (lambda: objectives.unbiased(losses.aot, flip_rate=0.1), "couples the pairs"),
        (lambda: objectives.forward(losses.sft, flip_rate=0.1), "names its arrays"),
        (lambda: objectives.forward(losses.rdpo, flip_rate=0.1), "rdpo: it has a flip"),
        (
            lambda: from_loss(objectives.unbiased(losses.dpo, flip_rate=0.5)),
            r"unbiased_dpo: Expected flip_rate in \[0, 0.5\), got 0.5",
        ),
        (lambda: from_loss(losses.dpo, bta=PER_RECORD), "bta"),
    ],
)
def test_what_is_not_defined_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "loss, column, value, message",
    [
        (losses.dpo, "beta", 0, "field 'x' for beta: Expected beta > 0 .* got 0"),
        (losses.dpo, "beta", "big", "field 'x' must be a number for beta"),
        (losses.dpo, "beta", None, "no field 'x' for beta"),
        (losses.power_dpo, "power", 1.5, r"Expected power in \(0, 1\], got 1.5"),
        (losses.rdpo, "flip_rate", 1.5, "'x' must be from 0 to 1 for flip_rate"),
        (losses.rdpo, "flip_rate", 0.5, "rdpo divides by 1 - 2 flip_rate"),
    ],
)
def test_a_value_out_of_range_names_the_row_and_the_field(loss, column, value, message):
    rows = [row | {"x": 0.3} for row in records()]
    rows[3]["x"] = value
    objective = from_loss(loss, **{column: PER_RECORD})
    with pytest.raises(InputError, match=f"row 4: .*{message}"):
        inputs_of(objective, f"{column}=x", rows=rows)


@pytest.mark.parametrize("flips", [0.0, 0.5])
def test_a_value_out_of_range_may_be_skipped(flips):
    """Everything else, flips included, is that of the file without the row."""
    rows = [row | {"x": 0.3} for row in records(40)]
    rows[3] |= {"x": -1}
    options = DataOptions(
        columns=("beta=x",),
        heldout_fraction=0.2,
        on_bad_row="skip",
        inject=data.InjectOptions(flip_rate=flips) if flips else data.InjectOptions(),
    )
    kind = from_loss(losses.dpo, beta=PER_RECORD).kind
    make = lambda rows: data.make_splits(
        ListSource(rows), byte_tokenizer(), options, kind=kind
    )
    found, expected = make(rows), make(rows[:3] + rows[4:])
    assert [bad.row for bad in found.skipped] == [ListSource(rows).location(3)]
    assert "Expected beta > 0" in found.skipped[0].reason
    assert found.digest == expected.digest
    counts = ("train", "heldout", "flipped")
    assert [found.report[x] for x in counts] == [expected.report[x] for x in counts]
    assert found.report["skipped"] == 1


def test_labels_may_be_more_likely_wrong_than_right():
    rows = [row | {"x": (0.1, 0.5, 0.9)[n % 3]} for n, row in enumerate(records())]
    for loss in (losses.cdpo, losses.forward_dpo):
        objective = from_loss(loss, flip_rate=PER_RECORD)
        inputs, *_ = inputs_of(objective, "flip_rate=x", rows=rows)
        assert np.isfinite(objective.losses(inputs, {})).all()


def test_answers_and_lists_have_weights():
    answer = {"prompt": "q", "completion": " a", "label": True, "w": 2}
    ranks = {"prompt": "q", "completions": [" a", " b"], "ranks": [1, 2], "w": 2}
    options = DataOptions(columns=("weight=w",), heldout_fraction=0.0)
    for row, objective in (
        ({k: x for k, x in answer.items() if k != "label"}, objectives.sft()),
        (answer, objectives.bco()),
        (answer, objectives.kto()),
        (ranks, objectives.lipo_lambda()),
    ):
        rows = [row | {"prompt": f"q{n}"} for n in range(2)]
        make = functools.partial(data.make_splits, ListSource(rows), byte_tokenizer())
        train = make(options, kind=objective.kind).train
        assert train.weights.tolist() == [2.0, 2.0]
        assert "weight" not in train.numbers
        config = dict(model="m", data="d", out="o", objective=objective)
        assert TrainConfig(**config, options=options).options == options


def test_kinds_with_other_checks_differ():
    """A sweep reads the records once for each kind."""
    one, two = (from_loss(x, beta=PER_RECORD).kind for x in (losses.dpo, losses.ipo))
    assert one != two and from_loss(losses.dpo).kind == Kind(2, votes=True)


# --- from the command line


@pytest.mark.slow
def test_an_audit_feeds_a_loss(tmp_path, monkeypatch):
    make_model_folder(tmp_path / "model")
    p = [0.9, 0.6, 0.2]
    rows = [
        row | {"p_correct": p[n % 3], "flip_rate": 1 - p[n % 3]}
        for n, row in enumerate(synthetic_pairs(24))
    ]
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    run = f"--model {tmp_path / 'model'} --data {tmp_path / 'clean.jsonl'}"
    run += " --max-steps 2 --batch-size 8 --heldout-fraction 0.2 --log-every 1"

    def train(out, flags):
        words = f"jaxpref train {run} --out {tmp_path / out} {flags}"
        monkeypatch.setattr(sys, "argv", words.split())
        cli.main()
        lines = read_metrics(tmp_path / out / "metrics.jsonl")
        return [x["loss"] for x in lines if "loss" in x]

    flags = "--columns flip_rate=flip_rate"
    direct = train("direct", f"--loss forward_dpo {flags}")
    corrected = train("corrected", f"--correct forward {flags}")
    # The same equation in two forms; float32.
    np.testing.assert_allclose(direct, corrected, rtol=1e-5)
    config = json.loads((tmp_path / "corrected" / "config.json").read_text())
    assert config["loss"]["flip_rate"] == "per record"
    assert config["loss"]["name"] == "forward_corrected_dpo"
    assert config["options"]["columns"] == ["flip_rate=flip_rate"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--loss rdpo --columns flip_rat=e", "did you mean flip_rate"),
        (
            "--columns flip_rate=e --loss rdpo --loss.flip-rate 0.1",
            "has one for each record",
        ),
        ("--loss kto --columns beta=b", "kto has one beta for all records"),
        ("--loss kto --correct forward", "kto has its own objective"),
        ("--correct forward --objective em", "corrects for wrong labels too"),
        ("--columns chosen_rating=a", "name the fields of both"),
        ("--correct unbaised", "did you mean unbiased"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    given = split(f"--model m --data d --out o {words}".split())
    with pytest.raises(InputError, match=message):
        train_command.config_of(given)

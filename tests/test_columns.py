"""Numbers of the records beside the order: from the file into the losses."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxpref import cli, data, losses
from jaxpref.data import (
    DataOptions,
    InjectOptions,
    ListSource,
    make_splits,
)
from jaxpref.data.columns import ARRAYS, OF_ANSWERS
from jaxpref.data.noise import flip_pairs
from jaxpref.errors import InputError
from jaxpref.models import RewardModel
from jaxpref.objectives import em, from_loss, reward_regression
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.objective import weighted_losses
from jaxpref.scoring import make_scorer
from jaxpref.train import TrainConfig, read_metrics
from jaxpref.train.evaluation import evaluation_metrics, make_evaluation
from tests.data_tokenizers import byte_tokenizer
from tests.test_reward_models import reward_steps
from tests.tiny import (
    WORDS,
    make_model_folder,
    padded_batches,
    tiny_config,
    tiny_params,
)

FIELDS = (
    "margin=how.far,strength=strength,tie=tie",
    "chosen_rating=good,rejected_rating=bad",
)
TOKENIZER = byte_tokenizer()


def records(count=24, seed=0):
    """Pairs of words with numbers, of which no two are the same."""
    rng = np.random.default_rng(seed)
    text = lambda: " " + " ".join(rng.choice(WORDS, rng.integers(3, 9)))
    return [
        {
            "prompt": f"the{text()}",
            "chosen": text(),
            "rejected": text(),
            "how": {"far": round(float(rng.normal()), 3)},
            "strength": int(rng.integers(0, 4)),
            "tie": [True, 0, 0.25, 1, False, 0.5][n % 6],
            "good": 5 + n,
            "bad": -n,
        }
        for n in range(count)
    ]


def plan_of(rows, fields=FIELDS, **options):
    options = {"heldout_fraction": 0.0} | options
    options = DataOptions(columns=fields, max_length=128, **options)
    return make_splits(ListSource(rows), TOKENIZER, options)


def expected(rows):
    return {
        "margin": [row["how"]["far"] for row in rows],
        "strength": [row["strength"] for row in rows],
        "tie": [float(row["tie"]) for row in rows],
        "chosen_rating": [row["good"] for row in rows],
        "rejected_rating": [row["bad"] for row in rows],
    }


def assert_labels(found, wanted):
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], np.float32(values), err_msg=name)


# --- from the file into a batch


def test_numbers_are_read_by_the_names_of_their_fields():
    rows = records()
    assert_labels(plan_of(rows).train.numbers, expected(rows))
    found = plan_of(rows, ["tie=tie"]).train.numbers
    assert_labels(found, {"tie": expected(rows)["tie"]})
    # A field of just that name is found before the inner one.
    both = [row | {"how.far": 7} for row in rows]
    assert set(plan_of(both).train.numbers["margin"]) == {7}


def test_they_follow_their_pairs_through_split_and_drops():
    rows = records(60)
    rows[5] |= {"rejected": rows[5]["chosen"], "strength": None}  # dropped, so not read
    plan = plan_of(rows, heldout_fraction=0.4)
    assert len(plan.train) and len(plan.heldout) and len(plan.train) < 59
    for pairs in (plan.train, plan.heldout):
        assert_labels(pairs.numbers, expected([rows[n] for n in pairs.columns["row"]]))


@pytest.mark.parametrize("by", ["plan", "pairs"])
def test_a_flip_keeps_the_size_and_takes_the_ratings_along(by):
    rows = records(60)
    if by == "plan":
        pairs = plan_of(rows, inject=InjectOptions(flip_rate=0.5)).train
    else:
        flips = np.random.default_rng(1).random(60) < 0.5
        pairs = flip_pairs(plan_of(rows).train, flips)
    assert 10 < pairs.columns["is_flipped"].sum() < 50
    wanted = expected(rows)
    plain = plan_of(rows).train
    for n in range(60):
        sides = (1, 0) if pairs.columns["is_flipped"][n] else (0, 1)
        for side, of in enumerate(sides):
            mine, its = pairs.completion(n, side), plain.completion(n, of)
            np.testing.assert_array_equal(mine, its)
            name = ("chosen_rating", "rejected_rating")
            assert pairs.numbers[name[side]][n] == wanted[name[of]][n]
        for name in ("margin", "strength", "tie"):
            assert pairs.numbers[name][n] == np.float32(wanted[name][n])


def test_batches_hold_the_pairs_own_numbers_and_zeros_elsewhere():
    pairs = plan_of(records()).train
    batches = padded_batches(pairs, batch_size=8, accumulation=2)
    batch = next(batches)
    for name, values in pairs.numbers.items():
        assert batch.numbers[name].shape == (2, 4, 1)
        np.testing.assert_array_equal(batch.numbers[name], values[batch.pair_index])
    *_, last = data.padded_layout(pairs, batch_size=10).eval_batches(pairs)
    assert (last.pair_index < 0).sum() == 6
    assert all((x[last.pair_index < 0] == 0).all() for x in last.numbers.values())


def test_without_fields_nothing_is_another_plan():
    rows = records()
    bare = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    plan, labeled = plan_of(bare, ()), plan_of(rows)
    assert plan.train.numbers == {}
    assert plan.train.ids.tolist() == labeled.train.ids.tolist()
    other = [row | {"strength": row["strength"] + 1} for row in rows]
    assert len({plan.digest, labeled.digest, plan_of(other).digest}) == 3
    renamed = [row | {"w": row["strength"]} for row in rows]
    by_w = [x.replace("strength=strength", "strength=w") for x in FIELDS]
    assert plan_of(renamed, by_w).digest == labeled.digest


WRONG = {
    "missing": (
        {"strength": None},
        "row 2: no field 'strength' for strength",
    ),
    "inner": ({"how": {}}, "row 2: no field 'how.far' for margin"),
    "no object": ({"how": 3}, "row 2: no field 'how.far'"),
    "text": (
        {"strength": "three"},
        "row 2: field 'strength' must be a number .* it is 'three'",
    ),
    "boolean": ({"strength": True}, "row 2: field 'strength' must be a number .* True"),
    "list": ({"good": [1]}, r"row 2: field 'good' must be a number .* \[1\]"),
    "negative": ({"strength": -1}, "row 2: field 'strength' must be 0 or more .* -1"),
    "more than a tie": ({"tie": 2}, "row 2: field 'tie' must be from 0 to 1 for tie"),
    "NaN": ({"good": float("nan")}, "row 2: field 'good' must be finite .* nan"),
    "too large": ({"bad": 1e39}, "row 2: field 'bad' must be finite .* 1e"),
    "much too large": ({"bad": 10**400}, "row 2: field 'bad' must be finite .* 1000"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_number_names_row_and_field(kind):
    change, message = WRONG[kind]
    rows = records(3)
    rows[1] |= change
    with pytest.raises(InputError, match=message) as raised:
        plan_of(rows)
    assert "\n" not in str(raised.value)


def test_a_rating_alone_is_refused():
    with pytest.raises(InputError, match="name the fields of both"):
        DataOptions(columns=("chosen_rating=good",))


# --- in the losses


def log_s(x):
    return -np.logaddexp(0, -x)


def rao_kupper(d, labels):
    s, tie = scipy.special.expit, labels["tie"]
    win, drawn = s(d - np.log(3)), 8 * s(d - np.log(3)) * s(-d - np.log(3))
    return -(1 - tie) * np.log(win) - tie * np.log(drawn)


def davidson(d, labels):
    total = np.exp(d) + 1 + 2 * np.exp(d / 2)
    tie = labels["tie"]
    return np.log(total) - (1 - tie) * d - tie * (np.log(2) + d / 2)


OBJECTIVES = {
    "margin_bradley_terry": (
        from_loss(losses.margin_bradley_terry),
        lambda w, l, labels: -log_s(w - l - labels["margin"]),  # noqa: E741
    ),
    "scaled_bradley_terry": (
        from_loss(losses.scaled_bradley_terry),
        lambda w, l, labels: -labels["strength"] * log_s(w - l),  # noqa: E741
    ),
    "rao_kupper": (
        from_loss(losses.rao_kupper),
        lambda w, l, labels: rao_kupper(w - l, labels),  # noqa: E741
    ),
    "davidson": (
        from_loss(losses.davidson),
        lambda w, l, labels: davidson(w - l, labels),  # noqa: E741
    ),
    "reward_regression": (
        reward_regression(),
        lambda w, l, labels: (
            (  # noqa: E741
                (w - labels["chosen_rating"]) ** 2
                + (l - labels["rejected_rating"]) ** 2
            )
            / 2
        ),
    ),
}


def small(rows):
    """Ratings near the rewards, so that float32 keeps their differences."""
    return [row | {"good": row["good"] / 10, "bad": row["bad"] / 10} for row in rows]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_reads_its_pairs_numbers(name):
    objective, of_pair = OBJECTIVES[name]
    rows = small(records())
    pairs = plan_of(rows, inject=InjectOptions(flip_rate=0.3)).train
    model = RewardModel(tiny_config(vocab_size=512, max_position_embeddings=256))
    scorer = make_scorer(model, objective.scores)
    found, wanted, rewards = [], [], np.zeros((24, 2), np.float32)
    for batch in data.padded_layout(pairs, batch_size=10).eval_batches(pairs):
        micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
        out = jax.jit(scorer)(tiny_params(model), None, micro).scores
        each = np.asarray(weighted_losses(objective, Inputs(out, micro), {}))[:, 0]
        real = np.asarray(micro.pair_index)[:, 0] >= 0
        assert np.isfinite(each).all() and (each[~real] == 0).all()
        index = np.asarray(micro.pair_index)[real, 0]
        mine = np.asarray(out["rewards"])[real, 0]
        labels = {k: v[index].astype(float) for k, v in pairs.numbers.items()}
        wanted.extend(of_pair(*mine.astype(float).T, labels))
        found.extend(each[real])
        rewards[index] = mine
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-6)
    evaluated = evaluation_metrics(
        make_evaluation(objective), {"rewards": rewards}, {}, pairs, {}
    )
    assert evaluated["eval_loss"] == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["margin_bradley_terry", "reward_regression"])
def test_layout_does_not_change_the_numbers(name):
    """Labels lie with their rows, on whatever device."""
    rng = np.random.default_rng(1)
    words = lambda low, high: rng.integers(4, 36, rng.integers(low, high)).tolist()
    builder = data.DatasetBuilder(2)
    for n in range(24):
        labels = {key: float(rng.normal()) for key in sorted(ARRAYS - OF_ANSWERS)}
        answers = [words(3, 9), words(3, 9)]
        builder.add([1, *words(2, 6)], answers, id=f"pair-{n}", columns=labels)
    objective, _ = OBJECTIVES[name]
    history, _ = reward_steps(builder.build(), objective)
    split, _ = reward_steps(builder.build(), objective, sizes=(2, 2, 2), accumulation=2)
    for ours, theirs in zip(split, history):
        for key in ("loss", "grad_norm", "rewards/margins"):
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [losses.margin_bradley_terry, losses.scaled_bradley_terry, losses.rao_kupper],
)
def test_noise_is_learned_beside_numbers(loss):
    """The exchanged pair, to which a posterior compares, has the same numbers."""
    pairs = plan_of(records()).train
    batch, *_ = data.padded_layout(pairs, batch_size=24).eval_batches(pairs)
    objective = em(loss)
    assert objective.numbers == from_loss(loss).numbers != frozenset()
    rewards = np.random.default_rng(2).normal(size=(24, 1, 2))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    scores = {"rewards": jnp.asarray(rewards, jnp.float32)}
    found = objective.losses(Inputs(scores, batch), objective.init(0))[:, 0]
    w, l = rewards[:, 0].T  # noqa: E741
    _, of_pair = OBJECTIVES[loss.__name__]
    labels = {name: np.float64(values) for name, values in pairs.numbers.items()}
    z = of_pair(l, w, labels) - of_pair(w, l, labels)
    right = scipy.special.expit(z + np.log(9))  # 0.9 is the prior's reliability
    expected = -right * log_s(z) - (1 - right) * log_s(-z)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


# --- from the command line


def test_fields_and_loss_belong_together(tmp_path):
    config = {"model": "m", "data": "d", "out": str(tmp_path)}
    objective, _ = OBJECTIVES["rao_kupper"]
    make = lambda objective, *columns: TrainConfig(
        **config, objective=objective, options=DataOptions(columns=columns)
    )
    assert make(objective, "tie=t").options.named_columns == {"tie": "t"}
    with pytest.raises(InputError, match="reads tie .* --columns tie=FIELD"):
        make(objective)
    with pytest.raises(InputError, match="--columns margin=m: rao_kupper"):
        make(objective, "tie=t,margin=m")
    with pytest.raises(InputError, match="--columns tie=t: dpo does not read it"):
        make(from_loss(losses.dpo), "tie=t")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    make_model_folder(folder / "model")
    lines = [json.dumps(row) + "\n" for row in small(records(32))]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def train(folder, out, monkeypatch, *argv):
    settings = f"--model {folder / 'model'} --data {folder / 'pairs.jsonl'} --out {out}"
    settings += " --max-steps 2 --batch-size 8 --heldout-fraction 0.2 --log-every 1"
    settings += " --learning-rate 1e-2"
    argv = ["jaxpref", "train", *settings.split(), *argv]
    monkeypatch.setattr(sys, "argv", argv)
    cli.main()


def test_a_run_reads_them_and_resumes(folder, tmp_path, monkeypatch, capsys):
    flags = "--loss reward_regression --columns chosen_rating=good,rejected_rating=bad"
    flags = flags.split()
    train(folder, tmp_path / "run", monkeypatch, *flags)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    before, after = (line["eval_loss"] for line in lines if "eval_loss" in line)
    assert after < before
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["options"]["columns"] == ["chosen_rating=good", "rejected_rating=bad"]

    # Another number in the file is another run.
    rows = (folder / "pairs.jsonl").read_text()
    changed = tmp_path / "folder"
    changed.mkdir()
    (changed / "model").symlink_to(folder / "model")
    (changed / "pairs.jsonl").write_text(rows)
    train(changed, tmp_path / "other", monkeypatch, *flags)
    row = json.loads(rows.splitlines()[0]) | {"good": 77}
    rest = "\n".join(rows.splitlines()[1:])
    (changed / "pairs.jsonl").write_text(json.dumps(row) + "\n" + rest + "\n")
    with pytest.raises(SystemExit):
        train(changed, tmp_path / "other", monkeypatch, *flags)
    assert "the training pairs (" in capsys.readouterr().err


def test_a_row_without_its_number_is_one_line(folder, tmp_path, monkeypatch, capsys):
    rows = [json.loads(x) for x in (folder / "pairs.jsonl").read_text().splitlines()]
    del rows[4]["strength"]
    (tmp_path / "model").symlink_to(folder / "model")
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--loss scaled_bradley_terry --columns strength=strength".split()
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, tmp_path / "run", monkeypatch, *flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("jaxpref: error:")]
    assert f"{path} row 5: no field 'strength'" in line
    assert "--columns strength=strength" in line and "Traceback" not in error

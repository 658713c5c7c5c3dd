"""`--loss align_distil`: a run with two teachers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpref.cli.train import config_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.train import prepare, read_metrics, run
from tests.losses.test_distillation import loss, weight
from tests.tiny import make_model_folder, make_pairs_file, tiny_config

MODELS = "model", "teacher", "reverse"
FLAGS = "--loss align_distil --loss.scale 2 --loss.floor 0.1 --loss.beta 0.5"
FEW = (
    "--learning-rate 1e-2 --batch-size 8 --max-length 64 --log-every 1 --decay constant"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("align_distil")
    for seed, name in enumerate(MODELS):
        make_model_folder(folder / name, seed=seed)
    make_pairs_file(folder / "pairs.jsonl", 24)
    return folder


def config(folders, out, *more, models=MODELS, steps=4):
    given = [f"--{name} {folders / name}" for name in models]
    given += [f"--data {folders / 'pairs.jsonl'} --out {out} --max-steps {steps}"]
    return config_of(split(" ".join([*given, FLAGS, FEW, *more]).split()))


def lines_of(out):
    return [x for x in read_metrics(out / "metrics.jsonl") if "loss" in x]


def expected_of(folders, task):
    """The mean loss and weight of the first step, from all logits."""
    pairs = task.datasets.splits.train
    records = task.records_seen()[:8]
    texts = [[*pairs.prompt(n), *pairs.completion(n, 0)] for n in records]
    rows = np.zeros((8, max(map(len, texts))), np.int32)
    for row, text in zip(rows, texts):
        row[: len(text)] = text
    model = build(tiny_config())
    logits = jax.jit(model.logits)
    params = [load_params(folders / name, model) for name in MODELS]
    z = np.stack([np.asarray(logits(p, jnp.asarray(rows)), float) for p in params])
    values, weights = [], []
    for row, record in enumerate(records):
        first = len(pairs.prompt(record)) - 1
        tokens = range(first, first + len(pairs.completion(record, 0)))
        each = [loss(*z[:, row, t], scale=2, floor=0.1, beta=0.5) for t in tokens]
        values.append(np.mean(each))
        own = [weight(*z[1:, row, t], scale=2, floor=0.1) for t in tokens]
        weights.append(np.mean(own))
    return np.mean(values), np.mean(weights)


def test_a_run_learns_from_two_models(folders, tmp_path):
    asked = config(folders, tmp_path / "run")
    run(asked)
    task = prepare(asked)
    lines = lines_of(tmp_path / "run")
    value, mean_weight = expected_of(folders, task)
    assert lines[0]["loss"] == pytest.approx(value, rel=1e-4)
    assert lines[0]["align_distil/weight"] == pytest.approx(mean_weight, rel=1e-4)
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    # Resumed with another teacher, which its checkpoints do not have.
    make_model_folder(tmp_path / "reverse", seed=3)
    reverse = f"--reverse {tmp_path / 'reverse'}"
    resumed = config(folders, tmp_path / "run", reverse, models=MODELS[:2], steps=5)
    with pytest.raises(InputError, match="the weights of the reverse"):
        run(resumed)


@pytest.mark.slow
def test_adapters_learn_it_and_the_start_may_be_the_reverse(folders, tmp_path):
    more = "--lora.rank 2", "--reverse start"
    asked = config(folders, tmp_path / "run", *more, models=MODELS[:2])
    run(asked)
    lines = lines_of(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_models_that_are_missing_or_not_read_are_named(folders, tmp_path):
    with pytest.raises(InputError, match="align_distil: give .* with --reverse"):
        config(folders, tmp_path / "run", models=MODELS[:2])
    with pytest.raises(InputError, match="--teacher .*: dpo does not read it"):
        words = f"--model m --data d --out o --teacher {folders / 'teacher'}"
        config_of(split(words.split()))
    make_model_folder(tmp_path / "wide", hidden_size=32)
    wide = config(
        folders, tmp_path / "run", f"--reverse {tmp_path / 'wide'}", models=MODELS[:2]
    )
    with pytest.raises(InputError, match="--reverse .*: its config.json differs"):
        prepare(wide)
    with pytest.raises(InputError, match="align_distil: Expected floor > 0"):
        words = "--loss align_distil --loss.floor 0 --model m --data d --out o"
        config_of(split(f"{words} --teacher t --reverse r".split()))


def test_a_teacher_with_other_tokens_is_refused(folders, tmp_path):
    other = make_model_folder(tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    path.write_text(json.dumps(tokenizer))
    asked = config(folders, tmp_path / "run", f"--reverse {other}", models=MODELS[:2])
    with pytest.raises(InputError, match=f"{other}"):
        prepare(asked)

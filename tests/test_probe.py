"""`jaxpref probe`: linear heads on frozen features, against planted preferences."""

import json

import jax
import numpy as np
import pytest
import scipy.optimize
from safetensors.numpy import load_file

from jaxpref import data
from jaxpref.cli import evaluate as evaluate_command
from jaxpref.cli import probe
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.probe import fits
from jaxpref.evaluate.probe.states import Backbone
from jaxpref.models import build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import read_architecture
from tests.tiny import WORDS, make_model_folder

PROMPTS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and votes of six annotators: even ones like what odd ones do not.

    `chosen_style` and `rejected_style` say which of the two answers even ones like.
    """
    folder = tmp_path_factory.mktemp("probe")
    make_model_folder(folder / "lm", num_layers=1)
    rng = np.random.default_rng(0)
    text = lambda count: " ".join(rng.choice(WORDS, count))
    rows = []
    for _ in range(PROMPTS):
        prompt, size = text(3), int(rng.integers(2, 4))
        answers = [text(size) + end for end in (" good", " bad")]
        for who in rng.choice(6, 4, replace=False):
            likes = int(who) % 2
            row = {"prompt": prompt, "annotator": f"w{who}", "kind": "ab"[size % 2]}
            for side, answer in (("chosen", likes), ("rejected", 1 - likes)):
                row |= {side: answers[answer], f"{side}_style": float(answer)}
            rows.append(row)
    write(folder / "votes.jsonl", rows)
    write(folder / "agree.jsonl", [x for x in rows if x["annotator"] in ("w0", "w2")])
    write(folder / "unnamed.jsonl", [dict(x, annotator=None) for x in rows])
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))


def run(folder, out, *flags, file="votes.jsonl"):
    words = f"--model {folder / 'lm'} --data {folder / file} --out {out} --folds 3"
    words += f" --features {folder / 'features'} --max-length 32 --batch-size 16"
    probe.command([*words.split(), *map(str, flags)])
    lines = (out / "votes.jsonl").read_text().splitlines()
    return json.loads((out / "probe.json").read_text()), [*map(json.loads, lines)]


def test_one_head_is_the_optimum_and_a_reward_model(folder, tmp_path, capsys):
    found, votes = run(folder, tmp_path / "out", "--by", "kind", file="agree.jsonl")
    right = np.array([x["margin"] > 0 for x in votes])
    assert found["bradley_terry"]["accuracy"] == right.mean() > 0.8
    assert sum(x["count"] for x in found["by"]["kind"].values()) == len(votes)
    assert "the reward model" in capsys.readouterr().out
    # The states at the last tokens, one sequence alone.
    model = build(read_architecture(folder / "lm"))
    params, hidden_of = load_params(folder / "lm", model), jax.jit(model.hidden)
    pairs = data.make_splits(
        data.open_source(str(folder / "agree.jsonl")),
        data.load_tokenizer(folder / "lm"),
        DataOptions(max_length=32, heldout_fraction=0.0),
        whole_turns=True,
    ).train

    def state(n, side):
        tokens = np.concatenate([pairs.prompt(n), pairs.completion(n, side)])
        padded = np.pad(tokens, (0, 32 - len(tokens)))[None]
        return np.asarray(hidden_of(params, padded)[0, len(tokens) - 1], np.float64)

    raw = np.array([state(n, 0) - state(n, 1) for n in range(len(pairs))])
    sizes = np.sqrt(np.mean(raw**2, axis=0))
    columns, penalty = raw / sizes, np.median(found["bradley_terry"]["penalties"])
    loss = lambda b: np.mean(np.logaddexp(0, -columns @ b)) + penalty / 2 * b @ b
    best = scipy.optimize.minimize(loss, np.zeros(len(sizes)), tol=1e-10).x
    head = load_file(tmp_path / "out" / "heads.safetensors")["heads"]
    np.testing.assert_allclose(head[0], best / sizes, rtol=1e-3, atol=1e-4)
    # The folder is a reward model like any other.
    evaluate_command.command(
        f"--model {tmp_path / 'out' / 'model'} --data {folder / 'agree.jsonl'} "
        f"--max-length 32 --out {tmp_path / 'eval'}".split()
    )
    lines = (tmp_path / "eval" / "eval_pairs.jsonl").read_text().splitlines()
    margins = [json.loads(x)["margin"] for x in lines]
    np.testing.assert_allclose(margins, raw @ head[0], rtol=1e-3, atol=1e-4)


def test_groups_of_annotators_are_found(folder, tmp_path, capsys):
    found, votes = run(folder, tmp_path, "--heads", 2, "--new-votes", 3)
    several = found["several"]
    assert several["accuracy"] == np.mean([x["margin"] > 0 for x in votes]) > 0.8
    assert several["difference_low"] > 0.1
    lines = (tmp_path / "annotators.jsonl").read_text().splitlines()
    weights = {x["annotator"]: x["weights"] for x in map(json.loads, lines)}
    of = {name: int(np.argmax(x)) for name, x in weights.items()}
    assert {of["w0"], of["w2"], of["w4"]} != {of["w1"], of["w3"], of["w5"]}
    assert len({of["w0"], of["w2"], of["w4"]}) == 1 and len({*of.values()}) == 2
    assert sum(x["votes"] for x in found["heads"]) == len(votes) == 4 * PROMPTS
    assert sum(x["annotators"] for x in found["heads"]) == 6
    new = found["new_annotators"]
    assert new["0"]["baseline_accuracy"] == new["3"]["baseline_accuracy"]
    assert new["3"]["accuracy"] > 0.7 and new["3"]["accuracy"] > new["0"]["accuracy"]
    assert not (tmp_path / "model").exists()
    assert "new annotators after 3 votes" in capsys.readouterr().out


def test_the_prompt_may_say_which_head_counts():
    rng = np.random.default_rng(0)
    contexts, differences = rng.normal(size=(2, 400, 4))
    likes = np.where(contexts[:, 0] > 0, 1, -1) * differences[:, 0]
    differences *= np.sign(likes)[:, None]
    learned = np.arange(400) < 300
    found = fits.by_prompt(
        differences, contexts, learned, num_heads=2, penalty=0.03, seed=0
    )
    assert np.mean(found.margins[~learned] > 0) > 0.8
    assert np.abs(found.weights.sum(axis=1) - 1).max() < 1e-5
    first = found.weights.argmax(axis=1) == found.weights[0].argmax()
    same = (contexts[:, 0] > 0) == (contexts[0, 0] > 0)
    assert np.mean(first == same) > 0.85


def test_one_prototype_is_a_bradley_terry_model():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 3)) + [0.4, -0.2, 0.1]
    loss = lambda b: np.mean(np.logaddexp(0, -x @ b)) + 0.1 / 2 * b @ b
    best = scipy.optimize.minimize(loss, np.zeros(3), tol=1e-10).x
    found = fits.by_annotator(
        x,
        np.arange(200) % 7,
        np.ones(200, bool),
        num_annotators=7,
        num_heads=1,
        penalty=0.1,
        seed=0,
    )
    np.testing.assert_allclose(found.heads[0], best, atol=2e-3)
    np.testing.assert_allclose(found.margins, x @ best, atol=1e-2)


def test_first_votes_are_of_each_annotator_among_those_allowed():
    annotators = np.array([0, 1, 0, 0, 1, 2, 0, 1])
    among = np.array([1, 1, 1, 1, 0, 0, 1, 1], bool)
    found = fits.first_votes(annotators, among, 2, seed=0)
    assert not (found & ~among).any()
    assert np.bincount(annotators[found], minlength=3).tolist() == [2, 2, 0]
    assert not fits.first_votes(annotators, among, 0, seed=0).any()


def test_columns_of_the_domain(folder, tmp_path, capsys):
    flags = ("--columns", "style")
    found, _ = run(folder, tmp_path, *flags, file="agree.jsonl")
    assert found["columns"]["style"] < 0  # even annotators like style 0
    assert found["with_columns"]["accuracy"] == found["bradley_terry"]["accuracy"] == 1
    assert found["with_columns"]["difference"] >= 0
    assert not (tmp_path / "model").exists()
    assert "gain by the columns" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "file", "message"),
    [
        (["--columns", "styles"], "votes.jsonl", "row 1: --columns styles: no field"),
        (["--columns", "text"], "texts.jsonl", "'chosen_text' holds 'a'; --columns"),
        (["--heads", "2"], "unnamed.jsonl", "name 0 annotators"),
        (["--new-votes", "5"], "votes.jsonl", "needs --heads 2 or more"),
        (["--mixed-by", "prompt"], "votes.jsonl", "needs --heads 2 or more"),
        ([], "labeled.jsonl", "single answers with labels"),
        ([], "one.jsonl", "all pairs have the same prompt"),
        (["--heads", "2", "--mixed-by", "prompt"], "one.jsonl", "have the same prompt"),
        (["--seed", "-1"], "votes.jsonl", "seed -1: must be"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(folder, tmp_path, flags, file, message):
    pair = {"prompt": "the", "chosen": " film", "rejected": " book"}
    write(folder / "one.jsonl", [pair, pair])
    texts = pair | {"chosen_text": "a", "rejected_text": "b"}
    write(folder / "texts.jsonl", [texts, texts | {"prompt": "we"}])
    label = {"prompt": "the", "completion": "a film", "label": True}
    write(folder / "labeled.jsonl", [label])
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "out", *flags, file=file)
    assert not (tmp_path / "out" / "probe.json").exists()


def test_files_of_another_program_are_not_overwritten(folder, tmp_path):
    (tmp_path / "votes.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"has votes\.jsonl without probe\.json"):
        run(folder, tmp_path)
    assert (tmp_path / "votes.jsonl").read_text() == "mine"


def test_an_interrupted_probe_leaves_no_summary(folder, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path)
    assert (tmp_path / "votes.jsonl").exists()
    assert not (tmp_path / "probe.json").exists()
    run(folder, tmp_path)
    assert (tmp_path / "probe.json").exists()

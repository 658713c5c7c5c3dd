"""`jaxpref evaluate` on language models and on reward models, against plain numpy."""

import json
import sys

import jax
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxpref import cli, data
from jaxpref.cli import evaluate as evaluate_command
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.files import RUN, RUN_FILES
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.runtime.run_folder import open_out
from tests.tiny import make_model_folder, make_pairs_file, tiny_config, tiny_params


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A language model, another one, a reward model of the first, and 21 pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("lm", 0), ("other", 1)):
        make_model_folder(folder / name, seed)
    model = RewardModel(tiny_config())
    save(folder / "reward", model, tiny_params(model), folder / "lm")
    make_pairs_file(folder / "pairs.jsonl", 20)
    with (folder / "pairs.jsonl").open("a") as file:
        row = {"prompt": "the film", "chosen": " was good", "rejected": " was"}
        file.write(json.dumps(row | {"annotator": "ann", "flip": True}) + "\n")
    return folder


def evaluate(inputs, out, model, *flags):
    """What the command writes: metrics and lines."""
    evaluate_command.command(
        f"--model {inputs / model} --data {inputs / 'pairs.jsonl'} --out {out} "
        f"--max-length 64 --batch-size 8 {' '.join(map(str, flags))}".split()
    )
    lines = (out / "eval_pairs.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), list(map(json.loads, lines))


def tokenized(inputs):
    """(prompt and completion, tokens of the completion) of every pair and side."""
    plan = data.make_splits(
        data.open_source(str(inputs / "pairs.jsonl")),
        data.load_tokenizer(inputs / "lm"),
        DataOptions(max_length=64, heldout_fraction=0.0),
    )
    pairs = plan.train
    whole = lambda n, k: np.concatenate([pairs.prompt(n), pairs.completion(n, k)])
    return pairs, [
        [(whole(n, k), int(pairs.completion_lengths[n, k])) for k in range(2)]
        for n in range(len(pairs))
    ]


def check_shares(metrics, margins, lengths):
    wins, longer = (np.sign(x) for x in (margins, lengths[:, 0] - lengths[:, 1]))
    for name, signs in (("rewards", wins), ("length_only", longer)):
        share, count = (1 + signs.mean()) / 2, len(signs)
        assert metrics[f"{name}/accuracies"] == pytest.approx(share)
        # Wilson's interval holds the shares that are z standard errors away or nearer.
        for end in ("low", "high"):
            p = metrics[f"{name}/accuracies_{end}"]
            z = (share - p) / np.sqrt(p * (1 - p) / count)
            assert abs(z) == pytest.approx(scipy.stats.norm.ppf(0.975))
    assert metrics["rewards/margins"] == pytest.approx(margins.mean(), abs=1e-6)
    assert metrics["pairs"] == len(margins)


def test_a_reward_model_is_judged_by_its_scores(inputs, tmp_path):
    metrics, lines = evaluate(inputs, tmp_path, "reward")
    model = RewardModel(read_architecture(inputs / "reward"))
    params = load_params(inputs / "reward", model)
    pairs, wholes = tokenized(inputs)
    alone = jax.jit(model.rewards)
    # Padded behind the end to one shape, which does not matter.
    of = lambda whole: alone(
        params, np.pad(whole, (0, 64 - len(whole)))[None], np.array([len(whole)])
    )
    expected = np.array([[of(x)[0] for x, _ in sides] for sides in wholes], float)
    lengths = np.array([[n for _, n in sides] for sides in wholes])
    margins = expected[:, 0] - expected[:, 1]
    assert np.abs(margins).min() > 1e-4 and 0 < (margins > 0).mean() < 1
    check_shares(metrics, margins, lengths)
    assert metrics["rewards/chosen"] == pytest.approx(expected[:, 0].mean(), abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(expected[:, 1].mean(), abs=1e-5)
    assert not any("logps" in name for name in {*metrics, *lines[0]})
    for n, line in enumerate(lines):
        assert (line["id"], line["row"]) == (pairs.ids[n], n + 1)
        found = [line[f"rewards_{side}"] for side in ("chosen", "rejected")]
        np.testing.assert_allclose(found, expected[n], atol=1e-5)
        assert [line[f"length_{s}"] for s in ("chosen", "rejected")] == [*lengths[n]]
        assert line["margin"] == pytest.approx(found[0] - found[1], abs=1e-6)
        assert line["correct"] is bool(margins[n] > 0)
    assert [(x["annotator"], x["flip"]) for x in lines[-2:]] == [
        (None, False),
        ("ann", True),
    ]


def test_equal_scores_are_half_right(inputs, tmp_path):
    model = RewardModel(tiny_config())
    params = tiny_params(model)
    params["score"] = 0 * params["score"]
    save(tmp_path / "zero", model, params, inputs / "lm")
    metrics, lines = evaluate(inputs, tmp_path / "out", tmp_path / "zero")
    assert metrics["rewards/accuracies"] == 0.5 and metrics["rewards/margins"] == 0
    assert [line["correct"] for line in lines] == [None] * 21
    metrics |= {"rewards/margins": 0.0}
    _, wholes = tokenized(inputs)
    lengths = np.array([[n for _, n in sides] for sides in wholes])
    check_shares(metrics, np.zeros(21), lengths)


def test_a_language_model_is_judged_by_log_ratios(inputs, tmp_path):
    flags = ("--reference", inputs / "other", "--beta", 0.5)
    metrics, lines = evaluate(inputs, tmp_path, "lm", *flags)
    _, wholes = tokenized(inputs)
    config = read_architecture(inputs / "lm")
    network = build(config)
    tables = {}
    for name, folder in (("logps", "lm"), ("reference_logps", "other")):
        params = load_params(inputs / folder, network)
        logits_of = jax.jit(network.logits)

        def of(whole, size, params=params, logits_of=logits_of):
            tokens = np.pad(whole, (0, 64 - len(whole)))[None]
            logits = np.asarray(logits_of(params, tokens), float)[0, : len(whole)]
            before = scipy.special.log_softmax(logits, axis=-1)[-size - 1 : -1]
            return before[np.arange(size), whole[-size:]].sum()

        tables[name] = np.array([[of(*side) for side in sides] for sides in wholes])
    rewards = 0.5 * (tables["logps"] - tables["reference_logps"])
    margins = rewards[:, 0] - rewards[:, 1]
    lengths = np.array([[n for _, n in sides] for sides in wholes])
    check_shares(metrics, margins, lengths)
    for name, table in {"rewards": rewards, "logps": tables["logps"]}.items():
        for k, side in enumerate(("chosen", "rejected")):
            found = metrics[f"{name}/{side}"]
            assert found == pytest.approx(table[:, k].mean(), rel=1e-4)
    for n, line in enumerate(lines):
        for name, table in tables.items():
            found = [line[f"{name}_{side}"] for side in ("chosen", "rejected")]
            np.testing.assert_allclose(found, table[n], rtol=1e-4)
        assert line["margin"] == pytest.approx(margins[n], abs=1e-4)
    assert [*lines[0]] == [
        "id",
        "row",
        "logps_chosen",
        "logps_rejected",
        "reference_logps_chosen",
        "reference_logps_rejected",
        "length_chosen",
        "length_rejected",
        "margin",
        "correct",
        "flip",
        "annotator",
        "ches",
        "normalized_ches",
        "difficulty",
    ]


@pytest.mark.parametrize(
    ("model", "flags", "parts"),
    [
        ("reward", ["--reference", "lm"], ["--reference", "reward is a reward model"]),
        ("reward", ["--beta", "0.1"], ["--beta 0.1", "leave out --beta"]),
        ("lm", ["--reference", "reward"], ["reward: holds a reward model", "LM head"]),
        ("lm", ["--beta", "0"], ["beta 0.0: must be above 0"]),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(
    inputs, tmp_path, monkeypatch, capsys, model, flags, parts
):
    monkeypatch.chdir(inputs)
    argv = ["jaxpref", "evaluate", "--model", model, "--data", "pairs.jsonl", *flags]
    argv += ["--out", str(tmp_path / "out"), "--max-length", "64"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    (line,) = [x for x in error.splitlines() if x.startswith("jaxpref: error:")]
    assert all(part in line for part in parts) and "Traceback" not in error
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_results_of_another_program_are_not_overwritten(inputs, tmp_path):
    mine = tmp_path / "metrics.json"
    mine.write_text('{"mine": 1}')
    with pytest.raises(InputError, match="another program wrote it"):
        evaluate(inputs, tmp_path, "lm")
    assert mine.read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    "mine", ['{"prompt": "a", "chosen": "b", "rejected": "c"}', "[1]", "text", "\xff"]
)
def test_a_file_of_the_user_is_not_overwritten(inputs, tmp_path, mine):
    path = tmp_path / "eval_pairs.jsonl"
    path.write_text(mine)
    with pytest.raises(InputError, match="not written by `jaxpref evaluate`"):
        evaluate(inputs, tmp_path, "lm")
    assert path.read_text() == mine


def test_an_evaluation_takes_no_folder(inputs, tmp_path):
    """Where files of others are, it is repeated, and a run refuses to overwrite."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "report.html").write_text("mine")
    once, _ = evaluate(inputs, tmp_path, "lm")
    again, _ = evaluate(inputs, tmp_path, "lm")
    assert again == once
    opened = open_out(
        str(tmp_path), "config.json", what=RUN, writes=RUN_FILES, reads={}
    )
    with pytest.raises(InputError, match=r"has report\.html"), opened:
        pass

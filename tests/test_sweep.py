"""`jaxpref sweep` from the command line to its table and report."""

import json
import shutil
from pathlib import Path

import pytest

import jaxpref.sweep.runs as sweep_runs
from jaxpref import cli, data
from jaxpref.errors import Stopped
from jaxpref.files import write_json
from jaxpref.models import RewardModel
from jaxpref.models.folder import save
from jaxpref.scoring import score_tables
from jaxpref.train import read_metrics
from jaxpref.train.config import to_json
from tests.tiny import make_pairs_file, tiny_config, tiny_params

OPTIONS = (
    "--max-steps 2 --batch-size 8 --max-length 64 --row-length none "
    "--heldout-fraction 0.2"
)
KL = "--kl-prompts 8 --kl-tokens 8"


def sweep(folder, out, over, more="", code=None):
    """Runs the command; what is in `sweep.json`."""
    argv = f"sweep --model {folder}/model --data {folder}/pairs.jsonl --out {out} "
    words = [f"--over {word}" for word in over.split()]
    line = f"{argv}{OPTIONS} {' '.join(words)} {more}"
    if code is None:
        cli.main(line.split())
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(line.split())
        assert ended.value.code == code
    path = out / "sweep.json"
    return json.loads(path.read_text()) if path.exists() else None


def by_name(content):
    return {record["name"]: record for record in content["runs"]}


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that were trained, in order."""
    names, train = [], sweep_runs.train

    def recorded(config, **given):
        names.append(Path(config.out).name)
        return train(config, **given)

    monkeypatch.setattr(sweep_runs, "train", recorded)
    return names


@pytest.fixture
def read(monkeypatch):
    """One item for each time that records were tokenized."""
    calls, splits = [], data.read.make_splits
    monkeypatch.setattr(
        data.read, "make_splits", lambda *x, **y: calls.append(x) or splits(*x, **y)
    )
    return calls


def pretended(config, *, task):
    """In place of training: files with numbers that depend on the learning rate."""
    rate = config.optimizer.learning_rate
    if rate > 1:
        raise Stopped("the loss is not finite")
    if rate == 0.125:
        raise KeyboardInterrupt
    out = Path(config.out)
    out.mkdir(exist_ok=True)
    if not (out / "export").exists():
        shutil.copytree(config.model, out / "export")
    write_json(out / "config.json", to_json(config))
    before = {"eval_loss": 0.7, "eval_logps/chosen": -9.0, "eval_logps/rejected": -9.0}
    after = {"eval_loss": rate, "eval_logps/chosen": -8.0, "eval_logps/rejected": -12.0}
    more = {"eval_rewards/accuracies": rate + config.seed, "eval_rewards/margins": 0.0}
    lines = [{"step": 0, **before, **more}, {"step": 2, **after, **more}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "metrics.jsonl").write_text(text)


@pytest.fixture
def pretending(monkeypatch):
    monkeypatch.setattr(sweep_runs, "train", pretended)
    monkeypatch.setattr(sweep_runs, "write_training", lambda out, command: None)


def test_finished_runs_are_skipped_and_failed_ones_tried_again(
    inputs, tmp_path, monkeypatch, pretending, trained, read, capsys
):
    out = tmp_path / "out"
    ask = lambda rates, **more: sweep(
        inputs, out, f"learning-rate={rates} seed=0,1", "--kl-prompts 0", **more
    )
    first = ask("0.25,0.5")
    assert trained == [
        f"learning-rate={rate},seed={seed}" for rate in (0.25, 0.5) for seed in (0, 1)
    ]
    assert len(read) == 1  # for all runs
    assert [record["accuracy"] for record in first["runs"]] == [0.25, 1.25, 0.5, 1.5]
    assert [record["loss"] for record in first["runs"]] == [0.25, 0.25, 0.5, 0.5]
    assert {record["heldout_log_ratio"] for record in first["runs"]} == {-1.0}
    assert first["settings"][1]["accuracy"]["mean"] == 1.0
    assert first["frontier"]["x"] == "heldout_log_ratio"
    printed = capsys.readouterr().out
    assert "4 runs: 0 finished, 4 to do" in printed
    assert "run 1 of 4, learning-rate=0.25,seed=0: loss 0.2500, accuracy 25.0%" in (
        printed
    )
    assert printed.count("; about ") == 3  # not after the last one

    # One of the new values fails, and the others go on.
    trained.clear()
    more = ask("0.25,2,0.5,0.75", code=65)
    assert trained == [
        f"learning-rate={rate},seed={seed}" for rate in (2, 0.75) for seed in (0, 1)
    ]
    records = by_name(more)
    assert records.items() >= by_name(first).items()
    assert [*records] == [
        f"learning-rate={rate},seed={seed}"
        for rate in ("0.25", "2", "0.5", "0.75")
        for seed in (0, 1)
    ]
    failed = records["learning-rate=2,seed=0"]
    assert (failed["status"], failed["exit_code"]) == ("failed", 65)
    assert failed["error"] == "the loss is not finite"
    page = (out / "report.html").read_text()
    assert "Failed runs: 2" in page and "the loss is not finite" in page
    error = capsys.readouterr().err
    assert "2 of 8 runs failed: learning-rate=2,seed=0; learning-rate=2,seed=1" in error

    # Interrupted: the table has the runs so far, and the next command does the rest.
    trained.clear()
    partly = ask("0.375,0.125", code=130)
    assert [*by_name(partly)] == [f"learning-rate=0.375,seed={n}" for n in (0, 1)]
    assert ask("0.375,0.5")["runs"][2:] == first["runs"][2:]
    assert trained == ["learning-rate=0.375,seed=0", "learning-rate=0.375,seed=1"] + [
        "learning-rate=0.125,seed=0"
    ]


def test_what_is_refused_before_the_first_run(
    inputs, tmp_path, pretending, trained, capsys
):
    refused = lambda over, more="": sweep(
        inputs, tmp_path / "out", over, f"--kl-prompts 0 {more}", code=2
    )
    for over, more, message in [
        # Only the records show it.
        ("max-pairs=64,2", "", "max-pairs=2: batch_size 8: a step would see pairs"),
        ("seed=0,1", "--reward-model m", "--reward-model m: needs answers"),
        ("seed=0,1", "--print-config", "--print-config: a sweep has several configs"),
        ("model=m,n", "", "--model: also given as --over model"),
    ]:
        assert refused(over, more) is None
        assert message in capsys.readouterr().err
    assert not trained and not (tmp_path / "out" / "max-pairs=64").exists()
    (tmp_path / "out" / "report.html").write_text("mine")
    assert refused("seed=0,1") is None
    assert "has report.html, but no sweep.json" in capsys.readouterr().err


def test_soft_prompts_are_compared_on_heldout_pairs(
    inputs, tmp_path, pretending, trained, capsys
):
    """Their runs write an adapter, and no export."""
    soft, out = "--soft-prompt.length 2", tmp_path / "out"
    assert sweep(inputs, out, "seed=0", f"{KL} {soft}", code=2) is None
    assert "pass --kl-prompts 0" in capsys.readouterr().err
    for _ in range(2):
        (found,) = sweep(inputs, out, "seed=0", f"--kl-prompts 0 {soft}")["runs"]
        assert found["status"] == "finished" and len(trained) == 1
        if (out / "seed=0" / "export").exists():
            (out / "seed=0" / "export").rename(out / "seed=0" / "adapter")


def test_a_run_of_other_records_is_not_skipped(inputs, tmp_path, pretending, trained):
    shutil.copytree(inputs / "model", tmp_path / "model")
    make_pairs_file(tmp_path / "pairs.jsonl", 30)
    for seed, trained_so_far in ((0, 1), (0, 1), (1, 2)):
        make_pairs_file(tmp_path / "pairs.jsonl", 30, seed)
        sweep(tmp_path, tmp_path / "out", "seed=0", "--kl-prompts 0")
        assert len(trained) == trained_so_far


@pytest.mark.slow
def test_a_sweep_that_trains(inputs, tmp_path, monkeypatch, trained):
    """The reference is scored once; a reward model is asked without training again."""
    monkeypatch.setenv("JAXPREF_CACHE", str(tmp_path / "cache"))
    scored, fill = [], score_tables._fill
    monkeypatch.setattr(
        score_tables, "_fill", lambda *given: scored.append(given) or fill(*given)
    )
    out = tmp_path / "out"
    found = sweep(inputs, out, "learning-rate=0.01,0.02", KL)
    assert trained == ["learning-rate=0.01", "learning-rate=0.02"]
    assert len(scored) == 2  # training and held-out pairs
    for name, record in by_name(found).items():
        lines = read_metrics(out / name / "metrics.jsonl")
        before, last = [line for line in lines if "eval_loss" in line]
        assert (record["status"], record["step"]) == ("finished", 2)
        assert record["loss"] == last["eval_loss"]
        assert record["accuracy"] == last["eval_rewards/accuracies"]
        assert record["margin"] == last["eval_rewards/margins"]
        sides = [f"eval_logps/{side}" for side in ("chosen", "rejected")]
        moved = sum(last[side] - before[side] for side in sides) / 2
        assert record["heldout_log_ratio"] == pytest.approx(moved)
        assert record["kl"] > 0 and record["samples"] == 8
        assert (out / name / "report.html").is_file()
    page = (out / "report.html").read_text()
    assert "KL to the reference: each policy answers 8 held-out prompts" in page
    assert (out / "frontier.png").is_file() and (out / "sweep.csv").is_file()

    reward = RewardModel(tiny_config())
    save(tmp_path / "reward", reward, tiny_params(reward, 2), inputs / "model")
    more = f"{KL} --reward-model {tmp_path / 'reward'} --most-kl 100"
    rewarded = sweep(inputs, out, "learning-rate=0.01,0.02", more)
    assert len(trained) == 2
    for record, before in zip(rewarded["runs"], found["runs"]):
        assert record.items() >= before.items()
        assert record["reward"] != record["reference_reward"]
    assert rewarded["frontier"]["y"] == "reward"
    best = max(rewarded["runs"], key=lambda record: record["reward"])
    assert rewarded["chosen"][0]["setting"] == best["options"]

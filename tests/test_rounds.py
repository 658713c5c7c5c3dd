"""`jaxpref rounds`: recipes, what is run again, and the report."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxpref import cli
from jaxpref.cli import rounds as command
from jaxpref.errors import InputError
from jaxpref.online.rounds import recipe, summary
from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.prompts import split_prompts
from jaxpref.online.rounds.stages import Stages
from tests.data_tokenizers import write_lines

NEEDS = {
    "spa": ["--data", "seed.jsonl"],
    "delta": ["--weak-model", "weak"],
}
"""What recipes need; all others need a reward."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with prompts in it."""
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"question {n}", "topic": n % 3} for n in range(23)]
    write_lines(tmp_path / "prompts.jsonl", records)
    return tmp_path


@pytest.fixture
def ran(monkeypatch):
    """The commands that are run; each writes plausible files."""
    words = []

    def run(name):
        def write(argv):
            words.append([name, *argv])
            pretend([name, *argv])

        return write

    monkeypatch.setattr(command, "RUN", {name: run(name) for name in command.RUN})
    return words


def pretend(words):
    """Writes what a command would write: the answer of a model is its folder."""
    option = lambda name: words[words.index(f"--{name}") + 1]
    out = Path(option("out"))
    if words[0] == "train":
        (out / "export").mkdir(parents=True)
        (out / "export" / "config.json").write_text(json.dumps(words))
        return
    rows = [json.loads(line) for line in Path(option("data")).open()]
    if words[0] == "sample":
        count = int(option("n")) if "--n" in words else 1
        number = len(out.parent.name.split("_")[1]) + option("model").count("round_1")
        texts = [" ".join(["word"] * (k + 1 + number)) for k in range(count)]
        rows = [
            row | {"completions": [{"text": text, "ended": True} for text in texts]}
            for row in rows
        ]
    elif words[0] == "score":
        for row in rows:
            if "chosen" in row:
                sides = ("chosen", "rejected")
                row |= {f"{x}_score": -len(row[x]) for x in sides}
                continue
            row["scores"] = [len(x["text"].split()) for x in row["completions"]]
    else:
        return cli.main(words)
    write_lines(out, rows)


def run(*words):
    line = "--model start --prompts prompts.jsonl --out out"
    command.command([*line.split(), *words])


@pytest.mark.parametrize("name", recipe.shipped())
def test_the_commands_of_a_recipe_have_these_options(folder, name, capsys):
    words = NEEDS.get(name, ["--reward", "rule:words"])
    run("--recipe", name, "--rounds", "2", "--dry-run", *words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# round 0"
    trained = [line for line in lines if line.startswith("jaxpref train")]
    assert "--out out/round_2/policy" in trained[-1]
    assert "--model out/round_1/policy/export" in trained[-1]
    assert not any("{" in line for line in lines)
    assert recipe.read_recipe(name).about.count("arXiv:") == 1
    assert not Path("out").exists()


def test_rounds_are_run_once_and_reported(folder, ran, capsys):
    words = ["--recipe", "iterated_dpo", "--reward", "rule:words", "--rounds", "2"]
    run(*words, "--gold", "rule:characters")
    assert [x[0] for x in ran[:2]] == ["sample", "score"]  # of the model at the start
    assert len(ran) == 2 + 2 * 8
    found = json.loads(Path("out/rounds.json").read_text())
    assert [one["round"] for one in found["rounds"]] == [0, 1, 2]
    first, second, third = found["rounds"]
    assert first["reward"] == first["words"] == 2
    assert second["reward"] == 3 and second["win_rate"] == 1
    # The judge in `pretend` contradicts every label.
    assert second["flip_rate"] == third["flip_rate"] == 1
    assert (second["prompts"], second["pairs"]) == (9, 9)
    page = Path("out/report.html").read_text()
    assert "question" in page and "frontier" not in page.split("<h2>")[0]
    count = len(ran)
    run(*words, "--gold", "rule:characters")
    assert len(ran) == count
    shutil.rmtree("out/round_2/policy")
    run(*words, "--gold", "rule:characters")
    # What was made of it is the same, so it is not made again.
    assert [x[0] for x in ran[count:]] == ["train"]
    with pytest.raises(InputError, match="round_1: 1 sample was made by another .* 4"):
        run(*words, "--gold", "rule:characters", "--sample.n", "8")
    with Path("prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(InputError, match="prompts.jsonl: was made from other prompts"):
        run(*words, "--gold", "rule:characters")


def test_offline_pairs_are_mixed_in(folder, capsys):
    run(
        *("--recipe", "iterated_dpo", "--reward", "rule:words", "--dry-run"),
        *("--data", "seed.jsonl", "--mix-offline", "0.25", "--train.loss.beta", "0.3"),
        *("--pairs.min-gap", "2", "--rounds", "1", "--sample.temperature", "0.7"),
    )
    lines = capsys.readouterr().out
    assert "--data out/round_1/pairs.jsonl:0.75 seed.jsonl:0.25" in lines
    assert "--epochs 1" in lines
    assert "--loss.beta 0.3" in lines and "--min-gap 2" in lines
    sampled = [x for x in lines.splitlines() if x.startswith("jaxpref sample")]
    # Held-out answers are the model's own distribution, whatever is trained on.
    assert ["0.7" in line for line in sampled] == [False, True, False]


def test_steps_are_instead_of_epochs(folder, capsys):
    words = ("--recipe", "upo", "--reward", "rule:words", "--dry-run")
    run(*words, "--train.max-steps", "7")
    lines = capsys.readouterr().out
    assert "--max-steps 7" in lines and "--epochs" not in lines


def commands_of(capsys, *words):
    """The printed commands, by round."""
    run(*words, "--dry-run")
    found: list[list[list[str]]] = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("# round"):
            found.append([])
        else:
            found[-1].append(shlex.split(line))
    return found


@pytest.mark.parametrize("name", ["iterated_dpo", "spa"])
def test_the_optimizer_continues_after_the_first_training(folder, capsys, name):
    words = NEEDS.get(name, ["--reward", "rule:words"])
    words = ["--recipe", name, "--rounds", "3", *words]
    plain = commands_of(capsys, *words)
    continued = commands_of(capsys, *words, "--carry-optimizer")
    option = lambda n: ["--optimizer-from", f"out/round_{n}/policy"]
    began = False
    for n, (before, after) in enumerate(zip(plain, continued, strict=True)):
        for one, other in zip(before, after, strict=True):
            if one[1] == "train":
                assert other == one + (option(n - 1) if began else [])
            else:
                assert other == one
        began |= any(one[1] == "train" for one in before)
    with pytest.raises(InputError, match="optimizer-from: is what the recipe says"):
        run(*words, "--train.optimizer-from", "x", "--dry-run")


def test_the_reward_that_judges_has_options_of_its_own(folder, capsys):
    words = ["--recipe", "iterated_dpo", "--reward", "rule:words", "--rounds", "1"]
    gold = ["--gold", "rule:number", "--gold.answer-field", "solution"]
    rounds = commands_of(capsys, *words, *gold)
    for line in (line for lines in rounds for line in lines if line[1] == "score"):
        judges = "rule:number" in line
        assert ("--answer-field" in line) == judges
        assert ("rule:words" in line) != judges or "log-ratio" in str(line)
    words += ["--score.batch-size", "4"]
    sizes = {
        line[line.index("--batch-size") + 1]
        for lines in commands_of(capsys, *words, *gold, "--gold.batch-size", "3")
        for line in lines
        if line[1] == "score" and "rule:number" in line
    }
    assert sizes == {"3"}
    for more, message in {
        "--gold.answer-field x": "--gold.answer-field: give the reward too",
        "--gold rule:words --gold.answer-field x": "only rule:exact and rule:number",
        "--gold rule:words --gold.reward x": "--gold.reward: cannot be changed",
        "--gold nonsense:x": "--reward nonsense:x: ",
        "--gold rule:words --gold.q x": "--q: jaxpref score has no such option",
    }.items():
        with pytest.raises(InputError, match=message):
            run(*words, *more.split(), "--dry-run")


MEASURED = """\
round:
train --model {policy} --data {prompts} --loss sft --out {round}/policy
measure:
evaluate --model {policy} --data {heldout} --out {round}/evaluation
"""


def test_a_recipe_measures_the_model_of_every_round(folder, capsys):
    Path("mine.recipe").write_text(MEASURED)
    words = ["--recipe", "mine.recipe", "--rounds", "2"]
    rounds = commands_of(capsys, *words)
    models = ["start", "out/round_1/policy/export", "out/round_2/policy/export"]
    for n, (model, lines) in enumerate(zip(models, rounds, strict=True)):
        (line,) = [line for line in lines if line[1] == "evaluate"]
        assert line[2:] == [
            *("--model", model, "--data", "out/round_0/heldout_prompts.jsonl"),
            *("--out", f"out/round_{n}/evaluation"),
        ]
        assert line == lines[-1]  # so that it can be added to a finished run
    with pytest.raises(InputError, match="--eval-prompts 0: the recipe .* held-out"):
        run(*words, "--eval-prompts", "0", "--dry-run")


def test_a_folder_with_data_is_part_of_what_a_command_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pairs", "dpo"):
        Path(name).mkdir()
        (Path(name) / "a.jsonl").write_text("{}")
    words = ["train", "--data", "pairs:0.5", "--loss", "dpo", "--out", "out"]
    made = Stages(tmp_path)
    made.done("train", words)
    Path("out").mkdir()
    (Path("dpo") / "b").write_text("not named by an option for data")
    assert Stages(tmp_path).is_done("train", words)
    inner = Path("pairs") / "more" / "b.jsonl"
    inner.parent.mkdir()
    inner.write_text("{}")
    with pytest.raises(InputError, match="pairs has changed"):
        Stages(tmp_path).is_done("train", words)
    inner.rename(Path("pairs") / "c.jsonl")  # the same contents by another name
    inner.parent.rmdir()
    with pytest.raises(InputError, match="pairs has changed"):
        Stages(tmp_path).is_done("train", words)
    (Path("pairs") / "c.jsonl").unlink()
    assert Stages(tmp_path).is_done("train", words)


def test_folders_of_adapters_and_checkpoints_have_digests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "data", "a:b", "run/checkpoints/3/meta"):
        Path(name).mkdir(parents=True)
    Path("adapter/adapter_config.json").write_text("{}")
    Path("adapter/adapter_model.safetensors").write_text("x")
    Path("data/config.json").write_text("{}")  # and yet no model
    Path("data/a.jsonl").write_text("x")
    Path("a:b/p.jsonl").write_text("x")
    files = {
        "--adapter adapter": "adapter/adapter_model.safetensors",
        "--prompts data": "data/a.jsonl",
        "--data data": "data/a.jsonl",
        "--data a:b/p.jsonl:0.5": "a:b/p.jsonl",
    }
    for words, changed in files.items():
        line = ["train", *words.split(), "--out", "out"]
        Stages(tmp_path).done("train", line)
        Path("out").mkdir(exist_ok=True)
        assert Stages(tmp_path).is_done("train", line)
        Path(changed).write_text(words)
        with pytest.raises(InputError, match="has changed"):
            Stages(tmp_path).is_done("train", line)
    Path("run/checkpoints/3/meta/metadata").write_text("{")
    for name in ("run", "run/checkpoints/3"):
        with pytest.raises(InputError, match="3: not a readable checkpoint"):
            Stages(tmp_path).done("train", ["train", "--model", name, "--out", "out"])


def test_a_measurement_is_added_to_a_finished_run(folder, ran):
    text = MEASURED.partition("measure:")[0]
    Path("mine.recipe").write_text(text)
    words = ["--recipe", "mine.recipe", "--rounds", "1"]
    run(*words)
    count = len(ran)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write_lines(folder / "heldout.jsonl", [pair])
    line = "score --data heldout.jsonl --reward rule:words --out {round}/more.jsonl"
    Path("mine.recipe").write_text(f"{text}measure:\n{line}\n")
    run(*words)
    assert [x[0] for x in ran[count:]] == ["score", "score"]


def test_the_start_has_options_of_its_own(folder, capsys):
    words = ["--recipe", "spa", "--rounds", "1", "--data", "seed.jsonl"]
    words += ["--train.max-steps", "7", "--train.loss.beta", "0.3"]
    rounds = commands_of(capsys, *words, "--start.train.epochs", "2")
    trained = [x for lines in rounds for x in lines if x[1] == "train"]
    assert [("--epochs" in x, "--max-steps" in x) for x in trained] == [
        *((True, False), (False, True))
    ]
    assert all(x[x.index("--loss.beta") + 1] == "0.3" for x in trained)
    with pytest.raises(InputError, match="start.sample.n: .* before the first round;"):
        run(*words, "--start.sample.n", "2", "--dry-run")


def test_prompts_are_divided_whatever_their_order(folder):
    make = lambda **more: split_prompts(
        RoundsConfig(recipe="spa", model="m", prompts="prompts.jsonl", out="o", **more)
    )
    parts, heldout = make(rounds=3)
    assert [len(part) for part in parts] == [6, 6, 6] and len(heldout) == 5
    every = [json.dumps(x) for part in [*parts, heldout] for x in part]
    assert len({*every}) == 23
    lines = Path("prompts.jsonl").read_text().splitlines(keepends=True)
    Path("prompts.jsonl").write_text("".join(lines[::-1]) + lines[0])
    assert make(rounds=3) == (parts, heldout)
    more, _ = make(rounds=2, prompts_per_round=6)
    assert more == parts[:2]
    with pytest.raises(InputError, match="prompts need 105"):
        make(rounds=2, prompts_per_round=50)
    assert make(rounds=1, eval_prompts=0)[1] == []
    same, held = make(rounds=2, same_prompts=True)
    assert same[0] == same[1] == [x for part in parts for x in part]
    assert held == heldout


def test_bad_scores_are_left_out_of_the_means(folder):
    out = folder / "out" / "round_0"
    out.mkdir(parents=True)
    answer = {"prompt": "q", "completions": [{"text": "a b", "ended": True}]}
    write_lines(out / "heldout_answers.jsonl", [answer] * 3)
    scored = [answer | {"scores": [x]} for x in (1.0, None, 3.0)]
    write_lines(out / "heldout_scored.jsonl", scored)
    config = RoundsConfig(recipe="spa", model="m", prompts="p", out="out")
    (one,) = summary.summarize(config, 0)["rounds"]
    assert one["reward"] == 2 and np.isfinite(one["reward_low"])


ROUND = "round:\ntrain --model {policy} --out {round}/policy\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no commands after 'round:'"),
        ("train --out x\n" + ROUND, "line 1: begin with 'start:' or 'round:'"),
        (ROUND + "rm --out {round}/x", "line 3: rm: is no command of a recipe"),
        (ROUND + "sample --model {pollicy} --out {round}/x", "did you mean policy"),
        (ROUND + "sample --out x.jsonl", "--out must be in the round's folder"),
        (ROUND + "sample --model {policy}", "has no --out"),
        (ROUND + "sample --model 'x --out {round}/y", "line 3: No closing quotation"),
        ("round:\nsample --out {round}/x", "no command of a round is `train"),
        (ROUND + "measure:\nscore --data {pairs} --out {round}/x", "line 4: {pairs}: "),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(text, message):
    with pytest.raises(InputError, match=message):
        recipe.parse_recipe(text, "mine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--recipe iterated", "no such recipe or file; did you mean iterated_dpo"),
        ("--recipe iterated_dpo", "needs --reward"),
        ("--recipe spa", "needs --data"),
        ("--recipe delta", "needs --weak-model"),
        ("--recipe spa --data x --reward rule:words", "pass --gold"),
        ("--recipe upo --reward rule:words --data x", "--data: the recipe upo does"),
        ("--recipe upo --reward rule:words --weak-model x", "leave it out"),
        ("--recipe spa --data x --mix-offline 1", "must be at least 0 and below 1"),
        ("--recipe upo --reward rule:words --mix-offline 0.5", "needs --data"),
        (
            "--recipe spa --data x --merge.method slerp",
            "the recipe has no such command",
        ),
        ("--recipe spa --data x --start.merge.x 1", "it has train"),
        ("--recipe upo --reward rule:words --start.train.x 1", "it has none"),
        ("--recipe upo --reward rule:words --carry-optimizer --rounds 1", "pass more"),
        (
            "--recipe upo --reward rule:words --carry-optimizer --train.lora.rank 4",
            "^round 2: --carry-optimizer, from .*round_1/policy: new adapters have no",
        ),
        ("--recipe spa --data x --score.passes 8", "estimates uncertainty"),
        ("--recipe spa --data x --sample.q 8", "round 1: --q: jaxpref sample has no"),
        ("--recipe spa --data x --train.loss.q 8", "round 0: --loss.q: jaxpref train"),
    ],
)
def test_wrong_options_are_found_before_anything_runs(folder, ran, words, message):
    with pytest.raises(InputError, match=message):
        run(*words.split())
    assert not ran and not Path("out").exists()

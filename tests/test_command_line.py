"""The command line itself: help, completion, names, and the time they take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxpref import cli
from jaxpref.cli import train as train_command
from jaxpref.cli.completion import completion_script
from jaxpref.cli.main import COMMANDS
from jaxpref.cli.objectives import LOSSES, MIXTURES, WRAPPERS, losses_by_kind
from jaxpref.cli.options import options_of
from jaxpref.cli.words import split
from jaxpref.data.options import DataOptions, InjectOptions, resolved_max_length
from jaxpref.data.read import injection_warning
from jaxpref.errors import InputError
from jaxpref.objectives import from_loss
from jaxpref.plan.sweep import with_flags
from jaxpref.train.config import to_json
from jaxpref.train.options import RunOptions, StepOptions, steps_of

ROOT = Path(__file__).resolve().parents[1]
GIVEN = ["--model", "m", "--data", "d.jsonl", "--out", "o"]


@pytest.fixture
def shown(capsys):
    """What a command line prints before it ends with code 0."""

    def show(*argv: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 0
        return capsys.readouterr().out

    return show


def test_the_overview_loads_no_library():
    """It comes at once: in a process of its own, what help imports."""
    script = (
        "import sys; from jaxpref.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'jax', 'tyro', 'numpy', 'torch'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stderr.strip() == ""
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_help_of_train_fits_two_screens_and_names_every_loss(shown):
    text = shown("train", "--help")
    lines = text.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 90
    words = set(text.split())
    assert {*LOSSES, *WRAPPERS, *MIXTURES} <= words
    assert {"--model", "--max-steps", "--learning-rate", "--help-all)"} <= {
        word.rstrip(":") for word in words
    }


def test_help_all_has_every_option(shown):
    words = set(shown("train", "--help-all").split())
    missing = {f"--{name}" for name in train_command.options()} - words
    assert not missing


def test_help_of_a_loss_and_an_objective(shown):
    text = shown("train", "--loss", "rdpo", "--objective", "em", "--help")
    assert "loss = [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e)" in text
    assert "arXiv:2403.00409" in text
    assert "--loss.flip-rate FLOAT" in text and "(required)" in text
    assert "--objective.memory FLOAT" in text and "(default: 20000.0)" in text
    assert "--max-steps" not in text


def test_help_of_sampled_answers_has_what_is_read(shown):
    text = shown("train", "--objective", "hypo", "--help")
    assert "--group-size" in text and "--max-length" in text
    others = "resample-uniform prompt-candidates prompts reward overlong-buffer"
    assert not {f"--{name}" for name in others.split()} & set(text.split())
    text = shown("train", "--objective", "grpo", "--help-all")
    assert "--objective grpo --model MODEL --prompts PROMPTS --out OUT" in text
    assert "--prompts" in text.split() and "--data" not in text.split()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command, shown):
    assert f"usage: jaxpref {command} " in shown(command, "--help-all")
    module = __import__(f"jaxpref.cli.{command}", fromlist=["options"])
    assert not [o.name for o in module.options().values() if not o.help]


def test_every_loss_has_one_kind():
    listed = [name for names in losses_by_kind().values() for name in names]
    assert sorted(listed) == sorted(LOSSES)


@pytest.mark.parametrize("name", ["rdpo", "beta_dpo", "alpha_po"])
def test_options_of_a_loss_have_their_defaults(name):
    choice = train_command.Choice(name)
    options = options_of({"loss": choice.parts["loss"]})
    expected = {
        "rdpo": {"loss.beta": 0.1},
        "beta_dpo": {
            "loss.beta": 0.1,
            "loss.alpha": 0.6,
            "loss.drop-rate": 0.2,
            "loss.momentum": 0.9,
        },
        "alpha_po": {},
    }[name]
    for option, value in expected.items():
        assert options[option].default == value


def objective_of(*words):
    return train_command.config_of(split([*GIVEN, *words])).objective


def test_options_of_loss_and_objective_reach_them():
    plain = objective_of("--loss", "rdpo", "--loss.flip-rate", "0.2")
    assert plain.options == {"beta": 0.1, "flip_rate": 0.2}
    words = ["--loss.beta", "0.3", "--objective", "em", "--objective.memory", "1e4"]
    wrapped = objective_of(*words)
    assert wrapped.name == "em_dpo"
    assert wrapped.options["loss"] == {"name": "dpo", "beta": 0.3}
    assert wrapped.options["memory"] == 1e4
    words = ["--objective", "bvpo", "--objective.alpha", "0.25"]
    words += ["--objective.noise", "em"]
    words += ["--objective.noise.memory", "500"]
    mixed = objective_of(*words)
    assert mixed.name == "bvpo_em_dpo"
    assert mixed.options["alpha"] == 0.25
    assert mixed.options["objective"]["memory"] == 500


def test_an_option_of_the_objective_may_be_called_as_one_of_the_loss(monkeypatch):
    found = {}

    def tempered(loss, *, beta: float = 1.0):
        """An objective with a beta of its own.

        Args:
          loss: a loss of single pairs.
          beta: its temperature.
        """
        found.update(loss=loss.keywords, beta=beta)
        return from_loss(loss)

    monkeypatch.setitem(WRAPPERS, "tempered", tempered)
    words = ["--loss.beta", "0.3", "--objective", "tempered", "--objective.beta", "2"]
    objective_of(*words)
    assert found == {"loss": {"beta": 0.3}, "beta": 2.0}


COMPLETIONS = {
    "tr": ["train"],
    "train --loss rd": ["rdpo"],
    "train --loss rdpo --loss.": ["--loss.beta", "--loss.flip-rate"],
    "train --loss ipo --loss.": ["--loss.beta"],
    "train --objective re": ["re_po"],
    "train --objective em --objective.m": ["--objective.memory"],
    "train --objective bvpo --empty": ["--empty-data", "--empty-share"],
    "train --objective bvpo --objective.noise em --objective.noise.m": [
        "--objective.noise.memory"
    ],
    "train --decay l": ["linear"],
    "plan --remat f": ["full"],
    "audit --act": ["--action", "--action-top"],
    "sample --mo": ["--model"],
    "merge --method s": ["slerp"],
    "merge --layer": ["--layer-weights"],
    "data insp": ["inspect"],
    "data convert --see": ["--seed"],
}


def test_completion_in_bash():
    script = completion_script("bash", COMMANDS)
    for words in COMPLETIONS:
        script += (
            f"COMP_WORDS=(jaxpref {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1))\n"
            "COMPREPLY=(); _jaxpref; echo ${COMPREPLY[*]}\n"
        )
    done = subprocess.run(
        ["bash", "-eu"], input=script, capture_output=True, text=True, check=True
    )
    found = [line.split() for line in done.stdout.splitlines()]
    assert found == [*COMPLETIONS.values()]


def test_completion_for_an_unknown_shell(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--completion", "tcsh"])
    assert "--completion tcsh: expected one of bash, zsh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flip-rate", "0.1"], "--flip-rate: jaxpref train --loss dpo has no such"),
        (["--loss.gamma", "1"], "--loss dpo has no such option"),
        (["--objective", "em", "--objective.beta", "1"], "mean --loss.beta?"),
        (["--loss", "rdpo", "dpo"], "--loss: expected the name of one loss"),
    ],
)
def test_unread_options(words, message):
    with pytest.raises(InputError) as error:
        train_command.config_of(split([*GIVEN, *words]))
    assert message in str(error.value)


# ---- --config and --print-config ----------------------------------------------------


def config_of(*words):
    return to_json(train_command.config_of(split(words)))


LONG = [
    *("--loss", "rdpo", "--loss.flip-rate", "0.2", "--objective", "bvpo"),
    *("--objective.alpha", "auto", "--objective.noise", "em"),
    *("--objective.noise.memory", "1e4", "--learning-rate", "3e-7", "--drop-empty"),
    *("--inject.rates", "7.json", "--mesh.fsdp", "2", "--decay", "linear"),
    *("--epochs", "1.5", "--row-length", "auto", "--empty-share", "0.25"),
]


@pytest.mark.parametrize("words", [[], ["--objective", "re_po"], LONG])
def test_a_printed_config_is_read_back_as_the_same(words, tmp_path, capsys):
    train_command.command([*GIVEN, *words, "--print-config"])
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    expected = config_of(*GIVEN, *words)
    if expected["epochs"] is None:
        expected["max_steps"] = 1000
    assert config_of("--config", str(path)) == expected


def test_the_form_of_a_printed_config(capsys):
    words = ["--objective", "em", "--objective.memory", "1e4", "--max-length", "64"]
    train_command.command([*GIVEN, *words, "--print-config"])
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["loss"] == {"name": "dpo", "beta": 0.1}
    assert content["objective"] == {
        "name": "em",
        "prior-right": 9.0,
        "prior-wrong": 1.0,
        "memory": 10000.0,
    }
    assert content["mesh"] == {"data": None, "fsdp": -1, "expert": 1, "tensor": 1}
    assert content["inject"]["flip-rate"] is None
    assert (content["max-steps"], content["max-length"]) == (1000, 64)


def file_of(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_what_is_typed_overrides_the_file(tmp_path):
    path = file_of(
        tmp_path,
        "model: m\ndata: d.jsonl\nout: o\nmax_steps: 7\ndrop-empty: true\n"
        "loss: {name: rdpo, flip-rate: 0.2}\nmesh.fsdp: 4\nlearning-rate: 1e-5\n",
    )
    plain = config_of("--config", path)
    assert plain["loss"] == {"name": "rdpo", "beta": 0.1, "flip_rate": 0.2}
    assert plain["max_steps"] == 7 and plain["mesh"]["fsdp"] == 4
    assert (
        plain["options"]["drop_empty"] and plain["optimizer"]["learning_rate"] == 1e-5
    )
    typed = ["--config", path, "--out", "other", "--no-drop-empty", "--epochs", "2"]
    changed = config_of(*typed, "--loss.beta", "0.3")
    assert changed["out"] == "other" and not changed["options"]["drop_empty"]
    assert (changed["max_steps"], changed["epochs"]) == (None, 2.0)
    assert changed["loss"] == {"name": "rdpo", "beta": 0.3, "flip_rate": 0.2}
    # The options of a loss are none of another's.
    assert config_of(*typed, "--loss", "ipo")["loss"] == {"name": "ipo", "beta": 0.1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {flip-rat: 0.2, name: rdpo}", "--loss.flip-rat: "),
        ("loss: {flip-rat: 0.2, name: rdpo}", "did you mean --loss.flip-rate?"),
        ("batchsize: 3", "run.yaml --loss dpo has no such option; did you mean"),
        ("batch-size: many", "--batch-size many: expected INT"),
        ("batch-size: 3\nbatch_size: 4", "batch-size is given twice"),
        ("- 1", "expected lines of"),
        ("a: [", "not YAML"),
        ("seed: on", "--seed: expected a value after it: INT"),
    ],
)
def test_a_wrong_file(text, message, tmp_path):
    with pytest.raises(InputError) as error:
        config_of(*GIVEN, "--config", file_of(tmp_path, text))
    assert message in str(error.value)


def test_no_file():
    with pytest.raises(InputError, match="--config none.yaml: cannot be read"):
        config_of(*GIVEN, "--config", "none.yaml")


# ---- options that are resolved later ------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pairs", "steps"),
    [
        ({}, 5, 1000),
        ({"max_steps": 7}, 5, 7),
        ({"epochs": 1, "batch_size": 8}, 64, 8),
        ({"epochs": 1, "batch_size": 8}, 65, 9),
        ({"epochs": 0.3, "batch_size": 10}, 100, 3),
        ({"epochs": 2.5, "batch_size": 10}, 99, 25),
        ({"epochs": 0.01, "batch_size": 32}, 5, 1),
    ],
)
def test_steps(options, pairs, steps):
    assert steps_of(StepOptions(**options), pairs) == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2, "max_steps": 3}, "--epochs 2 and --max-steps 3"),
        ({"epochs": 0}, "epochs 0"),
        ({"row_length": 0}, "row_length 0"),
        ({"row_length": "yes"}, "row_length yes"),
        ({"max_loss_rise": 0.0}, "max_loss_rise 0.0"),
        ({"export": "best"}, "--export best"),
        ({"log_every": 0}, "log_every 0"),
        ({"unroll": 0}, "unroll 0"),
    ],
)
def test_each_part_checks_its_own(options, message):
    with pytest.raises(InputError, match=message):
        RunOptions(model="m", data="d", out="o", **options)


@pytest.mark.parametrize(
    ("given", "positions", "expected"),
    [(None, 512, 512), (None, 4096, 1024), (300, 512, 300), (512, 512, 512)],
)
def test_max_length_follows_the_model(given, positions, expected):
    assert resolved_max_length(DataOptions(max_length=given), positions) == expected


def test_max_length_beyond_the_positions():
    with pytest.raises(InputError, match="max_length 513: the model has 512 positions"):
        resolved_max_length(DataOptions(max_length=513), 512)


def test_injected_noise_is_announced():
    noise = InjectOptions(flip_rate=0.1, prefer_longer=0.5, seed=3).describe()
    assert injection_warning(1200, 4000, noise) == (
        "warning: 1,200 of 4,000 training labels (30.0%) were flipped on purpose "
        "(--inject: flip rate 0.1, 0.5 of the labels by length alone)"
    )


def test_a_sweep_replaces_options_and_repeats_none():
    argv = "--batch 8 --mesh.data=2 --remat none --sweep --accumulation 2 --seq 16"
    flags = ["--mesh.data", "1", "--remat", "full", "--accumulation", "4"]
    expected = ["--batch", "8", "--sweep", "--seq", "16", *flags]
    assert with_flags(argv.split(), flags) == expected

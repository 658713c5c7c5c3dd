"""The command line itself: help, completion, names, and the time they take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpref import cli
from jaxpref.cli import train as train_command
from jaxpref.cli.completion import completion_script
from jaxpref.cli.main import COMMANDS
from jaxpref.cli.objectives import LOSSES, MIXTURES, WRAPPERS, losses_by_kind
from jaxpref.cli.options import options_of
from jaxpref.errors import InputError

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


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command, shown):
    assert f"usage: jaxpref {command} --" in shown(command, "--help-all")
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
    return train_command.config_of([*GIVEN, *words]).objective


def test_options_of_loss_and_objective_reach_them():
    plain = objective_of("--loss", "rdpo", "--loss.flip-rate", "0.2")
    assert plain.options == {"beta": 0.1, "flip_rate": 0.2}
    words = ["--loss.beta", "0.3", "--objective", "em", "--objective.memory", "1e4"]
    wrapped = objective_of(*words)
    assert wrapped.name == "em_dpo"
    assert wrapped.options["beta"] == 0.3 and wrapped.options["memory"] == 1e4
    words = ["--objective", "bvpo", "--objective.alpha", "0.25"]
    words += ["--objective.noise", "learned_rate"]
    words += ["--objective.noise.memory", "500"]
    mixed = objective_of(*words)
    assert mixed.name == "bvpo_learned_rate_dpo"
    assert mixed.options["bvpo"] == {"alpha": 0.25}
    assert mixed.options["memory"] == 500


COMPLETIONS = {
    "tr": ["train"],
    "train --loss rd": ["rdpo"],
    "train --loss rdpo --loss.": ["--loss.beta", "--loss.flip-rate"],
    "train --loss ipo --loss.": ["--loss.beta"],
    "train --objective re": ["re_po"],
    "train --objective learned_rate --objective.m": ["--objective.memory"],
    "train --objective bvpo --empty": ["--empty-data", "--empty-share"],
    "train --objective bvpo --objective.noise em --objective.noise.m": [
        "--objective.noise.memory"
    ],
    "train --decay l": ["linear"],
    "plan --remat f": ["full"],
    "audit --act": ["--action"],
    "sample --mo": ["--model"],
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
        train_command.config_of([*GIVEN, *words])
    assert message in str(error.value)

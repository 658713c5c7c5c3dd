"""`--over`: the grid of a sweep, and the config of every run, before any starts."""

import shlex

import pytest

from jaxpref.cli import train as train_command
from jaxpref.cli.grid import axes_of, runs_of
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.train.config import to_json

GIVEN = "--model m --data d.jsonl --out o"


def runs(over: str, more: str = ""):
    return runs_of(axes_of(over.split()), split(f"{GIVEN} {more}".split()))


def test_every_combination_in_order():
    found = runs("loss.beta=0.1,1e-2 seed=0,1,2", "--max-steps 7")
    assert [run.name for run in found] == [
        f"loss.beta={beta},seed={seed}" for beta in ("0.1", "1e-2") for seed in range(3)
    ]
    for run in found:
        config = run.config
        assert config.objective.options["beta"] == float(run.values["loss.beta"])
        assert config.seed == int(run.values["seed"])
        assert (config.max_steps, config.out) == (7, f"o/{run.name}")


def test_the_command_of_a_run_makes_its_config():
    for run in runs("loss=dpo,rdpo loss.flip-rate=0.1,0.2", "--learning-rate 1e-4"):
        program, command, *words = shlex.split(run.command)
        assert (program, command) == ("jaxpref", "train")
        config = train_command.config_of(split(words))
        assert to_json(config) == to_json(run.config)


def test_options_of_a_loss_go_to_the_runs_that_have_it():
    """dpo has no flip rate: one run, not one for each rate."""
    found = runs("loss=dpo,rdpo loss.flip-rate=0.1,0.2", "--loss.beta 0.3")
    assert [run.name for run in found] == [
        "loss=dpo",
        "loss=rdpo,loss.flip-rate=0.1",
        "loss=rdpo,loss.flip-rate=0.2",
    ]
    options = [dict(run.config.objective.options) for run in found]
    assert [x["beta"] for x in options] == [0.3] * 3
    assert [x.get("flip_rate") for x in options] == [None, 0.1, 0.2]


def test_runs_with_and_without_an_objective():
    more = "--objective.memory 1e4 --loss.beta 0.2"
    found = runs("objective=none,em", more)
    assert [run.config.objective.name for run in found] == ["dpo", "em_dpo"]
    assert [run.name for run in found] == ["objective=none", "objective=em"]


def test_flags_and_paths():
    (run, other) = runs("drop-empty=true,false")
    assert run.config.options.drop_empty and not other.config.options.drop_empty
    found = runs("reference=models/a,models/b")
    assert [run.name for run in found] == ["reference=a", "reference=b"]
    assert found[0].config.reference == "models/a"


def test_a_config_file_is_overridden(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("seed: 5\nbatch-size: 16\nloss: {name: rdpo, flip-rate: 0.2}\n")
    found = runs("loss=dpo,rdpo seed=1,2", f"--config {path}")
    assert [run.name for run in found] == [
        f"loss={loss},seed={seed}" for loss in ("dpo", "rdpo") for seed in (1, 2)
    ]
    assert [run.config.seed for run in found] == [1, 2, 1, 2]
    assert {run.config.batch_size for run in found} == {16}
    assert found[3].config.objective.options["flip_rate"] == 0.2


@pytest.mark.parametrize(
    ("over", "more", "message"),
    [
        ("loss.beta", "", "--over loss.beta: expected an option and its values"),
        ("seed=1,,2", "", "--over seed=1,,2: expected"),
        ("=1", "", "--over =1: expected"),
        ("seed=1 seed=2", "", "--over seed=2: seed is given twice"),
        ("seed=1,2,1", "", "1 and 1 would both be named 1"),
        ("model=a/m,b/m", "", "a/m and b/m would both be named m"),
        ("out=a,b", "", "--over out=a,b: --out cannot be swept"),
        ("seed=1,2", "--seed 3", "--seed: also given as --over seed"),
        ("drop-empty=true", "--no-drop-empty", "--no-drop-empty: also given"),
        (
            "sede=1,2",
            "",
            r"--sede: jaxpref train --loss dpo has no .*--seed\?",
        ),
        # Of values that come later, before the first run starts.
        ("seed=0,x", "", "^seed=x: --seed x: expected INT"),
        ("loss.beta=0.1,-1", "", "^loss.beta=-1: loss dpo: Expected beta > 0"),
        ("loss=dpo,rdop", "", "^loss=rdop: --loss rdop: no such loss.*rdpo"),
        ("loss=dpo,rdpo", "", "^loss=rdpo: jaxpref train --loss rdpo: needs --loss.f"),
        ("loss=dpo,ipo", "--loss.flip-rate 0.1", "--loss.flip-rate: no loss or object"),
        ("loss=sft,dpo objective=none,em", "", "sft has its own objective"),
        ("seed=" + "1" * 250, "", "the name of a run would have 255 characters"),
    ],
)
def test_what_is_refused(over, more, message):
    with pytest.raises(InputError, match=message):
        runs(over, more)

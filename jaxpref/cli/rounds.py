"""`jaxpref rounds`."""

import shlex
import textwrap
import time
from collections.abc import Sequence

import jax

from jaxpref.cli import compare, data, evaluate, help, sample, score, train
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import Given, canonical, split
from jaxpref.errors import InputError, show
from jaxpref.online.rounds import run as rounds
from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.recipe import read_recipe, shipped
from jaxpref.report.progress import aligned
from jaxpref.report.rounds import round_rows, write_rounds
from jaxpref.rewards.choice import reward_of
from jaxpref.rewards.models import ModelOptions
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.uncertain_command import UncertaintyOptions

COMMAND = "jaxpref rounds"
PARTS = {"config": Part(RoundsConfig), "rewards": Part(RewardOptions)}
RUN = {
    "sample": sample.command,
    "score": score.command,
    "data": data.command,
    "train": lambda argv: train.command(argv, began=time.time()),
    "evaluate": evaluate.command,
    "compare": compare.command,
}
"""The commands of recipes."""
PARTS_OF = {
    "sample": sample.PARTS,
    "score": score.PARTS,
    "evaluate": evaluate.PARTS,
    "compare": compare.PARTS,
}
"""Their options, if they are the same for every loss and objective."""
FIXED = ("model", "data", "out", "against", "empty-data", "prompts")
"""Options with which commands of a recipe depend on each other."""
UNCERTAIN = options_of({"uncertain": Part(UncertaintyOptions)})
"""Options of `score` for the uncertainty of rewards."""
INSTEAD_OF = {"max-steps": "epochs"}
"""Options of which a command takes only one."""
REPEATABLE = ("reward", "data", "guide", "logger")
ABOUT = """\
Train a model on its own answers: sample, score, pair, train, and again.  A recipe is a
list of jaxpref commands; --dry-run prints them.  Each round continues from the model of
the last one and has a folder, OUT/round_1, OUT/round_2, ...  The same command resumes,
between commands and within them.

Options of the commands in a recipe are --COMMAND.OPTION, for all rounds:

  --sample.n 8 --sample.max-new-tokens 256 --train.lora.rank 8 --pairs.min-gap 0.5

Recipes:
"""


def command(argv: Sequence[str]) -> None:
    """Runs the rounds of a recipe."""
    given = split(argv, repeatable=("reward",))
    changes = {name: words for name, words in given.items() if "." in name}
    own = {name: words for name, words in given.items() if name not in changes}
    parsed = parse(PARTS, own, command=COMMAND)
    config: RoundsConfig = parsed.config
    reward = _spelled({x: own[x] for x in options_of(REWARDS) if x in own})

    def override(words: Sequence[str], only: Sequence[str] | None = None) -> list[str]:
        return _overridden(words, changes, only)

    commands = rounds.plan(config, reward, override)
    _check_used(changes, commands)
    for n, lines in enumerate(commands):
        for words in lines:
            _check(words, n)
    if config.dry_run:
        for n, lines in enumerate(commands):
            show("\n".join([f"# round {n}", *map(rounds.shown, lines)]))
        return
    summary = rounds.run(config, commands, lambda words: RUN[words[0]](words[1:]))
    if jax.process_index() == 0:
        line = shlex.join(["jaxpref", "rounds", *argv])
        write_rounds(config.out, summary, command=line)
        columns, rows = round_rows(summary)
        show("\n".join([*aligned([columns, *rows]), f"{config.out}/report.html"]))


REWARDS = {"rewards": PARTS["rewards"]}


def _overridden(
    words: Sequence[str], changes: Given, only: Sequence[str] | None
) -> list[str]:
    """The words of a command with the options of the user, or only some of these.

    Options of the uncertainty change the commands that estimate it.
    """
    start = _start(words)
    given = split(words[start:], repeatable=REPEATABLE)
    estimates = {"uncertainty"} & {*given, *_own(changes, words)}
    for name, values in _own(changes, words).items():
        if only is not None and not name.startswith(tuple(only)):
            continue
        if words[0] == "score" and name in UNCERTAIN and not estimates:
            continue
        given.pop(INSTEAD_OF.get(name, ""), None)
        given[name] = values
    return [*words[:start], *_spelled(given)]


def _own(changes: Given, words: Sequence[str]) -> Given:
    """The options of the user for a command."""
    prefix = words[_start(words) - 1] + "."
    return {
        canonical(name.removeprefix(prefix)): values
        for name, values in changes.items()
        if name.startswith(prefix)
    }


def _spelled(given: Given) -> list[str]:
    """Options and their values as words."""
    return [word for name, values in given.items() for word in _of_option(name, values)]


def _of_option(name: str, values: Sequence[str]) -> list[str]:
    if name in REPEATABLE and name != "data":
        return [word for value in values for word in (f"--{name}", value)]
    return [f"--{name}", *values]


def _check_used(changes: Given, commands: Sequence[Sequence[list[str]]]) -> None:
    """Refuses options of commands that the recipe does not have."""
    every = [words for lines in commands for words in lines]
    names = {words[_start(words) - 1] for words in every}
    for option in changes:
        command, _, name = option.partition(".")
        if canonical(name) in FIXED or (command, name) == ("score", "reward"):
            raise InputError(
                f"--{option}: is what the recipe says; write a recipe of your own to "
                "change it"
            )
        estimates = any("--uncertainty" in words for words in every)
        if command == "score" and canonical(name) in UNCERTAIN and not estimates:
            raise InputError(
                f"--{option}: no command of the recipe estimates uncertainty; pass "
                "--score.uncertainty too, or leave it out"
            )
        if command not in names:
            raise InputError(
                f"--{option}: the recipe has no such command; it has "
                f"{', '.join(sorted(names))}"
            )


def _check(words: Sequence[str], n: int) -> None:
    """Raises InputError if a command has a wrong option, before the first one runs."""
    start = _start(words)
    given = split(words[start:], repeatable=REPEATABLE)
    try:
        if words[0] == "train":
            train.config_of(given)
            return
        if start == 2 and words[1] not in data.PARTS:
            raise InputError(f"data {words[1]}: choose from {', '.join(data.PARTS)}")
        parts = data.PARTS[words[1]] if start == 2 else PARTS_OF[words[0]]
        found = parse(parts, given, command=shlex.join(["jaxpref", *words[:start]]))
        if words[0] == "score":
            _check_rewards(found.rewards, found.uncertain)
    except InputError as error:
        raise InputError(f"round {n}: {error}") from error


def _check_rewards(rewards: RewardOptions, uncertain: UncertaintyOptions) -> None:
    """Checks what can be checked of rewards without reading a model."""
    rewards.check()
    uncertain.check(rewards)
    for word in rewards.reward:
        if word.startswith("rule:"):
            reward_of(word, ModelOptions(), rewards)


def _start(words: Sequence[str]) -> int:
    """The number of words before the options."""
    return 2 if words[0] == "data" else 1


def options() -> dict[str, Option]:
    """All options of the command, besides those of the commands in recipes."""
    return options_of(PARTS)


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    known = [
        textwrap.indent(
            textwrap.fill(f"{name}: {read_recipe(name).about}", help.WIDTH - 2), "  "
        )
        for name in shipped()
    ]
    usage, listed = help.command(COMMAND, options()).split("\n\n", 1)
    recipes = "\n\n".join(known)
    return f"{usage}\n\n{ABOUT}\n{recipes}\n\n{listed}"

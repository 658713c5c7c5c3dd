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
from jaxpref.rewards.choice import reads_no_model, reward_of
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
FIXED = (
    *("model", "data", "out", "against", "empty-data", "prompts", "optimizer-from"),
)
"""Options with which commands of a recipe depend on each other."""
UNCERTAIN = options_of({"uncertain": Part(UncertaintyOptions)})
"""Options of `score` for the uncertainty of rewards."""
INSTEAD_OF = {"max-steps": "epochs", "epochs": "max-steps"}
"""Options of which a command takes only one."""
REPEATABLE = ("reward", "data", "guide", "logger")
ABOUT = """\
Train a model on its own answers: sample, score, pair, train, and again.  A recipe is a
list of jaxpref commands; --dry-run prints them.  Each round continues from the model of
the last one and has a folder, OUT/round_1, OUT/round_2, ...  The same command resumes,
between commands and within them.

Options of the commands in a recipe are --COMMAND.OPTION, for all rounds:

  --sample.n 8 --sample.max-new-tokens 256 --train.lora.rank 8 --pairs.min-gap 0.5

Those of commands before the first round alone are --start.COMMAND.OPTION.

Recipes:
"""


def command(argv: Sequence[str]) -> None:
    """Runs the rounds of a recipe."""
    given = split(argv, repeatable=("reward",))
    of_gold = {name: words for name, words in given.items() if name.startswith(GOLD)}
    of_start = {x: words for x, words in given.items() if x.startswith(START)}
    others = of_gold | of_start
    changes = {x: words for x, words in given.items() if "." in x and x not in others}
    own = {x: words for x, words in given.items() if x not in changes | others}
    parsed = parse(PARTS, own, command=COMMAND)
    config: RoundsConfig = parsed.config
    reward = _spelled({x: own[x] for x in options_of(REWARDS) if x in own})

    first = {x.removeprefix(START): words for x, words in of_start.items()}

    def override(
        words: Sequence[str], only: Sequence[str] | None = None, start: bool = False
    ) -> list[str]:
        changed = _overridden(words, changes, only)
        return _overridden(changed, first, only) if start else changed

    gold = _gold(config.gold, of_gold)
    commands = rounds.plan(config, reward, gold, override)
    _check_used(changes, commands)
    _check_used(first, [read_recipe(config.recipe).start], prefix=START)
    if gold and not any(config.gold in words for lines in commands for words in lines):
        raise InputError(
            f"--gold {config.gold}: with --eval-prompts 0, no command of the recipe "
            f"{config.recipe} reads it; leave it out"
        )
    for n, lines in enumerate(commands):
        for words in lines:
            _check(words, n, config)
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
GOLD = "gold."
"""Prefix of the options of the reward that judges."""
START = "start."
"""Prefix of the options of commands before the first round."""


def _gold(word: str | None, given: Given) -> list[str]:
    """The options of the reward that judges, as words."""
    if word is None and given:
        raise InputError(f"--{next(iter(given))}: give the reward too, with --gold")
    if word is None:
        return []
    changes = {canonical(x.removeprefix(GOLD)): values for x, values in given.items()}
    if fixed := {*FIXED, "reward"} & changes.keys():
        raise InputError(f"--{GOLD}{min(fixed)}: cannot be changed; leave it out")
    return ["--reward", word, *_spelled(changes)]


def _overridden(
    words: Sequence[str], changes: Given, only: Sequence[str] | None
) -> list[str]:
    """The words of a command with the options of the user, or only some of these.

    Options of the uncertainty change the commands that estimate it.
    """
    start = _start(words)
    given = split(words[start:], repeatable=REPEATABLE)
    own = _own(changes, words)
    estimates = {"uncertainty"} & {*given, *own}
    for name, values in own.items():
        if only is not None and not name.startswith(tuple(only)):
            continue
        if words[0] == "score" and name in UNCERTAIN and not estimates:
            continue
        if (instead_of := INSTEAD_OF.get(name)) not in own and instead_of:
            given.pop(instead_of, None)
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


def _check_used(
    changes: Given, commands: Sequence[Sequence[Sequence[str]]], prefix: str = ""
) -> None:
    """Refuses options of commands that the recipe does not have."""
    every = [words for lines in commands for words in lines]
    names = {words[_start(words) - 1] for words in every}
    for change in changes:
        option, (command, _, name) = prefix + change, change.partition(".")
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
            known = ", ".join(sorted(names)) or "none"
            where = " before the first round" if prefix else ""
            raise InputError(
                f"--{option}: the recipe has no such command{where}; it has {known}"
            )


def _check(words: Sequence[str], n: int, config: RoundsConfig) -> None:
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
        message = rounds.in_own_options(str(error), config)
        raise InputError(f"round {n}: {message}") from error


def _check_rewards(rewards: RewardOptions, uncertain: UncertaintyOptions) -> None:
    """Checks what can be checked of rewards without reading a model."""
    rewards.check()
    uncertain.check(rewards)
    for word in rewards.reward:
        if reads_no_model(word):
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

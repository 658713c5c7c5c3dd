"""`jaxpref rounds`: sample, score, pair, train, and again."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import write_json
from jaxpref.online.rounds.config import RoundsConfig
from jaxpref.online.rounds.evaluation import HELDOUT, evaluation_commands
from jaxpref.online.rounds.prompts import (
    check_records,
    split_prompts,
    write_records,
)
from jaxpref.online.rounds.recipe import Recipe, filled, read_recipe, trains
from jaxpref.online.rounds.stages import Stages
from jaxpref.online.rounds.summary import summarize
from jaxpref.runtime import processes
from jaxpref.runtime.processes import log

SEEDS = 1000
"""How far apart the seeds of sampling are of two values of --seed."""
OPTIMIZER = "--optimizer-from"
"""The option of `jaxpref train` that --carry-optimizer adds."""
Words = list[str]
Run = Callable[[Words], None]
"""Runs a command, given as the words after `jaxpref`."""
Override = Callable[..., Words]
"""`override(words, only=None, start=False)` changes the options of a command to those
of the user, or only some of them; `start` for a command before the first round."""


def plan(
    config: RoundsConfig,
    reward: Sequence[str],
    gold: Sequence[str],
    override: Override,
) -> list[list[Words]]:
    """The commands of each round; those before the first one are round 0.

    Args:
      config: the options.
      reward: the options of rewards, as words.
      gold: those of the reward that judges; empty for `reward`.
      override: changes options of the commands.

    Raises:
      InputError: if the recipe needs an option that is not given.
    """
    recipe = read_recipe(config.recipe)
    _check_needs(recipe, config, reward)
    for name, path in {"--model": config.model, "--out": config.out}.items():
        if ":" in path:
            raise InputError(f"{name} {path}: rounds need a path without a colon")
    rounds = []
    for n in range(config.rounds + 1):
        places = _places(recipe, config, reward, n)
        lines = recipe.rounds if n else recipe.start
        continued = _optimizer_option(recipe, config, n)
        commands = [
            override(
                [*filled(line, places), *(continued if trains(line) else [])],
                start=n == 0,
            )
            for line in lines
        ]
        judge = gold or reward
        commands += evaluation_commands(config, n, judge, commands, override, recipe)
        # The model that is measured is that with which the next round begins.
        after = places | {"policy": [_policy(recipe, config, n + 1)]}
        # Last, so that a measurement can be added to a finished run.
        commands += [override(filled(line, after)) for line in recipe.measures]
        rounds.append(commands)
    return rounds


def run(
    config: RoundsConfig,
    commands: Sequence[Sequence[Words]],
    execute: Run,
) -> dict[str, Any]:
    """Runs all commands that are not done, and returns the summary of all rounds.

    Args:
      config: the options.
      commands: from `plan`.
      execute: runs a command.

    Raises:
      InputError: for anything that the caller can fix.
    """
    out = Path(config.out)
    parts, heldout = split_prompts(config)
    processes.together(lambda: _prepare(out, parts, heldout))
    for n, lines in enumerate(commands):
        stages = Stages(round_folder(out, n))
        for number, words in enumerate(lines, start=1):
            title = f"round {n} of {config.rounds}, command {number} of {len(lines)}"
            name = f"{number} {words[0]}"
            if stages.is_done(name, words):
                continue
            log(f"{title}: {shown(words)}")
            try:
                execute(list(words))
            except InputError as error:
                raise InputError(in_own_options(str(error), config)) from error
            stages.done(name, words)
    summary = summarize(config, config.rounds)
    processes.together(lambda: write_json(out / "rounds.json", summary))
    return summary


def in_own_options(message: str, config: RoundsConfig) -> str:
    """A message of a command, with the option that the user gave of the rounds."""
    if not config.carry_optimizer:
        return message
    return message.replace(f"{OPTIMIZER} ", "--carry-optimizer, from ")


def shown(words: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["jaxpref", *words])


def round_folder(out: Path, n: int) -> Path:
    """The folder of a round."""
    return out / f"round_{n}"


def _prepare(out: Path, parts: list[list[Any]], heldout: list[Any]) -> None:
    """Writes the prompts of all rounds."""
    folders = [round_folder(out, n) for n in range(len(parts) + 1)]
    files = {at / "prompts.jsonl": part for at, part in zip(folders[1:], parts)}
    if heldout:
        files[folders[0] / HELDOUT] = heldout
    for path, records in files.items():
        check_records(path, records)  # all, before one is written
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for path, records in files.items():
        write_records(path, records)


def _places(
    recipe: Recipe, config: RoundsConfig, reward: Sequence[str], n: int
) -> dict[str, Sequence[str]]:
    out = Path(config.out)
    folder = round_folder(out, n)
    pairs = [f"{folder}/pairs.jsonl"]
    if config.mix_offline:
        own = 1 - config.mix_offline
        pairs = [f"{pairs[0]}:{own:g}", f"{config.data}:{config.mix_offline:g}"]
    return {
        "model": [config.model],
        "policy": [_policy(recipe, config, n)],
        "weak": [config.weak_model or ""],
        "data": [config.data or ""],
        "prompts": [f"{folder}/prompts.jsonl"],
        "heldout": [f"{round_folder(out, 0)}/{HELDOUT}"],
        "pairs": pairs,
        "reward": reward,
        "round": [str(folder)],
        "n": [str(n)],
        "seed": [str(SEEDS * config.seed + n)],
    }


def _policy(recipe: Recipe, config: RoundsConfig, n: int) -> str:
    """The model with which round n begins."""
    if not recipe.has_trained_before(n):
        return config.model
    return str(round_folder(Path(config.out), n - 1) / "policy" / "export")


def _optimizer_option(recipe: Recipe, config: RoundsConfig, n: int) -> Words:
    """The option by which a training starts with the previous round's optimizer."""
    if not (config.carry_optimizer and recipe.has_trained_before(n)):
        return []
    return [OPTIMIZER, str(round_folder(Path(config.out), n - 1) / "policy")]


def _check_optimizer(recipe: Recipe, config: RoundsConfig) -> None:
    if not config.carry_optimizer:
        return
    if not recipe.has_trained_before(config.rounds):
        raise InputError(
            f"--carry-optimizer: with --rounds {config.rounds}, no model is trained "
            "before the last round; pass more --rounds, or leave it out"
        )
    if any(OPTIMIZER in line for line in recipe.rounds if trains(line)):
        raise InputError(
            f"--carry-optimizer: the recipe {config.recipe} has {OPTIMIZER} already; "
            "leave one of the two out"
        )


def _check_needs(recipe: Recipe, config: RoundsConfig, reward: Sequence[str]) -> None:
    given = {
        "data": ("--data", config.data),
        "weak": ("--weak-model", config.weak_model),
        "reward": ("--reward", reward),
    }
    for place, (flag, value) in given.items():
        if place in recipe.places and not value:
            raise InputError(f"--recipe {config.recipe}: needs {flag}")
    if config.weak_model is not None and "weak" not in recipe.places:
        raise InputError(
            f"--weak-model: the recipe {config.recipe} does not read it; leave it out"
        )
    if reward and "reward" not in recipe.places:
        raise InputError(
            f"--reward: the recipe {config.recipe} does not read it; pass --gold to "
            "judge the answers in the report"
        )
    if "heldout" in recipe.places and not config.eval_prompts:
        raise InputError(
            f"--eval-prompts 0: the recipe {config.recipe} reads held-out prompts"
        )
    _check_optimizer(recipe, config)
    reads_data = "data" in recipe.places or config.mix_offline
    if config.data is not None and not reads_data:
        raise InputError(
            f"--data: the recipe {config.recipe} does not read it; leave it out, or "
            "pass --mix-offline"
        )
    if config.mix_offline and "pairs" not in recipe.places:
        raise InputError(
            f"--mix-offline: the recipe {config.recipe} has no {{pairs}} to mix with"
        )

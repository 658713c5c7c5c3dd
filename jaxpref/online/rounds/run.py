"""`jaxpref rounds`: sample, score, pair, train, and again."""

import shlex
from collections.abc import Callable, Mapping, Sequence
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
from jaxpref.online.rounds.recipe import Recipe, filled, read_recipe
from jaxpref.online.rounds.stages import Stages
from jaxpref.online.rounds.summary import summarize
from jaxpref.runtime import processes
from jaxpref.runtime.processes import log

SEEDS = 1000
"""How far apart the seeds of sampling are of two values of --seed."""
Words = list[str]
Run = Callable[[Words], None]
"""Runs a command, given as the words after `jaxpref`."""
Override = Callable[..., Words]
"""`override(words, only=None)` changes the options of a command to those of the user,
or only some of them."""


def plan(
    config: RoundsConfig, reward: Sequence[str], override: Override
) -> list[list[Words]]:
    """The commands of each round; those before the first one are round 0.

    Args:
      config: the options.
      reward: the options of rewards, as words.
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
        commands = [override(filled(line, places)) for line in lines]
        more = evaluation_commands(config, n, reward, commands, override, recipe)
        rounds.append([*commands, *more])
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
            execute(list(words))
            stages.done(name, words)
    summary = summarize(config, config.rounds)
    processes.together(lambda: write_json(out / "rounds.json", summary))
    return summary


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
) -> Mapping[str, Sequence[str]]:
    out = Path(config.out)
    folder = round_folder(out, n)
    trained = n > 1 or (n == 1 and recipe.starts_with_training)
    policy = config.model
    if trained:
        policy = str(round_folder(out, n - 1) / "policy" / "export")
    pairs = [f"{folder}/pairs.jsonl"]
    if config.mix_offline:
        own = 1 - config.mix_offline
        pairs = [f"{pairs[0]}:{own:g}", f"{config.data}:{config.mix_offline:g}"]
    return {
        "model": [config.model],
        "policy": [policy],
        "weak": [config.weak_model or ""],
        "data": [config.data or ""],
        "prompts": [f"{folder}/prompts.jsonl"],
        "pairs": pairs,
        "reward": reward,
        "round": [str(folder)],
        "n": [str(n)],
        "seed": [str(SEEDS * config.seed + n)],
    }


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

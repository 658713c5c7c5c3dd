"""`jaxpref COMMAND`: finds the command and runs it."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from jaxpref.cli.completion import SHELLS, completion_script
from jaxpref.cli.words import closest, take
from jaxpref.errors import InputError, show

COMMANDS = {
    "train": "Train a model on preference pairs or, with --loss sft, on completions.",
    "sweep": "Train a grid of options, and compare the runs.",
    "evaluate": "Score pairs, labeled answers, or lists with a model and its reference,"
    " or with a reward model.",
    "sample": "Generate completions of prompts.",
    "score": "Compute rewards of answers: of models, rules, or your own functions.",
    "compare": "Compare models by their answers: win rates by a judge, also at equal"
    " lengths.",
    "rounds": "Train a model on its own answers: sample, score, pair, train, again.",
    "data": "Inspect preference data as a model sees it, convert it, or make pairs.",
    "audit": "Find labels that are probably wrong, and unreliable annotators.",
    "probe": "Fit linear reward models to frozen features: for all annotators, or"
    " for groups.",
    "merge": "Merge models by their weights: means, SLERP, task vectors, greedy soups.",
    "plan": "Check whether a run fits a TPU slice, and estimate its speed, without"
    " a TPU.",
}
"""A one-line description of each command; `jaxpref.cli.NAME.command` runs it."""

PROCESSES = """\
On Cloud TPU, on GKE, and under Slurm, the processes of a run discover each other.
Elsewhere, add --coordinator HOST:PORT --processes N --process-id I to any command;
process 0 runs on HOST."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.  Invalid input prints one line on stderr and exits with code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv + [""])[0], argv[1:]
    if name in ("", "-h", "--help", "help"):
        show(_overview())
        sys.exit(0 if name else 2)
    if name == "--completion":
        _complete(rest)
    if name not in COMMANDS:
        _fail(
            f"{name}: no such command{closest(name, COMMANDS)}; choose from "
            f"{', '.join(COMMANDS)}"
        )
    module = _imported(f"jaxpref.cli.{name}")
    if {"-h", "--help", "--help-all"} & set(rest):
        try:
            show(module.help_text(rest))
        except InputError as error:
            _fail(str(error))
        sys.exit(0)
    _run(module.command, rest, resumes=_resumes(name, rest))


def _imported(name: str) -> ModuleType:
    """Imports the module of a command; says what to install if that fails."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "jaxpref":
            raise
        _fail(
            f"the command line needs {error.name}, which comes with the train extra: "
            'pip install "jaxpref[train]"'
        )


def _resumes(name: str, argv: Sequence[str]) -> bool:
    """Whether a command that is interrupted keeps what it has done."""
    has_out = any(word.partition("=")[0] == "--out" for word in argv)
    return name in ("train", "sweep", "rounds", "audit") or (
        name == "sample" and has_out
    )


def _run(
    command: Callable[[Sequence[str]], None], argv: list[str], *, resumes: bool
) -> None:
    from jaxpref.runtime.entry import entry_point, fail
    from jaxpref.runtime.mesh import PROCESS_OPTIONS

    try:
        for flag, variable in PROCESS_OPTIONS.items():
            given, argv = take(flag, argv)
            if given is not None:
                os.environ[variable] = given
        out, _ = take("--out", argv)
    except InputError as error:
        fail(str(error))
    with entry_point(Path(out) if out else None, resumes=resumes):
        command(argv)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {does}" for name, does in COMMANDS.items())
    return (
        f"usage: jaxpref COMMAND [options]\n\n{listed}\n\n"
        "`jaxpref COMMAND --help` lists a command's options.  `jaxpref --completion "
        "bash`\n(or zsh) prints a shell completion script.\n"
        f"\n{PROCESSES}"
    )


def _complete(argv: Sequence[str]) -> NoReturn:
    shell = (list(argv) + [""])[0]
    if shell not in SHELLS:
        _fail(f"--completion {shell}: expected one of {', '.join(SHELLS)}")
    show(completion_script(shell, COMMANDS))
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    # Does not use jax, which takes most of a second to import.
    show(f"jaxpref: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

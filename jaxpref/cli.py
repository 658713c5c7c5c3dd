"""The command line: `jaxpref train`, `jaxpref evaluate`, `jaxpref sample`.

A loss's options are the keyword-only parameters of its function, with its defaults and
the help of its docstring, so an option that the chosen loss does not read is an error.
"""

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

import jax
import tyro

from jaxpref import losses
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate import generations, pairs
from jaxpref.train import (
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    beta_dpo,
    from_loss,
    run,
    sft,
    trainable,
)
from jaxpref.train.config import RunConfig
from jaxpref.train.entry import entry_point, fail

OBJECTIVES = {make.__name__: make for make in (beta_dpo, sft)}
"""Losses that are trained otherwise than by their mean over the pairs."""

LOSSES = {
    name: getattr(losses, name)
    for name in sorted(losses.__all__)
    if trainable(getattr(losses, name))
} | OBJECTIVES
"""The one table behind `--loss`: every public loss that a batch of pairs can feed."""

Options = TypeVar("Options")
Flat = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True)
class TrainArguments(Generic[Options]):
    """What `jaxpref train` reads."""

    run: Annotated[RunConfig, Flat]
    loss: Options
    options: Annotated[DataOptions, Flat] = DataOptions()
    optimizer: Annotated[OptimizerConfig, Flat] = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()


def train(argv: Sequence[str]) -> None:
    """Train a model on preference pairs (or, with --loss sft, on completions)."""
    name, argv = _take_loss(argv)
    described = "\n".join(f"  {k}: {_summary(v)}" for k, v in LOSSES.items())
    arguments = tyro.cli(
        TrainArguments[_options(LOSSES[name])],
        args=argv,
        prog=f"jaxpref train --loss {name}",
        description=f"{train.__doc__}\n\nLosses, chosen by --loss NAME:\n{described}",
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    chosen = vars(arguments.loss)
    make = OBJECTIVES.get(name) or functools.partial(from_loss, LOSSES[name])
    config = TrainConfig(
        **vars(arguments.run),
        objective=make(**chosen),
        options=arguments.options,
        optimizer=arguments.optimizer,
        mesh=arguments.mesh,
    )
    export = run(config)
    if jax.process_index() == 0:
        print(f"exported to {export}")


def evaluate(argv: Sequence[str]) -> None:
    """Score preference pairs under a model and its reference."""
    pairs.run(_parse(pairs.EvaluateConfig, argv, evaluate))


def sample(argv: Sequence[str]) -> None:
    """Write completions of prompts."""
    generations.run(_parse(generations.SampleConfig, argv, sample))


COMMANDS = {"train": train, "evaluate": evaluate, "sample": sample}


def main() -> None:
    """Entry point; wrong input is one line on stderr and exit code 2."""
    name, argv = (sys.argv + [""])[1], sys.argv[2:]
    if name not in COMMANDS:
        width = max(map(len, COMMANDS))
        listed = "\n".join(f"  {k:{width}}  {v.__doc__}" for k, v in COMMANDS.items())
        if name not in ("", "-h", "--help", "help"):
            fail(f"{name}: no such command; choose from {', '.join(COMMANDS)}")
        print(
            f"usage: jaxpref COMMAND [options]\n\n{listed}\n\n"
            "`jaxpref COMMAND --help` explains a command's options."
        )
        sys.exit(0 if name else 2)
    with entry_point():
        COMMANDS[name](argv)


def _parse(config: type, argv: Sequence[str], command: Callable) -> Any:
    return tyro.cli(
        config,
        args=argv,
        prog=f"jaxpref {command.__name__}",
        description=command.__doc__,
        config=(tyro.conf.EnumChoicesFromValues,),
    )


def _take_loss(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The value of `--loss`, and the rest: the loss decides which options exist."""
    argv, name = list(argv), "dpo"
    for index, argument in enumerate(argv):
        if argument == "--loss" or argument.startswith("--loss="):
            given = argument.split("=", 1)[1:] or argv[index + 1 : index + 2]
            if not given:
                raise InputError("--loss: expected a name after it")
            name = given[0]
            del argv[index : index + 1 + ("=" not in argument)]
            break
    if name not in LOSSES:
        raise InputError(f"--loss {name}: expected one of {', '.join(LOSSES)}")
    return name, argv


def _options(loss: Callable) -> type:
    """A dataclass of the loss's keyword-only parameters, with its docstring's help."""
    documented = _documented_arguments(loss)
    fields = []
    for parameter in inspect.signature(loss).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name == "where":
            continue
        kind = Annotated[float, tyro.conf.arg(help=documented[parameter.name])]
        if parameter.default is parameter.empty:
            fields.append((parameter.name, kind))
        else:
            fields.append(
                (parameter.name, kind, dataclasses.field(default=parameter.default))
            )
    return dataclasses.make_dataclass(
        f"{loss.__name__}_options", fields, frozen=True, kw_only=True
    )


def _documented_arguments(function: Callable) -> dict[str, str]:
    """Name -> text of the `Args:` section of a Google-style docstring."""
    section = inspect.getdoc(function).split("Args:\n", 1)[-1].split("\n\n", 1)[0]
    entries = re.findall(
        r"^ +(\w+)(?: \([^)]*\))?: (.*(?:\n {3,}(?!\w+: ).*)*)", section, re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in entries}


def _summary(function: Callable) -> str:
    return inspect.getdoc(function).splitlines()[0]

"""The command line: `jaxpref train`, `evaluate`, `sample`, `audit` and `plan`.

A loss's options are the keyword-only parameters of its function, with its defaults and
the help of its docstring, so an option that the chosen loss does not read is an error.
"""

import dataclasses
import functools
import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import jax
import tyro

from jaxpref import losses
from jaxpref.data import DataOptions, MixOptions
from jaxpref.errors import InputError
from jaxpref.evaluate import audit as label_audit
from jaxpref.evaluate import generations, pairs
from jaxpref.objectives import (
    Objective,
    beta_dpo,
    bvpo,
    crm,
    em,
    em_weighted,
    from_loss,
    learned_rate,
    re_po,
    reward_regression,
    sft,
    trainable,
)
from jaxpref.plan import PlanConfig
from jaxpref.plan import run as run_plan
from jaxpref.runtime.entry import entry_point, fail
from jaxpref.runtime.mesh import PROCESS_OPTIONS
from jaxpref.train import MeshConfig, OptimizerConfig, TrainConfig, run
from jaxpref.train.config import RunConfig

OBJECTIVES = {make.__name__: make for make in (beta_dpo, reward_regression, sft)}
"""Losses that are trained otherwise than by their mean over the pairs."""

LOSSES = {
    name: OBJECTIVES.get(name) or getattr(losses, name)
    for name in sorted({*losses.__all__, *OBJECTIVES})
    if name in OBJECTIVES or trainable(getattr(losses, name))
}
"""The one table behind `--loss`: every public loss that a batch of pairs can feed."""

LEARNT = {m.__name__: m for m in (crm, em, em_weighted, learned_rate, re_po)}
"""For `--objective`: what is learnt of the labels beside the policy."""

MIXES = {bvpo.__name__: bvpo}
"""For `--objective` too: gradients of two kinds of pairs, mixed."""

MIXED = {name: make for name, make in LEARNT.items() if make is not crm}
"""For `--objective.noise`: those of single pairs, whose gradients can be mixed."""

Options = TypeVar("Options")
Learnt = TypeVar("Learnt")
Mix = TypeVar("Mix")
Flat = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True)
class Plain:
    """Options of no `--objective`."""


@dataclasses.dataclass(frozen=True)
class TrainArguments(Generic[Options, Learnt, Mix]):
    """What `jaxpref train` reads."""

    run: Annotated[RunConfig, Flat]
    loss: Options
    objective: Learnt
    mix: Annotated[Mix, Flat]
    options: Annotated[DataOptions, Flat] = DataOptions()
    optimizer: Annotated[OptimizerConfig, Flat] = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class PlanArguments(Generic[Options, Learnt]):
    """What `jaxpref plan` reads."""

    plan: Annotated[PlanConfig, Flat]
    loss: Options
    objective: Learnt


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What `--loss` and `--objective` name; it decides what options there are."""

    loss: str
    learnt: str | None
    """What is learnt of the labels beside the policy."""
    mixes: bool
    """Whether gradients of two kinds of pairs are mixed."""
    called: str
    """The arguments that say so."""

    @property
    def options(self) -> tuple[type, type]:
        """Dataclasses of the options of `--loss` and of `--objective`."""
        own = _options(LEARNT[self.learnt]) if self.learnt else Plain
        return _options(LOSSES[self.loss]), _mixing(own) if self.mixes else own

    def objective(self, of_loss, of_objective) -> Objective:
        """What is made small, of options that were read."""
        own = dict(vars(of_objective))
        learning = vars(own.pop("noise")) if self.mixes else own
        options = vars(of_loss)
        if self.loss in OBJECTIVES:
            objective = OBJECTIVES[self.loss](**options)
        elif self.learnt:
            bound = functools.partial(LOSSES[self.loss], **options)
            objective = LEARNT[self.learnt](bound, **learning)
        else:
            objective = from_loss(LOSSES[self.loss], **options)
        return bvpo(objective, **own) if self.mixes else objective


def train(argv: Sequence[str]) -> None:
    """Train a model on preference pairs (or, with --loss sft, on completions)."""
    chosen, argv = _choose(argv)
    of_loss, of_objective = chosen.options
    arguments = tyro.cli(
        TrainArguments[of_loss, of_objective, MixOptions if chosen.mixes else Plain],
        args=argv,
        prog=f"jaxpref train {chosen.called}",
        description=f"{train.__doc__}\n\n{_described()}",
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    config = TrainConfig(
        **vars(arguments.run),
        objective=chosen.objective(arguments.loss, arguments.objective),
        options=arguments.options,
        mix=arguments.mix if chosen.mixes else None,
        optimizer=arguments.optimizer,
        mesh=arguments.mesh,
    )
    export = run(config)
    if jax.process_index() == 0:
        print(f"exported to {export}")


def evaluate(argv: Sequence[str]) -> None:
    """Score preference pairs under a reward model, or a model and its reference."""
    pairs.run(_parse(pairs.EvaluateConfig, argv, evaluate))


def sample(argv: Sequence[str]) -> None:
    """Write completions of prompts."""
    generations.run(_parse(generations.SampleConfig, argv, sample))


def audit(argv: Sequence[str]) -> None:
    """Find the labels of a preference file that are probably wrong, and whose."""
    # Matplotlib takes most of a second to load, which the other commands save.
    from jaxpref import report

    config = _parse(label_audit.AuditConfig, argv, audit)
    found = label_audit.run(config)
    page = f"{config.out}/report.html"
    report.write_audit(
        page,
        found.summary,
        found.pairs,
        found.suspects,
        found.calibration,
        command=shlex.join(["jaxpref", "audit", *argv]),
        data=Path(config.data).name,
    )
    low, high = found.summary["flip_rate_interval"]
    print(
        f"flip rate {found.summary['flip_rate']:.3f} ({low:.3f} to {high:.3f}); {page}"
        if found.summary["identified"]
        else f"flip rate not identified: {found.summary['reason']}; {page}"
    )


def plan(argv: Sequence[str]) -> None:
    """Tell whether a run fits a TPU slice, and how fast it may be, without a TPU."""
    chosen, rest = _choose(argv)
    arguments = tyro.cli(
        PlanArguments[chosen.options],
        args=rest,
        prog=f"jaxpref plan {chosen.called}",
        description=f"{plan.__doc__}\n\n{_described()}",
        config=(tyro.conf.EnumChoicesFromValues,),
    )
    objective = chosen.objective(arguments.loss, arguments.objective)
    run_plan(arguments.plan, objective, argv)


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "audit": audit,
    "plan": plan,
}


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
            "`jaxpref COMMAND --help` explains a command's options.\n\n"
            "Several processes that share a run find each other on Cloud TPU, GKE and\n"
            "under Slurm; elsewhere tell each of any command: --coordinator HOST:PORT\n"
            "--processes N --process-id I, where process 0 runs on HOST."
        )
        sys.exit(0 if name else 2)
    try:
        for flag, variable in PROCESS_OPTIONS.items():
            given, argv = _cut(flag, argv)
            if given is not None:
                os.environ[variable] = given
    except InputError as error:
        fail(str(error))
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


def _choose(argv: Sequence[str]) -> tuple[Chosen, list[str]]:
    """What is made small, and the arguments that do not say it."""
    name, argv = _take("--loss", argv, LOSSES, default="dpo")
    learnt, argv = _take("--objective", argv, LEARNT | MIXES, default=None)
    called = f"--loss {name}" + (f" --objective {learnt}" if learnt else "")
    mixes = learnt in MIXES
    if mixes:
        learnt, argv = _take("--objective.noise", argv, MIXED, default=None)
        called += f" --objective.noise {learnt}" if learnt else ""
    if learnt and name in OBJECTIVES:
        raise InputError(f"--objective {learnt}: {name} has an objective of its own")
    return Chosen(name, learnt, mixes, called), argv


def _described() -> str:
    """Every loss and objective in a line."""
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {k}: {_summary(v)}" for k, v in table.items())
        for title, table in (
            ("Losses, chosen by --loss NAME:", LOSSES),
            ("What to learn of the labels' noise, by --objective NAME:", LEARNT),
            ("Gradients to mix, by --objective NAME:", MIXES),
        )
    )


def _take(
    flag: str, argv: Sequence[str], table: Mapping[str, Any], default: str | None
) -> tuple[str | None, list[str]]:
    """The name after `flag`, which decides what options exist, and the rest."""
    name, argv = _cut(flag, argv)
    if name is None:
        return default, argv
    if name not in table and name != default:
        raise InputError(f"{flag} {name}: expected one of {', '.join(table)}")
    return name, argv


def _cut(flag: str, argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """What stands after `flag`, None where it does not occur, and the rest."""
    argv = list(argv)
    for index, argument in enumerate(argv):
        if argument == flag or argument.startswith(f"{flag}="):
            given = argument.split("=", 1)[1:] or argv[index + 1 : index + 2]
            if not given:
                raise InputError(f"{flag}: expected a value after it")
            del argv[index : index + 1 + ("=" not in argument)]
            return given[0], argv
    return None, argv


def _options(loss: Callable) -> type:
    """A dataclass of the loss's keyword-only parameters, with its docstring's help."""
    documented = _documented_arguments(loss)
    fields = []
    for parameter in inspect.signature(loss).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name == "where":
            continue
        # Of the losses' types, which have arrays beside it, a number can be typed.
        typed = parameter.annotation in (int, float | Literal["auto"])
        kind = parameter.annotation if typed else float
        kind = Annotated[kind, tyro.conf.arg(help=documented[parameter.name])]
        if parameter.default is parameter.empty:
            fields.append((parameter.name, kind))
        else:
            fields.append(
                (parameter.name, kind, dataclasses.field(default=parameter.default))
            )
    return dataclasses.make_dataclass(
        f"{loss.__name__}_options", fields, frozen=True, kw_only=True
    )


def _mixing(noise: type) -> type:
    """The options of `bvpo`, with those of what is learnt of the labels in `noise`."""
    learnt = ("noise", noise, dataclasses.field(default_factory=noise))
    return dataclasses.make_dataclass(
        "mixing_options", [learnt], bases=(_options(bvpo),), frozen=True, kw_only=True
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

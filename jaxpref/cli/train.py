"""`jaxpref train`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.objectives import (
    MIXTURES,
    WRAPPERS,
    Choice,
    choose,
    description,
    losses_by_kind,
    summary,
)
from jaxpref.cli.options import Option, Part, Parts, options_of, parse
from jaxpref.cli.words import split
from jaxpref.data.options import DataOptions, MixOptions
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.train.config import RunConfig, TrainConfig
from jaxpref.train.optimizer import OptimizerConfig

COMMAND = "jaxpref train"
COMMON = (
    *("model", "data", "out", "reference", "eval-data", "heldout-fraction"),
    *("max-steps", "batch-size", "accumulation", "row-length"),
    *("max-length", "learning-rate", "warmup-steps", "optimizer", "compute-dtype"),
    *("remat", "eval-every", "save-every", "keep-best", "seed", "mesh.fsdp"),
)
"""Options that `--help` lists; `--help-all` lists all of them."""


def command(argv: Sequence[str]) -> None:
    """Trains and exports a model."""
    config = config_of(argv)
    import jax

    from jaxpref.train.loop import run

    export = run(config)
    if jax.process_index() == 0:
        print(f"exported to {export}")


def config_of(argv: Sequence[str]) -> TrainConfig:
    """The config that a command line asks for.

    Raises:
      InputError: if an option is wrong.
    """
    choice, given = choose(split(argv))
    parsed = parse(parts_of(choice), given, command=COMMAND, about=choice.about)
    return TrainConfig(
        **vars(parsed.run),
        objective=choice.objective(parsed),
        options=parsed.options,
        mix=parsed.mix if choice.mixture else None,
        optimizer=parsed.optimizer,
        mesh=parsed.mesh,
    )


def parts_of(choice: Choice) -> Parts:
    """What the command reads, beside the names of loss and objective."""
    parts = {
        "run": Part(RunConfig),
        "options": Part(DataOptions),
        "optimizer": Part(OptimizerConfig),
        "mesh": Part(MeshConfig, "mesh"),
    }
    if choice.mixture:
        parts["mix"] = Part(MixOptions)
    return parts | dict(choice.parts)


def options() -> dict[str, Option]:
    """All options that do not depend on `--loss` and `--objective`."""
    return options_of(parts_of(Choice()))


def help_text(argv: Sequence[str]) -> str:
    """`--help`, `--help-all` or, where a loss or an objective is named, its details."""
    asked = ("-h", "--help", "--help-all")
    choice, given = choose(split([word for word in argv if word not in asked]))
    named = choice != Choice() or "--loss" in argv
    options = options_of(parts_of(choice))
    if "--help-all" not in argv:
        if named:
            return _details(choice)
        options = {name: options[name] for name in COMMON}
    full = "--help-all" in argv
    title = "options:" if full else "common options (all of them: --help-all):"
    return (
        f"usage: {COMMAND} --model MODEL --data DATA --out OUT [options]\n\n"
        "Train a model on preference pairs or, with --loss sft, on completions.\n\n"
        f"{title}\n{help.rows(options.values(), full=full)}\n\n{choices_text()}"
    )


def choices_text() -> str:
    """Losses by kind, and objectives."""
    kinds = {kind: " ".join(names) for kind, names in losses_by_kind().items()}
    objectives = {name: summary(f) for name, f in (WRAPPERS | MIXTURES).items()}
    return (
        f"losses, --loss NAME (default: dpo):\n{help.table(kinds)}\n\n"
        "objectives, --objective NAME, that wrap a loss:\n"
        f"{help.table(objectives, column=18)}\n\n"
        f"`{COMMAND} --loss NAME --help` shows the equation and options of a loss,\n"
        f"`{COMMAND} --objective NAME --help` those of an objective."
    )


def _details(choice: Choice) -> str:
    """The equations and options of what was chosen."""
    texts = [f"usage: {COMMAND}{choice.about} [options]"]
    for field, (_, function) in choice.functions.items():
        options = options_of({field: choice.parts[field]})
        listed = help.rows(options.values(), full=True) or "  none"
        name = function.__name__
        texts.append(f"{name}: {description(function)}\n\noptions of {name}:\n{listed}")
    if choice.mixture:
        mixed = help.rows(options_of({"mix": Part(MixOptions)}).values(), full=True)
        texts.append(f"options of the mixture's data:\n{mixed}")
    texts.append(f"`{COMMAND} --help` lists the other options.")
    return "\n\n".join(texts)

"""`jaxpref merge`."""

from collections.abc import Sequence

from jaxpref.cli import help
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import closest, split
from jaxpref.errors import InputError
from jaxpref.merge import run
from jaxpref.merge.options import METHODS, MergeConfig

COMMAND = "jaxpref merge"
CONFIG = {"config": Part(MergeConfig)}
ABOUT = """\
Combine models into one, without training.  Tensors are read one at a time, and sums
are in float32.  Every tensor of OUT is

  linear   sum_i w_i theta_i / sum_i w_i
  slerp    on the arc from theta_1 to theta_2, at t = w_2
  task     theta_base + sum_i w_i (theta_i - theta_base); one model and a weight above 1
           extrapolate
  greedy   the mean of those models that do not lower the accuracy on preference pairs
  adapter  W + s a b, for a model and its LoRA or DoRA adapter

  jaxpref merge --models A B --weights 0.7 0.3 --out C
  jaxpref merge --models DPO --method task --base SFT --weights 1.3 --out C
  jaxpref merge --models BASE --method adapter --adapter OUT/adapter --out C"""
"""The explanation in the help."""


def command(argv: Sequence[str]) -> None:
    """Merges models."""
    given = split(argv)
    name = " ".join(given.get("method") or ["linear"])
    if name not in METHODS:
        raise InputError(
            f"--method {name}: expected {'|'.join(METHODS)}{closest(name, METHODS)}"
        )
    parts = {**CONFIG, "method": Part(METHODS[name])}
    options = parse(parts, given, command=COMMAND, about=f" --method {name}")
    run.run(options.config, options.method)


def options() -> dict[str, Option]:
    """The options of the command and of all methods."""
    return options_of({**CONFIG, **{name: Part(of) for name, of in METHODS.items()}})


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    methods = "\n\n".join(
        f"options of --method {name}:\n"
        + help.rows(options_of({"method": Part(method)}).values(), full=True)
        for name, method in METHODS.items()
    )
    common = help.rows(options_of(CONFIG).values(), full=True)
    return (
        f"usage: {COMMAND} --models MODEL ... --out OUT [options]\n\n{ABOUT}\n\n"
        f"options:\n{common}\n\n{methods}"
    )

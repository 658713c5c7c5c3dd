"""`jaxpref sweep`."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path

from jaxpref.cli import help, train
from jaxpref.cli.grid import axes_of, runs_of
from jaxpref.cli.options import Option, Part, options_of, parse
from jaxpref.cli.words import split
from jaxpref.errors import InputError
from jaxpref.sweep.options import SweepOptions

COMMAND = "jaxpref sweep"
PARTS = {"sweep": Part(SweepOptions)}
ABOUT = """\
Run `jaxpref train` for every combination of the values of --over, one after the other
in one process, and compare the runs on held-out pairs and at the same KL to the
reference.  OUT gets a folder for each run, such as OUT/loss.beta=0.1,seed=0, and
sweep.json, sweep.csv, and report.html.  All combinations are checked before the first
run starts.  The same command resumes; with more values, it adds runs.

  --over loss=dpo,rdpo --over loss.flip-rate=0.1,0.2 --over seed=0,1,2

An option of a loss or an objective goes to the runs that have it: this is 3 runs of dpo
and 6 of rdpo.  Values of flags are true and false.  --over objective=none,em includes
runs without an objective."""
"""The explanation in the help."""


def command(argv: Sequence[str]) -> None:
    """Trains a grid of options and compares the runs."""
    given = split(argv, repeatable=("over", "data"))
    if "print-config" in given:
        raise InputError(
            "--print-config: a sweep has several configs; leave it out, or use "
            "`jaxpref train --print-config`"
        )
    own = {name: words for name, words in given.items() if name in options_of(PARTS)}
    options = parse(PARTS, own, command=COMMAND).sweep
    axes = axes_of(options.over)
    rest = {name: words for name, words in given.items() if name not in own}
    words, _ = train.with_file(rest)
    runs = runs_of(axes, rest)
    (out,) = words["out"]
    from jaxpref.runtime.entry import fail
    from jaxpref.sweep.output import print_summary, write_report, write_tables
    from jaxpref.sweep.runs import run_all

    line = shlex.join(["jaxpref", "sweep", *argv])
    write = functools.partial(write_tables, over=axes, options=options, command=line)
    records = run_all(runs, options, out, write=write)
    content = write_report(Path(out))
    print_summary(content, out)
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        codes = {record["exit_code"] for record in failed}
        names = "; ".join(record["name"] for record in failed)
        fail(
            f"{len(failed)} of {len(records)} runs failed: {names}. Their errors are "
            f"in {out}/report.html; the same command tries them again",
            code=codes.pop() if len(codes) == 1 else 1,
        )


def options() -> dict[str, Option]:
    """All options that do not depend on `--loss` or `--objective`."""
    return options_of(PARTS) | {
        name: option
        for name, option in train.options().items()
        if name != "print-config"
    }


def help_text(argv: Sequence[str]) -> str:
    """The help of the command."""
    listed = options() if "--help-all" in argv else options_of(PARTS)
    return (
        f"usage: {COMMAND} --model MODEL --data DATA --out OUT --over OPTION=VALUE,... "
        f"[options]\n\n{ABOUT}\n\n"
        f"options:\n{help.rows(listed.values(), full=True)}\n\n"
        "All other options are those of `jaxpref train`, and are the same for all "
        "runs."
    )

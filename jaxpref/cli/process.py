"""The command line as a process of its own."""

import os
import sys

from jaxpref.cli.main import main as run_command


def main() -> None:
    """Runs a command.  One that fails does not wait for a program that still compiles.

    A normal exit waits for all threads, also for one that compiles for minutes.
    """
    try:
        run_command()
    except SystemExit as ended:
        # Not imported here: `--help` starts faster without jax.
        compilation = sys.modules.get("jaxpref.runtime.compilation")
        if compilation is not None and compilation.is_compiling():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        raise

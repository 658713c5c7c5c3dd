"""The command line: `jaxpref train`, `evaluate`, `sample`, `audit` and `plan`.

One file per command.  Each imports what it needs when it runs, so that help and errors
appear at once.
"""

from jaxpref.cli.main import main as main

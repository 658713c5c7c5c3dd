"""The command line: `jaxpref train`, `evaluate`, `sample`, `audit` and `plan`.

One file a command.  Each imports what it needs when it is called, so that help and
errors come at once.
"""

from jaxpref.cli.main import main as main

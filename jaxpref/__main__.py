"""`python -m jaxpref` and the `jaxpref` command."""

import os
import sys


def _import_nothing_from_here() -> None:
    """Takes the current folder off the import path.

    `python -m` puts it first, and an empty entry of `PYTHONPATH` means it, too.  It may
    hold a dataset or a model from someone else, and Python would run a `json.py` in it.
    It stays if it is the folder of this package, or if `PYTHONPATH` names it.
    The processes that this one starts leave it out, too.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # the folder was deleted, so nothing can be imported from it
        return
    if here == os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
        return
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [x for x in given if os.path.isabs(x) or os.path.realpath(x) != here]
    sys.path[:] = [x for x in sys.path if os.path.realpath(x) != here or x in named]
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)


_import_nothing_from_here()  # before any other import

from jaxpref.cli.process import main  # noqa: E402

if __name__ == "__main__":
    main()

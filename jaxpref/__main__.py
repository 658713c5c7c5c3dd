"""`python -m jaxpref` and the `jaxpref` command."""

import sys


def main() -> None:
    """The command line, or one line on how to get it: the losses need none of it."""
    try:
        from jaxpref import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "jaxpref":
            raise
        sys.exit(
            f"jaxpref: error: the command line needs {error.name}, which comes with "
            'the train extra: pip install "jaxpref[train]"'
        )
    cli.main()


if __name__ == "__main__":
    main()

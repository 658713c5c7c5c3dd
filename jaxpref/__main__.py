"""`python -m jaxpref` and the `jaxpref` command."""

from jaxpref.cli.process import main

if __name__ == "__main__":
    main()

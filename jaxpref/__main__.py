"""`python -m jaxpref` and the `jaxpref` command."""

from jaxpref.cli import main

if __name__ == "__main__":
    main()

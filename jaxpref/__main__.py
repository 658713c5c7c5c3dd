"""`python -m jaxpref` is the `jaxpref` command."""

from jaxpref.cli import main

main()

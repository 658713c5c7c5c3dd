"""`jaxpref rounds`: recipes of commands, run again and again."""

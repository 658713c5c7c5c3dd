"""Bad input, by the command line: one clear line, exit code not 0, nothing lost."""

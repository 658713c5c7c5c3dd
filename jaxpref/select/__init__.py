"""Choosing records of a file: scores, and which of them are kept."""

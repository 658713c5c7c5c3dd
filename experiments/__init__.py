"""Experiments: claims, and how to reproduce them; one file per experiment."""

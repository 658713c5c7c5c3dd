"""Sweeps: a grid of training runs, and their comparison at matched KL."""

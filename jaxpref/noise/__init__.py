"""Label noise: estimates of which labels are wrong, how often, and whose.

Pure functions on jax arrays from margins and votes to probabilities and rates.  Models,
files, and training belong to other packages.
"""

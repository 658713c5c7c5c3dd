"""Noise: which labels are wrong, and how often?

Pure functions on jax arrays: margins and votes in, probabilities and rates out.
Models, files and training are the business of other rooms.
"""

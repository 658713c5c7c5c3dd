"""Merging: one model from the weights of several, without training."""

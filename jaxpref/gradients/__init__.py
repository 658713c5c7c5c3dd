"""Combining several estimates of one gradient.

Pure functions on pytrees of jax arrays, from gradients to a gradient or to statistics
of it.  Models, traces, and training belong to other packages.
"""

from jaxpref.gradients import bvpo, min_norm

__all__ = ["bvpo", "min_norm"]

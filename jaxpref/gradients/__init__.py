"""Gradients: how are estimates of one gradient combined?

Pure functions on pytrees of jax arrays: gradients in, a gradient or numbers about it
out.  Models, traces and training are the business of other rooms.
"""

from jaxpref.gradients import bvpo

__all__ = ["bvpo"]

"""The environment of a run: devices, processes, signals, caches, and the supervisor.

This file imports nothing, because the supervisor must not load jax.
"""

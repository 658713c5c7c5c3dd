"""The machine a run lives on: devices, processes, signals, caches, and its supervisor.

Nothing is imported here: the supervisor must not load jax.
"""

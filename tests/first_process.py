"""Rewards of tests with several processes, computed by the first one alone."""

import jax


def of_length(prompt: str, answer: str, record: dict) -> float:
    """The number of words modulo 3."""
    assert jax.process_index() == 0
    return float(len(answer.split()) % 3)


def failing(prompt: str, answer: str, record: dict) -> float:
    """A verifier that does not work."""
    assert jax.process_index() == 0
    raise RuntimeError("out of order")
